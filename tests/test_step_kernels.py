"""The operator of a step that sees its past: its contract with PyTorch, and what its cases don't show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnext
from attnext import functional, reference
from attnext.gpu.checking import On
from attnext.gpu.contract import rules
from attnext.memory import Memory, prepare
from attnext.ops import operators
from attnext.steps import gathered

STEP = operators["cpu"].step
BACKWARD = torch.ops.attnext.additive_step_backward_cpu.default
BATCH, KEYS, SIZE, STATES, FILTERS, WIDTH = 3, 11, 8, 6, 4, 5
LENGTHS = torch.tensor([KEYS, 0, 4])
NAMES = (
    "query",
    "key",
    "value",
    "score_weight",
    "filters",
    "projection",
    "past",
    "second_past",
    "previous",
    "transition",
)


def inputs(dtype: torch.dtype = torch.float32, beam: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """All that the operator takes, with gradients."""
    rows = (BATCH, *beam)
    shapes = {
        "query": (*rows, SIZE), "key": (BATCH, KEYS, SIZE), "value": (BATCH, KEYS, STATES), "score_weight": (SIZE,),
        "filters": (FILTERS, 2, WIDTH), "projection": (SIZE, FILTERS),
    }  # fmt: skip
    x = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    x |= {name: torch.rand(*rows, KEYS, dtype=dtype) for name in ("past", "second_past", "previous")}
    x["transition"] = torch.rand(*rows, 1, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def arguments(x: dict[str, Tensor], rule: int, window: Tensor | None = None, **changes: Any) -> list[Any]:
    """As the schema has them; previous and transition only for forward attention."""
    tensors: dict[str, Any] = {name: x[name] if rule == 2 or name not in NAMES[8:] else None for name in NAMES}
    tensors |= {"lengths": LENGTHS, "mask": None, "window": window, "seed": None}
    return [*(tensors | {"scale": 1.0, "dropout_p": 0.0, "rule": rule} | changes).values()]


@pytest.mark.parametrize("rule", range(3))
@pytest.mark.parametrize("beam", [(), (2,)], ids=["flat", "beam"])
def test_opcheck(rule: int, beam: tuple[int, ...]) -> None:
    x = inputs(beam=beam)
    window = torch.tensor([1, 9]).expand(BATCH, *beam, 2)
    for args in (arguments(x, rule, window), arguments(x, rule, seed=torch.tensor(3), dropout_p=0.3)):
        torch.library.opcheck(STEP, args)
    plain = {**dict.fromkeys(NAMES[4:8]), "lengths": None}
    torch.library.opcheck(STEP, arguments(x, rule, **plain))
    detached = [y.detach() if isinstance(y, Tensor) else y for y in arguments(x, rule)]
    context, weights = STEP(*detached)
    for grads in ((torch.randn_like(context), torch.randn_like(weights)), (None, torch.randn_like(weights))):
        torch.library.opcheck(BACKWARD, (*grads, *detached, weights), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rule", range(3))
def test_gradcheck(rule: int) -> None:
    """With weights that a step hands on; in an empty row of forward attention the reader stays, which has no slope."""
    x = inputs(torch.float64)
    wanted = [name for name in NAMES if rule == 2 or name not in NAMES[8:]]

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        changed = x | dict(zip(wanted, tensors, strict=True))
        context, weights = STEP(*arguments(changed, rule, torch.tensor([[0, 9], [0, 9], [1, 3]])))
        return context, weights

    assert torch.autograd.gradcheck(step, [x[name] for name in wanted])


def attend(x: dict[str, Tensor], backend: str, memory: Memory | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    memory = memory or Memory(x["key"], x["value"], LENGTHS, None, x["score_weight"], None)
    past = [x["past"], x["second_past"]]
    return functional.attend_step(
        x["query"], memory, x["filters"], x["projection"], past, rule="softmax", backend=backend, **options
    )


@pytest.mark.parametrize("wanted", NAMES[:8])
def test_any_one_input_may_want_a_gradient(wanted: str) -> None:
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(2)
        x = {name: tensor.detach() for name, tensor in inputs(torch.float64, (2,)).items()}
        x[wanted].requires_grad_()
        context, weights = attend(x, backend)
        (grad,) = torch.autograd.grad(context.sin().sum() + weights.square().sum(), x[wanted])
        found.append(grad)
    torch.testing.assert_close(*found)
    assert (found[0] != 0).any()


def test_gradients_expanded_from_one_number_and_of_either_result_alone() -> None:
    x = inputs(torch.float64)
    for which in ((0, 1), (0,), (1,)):
        found = []
        for backend in ("cpu", "reference"):
            results = [attend(x, backend)[k] for k in which]
            incoming = [torch.tensor(0.7, dtype=torch.float64).expand(y.shape) for y in results]
            leaves = [x[name] for name in NAMES[:8]]
            found.append(torch.autograd.grad(results, leaves, incoming, materialize_grads=True, allow_unused=True))
        torch.testing.assert_close(*found)


def test_the_same_bits_on_any_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        memory = [torch.randn(shape, requires_grad=True) for shape in ((40, 90, 70), (40, 90, 65), (70,))]
        linear = [torch.randn(shape, requires_grad=True) for shape in ((32, 1, 31), (70, 32))]
        past, query = torch.rand(40, 90, requires_grad=True), torch.randn(40, 70, requires_grad=True)
        key, value, v = memory
        context, weights = functional.attend_step(
            query, Memory(key, value, None, None, v, None), *linear, [past], rule="softmax", backend="cpu"
        )
        leaves = [query, *memory, *linear, past]
        return [context, weights, *torch.autograd.grad(context.sin().sum() + weights.cos().sum(), leaves)]

    before = torch.get_num_threads()
    try:
        runs = [run(threads) for threads in (1, 2, 2, 5)]
    finally:
        torch.set_num_threads(before)
    for one in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], one, strict=True))


@pytest.mark.parametrize("steps", [3, 70, 130])
def test_many_steps_of_a_memory(steps: int) -> None:
    """Fewer than a block of steps, more, and more than two; each step's weights are the next one's past."""
    x = inputs(torch.float64)
    queries = torch.randn(steps, BATCH, SIZE, dtype=torch.float64, requires_grad=True)
    leaves = [queries, *(x[name] for name in NAMES[1:6])]

    def run(backend: str) -> tuple[Tensor, ...]:
        steps_of = gathered(x["key"], x["value"], x["score_weight"]) if backend == "cpu" else None
        memory = Memory(x["key"], x["value"], LENGTHS, None, x["score_weight"], None, steps=steps_of)
        weights = cumulative = torch.zeros(BATCH, KEYS, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for query in queries:
            context, weights = attend(x | {"query": query, "past": weights, "second_past": cumulative}, backend, memory)
            cumulative = cumulative + weights
            total = total + context.sin().sum()
        return torch.autograd.grad(total, leaves)

    # Rounding of a step is carried on by each that follows; weights that are handed on shrink it.
    torch.testing.assert_close(run("cpu"), run("reference"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ["aabb", "abab", "aapp", "ppaa", "abpb"])
def test_other_scales_and_operators_between_the_steps(order: str) -> None:
    """Steps that differ in what they share are not put together: two scales of attention, and those that see a past."""
    x = inputs(torch.float64)
    queries = torch.randn(len(order), BATCH, SIZE, dtype=torch.float64)
    leaves = [x[name] for name in NAMES[1:4]]

    def run(backend: str) -> tuple[Tensor, ...]:
        key, value, v = leaves
        on_cpu = backend == "cpu"
        prepared, steps = (prepare(key, LENGTHS, None, "cpu"), gathered(*leaves)) if on_cpu else (None, None)
        memory = Memory(key, value, LENGTHS, None, v, prepared, steps=steps)
        total = torch.zeros((), dtype=torch.float64)
        for kind, query in zip(order, queries, strict=True):
            if kind == "p":
                context, _ = attend(x | {"query": query}, backend, memory)
            else:
                context, _ = functional.attend(query, memory, {"a": 1.0, "b": 1.5}[kind], 0.0, False, backend)
            total = total + context.sin().sum()
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(run("cpu"), run("reference"))


@pytest.mark.parametrize("summed", [False, True])
def test_what_comes_in_for_an_empty_row_reaches_nothing(summed: bool) -> None:
    x = inputs()
    steps = gathered(x["key"], x["value"], x["score_weight"]) if summed else None
    memory = Memory(x["key"], x["value"], LENGTHS, None, x["score_weight"], None, steps=steps)
    context, weights = attend(x, "cpu", memory)
    assert (context[1] == 0).all()
    assert (weights[1] == 0).all()
    norm = context.square().sum(-1).sqrt().sum()  # its gradient at 0 is NaN
    grads = torch.autograd.grad(norm, [x[name] for name in NAMES[:8]])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2][0] != 0).any()


@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_saturated_softmax_has_no_gradient_of_rounding(scale: float, prepared: bool) -> None:
    """One key has all the weight, so that the scores' true gradient is 0, whatever comes in.

    As delta is made of the same products as dp, what is left are roundings of w itself, no larger than those of plain
    automatic differentiation.
    """
    query, value, v = torch.randn(4, 16), torch.randn(4, 9, 64) * 100, torch.randn(16).abs() + 1
    key = torch.full((4, 9, 16), -3.0)
    key[:, 2] = 3.0
    grads = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        q, k, h, w = (t.to(dtype, copy=True).requires_grad_() for t in (query, key, value, v))
        steps = gathered(k, h, w) if prepared and backend == "cpu" else None
        memory = Memory(k, h, None, None, w, None, steps=steps)
        if prepared:
            context, _ = functional.attend(q, memory, scale, 0.0, False, backend)
        else:
            context, _ = functional.attend_step(q, memory, None, None, [], rule="softmax", scale=scale, backend=backend)
        grads[backend, dtype] = torch.autograd.grad(context.sum(), q)[0].double()
    exact = grads["reference", torch.float64]
    plain = float((grads["reference", torch.float32] - exact).abs().max())
    error = float((grads["cpu", torch.float32] - exact).abs().max())
    assert error <= 2 * plain + scale * torch.finfo(torch.float32).tiny * 1e6


def test_large_score_weights_and_sums() -> None:
    """Far beyond where products of two features or their weights would overflow."""
    x = inputs()
    for size in (1e20, 1e36):
        changed = x | {"score_weight": torch.full((SIZE,), size), "key": x["key"].detach() * 1e4}
        context, weights = attend(changed, "cpu")
        exact = {name: tensor.detach().double() for name, tensor in changed.items()}
        expected, expected_weights = attend(exact, "reference")
        torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_in_a_visible_slot_is_not_hidden() -> None:
    for name in NAMES[:8]:
        x = {key: tensor.detach().clone() for key, tensor in inputs().items()}
        x[name].view(-1)[0] = torch.nan
        context, _ = attend(x, "cpu")
        assert context[0].isnan().any(), name


def test_nan_of_the_past_in_a_hidden_slot_reaches_nothing() -> None:
    x = inputs()
    with torch.no_grad():
        for name in ("past", "second_past"):
            x[name][2, 4:] = torch.nan
    context, weights = attend(x, "cpu")
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), [x[name] for name in NAMES[:8]])
    assert all(y.isfinite().all() for y in (context, weights, *grads))
    assert (grads[6][2, 4:] == 0).all()


def remember(
    x: dict[str, Tensor], rule: str, *, mask: Tensor | None = None, backend: str = "cpu"
) -> tuple[Tensor, Tensor]:
    memory = attnext.prepare(x["key"], x["value"], x["score_weight"], mask=mask)
    mixed = {name: x[name] for name in ("previous", "transition") if rule == "forward"}
    past = x["past"], x["second_past"]
    return attnext.additive_step(
        x["query"], memory, x["filters"], x["projection"], past, rule=rule, backend=backend, **mixed
    )


@pytest.mark.parametrize("name", ["previous", "transition"])
def test_nan_of_forward_attention_is_not_hidden(name: str) -> None:
    x = {key: tensor.detach().clone() for key, tensor in inputs().items()}
    x[name].view(-1)[0] = torch.nan
    for backend in ("cpu", "reference"):
        _, weights = remember(x, "forward", backend=backend)
        assert weights[0].isnan().any(), backend
        assert weights[1:].isfinite().all(), backend


@pytest.mark.parametrize("rule", ["softmax", "sigmoid", "forward"])
def test_nan_in_a_visible_slot_reaches_no_hidden_one(rule: str) -> None:
    x = inputs()
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    mask[:, 2] = False
    with torch.no_grad():
        x["key"][0, 5] = torch.nan
    context, weights = remember(x, rule, mask=mask)
    assert context[0].isnan().any()
    assert (weights[:, 2] == 0).all()
    grads = torch.autograd.grad(context.sum(), [x["key"], x["value"]])
    assert all((grad[:, 2] == 0).all() for grad in grads)
    for query in (x["query"], x["query"].unsqueeze(1)):  # of attention that sees no past: one query, and a call of some
        _, weights = attnext.additive_attention(
            query, x["key"], x["value"], x["score_weight"], mask=mask, backend="cpu", need_weights=True
        )
        assert weights[0].isnan().any()
        assert (weights[..., 2] == 0).all()


@pytest.mark.parametrize("size", [torch.inf, torch.nan])
def test_scores_of_hidden_slots_beside_infinite_weights(size: float) -> None:
    x = inputs()
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    mask[:, 2] = False
    for query in (x["query"], x["query"].unsqueeze(1).repeat(1, 3, 1)):
        scores = attnext.additive_scores(query, x["key"], torch.full((SIZE,), size), mask=mask, backend="cpu")
        assert (scores[..., 2] == -torch.inf).all()
        assert scores[..., 3].isnan().any()


def test_a_row_that_attends_nothing_has_no_part_in_gradients_of_steps() -> None:
    """Whatever comes in for its context, also NaN, as of a norm at 0."""
    x = inputs()
    memory = attnext.prepare(x["key"], x["value"], x["score_weight"])
    window = torch.tensor([[0, 9], [4, 4], [0, 9]])
    contexts = [attnext.additive_step(x["query"], memory, window=window)[0] for _ in range(2)]
    incoming = torch.ones_like(contexts[0])
    incoming[1] = torch.nan
    grads = torch.autograd.grad(contexts, [x["key"], x["value"], x["score_weight"]], [incoming] * 2)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][1] == 0).all()


def test_a_chance_of_dropout_below_all_draws() -> None:
    x = inputs()
    memory = attnext.prepare(x["key"], x["value"], x["score_weight"])
    grads = [
        torch.autograd.grad(attnext.additive_step(x["query"], memory, dropout_p=p)[0].sum(), [x["key"], x["value"]])
        for p in (1e-12, 0.0)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    args = arguments(x, 0, seed=torch.tensor(3), dropout_p=1e-12)
    torch.library.opcheck(STEP, args)


def test_opcheck_of_half_types_without_a_past() -> None:
    x = inputs(torch.bfloat16)
    detached = [y.detach() if isinstance(y, Tensor) else y for y in arguments(x, 0, **dict.fromkeys(NAMES[4:8]))]
    context, weights = STEP(*detached)
    args = (torch.randn_like(context), None, *detached, weights)
    torch.library.opcheck(BACKWARD, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.randn(BATCH, SIZE + 1)}, "query has size"),
    ({"score_weight": torch.randn(1, SIZE)}, "score_weight of a step"),
    ({"filters": torch.randn(FILTERS, 1, WIDTH)}, "filters has size 1"),
    ({"filters": torch.randn(FILTERS, 2, 4)}, "odd width, got 4"),
    ({"filters": None}, "need a past"),
    ({"previous": torch.rand(BATCH, KEYS)}, "nothing else takes it"),
    ({"previous": None, "transition": torch.rand(BATCH, 1)}, "transition needs previous"),
    ({"past": None}, "need a past"),
    ({"projection": None}, "filters has size 4"),
    ({"projection": torch.randn(SIZE, FILTERS, dtype=torch.float64)}, "differ in dtype"),
    ({"past": torch.rand(BATCH, KEYS + 1)}, "past has size"),
    ({"past": torch.rand(BATCH, KEYS).bfloat16()}, "past must be in the arithmetic's dtype"),
    ({"mask": torch.ones(BATCH, 1, KEYS, dtype=torch.bool)}, "mask of a step"),
    ({"window": torch.zeros(BATCH, 2)}, "window must be int64"),
    ({"window": torch.zeros(BATCH, 3, dtype=torch.int64)}, "window has size 3"),
    ({"rule": 2, "previous": None}, "needs previous"),
    ({"rule": 3}, "no rule 3"),
    ({"dropout_p": 0.5}, "dropout needs a seed"),
])  # fmt: skip
def test_direct_calls_are_refused_and_never_crash(change: dict[str, Any], message: str) -> None:
    x = {name: tensor.detach() for name, tensor in inputs().items()}
    STEP(*arguments(x, 0))
    with pytest.raises(RuntimeError, match=f"attnext: .*{message}"):
        STEP(*arguments(x, **{"rule": 0, **change}))


def test_weights_that_are_not_the_forward_pass_s_are_refused() -> None:
    x = [y.detach() if isinstance(y, Tensor) else y for y in arguments(inputs(), 0)]
    context, weights = STEP(*x)
    for wrong in (weights.double(), weights[:, :5], weights.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="attnext: weights"):
            BACKWARD(torch.randn_like(context), None, *x, wrong)


def test_second_derivatives_name_the_way_out() -> None:
    x = inputs(torch.float64)
    (grad,) = torch.autograd.grad(attend(x, "cpu")[0].sin().sum(), x["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(attend(x, "reference")[0].sin().sum(), x["query"], create_graph=True)
    torch.autograd.grad(grad.sum(), x["query"])


def test_a_compiled_loop_of_steps() -> None:
    torch._dynamo.reset()
    x = inputs()

    def loop(query: Tensor, past: Tensor, cumulative: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            query_, weights = attend(x | {"query": query, "past": past, "second_past": cumulative}, "cpu")
            query, past, cumulative = query + query_.sum(-1, keepdim=True), weights, cumulative + weights
        return query, past

    args = (x["query"], x["past"], x["second_past"])
    found, expected = torch.compile(loop, fullgraph=True, backend="aot_eager")(*args), loop(*args)
    torch.testing.assert_close(found, expected)
    leaves = [x[name] for name in NAMES[:8]]
    grads = (torch.autograd.grad([y[0].sum(), y[1].square().sum()], leaves) for y in (found, expected))
    torch.testing.assert_close(*grads)


def test_autocast_casts_all_but_the_past() -> None:
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, weights = attend(x, "cpu")
    assert (context.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    half = {name: tensor.detach() if name in NAMES[6:] else tensor.detach().bfloat16() for name, tensor in x.items()}
    torch.testing.assert_close((context, weights), attend(half, "cpu"), rtol=0, atol=0)
    grads = torch.autograd.grad(context.float().square().sum(), [x[name] for name in NAMES[:8]])
    assert [grad.dtype for grad in grads] == [torch.float32] * 8


def test_the_reference_is_one_step_of_the_plain_op_without_a_past() -> None:
    query, key, value, v = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,)))
    found = reference.additive_step(query, key, value, v, lengths=torch.tensor([5, 2]))
    expected = reference.additive_attention(query, key, value, v, lengths=torch.tensor([5, 2]), need_weights=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_nan_of_any_bits_is_rounded_to_one(dtype: torch.dtype) -> None:
    """All bits set, as in memory that was filled so: the rounding must not carry out of the exponent. Through products
    alone, from the last weights of forward attention to the context, the bits stay as they are."""
    x = {name: tensor.detach() for name, tensor in inputs().items()}
    x |= {name: x[name].to(dtype) for name in NAMES[:6]}
    x["previous"] = torch.full_like(x["previous"], -1, dtype=torch.int32).view(torch.float32)
    context, _ = STEP(*arguments(x, 2))
    assert context[0].isnan().all()
    assert not context[1].isnan().any()  # which attends nothing


@pytest.mark.usefixtures("instruction_set")
def test_rules_to_their_corners() -> None:
    rules(On("cpu", "cpu"))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("beam", [(), (2,)], ids=["flat", "beam"])
def test_a_nan_that_comes_in_reaches_no_hidden_value(beam: tuple[int, ...]) -> None:
    args = [y.detach() if isinstance(y, Tensor) else y for y in arguments(inputs(beam=beam), 0)]
    context, weights = STEP(*args)
    grad_value = BACKWARD(torch.full_like(context, torch.nan), None, *args, weights)[2]
    assert grad_value[2, :4].isnan().all()
    for hidden in (grad_value[1], grad_value[2, 4:]):
        assert (hidden == 0).all()
