"""The attention module against its formula, in one call and through a prepared memory, on every backend."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family import Recorded
from torch import Tensor
from torch.nn.utils import parametrizations, prune

import attnext
from attnext import BahdanauAttention, use_backend

BATCH, QUERIES, KEYS, QUERY, MEMORY, SIZE = 3, 4, 7, 5, 6, 9
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "normalize": {"normalize": True},
    "both": {"bias": True, "normalize": True},
}
LENGTHS = torch.tensor([KEYS, 1, 4])
MASK = torch.tensor([[True, False, True, True, True, False, True]] * BATCH)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with use_backend(name):
        yield name


def module(dtype: torch.dtype = torch.float64, **options: Any) -> BahdanauAttention:
    attn = BahdanauAttention(QUERY, MEMORY, SIZE, **options).to(dtype)
    for parameter in attn.parameters():  # the gain and the bias start at values that hide mistakes
        torch.nn.init.normal_(parameter)
    return attn


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries and encoder states."""
    return tuple(
        torch.randn(s, dtype=dtype, requires_grad=True) for s in ((BATCH, QUERIES, QUERY), (BATCH, KEYS, MEMORY))
    )  # type: ignore[return-value]


def formula(attn: BahdanauAttention, query: Tensor, states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, with the parameters by their names in a checkpoint; some key must be visible to each query."""
    p = dict(attn.named_parameters())
    v = p["score_weight"]
    if "gain" in p:
        v = p["gain"] * v / v.square().sum().sqrt()
    q = query @ p["query_projection.weight"].T + p.get("query_projection.bias", 0.0)
    k = states @ p["memory_projection.weight"].T
    scores = (torch.tanh(q[:, :, None] + k[:, None]) * v).sum(-1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights @ states, weights


def visible(lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    real = torch.arange(KEYS) < (torch.full((BATCH,), KEYS) if lengths is None else lengths)[:, None]
    return real[:, None] if mask is None else real[:, None] & mask.view(BATCH, -1, KEYS)


def gradients(context: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    loss = (context * torch.randn(context.shape, generator=generator, dtype=context.dtype)).sum()
    loss = loss + (weights * torch.randn(weights.shape, generator=generator, dtype=context.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("lengths", "mask"), [(None, None), (LENGTHS, None), (LENGTHS, MASK)], ids=["", "l", "lm"])
@pytest.mark.usefixtures("backend")
class TestFormula:
    def test_in_one_call(self, options: dict[str, Any], lengths: Tensor | None, mask: Tensor | None) -> None:
        attn, (query, states) = module(**options), inputs()
        leaves = (query, states, *attn.parameters())
        context, weights = attn(query, states, lengths=lengths, mask=mask, need_weights=True)
        expected = formula(attn, query, states, visible(lengths, mask))
        close((context, weights), expected)
        found, wanted = gradients(context, weights, *leaves), gradients(*expected, *leaves)
        close(found, wanted)
        assert all((grad != 0).any() for grad in found)

    def test_in_steps(self, options: dict[str, Any], lengths: Tensor | None, mask: Tensor | None) -> None:
        attn, (query, states) = module(**options), inputs()
        leaves = (query, states, *attn.parameters())
        memory = attn.prepare(states, lengths, mask)
        steps = [attn(query[:, i], memory, need_weights=True) for i in range(QUERIES)]
        context, weights = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        assert context.shape == (BATCH, QUERIES, MEMORY)
        expected = formula(attn, query, states, visible(lengths, mask))
        close((context, weights), expected)
        close(gradients(context, weights, *leaves), gradients(*expected, *leaves))
        close(attn(query, memory, need_weights=True), expected)  # all queries at once, the same memory
        close(attn(query[:, 2], states, lengths=lengths, mask=mask, need_weights=True), steps[2])


@pytest.mark.usefixtures("backend")
def test_a_mask_of_its_own_for_each_query() -> None:
    attn, (query, states) = module(), inputs()
    mask = torch.rand(BATCH, QUERIES, KEYS) < 0.5
    mask[..., 0] = True
    close(attn(query, states, mask=mask, need_weights=True), formula(attn, query, states, mask))


@pytest.mark.usefixtures("backend")
def test_weights_are_returned_when_asked_for() -> None:
    attn, (query, states) = module(), inputs()
    assert attn(query, states)[1] is None
    assert attn(query, attn.prepare(states))[1] is None
    close(attn(query, states)[0], attn(query, states, need_weights=True)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepared", [False, True])
def test_in_low_precision(dtype: torch.dtype, prepared: bool) -> None:
    """The kernels are as near to the exact result as the plain computation in that dtype, within a factor of two."""
    attn, (query, states) = module(dtype, normalize=True), inputs(dtype)
    exact_attn, exact_inputs = copy.deepcopy(attn).double(), [x.detach().double() for x in (query, states)]
    expected = [x.detach() for x in formula(exact_attn, *exact_inputs, visible(LENGTHS, None))]
    errors = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            memory = attn.prepare(states, LENGTHS)
            lengths = None if prepared else LENGTHS
            with torch.no_grad():
                found = attn(query, memory if prepared else states, lengths=lengths, need_weights=True)
        assert [x.dtype for x in found] == [dtype, dtype]
        errors[backend] = [float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)]
    for kernel, plain, exact in zip(*errors.values(), expected, strict=True):
        assert kernel <= 2 * plain + torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.usefixtures("backend")
def test_double_and_half_convert_a_module_in_use() -> None:
    attn, (query, states) = module(torch.float32, bias=True), inputs(torch.float32)
    context, _ = attn(query, attn.prepare(states))
    close(attn.double()(query.double(), states.double())[0], attn(query.double(), attn.prepare(states.double()))[0])
    torch.testing.assert_close(attn(query.double(), states.double())[0].float(), context)
    assert attn.half()(query.half(), attn.prepare(states.half()))[0].dtype == torch.float16


@pytest.mark.parametrize("prepared_by", ["cpu", "reference"])
@pytest.mark.parametrize("used_by", ["cpu", "reference"])
def test_a_memory_serves_every_backend(prepared_by: str, used_by: str) -> None:
    attn, (query, states) = module(normalize=True), inputs()
    leaves = (query, states, *attn.parameters())
    with use_backend(prepared_by):
        memory = attn.prepare(states, LENGTHS, MASK)
    assert (memory.prepared is not None) == (prepared_by == "cpu")
    with use_backend(used_by):
        found = attn(query, memory, need_weights=True)
    expected = formula(attn, query, states, visible(LENGTHS, MASK))
    close(found, expected)
    close(gradients(*found, *leaves), gradients(*expected, *leaves))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_memory_prepared_without_grad(options: dict[str, Any]) -> None:
    attn, (query, states) = module(**options), inputs()
    with torch.no_grad():
        memory = attn.prepare(states, LENGTHS)
    found = attn(query, memory, need_weights=True)
    expected = formula(attn, query, states, visible(LENGTHS, None))
    close(found, expected)
    leaves = (query, *attn.query_projection.parameters())
    close(gradients(*found, *leaves), gradients(*expected, *leaves))
    context = attn(query, memory)[0]
    fixed = (states, attn.memory_projection.weight, attn.score_weight)
    assert torch.autograd.grad(context.sum(), fixed, allow_unused=True) == (None, None, None)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_memory_outlives_a_change_of_the_parameters(options: dict[str, Any]) -> None:
    """It holds the encoder states as they were projected, and v as it was: one memory, one function of the query."""
    attn, (query, states) = module(**options), inputs()
    with torch.no_grad():
        memory = attn.prepare(states)
        before, _ = attn(query, memory)
        attn.memory_projection.weight.mul_(3.0)
        attn.score_weight.mul_(-2.0)
        close(attn(query, memory)[0], before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("single", [False, True], ids=["queries", "query"])
def test_a_decoder_adds_up_the_gradient_of_all_its_steps(single: bool) -> None:
    attn, (queries, states) = module(normalize=True), inputs()
    start = queries[:, 0] if single else queries
    cell = torch.randn(MEMORY, QUERY, dtype=torch.float64, requires_grad=True)
    leaves = (queries, states, cell, *attn.parameters())

    def decode(memory: attnext.Memory | None) -> tuple[Tensor, Tensor]:
        state, total = start, torch.zeros((), dtype=torch.float64)
        for _ in range(25):
            if memory is not None:
                context, weights = attn(state, memory, need_weights=True)
            else:
                context, weights = formula(attn, state.view(BATCH, -1, QUERY), states, visible(LENGTHS, MASK))
                context, weights = (x.view(*state.shape[:-1], -1) for x in (context, weights))
            total = total + weights[..., 0].sum()
            state = torch.tanh(state + context @ cell)
        return state, total

    found, expected = decode(attn.prepare(states, LENGTHS, MASK)), decode(None)
    close(found, expected)
    close(gradients(*found, *leaves), gradients(*expected, *leaves))


class TestDropout:
    def test_is_for_training(self, backend: str) -> None:
        attn, (query, states) = module(dropout=0.5), inputs()
        expected = formula(attn, query, states, visible(None, None))
        close(attn.eval()(query, states, need_weights=True), expected)
        close(attn(query, attn.prepare(states), need_weights=True), expected)
        context, weights = attn.train()(query, states, need_weights=True)
        dropped = weights == 0
        assert 0.2 < float(dropped.double().mean()) < 0.8
        close(weights, expected[1].masked_fill(dropped, 0.0) * 2)  # the rest is scaled by 1 / (1 - p)
        close(context, weights @ states)  # the weights returned are those that made the context

    def test_all_weights(self, backend: str) -> None:
        attn, (query, states) = module(dropout=1.0), inputs()
        leaves = (query, states, *attn.parameters())
        context, weights = attn(query, states, need_weights=True)
        assert all((x == 0).all() for x in (context, weights, *gradients(context, weights, *leaves)))

    @pytest.mark.parametrize("prepared", [False, True])
    def test_is_the_same_on_every_backend(self, prepared: bool) -> None:
        attn, (query, states) = module(dropout=0.3), inputs()
        leaves = (query, states, *attn.parameters())
        found = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(4)
            with use_backend(backend):
                steps = [attn(query, attn.prepare(states) if prepared else states, need_weights=True) for _ in "ab"]
            assert not torch.equal(steps[0][1] == 0, steps[1][1] == 0)  # each call draws anew
            found.append((*steps, gradients(*steps[1], *leaves)))
        assert torch.equal(found[0][1][1] == 0, found[1][1][1] == 0)
        close(found[0], found[1])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_nothing_give_nothing_and_no_nan(dtype: torch.dtype, prepared: bool) -> None:
    attn, (query, states) = module(dtype, normalize=True), inputs(dtype)
    lengths = torch.tensor([0, KEYS, 2])
    memory = attn.prepare(states, lengths) if prepared else states
    context, weights = attn(query, memory, lengths=None if prepared else lengths, need_weights=True)
    assert (context[0] == 0).all()
    assert (weights[0] == 0).all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights[1:].sum(-1), torch.ones(2, QUERIES, dtype=dtype), rtol=0, atol=KEYS * eps)
    assert torch.equal(weights > 0, visible(lengths, None).expand_as(weights))
    parameters = dict(attn.named_parameters())
    grads = gradients(context, weights, query, states, *parameters.values())
    for name, grad in zip(("query", "states", *parameters), grads, strict=True):
        assert grad.isfinite().all(), name
        assert (grad != 0).any(), name
    assert (grads[0][0] == 0).all()
    assert (grads[1][0] == 0).all()
    assert (grads[1][2, 2:] == 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("by_mask", [False, True], ids=["lengths", "mask"])
def test_what_stands_in_the_padding_reaches_nothing(bad: float, by_mask: bool) -> None:
    attn, (query, states) = module(normalize=True), inputs()
    slots = {"mask": visible(LENGTHS, None)[:, 0]} if by_mask else {"lengths": LENGTHS}
    found = []
    for filler in (0.0, bad):
        filled = states.detach().masked_fill(~visible(LENGTHS, None)[:, 0, :, None], filler).requires_grad_()
        results = attn(query, attn.prepare(filled, **slots), need_weights=True)
        found.append((*results, *gradients(*results, query, filled, *attn.parameters())))
        with torch.no_grad():
            found[-1] += attn(query, attn.prepare(filled, **slots), need_weights=True)
    close(found[1], found[0])


@pytest.mark.usefixtures("backend")
def test_large_inputs_saturate() -> None:
    attn, (query, states) = module(torch.float32), inputs(torch.float32)
    query, states = ((1e4 * x).detach().requires_grad_() for x in (query, states))
    context, weights = attn(query, attn.prepare(states), need_weights=True)
    exact = copy.deepcopy(attn).double()
    expected = formula(exact, query.double(), states.double(), visible(None, None))
    # tanh is 1 or -1: the scores are sums of v, right to some roundings of |v|.
    error = 4 * SIZE * torch.finfo(torch.float32).eps * float(attn.score_weight.detach().abs().sum())
    torch.testing.assert_close(weights.double(), expected[1], rtol=error, atol=error)
    assert all(grad.isfinite().all() for grad in gradients(context, weights, query, states, *attn.parameters()))


@pytest.mark.usefixtures("backend")
def test_sizes_of_zero() -> None:
    attn = module()
    for batch, queries, keys in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        memory = attn.prepare(torch.randn(batch, keys, MEMORY, dtype=torch.float64))
        context, weights = attn(torch.randn(batch, queries, QUERY, dtype=torch.float64), memory, need_weights=True)
        assert (context.shape, weights.shape) == ((batch, queries, MEMORY), (batch, queries, keys))
        assert (context == 0).all()


class TestModule:
    @pytest.mark.parametrize(
        ("options", "extra"),
        [
            ({}, set()),
            ({"bias": True}, {"query_projection.bias"}),
            ({"normalize": True}, {"query_projection.bias", "gain"}),
        ],
        ids=["plain", "bias", "normalize"],
    )
    def test_state_round_trip(self, options: dict[str, Any], extra: set[str]) -> None:
        attn, other, (query, states) = module(**options), module(**options), inputs()
        # What checkpoints depend on.
        assert set(attn.state_dict()) == {
            "query_projection.weight", "memory_projection.weight", "score_weight", *extra,
        }  # fmt: skip
        expected = attn(query, states)[0]
        assert not torch.allclose(other(query, states)[0], expected)
        file = io.BytesIO()
        torch.save(attn.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(query, states)[0], expected)

    @pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
    def test_a_copy_is_its_own(self, options: dict[str, Any]) -> None:
        attn, (query, states) = module(dropout=0.25, **options), inputs()
        attn.eval()
        twin = copy.deepcopy(attn)
        expected = attn(query, states)[0]
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.zero_()
        assert torch.equal(twin(query, states)[0], expected)
        assert twin.dropout == 0.25
        assert not twin.training

    def test_starts_as_documented(self) -> None:
        attn = BahdanauAttention(64, 64, 400, normalize=True)
        bound = 400**-0.5
        assert 0.9 * bound < float(attn.score_weight.detach().abs().max()) <= bound
        assert attn.gain is not None
        assert float(attn.gain.detach()) == pytest.approx(bound)
        assert (attn.query_projection.bias == 0).all()
        before = {name: x.detach().clone() for name, x in attn.named_parameters()}
        for parameter in attn.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        torch.manual_seed(1)
        attn.reset_parameters()
        for name, x in attn.named_parameters():
            assert (x != 7.0).any(), name
            torch.testing.assert_close(x.abs().max(), before[name].abs().max(), rtol=0.1, atol=0)

    def test_repr_tells_the_options(self) -> None:
        text = repr(BahdanauAttention(4, 6, 8, normalize=True, dropout=0.1))
        assert text.startswith("BahdanauAttention(")
        for part in ("normalize=True", "dropout=0.1", "in_features=4", "in_features=6", "out_features=8", "bias=True"):
            assert part in text
        assert "normalize=False, dropout=0.0" in repr(BahdanauAttention(4, 6, 8))

    @pytest.mark.usefixtures("backend")
    def test_learns_which_key_is_marked(self) -> None:
        """Training through a prepared memory moves every parameter, and the right way."""
        attn = BahdanauAttention(2, 3, 8, normalize=True)
        optimizer = torch.optim.Adam(attn.parameters(), lr=0.05)
        marked = torch.randint(0, 6, (16,))
        states = torch.randn(16, 6, 3) * 0.1
        states[torch.arange(16), marked, 0] = 2.0
        losses = []
        for _ in range(40):
            _, weights = attn(torch.ones(16, 2), attn.prepare(states), need_weights=True)
            loss = -weights[torch.arange(16), marked].log().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "sparsemax", "entmax15"])
@pytest.mark.usefixtures("backend")
def test_other_normalizers_and_a_temperature(normalizer: str) -> None:
    attn, (query, states) = module(normalizer=normalizer, temperature=0.4), inputs()
    lengths = torch.tensor([KEYS, 0, 4])
    poisoned = states.detach().masked_fill(torch.arange(KEYS)[:, None] >= lengths[:, None, None], torch.nan)
    scores = attn.scores(query, attn.prepare(states, lengths))
    p = dict(attn.named_parameters())
    sums = (query @ p["query_projection.weight"].T)[:, :, None] + (states @ p["memory_projection.weight"].T)[:, None]
    expected = ((sums.tanh() * p["score_weight"]).sum(-1) / 0.4).masked_fill(~visible(lengths, None), -torch.inf)
    close(scores, expected)
    weights = attnext.reference.normalize(expected, normalizer)
    for x in (states, poisoned):
        close(attn(query, x, lengths=lengths, need_weights=True), (weights @ states, weights))


def test_bad_options() -> None:
    for name, options in (("normalizer", {"normalizer": "max"}), ("temperature", {"temperature": 0.0})):
        with pytest.raises(ValueError, match=name):
            BahdanauAttention(QUERY, MEMORY, SIZE, **options)  # type: ignore[arg-type]


class TestOneQueryWithoutAPreparedMemory:
    """It is served by the operator of a step, which takes exp of the sums: nothing is computed of the keys ahead."""

    @staticmethod
    def served(*arguments: Any, **options: Any) -> str:
        with torch.no_grad(), Recorded() as recorded:
            attnext.additive_attention(*arguments, **options)
        (name,) = recorded.names
        return name

    def test_what_serves_it(self) -> None:
        query, key, value, v = (
            torch.randn(4, SIZE),
            torch.randn(4, KEYS, SIZE),
            torch.randn(4, KEYS, 2),
            torch.randn(SIZE),
        )
        mask = torch.ones(4, KEYS, dtype=torch.bool)
        for step in ({}, {"mask": mask}, {"mask": mask.unsqueeze(1)}, {"need_weights": True}, {"dropout_p": 0.5}):
            assert self.served(query, key, value, v, **step) == "additive_step_cpu", step
        assert self.served(query, key, value, v, need_weights=True, dropout_p=0.5) == "additive_attention_cpu"
        assert self.served(query, key, value, v.expand(2, SIZE)) == "additive_attention_cpu"
        assert self.served(query.unsqueeze(1), key, value, v) == "additive_attention_cpu"
        assert self.served(query, attnext.prepare(key, value, v)) == "additive_attention_cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_results_are_in_the_dtype_of_the_query(self, dtype: torch.dtype) -> None:
        attn, (query, states) = module(dtype), inputs(dtype)
        found = attn(query[:, 0], states, lengths=LENGTHS, need_weights=True)
        several = attn(query[:, :1], states, lengths=LENGTHS, need_weights=True)
        for one, other in zip(found, several, strict=True):
            assert one.dtype == dtype
            # Of the sums, or of factors, both in float32: then a rounding to the dtype.
            torch.testing.assert_close(one, other[:, 0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)

    def test_under_autocast(self) -> None:
        attn, (query, states) = module(torch.float32), inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = attn(query[:, 0], states, need_weights=True)
            expected = attn(query[:, :1], states, need_weights=True)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype == torch.bfloat16
            torch.testing.assert_close(one, other[:, 0], rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-5)

    def test_dropout_is_the_same_on_every_backend_and_with_a_memory(self) -> None:
        attn, (query, states) = module(dropout=0.4), inputs()
        leaves, found = (query, states, *attn.parameters()), []
        for backend, prepared in (("cpu", False), ("reference", False), ("cpu", True)):
            torch.manual_seed(4)
            with use_backend(backend):
                context, _ = attn(query[:, 0], attn.prepare(states) if prepared else states)
            found.append((context, *torch.autograd.grad(context.sum(), leaves)))
        assert not torch.allclose(found[0][0], attn.eval()(query[:, 0], states)[0])
        close(found[1], found[0])
        close(found[2], found[0])


def test_a_step_runs_the_hooks_of_the_module() -> None:
    attn, (query, states) = module(), inputs()
    memory, seen = attn.prepare(states), []
    expected = attn.step(query[:, 0], memory, need_weights=True)[:2]
    attn.register_forward_hook(lambda _, arguments, results: seen.append(results[1]))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda layer, _: seen.append(type(layer)))
    try:
        close(attn.step(query[:, 0], memory, need_weights=True)[:2], expected)
    finally:
        hook.remove()
    kinds, (weights,) = seen[:-1], seen[-1:]
    assert kinds == [BahdanauAttention, torch.nn.Linear]
    close(weights, expected[1])


def test_a_module_compiled_in_place_is_compiled_in_its_steps() -> None:
    attn, (query, states) = module(), inputs()
    memory, graphs = attn.prepare(states), []
    expected = attn.step(query[:, 0], memory)[0]

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attn.compile(backend=counted)
    close(attn.step(query[:, 0], memory)[0], expected)
    assert len(graphs) == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda attn: prune.l1_unstructured(attn, "score_weight", 4),
    "pruned projections": lambda attn: [
        prune.l1_unstructured(layer, "weight", 9) for layer in (attn.query_projection, attn.memory_projection)
    ],
    "weight norm by hooks": lambda attn: torch.nn.utils.weight_norm(attn, "score_weight", None),
    "spectral norm by hooks": lambda attn: torch.nn.utils.spectral_norm(attn.memory_projection).train(False),
    "weight norm": lambda attn: parametrizations.weight_norm(attn, "score_weight", None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", [BahdanauAttention, attnext.CoverageAttention])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_that_are_made_of_others(change: Callable[[Any], Any], kind: Any, backend: str) -> None:
    """Trained by steps, in which the module itself is not always called, as by calls."""
    attn, called = (kind(QUERY, MEMORY, SIZE).double() for _ in range(2))
    for one in (attn, called):
        change(one)
    called.load_state_dict(attn.state_dict())
    queries, states = inputs()
    for _ in range(3):
        memory, state, total = attn.prepare(states.detach(), LENGTHS), None, torch.zeros(())
        for query in queries.detach().unbind(1):
            context, _, state = attn.step(query, memory, state)
            total = total + context.square().sum()
        expected = called(queries.detach(), states.detach(), lengths=LENGTHS)[0].square().sum()
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12, check_dtype=False)
        for module_, loss in ((attn, total), (called, expected)):
            parameters = [x for x in module_.parameters() if x.requires_grad]
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            with torch.no_grad():
                torch._foreach_sub_(parameters, grads, alpha=0.1)


def test_quantised_projections(backend: str) -> None:
    """Dynamically, to 8 bits: what torch then calls is called, by steps too."""
    attn = module(torch.float32).eval()
    query, states = (x.detach() for x in inputs(torch.float32))
    expected = attn(query, states, lengths=LENGTHS)[0]
    low = torch.ao.quantization.quantize_dynamic(copy.deepcopy(attn), {torch.nn.Linear})
    found = low(query, states, lengths=LENGTHS)[0]
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)
    memory = low.prepare(states, LENGTHS)
    for k in range(QUERIES):
        torch.testing.assert_close(low.step(query[:, k], memory)[0], found[:, k], rtol=0.05, atol=0.05)
