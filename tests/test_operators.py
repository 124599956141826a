"""The operators' contract with PyTorch: opcheck, gradients, compilation, export and autocast."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import attnext
from attnext import reference

OPS = torch.ops.attnext
SHAPES = ((2, 3, 8), (2, 5, 8), (2, 5, 6), (8,))


def inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in SHAPES]


LENGTHS = torch.tensor([5, 2])
MASK = torch.tensor([[True, False, True, True, True], [True, True, False, True, True]])


class TestOpcheck:
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_attention(self, requires_grad: bool, need_weights: bool) -> None:
        x = inputs(requires_grad=requires_grad)
        exp_key, key_limit = OPS.additive_prepare_cpu(x[1].detach(), LENGTHS, MASK)
        seed = torch.tensor(7)
        for options in (
            (None, None, None, None, None, 1.0, 0.0),
            (exp_key, key_limit, LENGTHS, MASK, seed, 0.5, 0.2),
            (None, None, None, MASK.unsqueeze(1).expand(2, 3, 5), None, 1.0, 0.0),
        ):
            torch.library.opcheck(OPS.additive_attention_cpu.default, (*x, *options, need_weights))

    def test_attention_backward(self) -> None:
        x = inputs()
        options = (None, None, LENGTHS, MASK, None, 1.0, 0.0)
        saved = OPS.additive_attention_cpu(*x, *options, True)
        for grads in ((torch.randn(2, 3, 6), torch.randn(2, 3, 5)), (None, torch.randn(2, 3, 5))):
            torch.library.opcheck(OPS.additive_attention_backward_cpu.default, (*grads, *x, *options, *saved))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_scores(self, requires_grad: bool) -> None:
        query, key, _, v = inputs(requires_grad=requires_grad)
        torch.library.opcheck(OPS.additive_scores_cpu.default, (query, key, v, None, None, 1.0))

    def test_scores_backward(self) -> None:
        query, key, _, v = inputs()
        args = (torch.randn(2, 3, 5), query, key, v, LENGTHS, MASK, 1.0)
        torch.library.opcheck(OPS.additive_scores_backward_cpu.default, args)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_one_query(self, requires_grad: bool) -> None:
        """A query of (B, D): results and gradients are without Tq too."""
        _, *rest = inputs(requires_grad=requires_grad)
        x = [torch.randn(2, 8, requires_grad=requires_grad), *rest]
        options = (None, None, LENGTHS, MASK, None, 1.0, 0.0)
        torch.library.opcheck(OPS.additive_attention_cpu.default, (*x, *options, True))
        torch.library.opcheck(OPS.additive_scores_cpu.default, (x[0], x[1], x[3], None, None, 1.0))
        x = [tensor.detach() for tensor in x]
        saved = OPS.additive_attention_cpu(*x, *options, True)
        args = (torch.randn(2, 6), torch.randn(2, 5), *x, *options, *saved)
        torch.library.opcheck(OPS.additive_attention_backward_cpu.default, args)
        args = (torch.randn(2, 5), x[0], x[1], x[3], LENGTHS, MASK, 1.0)
        torch.library.opcheck(OPS.additive_scores_backward_cpu.default, args)

    def test_prepare(self) -> None:
        torch.library.opcheck(OPS.additive_prepare_cpu.default, (torch.randn(2, 5, 40), LENGTHS, MASK))


class TestGradients:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"lengths": torch.tensor([5, 0]), "scale": 0.7},
            {"mask": torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.6},
        ],
        ids=["plain", "lengths", "mask"],
    )
    def test_gradcheck(self, options: dict[str, Any]) -> None:
        def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
            context, weights = attnext.additive_attention(*x, need_weights=True, backend="cpu", **options)
            assert weights is not None
            return context, weights

        assert torch.autograd.gradcheck(attend, inputs(torch.float64, requires_grad=True))

    def test_gradcheck_of_scores(self) -> None:
        query, key, _, v = inputs(torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *x: attnext.additive_scores(*x, scale=1.5, backend="cpu"), (query, key, v)
        )

    def test_gradcheck_under_dropout(self) -> None:
        def attend(*x: Tensor) -> Tensor:
            torch.manual_seed(5)  # the same weights fall out at every evaluation
            return attnext.additive_attention(*x, dropout_p=0.4, backend="cpu")[0]

        assert torch.autograd.gradcheck(attend, inputs(torch.float64, requires_grad=True))

    @pytest.mark.parametrize("wanted", range(4))
    def test_any_one_input_may_want_a_gradient(self, wanted: int) -> None:
        x = inputs(torch.float64)
        x[wanted].requires_grad_()
        context, _ = attnext.additive_attention(*x, backend="cpu")
        (grad,) = torch.autograd.grad(context.sin().sum(), x[wanted])
        context, _ = reference.additive_attention(*x)
        (expected,) = torch.autograd.grad(context.sin().sum(), x[wanted])
        torch.testing.assert_close(grad, expected)
        assert (grad != 0).any()

    def test_an_incoming_gradient_expanded_from_one_number(self) -> None:
        x = inputs(torch.float64, requires_grad=True)
        grads = []
        for backend in ("cpu", "reference"):
            context, weights = attnext.additive_attention(*x, need_weights=True, backend=backend)
            assert weights is not None
            incoming = [torch.tensor(0.7, dtype=torch.float64).expand(y.shape) for y in (context, weights)]
            grads.append(torch.autograd.grad((context, weights), x, incoming))
        torch.testing.assert_close(*grads)

    def test_weights_alone_have_a_gradient(self) -> None:
        grads = []
        x = inputs(torch.float64, requires_grad=True)
        for backend in ("cpu", "reference"):
            _, weights = attnext.additive_attention(*x, need_weights=True, backend=backend)
            assert weights is not None
            grads.append(torch.autograd.grad(weights.square().sum(), x, allow_unused=True))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)

    @pytest.mark.parametrize("op", ["attention", "scores"])
    def test_second_derivatives_name_the_way_out(self, op: str) -> None:
        x = inputs(torch.float64, requires_grad=True)
        if op == "attention":
            out = attnext.additive_attention(*x, backend="cpu")[0]
        else:
            out = attnext.additive_scores(x[0], x[1], x[3], backend="cpu")
        (grad,) = torch.autograd.grad(out.sin().sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.sum().backward()

    def test_without_grad_nothing_is_recorded(self) -> None:
        x = inputs(requires_grad=True)
        with torch.no_grad():
            context, _ = attnext.additive_attention(*x, backend="cpu")
        assert not context.requires_grad
        torch.testing.assert_close(context, attnext.additive_attention(*x, backend="cpu")[0].detach(), rtol=0, atol=0)
        with torch.inference_mode():
            assert torch.equal(attnext.additive_attention(*x, backend="cpu")[0], context)


class TestTransforms:
    """torch.func: vmap works, with gradients outside it; derivatives inside are refused, not silently 0."""

    def attend(self, backend: str) -> Any:
        _, key, value, v = inputs(torch.float64)
        return lambda query: attnext.additive_attention(query, key, value, v, backend=backend)[0]

    def test_vmap(self) -> None:
        results = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(1)
            attend = self.attend(backend)
            queries = torch.randn(4, 2, 3, 8, dtype=torch.float64, requires_grad=True)
            context = torch.func.vmap(attend)(queries)
            results.append((context, torch.autograd.grad(context.sin().sum(), queries)[0]))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_vmap_of_lengths_and_masks(self, backend: str) -> None:
        query, key, value, v = inputs(torch.float64)
        batch, keys = key.shape[:2]
        attn = attnext.BahdanauAttention(query.shape[-1], value.shape[-1], 4).double()
        lengths, masks = torch.randint(0, keys + 1, (3, batch)), torch.rand(3, batch, keys) < 0.6
        calls: tuple[Any, ...] = (
            lambda n, mask: attnext.additive_attention(query, key, value, v, lengths=n, mask=mask, need_weights=True),
            lambda n, mask: attnext.additive_scores(query, key, v, lengths=n, mask=mask),
            lambda n, mask: attnext.dot_attention(query, key, value, lengths=n, mask=mask, need_weights=True),
            lambda n, mask: attn(query, value, lengths=n, mask=mask, need_weights=True),
        )
        for call in calls:
            with attnext.use_backend(backend):
                found = torch.func.vmap(call)(lengths, masks)
                each = [call(n, mask) for n, mask in zip(lengths, masks, strict=True)]
            expected = (
                torch.stack(each) if isinstance(each[0], Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))
            )
            torch.testing.assert_close(found, expected)

    def test_derivatives_are_refused(self) -> None:
        attend, query = self.attend("cpu"), inputs(torch.float64)[0]

        def loss(query: Tensor) -> Tensor:
            total: Tensor = attend(query).sum()
            return total

        for derivative in (
            lambda: torch.func.grad(loss)(query),
            lambda: torch.func.jvp(attend, (query,), (query,)),
            lambda: torch.func.jacfwd(loss)(query),
            lambda: torch.func.vmap(torch.func.grad(loss))(query.expand(2, 2, 3, 8)),
        ):
            with pytest.raises(RuntimeError, match="backend='reference'"):
                derivative()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend='reference'"):
            attend(forward_ad.make_dual(query, query))

    def test_the_reference_has_them_all(self) -> None:
        attend, query = self.attend("reference"), inputs(torch.float64)[0]
        _, tangent = torch.func.jvp(attend, (query,), (query,))
        assert (tangent != 0).any()


class TestDirectCalls:
    """What a program may hand to torch.ops.attnext itself is an error, never a crash."""

    @pytest.mark.parametrize(
        "change",
        [
            {0: torch.randn(8)},
            {0: torch.randn(2, 9)},
            {0: torch.randn(3, 8)},
            {0: torch.randn(3, 4, 8)},
            {0: torch.randn(2, 1, 4, 8)},
            {1: torch.randn(2, 5)},
            {1: torch.randn(2, 5, 9)},
            {2: torch.randn(2, 4, 6)},
            {3: torch.ones(8, dtype=torch.int8)},
            {3: torch.randn(8, dtype=torch.float64)},
            {3: torch.randn(7)},
            {4: torch.randn(2, 5, 8), 5: torch.randn(2, 5)},
            {6: torch.tensor([6, 1])},
            {6: torch.tensor([-1, 1])},
            {6: torch.tensor([1, 1], dtype=torch.int32)},
            {7: torch.ones(2, 5)},
            {7: torch.ones(2, 4, dtype=torch.bool)},
            {8: None},
            {8: torch.empty(0, dtype=torch.int64)},
            {8: torch.zeros((), dtype=torch.int8)},
            {10: 1e300},
            {10: torch.nan},
        ],
    )
    def test_attention(self, change: dict[int, Any]) -> None:
        args: list[Any] = [*inputs(), None, None, None, None, torch.tensor(1), 1.0, 0.5, False]
        OPS.additive_attention_cpu(*args)
        for place, value in change.items():
            args[place] = value
        with pytest.raises(RuntimeError, match="attnext: "):
            OPS.additive_attention_cpu(*args)

    def test_prepare(self) -> None:
        for args in ((torch.randn(5, 8), None, None), (torch.randn(2, 5, 8), None, torch.ones(2, 5))):
            with pytest.raises(RuntimeError, match="attnext: "):
                OPS.additive_prepare_cpu(*args)


class TestCompile:
    def test_one_graph_serves_every_size(self) -> None:
        torch._dynamo.reset()
        graphs = 0

        def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            nonlocal graphs
            graphs += 1
            return graph.forward

        def attend(query: Tensor, key: Tensor, value: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
            return attnext.additive_attention(query, key, value, v, lengths=lengths)[0]

        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
        for batch, queries, keys in ((2, 3, 5), (4, 7, 9), (3, 2, 11)):
            x = [torch.randn(s) for s in ((batch, queries, 8), (batch, keys, 8), (batch, keys, 6), (8,))]
            lengths = torch.randint(0, keys + 1, (batch,))
            torch.testing.assert_close(compiled(*x, lengths), attend(*x, lengths))
        assert graphs == 1

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_training_step_in_full(self, dropout_p: float) -> None:
        torch._dynamo.reset()
        attn = attnext.BahdanauAttention(6, 6, 8, normalize=True, dropout=dropout_p)

        def step(query: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
            memory = attn.prepare(states, lengths)
            context, weights = attn(query, memory, need_weights=True)
            again, _ = attn(context, memory)
            return again.square().sum() + weights.square().sum()

        query, states = torch.randn(2, 6), torch.randn(2, 5, 6, requires_grad=True)
        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        losses, grads = [], []
        for run in (step, compiled):
            torch.manual_seed(11)
            loss = run(query, states, LENGTHS)
            losses.append(loss.detach())
            grads.append(torch.autograd.grad(loss, [states, *attn.parameters()]))
        if dropout_p == 0.0:  # inductor draws its random numbers in its own way
            torch.testing.assert_close(losses[0], losses[1])
            torch.testing.assert_close(grads[0], grads[1])
        else:
            assert losses[1].isfinite()

    def test_lengths_out_of_range_are_refused_in_a_graph_too(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(attnext.additive_attention, fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match="lengths must lie between 0 and the number of keys, 5, got 6"):
            compiled(*inputs(), lengths=torch.tensor([6, 1]))


def test_export_saves_and_loads() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attnext.BahdanauAttention(4, 6, 8)

        def forward(self, query: Tensor, states: Tensor) -> Tensor:
            context: Tensor = self.attn(query, states)[0]
            return context

    model = Model().eval()
    batch, keys = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("keys", min=1, max=512)
    shapes = ({0: batch}, {0: batch, 1: keys})
    program = torch.export.export(model, (torch.randn(2, 4), torch.randn(2, 5, 6)), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    query, states = torch.randn(3, 4), torch.randn(3, 9, 6)
    torch.testing.assert_close(loaded(query, states), model(query, states))


class TestAutocast:
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_mixed_inputs_take_its_dtype(self, backend: str) -> None:
        query, key, value, v = inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context, _ = attnext.additive_attention(query.bfloat16(), key, value, v, backend=backend)
            scores = attnext.additive_scores(query, key.bfloat16(), v, backend=backend)
        assert context.dtype == torch.bfloat16
        assert scores.dtype == torch.bfloat16
        half = [t.bfloat16() for t in (query, key, value, v)]
        torch.testing.assert_close(context, attnext.additive_attention(*half, backend=backend)[0], rtol=0, atol=0)

    def test_gradients_keep_the_dtypes_of_their_inputs(self) -> None:
        x = inputs(requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context, _ = attnext.additive_attention(*x, backend="cpu")
        grads = torch.autograd.grad(context.float().square().sum(), x)
        assert [g.dtype for g in grads] == [torch.float32] * 4

    def test_float64_is_left_alone(self) -> None:
        """By the operators' own rule, which a call with gradients reaches."""
        x = inputs(torch.float64, requires_grad=True)
        expected, _ = attnext.additive_attention(*x, backend="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context, _ = attnext.additive_attention(*x, backend="cpu")
            scores = attnext.additive_scores(x[0], x[1], x[3], backend="cpu")
        assert torch.equal(context, expected)
        assert scores.dtype == torch.float64

    def test_module_with_float32_states(self) -> None:
        attn = attnext.BahdanauAttention(4, 6, 8)
        states = torch.randn(2, 5, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            memory = attn.prepare(states)
            context, _ = attn(torch.randn(2, 4), memory)
            all_in_one, _ = attn(torch.randn(2, 4), states)
        assert memory.value.dtype == context.dtype == all_in_one.dtype == torch.bfloat16

    def test_without_it_mixed_dtypes_are_refused(self) -> None:
        query, key, value, v = inputs()
        with pytest.raises(TypeError, match=r"key must have query's dtype torch\.float32, got torch\.bfloat16"):
            attnext.additive_attention(query, key.bfloat16(), value, v)
