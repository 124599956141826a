"""Luong's attention and attention with heads against their formulas; dot products beyond the cases of all backends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnext
from attnext import LuongAttention, MultiHeadAttention, dot, use_backend

BATCH, QUERIES, KEYS, SIZE, HEADS = 3, 4, 7, 6, 2
LENGTHS = torch.tensor([KEYS, 0, 4])
Module = LuongAttention | MultiHeadAttention
KINDS: dict[str, tuple[type[Module], tuple[int, ...], dict[str, Any]]] = {
    "dot": (LuongAttention, (SIZE, SIZE), {"score": "dot"}),
    "scaled_dot": (LuongAttention, (SIZE, SIZE), {"score": "scaled_dot"}),
    "general": (LuongAttention, (5, SIZE), {}),
    "concat": (LuongAttention, (5, SIZE), {"score": "concat", "attention_size": 9}),
    "heads": (MultiHeadAttention, (5, SIZE, 8, HEADS), {}),
    "heads, dot": (MultiHeadAttention, (5, SIZE, 8, HEADS), {"score": "dot"}),
    "heads, additive": (MultiHeadAttention, (5, SIZE, 8, HEADS), {"score": "additive"}),
}
"""Each kind's module, sizes and options."""
SHARED = ("dot", "scaled_dot", "general")
"""Those whose keys are the values."""


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with use_backend(name):
        yield name


def module(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Module:
    cls, sizes, options = KINDS[kind]
    attn = cls(*sizes, **options, **more).to(dtype)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter)
    return attn


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries and encoder states."""
    query = torch.randn(BATCH, QUERIES, KINDS[kind][1][0], dtype=dtype)
    return query.requires_grad_(), torch.randn(BATCH, KEYS, SIZE, dtype=dtype).requires_grad_()


def formula(attn: Module, query: Tensor, states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, with the parameters by their names in a checkpoint."""
    p = dict(attn.named_parameters())
    if isinstance(attn, MultiHeadAttention):
        return formula_of_heads(attn, p, query, states, visible)
    if attn.score == "concat":
        pairs = torch.cat([query[:, :, None].expand(-1, -1, KEYS, -1), states[:, None].expand(-1, QUERIES, -1, -1)], -1)
        scores = torch.tanh(pairs @ p["joint_projection.weight"].T) @ p["score_weight"]
    else:
        if attn.score == "general":
            query = query @ p["query_projection.weight"].T
        scores = torch.einsum("bid,bjd->bij", query, states)
        scores = scores / SIZE**0.5 if attn.score == "scaled_dot" else scores
    weights = softmax(scores, visible)
    return weights @ states, weights


def formula_of_heads(
    attn: MultiHeadAttention, p: dict[str, Tensor], query: Tensor, states: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """One head after another."""
    contexts, all_weights, size = [], [], 8 // HEADS
    for head in range(HEADS):
        q, k, v = (
            x @ p[f"{name}_projection.weight"][head * size : (head + 1) * size].T
            for name, x in (("query", query), ("memory", states), ("value", states))
        )
        if attn.score == "additive":
            scores = torch.tanh(q[:, :, None] + k[:, None]) @ p["score_weight"][head]
        else:
            scores = q @ k.transpose(1, 2) / (size**0.5 if attn.score == "scaled_dot" else 1.0)
        all_weights.append(softmax(scores, visible))
        contexts.append(all_weights[-1] @ v)
    return torch.cat(contexts, -1) @ p["output_projection.weight"].T, torch.stack(all_weights).mean(0)


def softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -1e30).softmax(-1) * visible


def visible(lengths: Tensor | None) -> Tensor:
    real = torch.arange(KEYS) < (torch.full((BATCH,), KEYS) if lengths is None else lengths)[:, None]
    return real[:, None].expand(-1, QUERIES, -1)


