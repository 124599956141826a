"""A memory's gradients over many steps: the sums are those that automatic differentiation makes of the steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from attnext import BahdanauAttention, LuongAttention, Memory, MultiHeadAttention, ops, use_backend
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
EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""Of float64: sums of a few hundred numbers of about 1."""


@pytest.fixture(params=MODULES)
def attn(request: pytest.FixtureRequest) -> Attention:
    return MODULES[request.param]().double()


@pytest.fixture(autouse=True)
def sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that makes its gradients anew fails, but where a test asks for that."""

    def fail(*_: object) -> NoReturn:
        raise AssertionError("gradients of keys and values were made anew")

    for op, backward in list(ops.summing.items()):
        monkeypatch.setitem(ops.summing, op, backward._replace(whole=fail))


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, sums_alone: None) -> None:
    for name in ("additive_attention", "dot_attention"):
        op = getattr(torch.ops.attnext, f"{name}_cpu").default
        backward = getattr(torch.ops.attnext, f"{name}_backward_cpu").default
        monkeypatch.setitem(ops.summing, op, ops.summing[op]._replace(whole=backward))


def encoder_states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, KEYS, STATES, dtype=dtype, requires_grad=True)


LENGTHS = torch.tensor([KEYS, 3, 0, 70])


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


def test_gradients_are_those_of_the_reference(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    inputs = [states, *queries, *attn.parameters()]
    memory = attn.prepare(states, LENGTHS)
    assert memory.steps is not None
    found = torch.autograd.grad(outcome(attn, memory, queries), inputs)
    with use_backend("reference"):
        expected = torch.autograd.grad(outcome(attn, attn.prepare(states, LENGTHS), queries), inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **EXACT)
    assert found[0][1, 3:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """The sum of 300 steps is rounded to the type once: rounded at each, it would be off by several per cent."""
    torch.manual_seed(0)
    value = (1 + torch.rand(1, 2, STATES)).to(dtype).requires_grad_()
    attn = LuongAttention(STATES, STATES, score="dot").to(dtype)
    memory = attn.prepare(value)
    query = torch.zeros(1, STATES, dtype=dtype)
    total = torch.stack([attn(query, memory)[0] for _ in range(300)]).float().sum()
    (found,) = torch.autograd.grad(total, value)
    torch.testing.assert_close(found, torch.full_like(found, 150), rtol=torch.finfo(dtype).eps, atol=0)


def test_other_gradients_leave_no_sums(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    total = outcome(attn, memory, queries)
    of_queries = torch.autograd.grad(total, queries, retain_graph=True)
    found = torch.autograd.grad(total, [states, *queries], retain_graph=True)
    again = torch.autograd.grad(total, [states, *queries])
    plain = outcome(attn, replace(attn.prepare(states, LENGTHS), steps=None), queries)
    expected = torch.autograd.grad(plain, [states, *queries])
    for x, y, z in zip(found, again, expected, strict=True):
        torch.testing.assert_close(x, z, **EXACT)
        torch.testing.assert_close(y, z, **EXACT)
    for x, z in zip(of_queries, expected[1:], strict=True):
        torch.testing.assert_close(x, z, **EXACT)


def test_a_pass_that_was_broken_off_leaves_no_sums(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    doubled = queries[0] * 2  # whose step is the last of the pass

    def stop(_: Tensor) -> NoReturn:
        raise KeyboardInterrupt

    total = outcome(attn, memory, [doubled, *queries[1:]])
    hook = doubled.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(total, [states, *queries], retain_graph=True)
    hook.remove()
    (found,) = torch.autograd.grad(total, states, retain_graph=True)
    (expected,) = torch.autograd.grad(outcome(attn, attn.prepare(states, LENGTHS), [doubled, *queries[1:]]), states)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_hook_on_the_keys_sees_the_whole_gradient() -> None:
    attn = MODULES["additive"]().double()
    states, queries = encoder_states(), queries_of(attn)
    memory = attn.prepare(states, LENGTHS)
    seen: list[Tensor] = []
    hook = memory.key.register_hook(seen.append)
    outcome(attn, memory, queries).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    hook.remove()
    (expected,) = torch.autograd.grad(outcome(attn, memory, queries), memory.key)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, **EXACT)


def test_rows_that_were_taken_have_sums_of_their_own(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    rows = torch.tensor([3, 1, 3])

    def total(memory: Memory) -> Tensor:
        few = memory.select(rows)
        assert (few.steps is None) == (memory.steps is None)
        return outcome(attn, memory, queries) + outcome(attn, few, [x[rows] for x in queries])

    (found,) = torch.autograd.grad(total(attn.prepare(states, LENGTHS)), states)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(total(attn.prepare(states, LENGTHS)), states)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("prepared_within", [True, False])
@pytest.mark.parametrize("kind", ["additive", "general", "dot"])
def test_under_autocast(kind: str, prepared_within: bool) -> None:
    attn = MODULES[kind]()
    states, queries = encoder_states(torch.float32), queries_of(attn, torch.float32)

    def gradients(**changes: Any) -> tuple[Tensor, ...]:
        memory = None if prepared_within else attn.prepare(states, LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            memory = memory or attn.prepare(states, LENGTHS)
            total = outcome(attn, replace(memory, **changes), queries)
        return torch.autograd.grad(total, [states, *queries])

    eps = torch.finfo(torch.bfloat16).eps
    for x, y in zip(gradients(), gradients(steps=None), strict=True):
        assert x.dtype == torch.float32
        # A sum of the steps, each of which the other way rounds, and the rounded sums of before.
        torch.testing.assert_close(x, y, rtol=0, atol=(STEPS + 1) * eps * float(y.abs().max()))


@pytest.mark.usefixtures("anew")
def test_second_derivatives_name_the_way_out(attn: Attention) -> None:
    states, queries = encoder_states(), queries_of(attn)
    (first,) = torch.autograd.grad(outcome(attn, attn.prepare(states), queries), states, create_graph=True)
    (plain,) = torch.autograd.grad(outcome(attn, replace(attn.prepare(states), steps=None), queries), states)
    torch.testing.assert_close(first, plain, **EXACT)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(first.sum(), states)


def test_only_where_there_is_a_gradient_to_sum() -> None:
    attn = MODULES["dot"]().double()
    states = encoder_states()
    assert attn.prepare(states.detach()).steps is None
    memory = attn.prepare(states)
    assert memory.steps is not None
    with torch.no_grad():
        assert attn.prepare(states).steps is None
        assert memory.select(torch.tensor([0])).steps is None
    converted = memory.to(dtype=torch.float32)
    assert converted.steps is not None
    assert converted.steps.key.dtype == torch.float32


def test_nothing_is_kept(attn: Attention) -> None:
    """Without the garbage collector: no cycle holds the memory of a sentence."""
    gc.collect()
    gc.disable()
    try:
        states = encoder_states() * 1
        memory = attn.prepare(states, LENGTHS)
        total = outcome(attn, memory, queries_of(attn))
        kept = [weakref.ref(x) for x in (memory.key, memory.value, memory)]
        total.backward()  # type: ignore[no-untyped-call]
        del states, memory, total
        assert [x() for x in kept] == [None] * 3
    finally:
        gc.enable()


def test_the_operators_fit_their_schemas_and_refuse_other_sums() -> None:
    query, key, value, v = (torch.randn(shape) for shape in ((2, 3), (2, 5, 3), (2, 5, 4), (3,)))
    additive = (query, key, value, v, None, None, None, None, None, 1.0, 0.0)
    dot = (query, key, value, None, None, None, 1.0, 0.0)
    sums = (torch.zeros(2, 5, 3), torch.zeros(2, 5, 4))
    cpu = torch.ops.attnext
    for inputs, forward, into in (
        (additive, cpu.additive_attention_cpu, cpu.additive_attention_backward_into_cpu.default),
        (dot, cpu.dot_attention_cpu, cpu.dot_attention_backward_into_cpu.default),
    ):
        saved = (torch.randn(2, 4), None, *inputs, *forward(*inputs, False))
        torch.library.opcheck(into, (*saved, *sums), test_utils=("test_schema", "test_faketensor"))
        for wrong, message in (
            (torch.zeros(2, 5, 3, dtype=torch.float64), "dtype of the arithmetic"),
            (torch.zeros(2, 3, 5).mT, "must be contiguous"),
            (torch.zeros(2, 4, 3), "sum_key has size 4"),
        ):
            with pytest.raises(RuntimeError, match=message):
                into(*saved, wrong, sums[1])
    with pytest.raises(RuntimeError, match="sum_value goes with value"):
        into(*saved, sums[0], None)
