"""A memory's gradients over many steps: the sums are those that automatic differentiation makes of the steps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnext import (
    BahdanauAttention,
    LuongAttention,
    Memory,
    MultiHeadAttention,
    additive_attention,
    additive_step,
    dot_attention,
    ops,
    prepare,
    use_backend,
)
from attnext.attention.base import Attention

BATCH, KEYS, QUERY, STATES, SIZE, STEPS = 4, 131, 6, 10, 12, 3
MODULES: dict[str, Callable[[], Attention]] = {
    "additive": lambda: BahdanauAttention(QUERY, STATES, SIZE, dropout=0.2),
    "concat": lambda: LuongAttention(QUERY, STATES, score="concat"),
    "general": lambda: LuongAttention(QUERY, STATES),
    "dot": lambda: LuongAttention(STATES, STATES, score="dot", dropout=0.2),
    "heads": lambda: MultiHeadAttention(QUERY, STATES, SIZE, 3),
    "heads, additive": lambda: MultiHeadAttention(QUERY, STATES, SIZE, 3, score="additive"),
}
LENGTHS = torch.tensor([KEYS, 3, 0, 70])
EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""Of float64: sums of a few hundred numbers of about 1."""


@pytest.fixture(params=MODULES)
def attn(request: pytest.FixtureRequest) -> Attention:
    return MODULES[request.param]().double()


class Calls:
    """How many backward passes of steps left the keys and values to the end, and how many made all gradients."""

    def __init__(self) -> None:
        self.part = self.whole = 0

    def counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return call(*arguments)

        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counts = Calls()
    for op, of in list(ops.of_steps.items()):
        counted = {name: counts.counting(name, getattr(of, name)) for name in ("whole", "part")}
        monkeypatch.setitem(ops.of_steps, op, of._replace(**counted))
    return counts


def encoder_states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, KEYS, STATES, dtype=dtype, requires_grad=True)