def gradients(context: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    loss = (context * torch.randn(context.shape, generator=generator, dtype=context.dtype)).sum()
    loss = loss + (weights * torch.randn(weights.shape, generator=generator, dtype=context.dtype)).sum()
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
@pytest.mark.usefixtures("backend")
def test_formula_in_one_call_and_in_steps(kind: str, lengths: Tensor | None) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    leaves = (query, states, *attn.parameters())
    expected = formula(attn, query, states, visible(lengths))
    wanted = gradients(*expected, *leaves)
    memory = attn.prepare(states, lengths)
    assert memory.shared == (kind in SHARED)
    of_steps = [attn.step(query[:, i], memory, need_weights=True)[:2] for i in range(QUERIES)]
    for found in (
        attn(query, states, lengths=lengths, need_weights=True),
        attn(query, memory, need_weights=True),
        attn.step(query, memory, need_weights=True)[:2],
        tuple(torch.stack(x, 1) for x in zip(*of_steps, strict=True)),
    ):
        close(found, expected)
        close(gradients(*found, *leaves), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("backend")
def test_scores_and_a_mask_for_each_query(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    mask = torch.rand(BATCH, QUERIES, KEYS) < 0.5
    close(attn(query, states, mask=mask, need_weights=True), formula(attn, query, states, mask))
    memory = attn.prepare(states, LENGTHS)
    scores = attn.scores(query, memory)
    weights = scores[0].softmax(-1)
    if isinstance(attn, MultiHeadAttention):
        assert scores.shape == (BATCH, HEADS, QUERIES, KEYS)
        weights = weights.mean(0)
    hidden = ~visible(LENGTHS) if scores.dim() == 3 else ~visible(LENGTHS)[:, None].expand(scores.shape)
    assert torch.equal(scores == -torch.inf, hidden)
    close(weights, formula(attn, query, states, visible(None))[1][0])
    close(attn.scores(query[:, 1], memory), scores[..., 1, :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("backend")
def test_memory_of_other_rows_and_dtypes(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    memory, rows = attn.prepare(states, LENGTHS), torch.tensor([2, 0, 2, 2])
    selected = memory.select(rows)
    assert selected.shared == memory.shared
    close(attn(query[rows], selected)[0], attn(query, memory)[0][rows])
    single = memory.to(dtype=torch.float32)
    assert single.shared == memory.shared
    attn.float()
    # Scores of some tens are off by a few roundings, and weights by as many times their size.
    found, expected = attn(query.float(), single)[0], attn.double()(query, memory)[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=50 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_reaches_nothing(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    hidden = torch.arange(KEYS) >= LENGTHS[:, None]
    poisoned = states.detach().masked_fill(hidden[:, :, None], torch.nan).requires_grad_()
    results = []
    for x in (states, poisoned):
        context, weights = attn(query, x, lengths=LENGTHS, need_weights=True)
        scores = attn.scores(query, attn.prepare(x, LENGTHS))
        results.append((context, weights, scores, *gradients(context, weights, query, *attn.parameters())))
    close(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(kind: str, dtype: torch.dtype) -> None:
    attn, (query, states) = module(kind, torch.float32), inputs(kind, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        memory = attn.prepare(states, LENGTHS)
        context, _ = attn(query, memory)
        assert memory.key.dtype == memory.value.dtype == context.dtype == attn.scores(query, memory).dtype == dtype
        assert memory.shared == (kind in SHARED)
        context.sum().backward()
    assert states.grad is not None
    assert states.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    memory = attn.prepare(states, LENGTHS)
    torch._dynamo.reset()  # of one function only so many versions are compiled
    for call, argument in ((attn.step, memory), (attn, states)):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(query, argument)[0], call(query, argument)[0]
        close(actual, expected)
        close(*(torch.autograd.grad(x.sin().sum(), (query, states), retain_graph=True) for x in (actual, expected)))


def test_dropout_in_training_alone() -> None:
    for kind in KINDS:
        attn, (query, states) = module(kind, dropout=0.5), inputs(kind)
        _, weights = attn(query, states, need_weights=True)
        assert (weights == 0).any()
        _, weights = attn.eval()(query, states, need_weights=True)
        close(weights.sum(-1), torch.ones(BATCH, QUERIES, dtype=torch.float64))


def test_no_gradient_is_kept_without_grad_mode() -> None:
    attn, (_, states) = module("dot"), inputs("dot")
    with torch.no_grad():
        assert not attn.prepare(states).key.requires_grad
    assert attn.prepare(states).key.requires_grad


def test_bad_arguments() -> None:
    attn, heads, (query, states) = module("general"), module("heads"), inputs("general")
    of_heads = heads.prepare(states)
    for error, message, call in (
        (ValueError, "score must be one of 'dot', 'scaled_dot'", lambda: LuongAttention(4, 4, score="product")),
        (ValueError, "attention_size must be left out", lambda: LuongAttention(4, 4, attention_size=3)),
        (ValueError, "query_size must be memory_size, 5, .* got 4", lambda: LuongAttention(4, 5, score="dot")),
        (ValueError, "query_size must be memory_size", lambda: LuongAttention(4, 5, score="scaled_dot")),
        (ValueError, "attention_size must be", lambda: LuongAttention(4, 5, score="concat", attention_size=0)),
        (ValueError, "dropout must be", lambda: LuongAttention(4, 4, dropout=2.0)),
        (ValueError, "query must have size 5", lambda: attn(states, states)),
        (ValueError, "attention_size must be a multiple of heads, 3, got 8", lambda: MultiHeadAttention(4, 4, 8, 3)),
        (ValueError, "heads must be an integer", lambda: MultiHeadAttention(4, 4, 8, 0)),
        (ValueError, "score must be one of", lambda: MultiHeadAttention(4, 4, 8, 2, score="general")),
        (ValueError, "memory must be prepared for heads=1, got one for heads=2", lambda: attn(query, of_heads)),
        (ValueError, "memory must have size 2 in dimension 0, as query's batch", lambda: heads(query[:2], of_heads)),
        (ValueError, "indices must lie between 0 and 2", lambda: of_heads.select(torch.tensor([3]))),
        (TypeError, "memory must be what prepare", lambda: attn.step(query, states)),
        (
            TypeError,
            "query must be float32",
            lambda: LuongAttention(4, 4, score="dot")(torch.ones(2, 4).long(), states),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_gradcheck_and_second_derivatives() -> None:
    query, states = inputs("dot")
    for value in (None, torch.randn(BATCH, KEYS, 2, dtype=torch.float64, requires_grad=True)):
        leaves = (query, states) if value is None else (query, states, value)
        options: dict[str, Any] = {"lengths": LENGTHS, "scale": 0.7, "need_weights": True, "backend": "cpu"}
        torch.autograd.gradcheck(lambda *x, options=options: attnext.dot_attention(*x, **options), leaves)
    context, _ = attnext.dot_attention(query, states, backend="cpu")
    (grad,) = torch.autograd.grad(context.sin().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["query", "states"])
def test_any_subset_of_gradients(name: str) -> None:
    query, states = (x.detach() for x in inputs("dot"))
    chosen = {"query": query, "states": states}[name].requires_grad_()
    grads = [
        torch.autograd.grad(attnext.dot_attention(query, states, backend=backend)[0].sin().sum(), chosen)[0]
        for backend in ("cpu", "reference")
    ]
    close(*grads)


def test_operators_keep_their_contract() -> None:
    ops, none = torch.ops.attnext, None
    query, states = (x.detach().float().requires_grad_() for x in inputs("dot"))
    for value in (None, torch.randn(BATCH, KEYS, 2, requires_grad=True)):
        options = (LENGTHS, none, none, 0.5, 0.0)
        for need_weights in (True, False):
            torch.library.opcheck(ops.dot_attention_cpu.default, (query, states, value, *options, need_weights))
        x = [t if t is None else t.detach() for t in (query, states, value)]
        found = ops.dot_attention_cpu(*x, *options, True)
        grads = (torch.randn_like(found[0]), torch.randn_like(found[1]))
        torch.library.opcheck(ops.dot_attention_backward_cpu.default, (*grads, *x, *options, *found))


def test_compiled_graphs_are_refused_what_does_not_fit() -> None:
    ops, (query, states) = torch.ops.attnext, (x.detach().float() for x in inputs("dot"))
    none = (None, None, None, 1.0, 0.0)
    found = ops.dot_attention_cpu(query, states, None, *none, True)
    for call in (
        lambda: ops.dot_attention_cpu(query, states[:, :, 1:], None, *none, True),
        lambda: ops.dot_attention_cpu(query, states, states[:, 1:], *none, True),
        lambda: ops.dot_attention_cpu(query, states, states.double(), *none, True),
        lambda: ops.dot_attention_cpu(query, states, None, None, None, None, 1.0, 0.5, True),
        lambda: ops.dot_attention_backward_cpu(torch.ones(BATCH, QUERIES, 3), None, query, states, None, *none, *found),
        lambda: ops.dot_attention_backward_cpu(None, torch.ones(BATCH, 1, KEYS), query, states, None, *none, *found),
    ):
        with pytest.raises(RuntimeError, match="attnext: "):
            call()


@pytest.mark.parametrize("mask", ["keys", "slots"])
def test_a_nan_reaches_only_what_attends_it(mask: str) -> None:
    """A query that is NaN reaches no hidden key, and a key that one query may not see reaches only the others."""
    query, states = torch.randn(1, 20, 33), torch.randn(1, 70, 33)
    query[0, 3], states[0, 66] = torch.nan, torch.inf
    visible = torch.ones(1, 20, 70, dtype=torch.bool)
    visible[0, ::2, 66] = False
    visible[0, :, 5::9] = False
    if mask == "keys":
        visible = visible[:, 0]
    x = [t.requires_grad_() for t in (query, states)]
    context, weights = attnext.dot_attention(*x, mask=visible, need_weights=True, backend="cpu")
    assert weights is not None
    odd = [i for i in range(1, 20, 2) if i != 3]
    assert context[0, ::2].isfinite().all()
    assert weights[0, 3].isnan().sum() == visible.expand(1, 20, 70)[0, 3].sum()
    assert context[0, odd].isfinite().all() == (mask == "keys")
    # Of squares, so that what comes in for a context that is NaN is NaN too.
    grad_query, grad_states = torch.autograd.grad(context.square().sum() + weights.square().sum(), x)
    assert grad_query[0, ::2].isfinite().all()
    assert torch.equal(grad_states[0, 5::9], torch.zeros_like(grad_states[0, 5::9]))


def test_overflow_counts_as_masked_or_is_nan() -> None:
    query, states = torch.full((1, 1, 4), 1e20), torch.full((1, 3, 4), -1e20)
    states[0, 1] = 0.0
    context, _ = attnext.dot_attention(query, states, torch.arange(3.0).view(1, 3, 1), backend="cpu")
    assert torch.equal(context, torch.ones(1, 1, 1))
    context, _ = attnext.dot_attention(-query, states, backend="cpu")
    assert context.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    attn = LuongAttention(64, 64, score="scaled_dot").to(dtype)
    states = torch.full((1, 3, 64), 40.0, dtype=dtype)
    scores = attn.scores(states, attn.prepare(states))
    assert scores.dtype == dtype
    assert torch.equal(scores, torch.full((1, 3, 3), 12800.0, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_of_another_score_is_refused(kind: str) -> None:
    attn, (query, states) = module(kind), inputs(kind)
    additive = attnext.BahdanauAttention(SIZE, SIZE, SIZE).double().prepare(states)
    dot = LuongAttention(SIZE, SIZE, score="dot").prepare(states)
    of_additive, other = (True, dot) if kind in ("concat", "heads, additive") else (False, additive)
    said = "for an additive score, got one for dot" if of_additive else "for dot products, got one for an additive"
    for call in (attn, attn.scores, attn.step):
        with pytest.raises(ValueError, match=f"^memory must be prepared {said}"):
            call(query, other)


def test_the_same_bits_on_any_number_of_threads() -> None:
    query, states = torch.randn(3, 40, 70, requires_grad=True), torch.randn(3, 150, 70, requires_grad=True)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            context, weights = attnext.dot_attention(query, states, need_weights=True, dropout_p=0.2, backend="cpu")
            assert weights is not None
            grads = torch.autograd.grad(context.sin().sum() + weights.cos().sum(), (query, states))
            runs.append([context, weights, *grads])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


class TestWays:
    """Large products go to a library's, or to PyTorch's attention, and nothing else does."""

    @pytest.fixture
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the ways that calls went, but for the kernel's."""
        taken: list[str] = []

        def noted(name: str, way: Any, *args: Any) -> Any:
            taken.append(name)
            return way(*args)

        for name, way in dot.WAYS.items():
            monkeypatch.setitem(dot.WAYS, name, partial(noted, name, way))
        return taken

    @staticmethod
    def inputs(queries: int, keys: int, features: int, values: int | None) -> list[Tensor]:
        sizes = [(2, queries, features), (2, keys, features)] + ([] if values is None else [(2, keys, values)])
        return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    @pytest.mark.parametrize(
        ("sizes", "way"),
        [
            ((32, 80, 70), "products"),
            ((9, 17, 300), "products"),
            ((3, 20, 200), "products"),
            ((1200, 1800, 3), "attention"),
            ((31, 80, 70), "kernel"),
            ((9, 30, 300), "kernel"),
            ((1, 10, 20), "kernel"),
        ],
    )
    @pytest.mark.parametrize("values", [None, "as features", 7])
    def test_each_gives_the_same(self, sizes: tuple[int, int, int], way: str, values: Any, taken: list[str]) -> None:
        x = self.inputs(*sizes, sizes[2] if values == "as features" else values)
        if values == 7 and way == "attention":  # PyTorch's takes no values of another size
            way = "kernel"

        def run(**options: Any) -> list[Tensor]:
            context, _ = attnext.dot_attention(*x, scale=0.3, **options)
            return [context, *torch.autograd.grad(context.sin().sum(), x)]

        found = run()
        assert taken == [way] * (way != "kernel")
        close(found, run(backend="reference"))
        with use_backend("cpu"):
            close(found, run())
        assert taken == [way] * (way != "kernel")

    def test_without_gradients_more_go_to_products(self, taken: list[str]) -> None:
        x = self.inputs(3, 40, 300, None)
        attnext.dot_attention(*x)
        assert taken == []
        with torch.no_grad():
            found, _ = attnext.dot_attention(*x)
            close([found], [attnext.dot_attention(*x, backend="reference")[0]])
        attnext.dot_attention(*(t.detach() for t in x))
        assert taken == ["products"] * 2

    @pytest.mark.parametrize("sizes", [(70, 80, 20), (1200, 1800, 3)])
    def test_what_goes_to_the_kernel(self, sizes: tuple[int, int, int], taken: list[str]) -> None:
        x = self.inputs(*sizes, None)
        attnext.dot_attention(*x, lengths=torch.tensor([sizes[1]] * 2))
        attnext.dot_attention(*x, mask=torch.ones(2, sizes[1], dtype=torch.bool))
        attnext.dot_attention(*x, dropout_p=0.1)
        attnext.dot_attention(*(t.half() for t in x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attnext.dot_attention(*(t.float() for t in x))
        # Under torch.func as a small call: vmap works, derivatives are refused.
        torch.func.vmap(lambda *rows: attnext.dot_attention(*rows)[0])(*(t.detach().expand(3, -1, -1, -1) for t in x))
        with pytest.raises(RuntimeError, match=r"none for torch\.func\.grad"):
            torch.func.grad(lambda query: attnext.dot_attention(query, *x[1:])[0].sum())(x[0].detach())
        assert taken == []

    def test_weights(self, taken: list[str]) -> None:
        for sizes, expected in (((70, 80, 20), ["products"]), ((64, 260, 20), ["products"]), ((9, 260, 20), [])):
            x = self.inputs(*sizes, None)
            close(attnext.dot_attention(*x, need_weights=True),
                  attnext.dot_attention(*x, need_weights=True, backend="reference"))  # fmt: skip
            assert taken == expected
            taken.clear()

    def test_more_weights_than_memory_should_hold(self, taken: list[str]) -> None:
        with torch.no_grad():
            x = [torch.randn(1, 1500, 70) for _ in range(2)]
            found, expected = (attnext.dot_attention(*x, backend=backend)[0] for backend in (None, "cpu"))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert taken == ["attention"]
            attnext.dot_attention(*x, need_weights=True)
        assert taken == ["attention"]

    @pytest.mark.parametrize("sizes", [(70, 80, 20), (700, 80, 20), (1200, 1800, 3)])
    @pytest.mark.parametrize("extension", [True, False], ids=["extension", "torch"])
    def test_a_row_of_scores_that_overflow(
        self, sizes: tuple[int, int, int], extension: bool, taken: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Minus infinity counts as masked, whichever way is the fastest, and whoever looks for it."""
        if not extension:
            monkeypatch.setattr(dot, "_extension", SimpleNamespace(load=lambda: None))
        query, key = (torch.rand(2, n, sizes[2]) + 1.0 for n in sizes[:2])
        query[1, 3] = -3e38
        query.requires_grad_()
        context, _ = attnext.dot_attention(query, key)
        assert taken  # and then the kernel
        assert bool(context.isfinite().all())
        assert bool((context[1, 3] == 0).all())
        assert bool((context[0] != 0).all())
        assert bool(torch.autograd.grad(context.sum(), query)[0][1, 3].eq(0).all())

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        x = self.inputs(70, 80, 20, None)
        compiled = torch.compile(lambda *x: attnext.dot_attention(*x)[0], fullgraph=True, backend="aot_eager")
        close([compiled(*x)], [attnext.dot_attention(*x)[0]])


def test_exported_with_open_sizes() -> None:
    class Attends(torch.nn.Module):
        def forward(self, query: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
            plain, _ = attnext.dot_attention(query, states)
            return plain + attnext.dot_attention(query, states, lengths=lengths)[0]

    batch, queries, keys = (torch.export.Dim(name, min=2, max=1000) for name in ("batch", "queries", "keys"))
    x = (torch.randn(3, 4, 6), torch.randn(3, 7, 6), torch.tensor([7, 0, 2]))
    program = torch.export.export(
        Attends(), x, dynamic_shapes=({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch})
    )
    for sizes in ((2, 9, 3), (5, 200, 150)):
        b, tq, tk = sizes
        y = (torch.randn(b, tq, 6), torch.randn(b, tk, 6), torch.randint(0, tk + 1, (b,)))
        torch.testing.assert_close(program.module()(*y), Attends()(*y))


def test_compiled_with_sizes_that_change() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attnext.dot_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, queries, keys in ((2, 3, 5), (3, 7, 4), (2, 130, 140)):
        x = [torch.randn(batch, n, 8, dtype=torch.float64, requires_grad=True) for n in (queries, keys)]
        found, expected = compiled(*x)[0], attnext.dot_attention(*x, backend="reference")[0]
        close(found, expected)
        close(*(torch.autograd.grad(y.sin().sum(), x) for y in (found, expected)))