def queries_of(attn: Attention, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Steps of one query and, the last, of several."""
    shapes = [(BATCH, attn.query_size)] * (STEPS - 1) + [(BATCH, 2, attn.query_size)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outcome(attn: Attention, memory: Memory, queries: list[Tensor]) -> Tensor:
    """A number that depends on contexts and on weights."""
    torch.manual_seed(5)  # of dropout
    total = torch.zeros((), dtype=torch.float64)
    for query in queries:
        context, weights = attn(query, memory, need_weights=True)
        assert weights is not None
        total = total + context.double().sin().sum() + weights.double().square().sum()
    return total


def plainly(attn: Attention, states: Tensor, queries: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients without sums."""
    memory = replace(attn.prepare(states, LENGTHS), steps=None)
    return torch.autograd.grad(outcome(attn, memory, queries), inputs)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def kept_sums(memory: Memory) -> int:
    """The passes whose sums are still there."""
    assert memory.steps is not None
    return len(memory.steps._collected._of_pass)


def test_gradients_are_those_of_the_reference(attn: Attention, calls: Calls) -> None:
    states, queries = encoder_states(), queries_of(attn)
    inputs = [states, *queries, *attn.parameters()]
    found = torch.autograd.grad(outcome(attn, attn.prepare(states, LENGTHS), queries), inputs)
    assert (calls.part, calls.whole) == (STEPS, 0)
    with use_backend("reference"):
        expected = torch.autograd.grad(outcome(attn, attn.prepare(states, LENGTHS), queries), inputs)
    assert_equal(found, expected)
    assert found[0][1, 3:].abs().max() == 0


def test_steps_beside_a_call_of_many_queries(attn: Attention, calls: Calls) -> None:
    """Which makes its gradients with its own: what has been gathered is added to them."""
    states, queries = encoder_states(), queries_of(attn)
    queries.append(torch.randn(BATCH, 20, attn.query_size, dtype=torch.float64, requires_grad=True))
    inputs = [states, *queries, *attn.parameters()]
    found = torch.autograd.grad(outcome(attn, attn.prepare(states, LENGTHS), queries), inputs)
    assert calls.part == STEPS
    assert_equal(found, plainly(attn, states, queries, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """The sum of 300 thirds is rounded to the type once: rounded at each, it would be off by several per cent."""
    value = torch.ones(1, 3, STATES, dtype=dtype, requires_grad=True)
    attn = LuongAttention(STATES, STATES, score="dot").to(dtype)
    memory = attn.prepare(value)
    query = torch.zeros(1, STATES, dtype=dtype)
    total = torch.stack([attn(query, memory)[0] for _ in range(300)]).float().sum()
    (found,) = torch.autograd.grad(total, value)
    # float32 sums have half a unit in the last place of error at each of the steps.
    eps = max(torch.finfo(dtype).eps, 150 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, torch.full_like(found, 100), rtol=eps, atol=0)


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_steps_of_one_memory_with_other_scales(score: str) -> None:
    """Each has its own in the sums that are made of several steps."""
    sizes = ((2, 9, 5), (2, 9, 4), (5,))
    key, value, v = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    query = torch.randn(2, 5, dtype=torch.float64)

    def found(gathers: bool) -> tuple[Tensor, ...]:
        memory = prepare(key, value, v if score == "additive" else None)
        memory = memory if gathers else replace(memory, steps=None)
        attend = additive_attention if score == "additive" else dot_attention
        loss = torch.stack([attend(query, memory, scale=scale)[0].sin().sum() for scale in (0.5, 2.0, 2.0)]).sum()
        return torch.autograd.grad(loss, (key, value, v)[: 3 if score == "additive" else 2])

    assert_equal(found(True), found(False))


def test_a_row_that_attends_nothing_at_a_step_has_no_part_in_the_values() -> None:
    """Whatever comes in for its context: 0 * NaN would be NaN in keys that other steps attend."""
    key, value = (torch.randn(2, 9, n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    memory = prepare(key, value, torch.randn(5, dtype=torch.float64))
    window, losses = torch.tensor([[3, 3], [0, 9]]), []
    for grad in (torch.nan, 1.0):
        context, _ = additive_step(torch.randn(2, 5, dtype=torch.float64), memory, window=window)
        losses.append((context * torch.tensor([[grad], [1.0]], dtype=torch.float64)).sum())
    for gradient in torch.autograd.grad(torch.stack(losses).sum(), (key, value)):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).any()


def test_passes_leave_no_sums(attn: Attention, calls: Calls) -> None:
    """Neither one that asks for other gradients alone, nor one that is repeated."""
    states, queries = encoder_states(), queries_of(attn)
    inputs = [states, *queries]
    memory = attn.prepare(states, LENGTHS)
    total = outcome(attn, memory, queries)
    of_queries = torch.autograd.grad(total, queries, retain_graph=True)
    assert kept_sums(memory) == 0
    found = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total, inputs)
    assert kept_sums(memory) == 0
    assert (calls.part, calls.whole) == (3 * STEPS, 0)
    expected = plainly(attn, states, queries, inputs)
    assert_equal(found, expected)
    assert_equal(again, expected)
    assert_equal(of_queries, expected[1:])


def test_a_pass_that_was_broken_off_leaves_no_sums(attn: Attention, calls: Calls) -> None:
    states, queries = encoder_states(), queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    doubled = queries[0] * 2  # whose step is the last of the pass

    def stop(_: Tensor) -> NoReturn:
        raise KeyboardInterrupt

    steps = [doubled, *queries[1:]]
    total = outcome(attn, memory, steps)
    hook = doubled.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(total, [states, *queries], retain_graph=True)
    hook.remove()
    found = torch.autograd.grad(total, [states], retain_graph=True)
    assert (calls.part, calls.whole) == (2 * STEPS, 0)
    assert_equal(found, plainly(attn, states, steps, [states]))


def test_passes_at_the_same_time(attn: Attention, calls: Calls) -> None:
    """Each thread's first step waits for the other's."""
    states, both = encoder_states(), [queries_of(attn), queries_of(attn)]
    memory, barrier = attn.prepare(states, LENGTHS), Barrier(2, timeout=60)

    def wait(gradient: Tensor) -> Tensor:
        barrier.wait()
        return gradient

    totals = []
    for queries in both:
        middle = queries[1] * 1
        middle.register_hook(wait)
        totals.append(outcome(attn, memory, [queries[0], middle, queries[2]]))
    with ThreadPoolExecutor(2) as pool:
        passes = [
            pool.submit(torch.autograd.grad, total, [states, queries[1]], retain_graph=True)
            for total, queries in zip(totals, both, strict=True)
        ]
    assert (calls.part, calls.whole) == (2 * STEPS, 0)
    for one, queries in zip(passes, both, strict=True):
        assert_equal(one.result(), plainly(attn, states, queries, [states, queries[1]]))


def test_a_pass_within_a_pass(attn: Attention, calls: Calls) -> None:
    states, queries, inner = encoder_states(), queries_of(attn), queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    within = outcome(attn, memory, inner)
    seen: list[tuple[Tensor, ...]] = []
    middle = queries[1] * 1

    def take_another(gradient: Tensor) -> Tensor:
        seen.append(torch.autograd.grad(within, [states], retain_graph=True))
        return gradient

    middle.register_hook(take_another)
    total, inputs = outcome(attn, memory, [queries[0], middle, queries[2]]), [states, queries[1]]
    found = torch.autograd.grad(total, inputs, retain_graph=True)
    assert (calls.part, calls.whole) == (2 * STEPS, 0)
    assert_equal(found, plainly(attn, states, queries, inputs))
    assert_equal(seen[0], plainly(attn, states, inner, [states]))


def one_again(attn: Attention, memory: Memory, queries: list[Tensor], reentrant: bool) -> Tensor:
    """The outcome with one step among the others that is computed again in the backward pass."""
    first = outcome(attn, memory, queries[:1])
    again = checkpoint(lambda query: outcome(attn, memory, [query]), queries[1], use_reentrant=reentrant)
    total: Tensor = first + again + outcome(attn, memory, queries[2:])
    return total


def test_a_step_that_is_computed_again(attn: Attention, calls: Calls) -> None:
    attn, states, queries = attn.eval(), encoder_states(), queries_of(attn)
    total = one_again(attn, attn.prepare(states, LENGTHS), queries, reentrant=False)
    inputs = [states, *queries]
    found = torch.autograd.grad(total, inputs)
    assert (calls.part, calls.whole) == (STEPS, 0)
    assert_equal(found, plainly(attn, states, queries, inputs))


def test_a_step_that_is_computed_again_in_a_pass_of_its_own(calls: Calls) -> None:
    attn, states = MODULES["dot"]().double().eval(), encoder_states()
    queries = queries_of(attn)
    (expected,) = plainly(attn, states, queries, [states])
    total = one_again(attn, attn.prepare(states, LENGTHS), queries, reentrant=True)
    total.backward()  # type: ignore[no-untyped-call]
    assert (calls.part, calls.whole) == (STEPS, 0)
    torch.testing.assert_close(states.grad, expected, **EXACT)


def test_a_hook_on_the_keys_sees_the_whole_gradient(calls: Calls) -> None:
    attn, states = MODULES["additive"]().double(), encoder_states()
    queries = queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    seen: list[Tensor] = []
    memory.key.register_hook(seen.append)
    torch.autograd.grad(outcome(attn, memory, queries), states, retain_graph=True)
    assert (calls.part, calls.whole, len(seen)) == (STEPS, 0, 1)
    expected = torch.autograd.grad(outcome(attn, replace(memory, steps=None), queries), [memory.key])
    assert_equal((seen[0],), expected)


def test_rows_that_were_taken_have_sums_of_their_own(attn: Attention, calls: Calls) -> None:
    states, queries = encoder_states(), queries_of(attn)
    rows = torch.tensor([3, 1, 3])

    def total() -> Tensor:
        memory = attn.prepare(states, LENGTHS)
        return outcome(attn, memory, queries) + outcome(attn, memory.select(rows), [x[rows] for x in queries])

    found = torch.autograd.grad(total(), [states])
    assert (calls.part, calls.whole) == (2 * STEPS, 0)
    with use_backend("reference"):
        assert_equal(found, torch.autograd.grad(total(), [states]))


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_other_keys_and_values_are_attended(kind: str, name: str, calls: Calls) -> None:
    """Those that the memory was given, with and without gradients."""
    attn, states = MODULES[kind]().double().eval(), encoder_states()
    memory, query = attn.prepare(states, LENGTHS), torch.randn(BATCH, attn.query_size, dtype=torch.float64)
    changed = replace(memory, **{name: getattr(memory, name) * 2, "prepared": None})
    context, _ = attn(query, changed)
    with torch.no_grad():
        torch.testing.assert_close(context, attn(query, changed)[0], **EXACT)
    context.sum().backward()  # type: ignore[no-untyped-call]
    assert (calls.part, calls.whole) == (0, 0)


@pytest.mark.parametrize(("kind", "prepared_within", "sums"), [
    ("additive", True, True), ("general", True, True), ("dot", True, True), ("additive", False, False),
])  # fmt: skip
def test_under_autocast(kind: str, prepared_within: bool, sums: bool, calls: Calls) -> None:
    """A memory that was prepared outside has another dtype, to which each step casts."""
    attn = MODULES[kind]()
    states, queries = encoder_states(torch.float32), queries_of(attn, torch.float32)

    def gradients(**changes: Any) -> tuple[Tensor, ...]:
        memory = None if prepared_within else attn.prepare(states, LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            memory = memory or attn.prepare(states, LENGTHS)
            total = outcome(attn, replace(memory, **changes), queries)
        return torch.autograd.grad(total, [states, *queries])

    found = gradients()
    assert (calls.part, calls.whole) == (STEPS * sums, 0)
    eps = torch.finfo(torch.bfloat16).eps
    for x, y in zip(found, gradients(steps=None), strict=True):
        assert x.dtype == torch.float32
        # A sum of the steps, each of which the other way rounds, and the rounded sums of before.
        torch.testing.assert_close(x, y, rtol=0, atol=(STEPS + 1) * eps * float(y.abs().max()))


def test_second_derivatives_name_the_way_out(attn: Attention, calls: Calls) -> None:
    states, queries = encoder_states(), queries_of(attn)
    total = outcome(attn, attn.prepare(states, LENGTHS), queries)
    first = torch.autograd.grad(total, [states], create_graph=True)
    assert (calls.part, calls.whole) == (0, STEPS)
    assert_equal(first, plainly(attn, states, queries, [states]))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(first[0].sum(), states)


def test_batches_of_gradients(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    context, _ = attn.eval()(queries[0], attn.prepare(states, LENGTHS))
    incoming = torch.randn(3, *context.shape, dtype=context.dtype)
    (found,) = torch.autograd.grad(context, states, incoming, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(context, states, one, retain_graph=True)[0] for one in incoming]
    torch.testing.assert_close(found, torch.stack(one_by_one), **EXACT)


@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_compiled_autograd(kind: str, calls: Calls) -> None:
    attn, states = MODULES[kind]().double(), encoder_states()
    queries = queries_of(attn)
    total = outcome(attn, attn.prepare(states, LENGTHS), queries)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()  # type: ignore[no-untyped-call]
    torch._dynamo.reset()
    assert calls.part == 0
    assert states.grad is not None
    assert_equal((states.grad,), plainly(attn, states, queries, [states]))


def test_only_where_there_is_a_gradient_to_sum() -> None:
    attn, states = MODULES["dot"]().double(), encoder_states()
    assert attn.prepare(states.detach()).steps is None
    memory = attn.prepare(states)
    assert memory.steps is not None
    with torch.no_grad():
        assert attn.prepare(states).steps is None
        assert memory.select(torch.tensor([0])).steps is None
    assert memory.to(dtype=torch.float32).steps is not None


def test_copies_have_none() -> None:
    """A copy's keys are leaves of their own, and get their gradients as such."""
    attn, states = MODULES["dot"]().double().eval(), encoder_states()
    memory, query = attn.prepare(states, LENGTHS), queries_of(attn)[0]
    (expected,) = plainly(attn, states, [query], [states])
    for one in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert one.steps is None
        outcome(attn, one, [query]).backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(one.key.grad, expected, **EXACT)


def test_states_may_change_in_place_before_the_first_step() -> None:
    """As a learnt memory does at an optimizer's step."""
    attn, states = MODULES["dot"]().double().eval(), encoder_states()
    memory, queries = attn.prepare(states, LENGTHS), queries_of(attn)
    with torch.no_grad():
        states.mul_(2)
    found = torch.autograd.grad(outcome(attn, memory, queries), [states])
    assert_equal(found, plainly(attn, states, queries, [states]))


def test_nothing_is_kept(attn: Attention, calls: Calls) -> None:
    """Without the garbage collector: no cycle holds the memory of a sentence."""
    gc.collect()
    gc.disable()
    try:
        states = encoder_states() * 1
        memory = attn.prepare(states, LENGTHS)
        total = outcome(attn, memory, queries_of(attn))
        kept = [weakref.ref(x) for x in (memory.key, memory.value, memory)]
        total.backward()  # type: ignore[no-untyped-call]
        assert (calls.part, calls.whole) == (STEPS, 0)
        del states, memory, total
        assert [x() for x in kept] == [None] * 3
    finally:
        gc.enable()


def test_the_operators_fit_their_schemas_and_refuse_other_weights() -> None:
    query, key, value, v = (torch.randn(shape) for shape in ((2, 3), (2, 5, 3), (2, 5, 4), (3,)))
    additive = (query, key, value, v, None, None, None, None, None, 1.0, 0.0)
    dot = (query, key, value, None, None, None, 1.0, 0.0)
    for op, inputs in ((ops.operators["cpu"].attention, additive), (ops.operators["cpu"].dot_attention, dot)):
        forward, _, part = ops.of_steps[op]
        torch.library.opcheck(forward, (*inputs, True), test_utils=("test_schema", "test_faketensor"))
        *_, wide = forward(*inputs, False)
        saved = (torch.randn(2, 4), None, *inputs)
        torch.library.opcheck(part, (*saved, wide), test_utils=("test_schema", "test_faketensor"))
        for wrong, message in ((wide.double(), "wide is not as"), (wide.mT, "wide has size"), (wide[0], "dimensions")):
            with pytest.raises(RuntimeError, match=message):
                part(*saved, wrong)


def test_the_operator_that_adds_fits_its_schema_and_refuses_other_sums() -> None:
    query, key, value, v = (torch.randn(shape) for shape in ((2, 3), (2, 5, 3), (2, 5, 4), (3,)))
    past = (torch.randn(4, 1, 3), torch.randn(3, 4), torch.rand(2, 5), None, None, None)
    inputs = (query, key, value, v, *past, None, None, None, None, 1.0, 0.0, 0)
    forward, _, part = ops.of_steps[ops.operators["cpu"].step]
    context, weights = forward(*inputs)
    saved = (torch.randn_like(context), None, *inputs, weights)
    torch.library.opcheck(part, (*saved, torch.zeros(2, 5, 3)), test_utils=("test_schema", "test_faketensor"))
    for wrong, message in (
        (torch.zeros(2, 5, 3, dtype=torch.float64), "dtype of the arithmetic"),
        (torch.zeros(2, 3, 5).mT, "must be contiguous"),
        (torch.zeros(2, 4, 3), "sum_key has size 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            part(*saved, wrong)
