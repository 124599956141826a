"""A prepared memory: rows taken from it, other devices and dtypes, and queries that share it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import attnext
from attnext import (
    BahdanauAttention,
    LocationSensitiveAttention,
    LuongAttention,
    Memory,
    MonotonicAttention,
    MultiHeadAttention,
    use_backend,
)

BATCH, KEYS, QUERY, STATES, SIZE = 4, 6, 5, 7, 8


@pytest.fixture
def attn() -> BahdanauAttention:
    return BahdanauAttention(QUERY, STATES, SIZE)


def memory_of(attn: BahdanauAttention, *, lengths: bool = True, mask: bool = True) -> Memory:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(BATCH, KEYS, STATES, generator=generator, dtype=attn.score_weight.dtype)
    visible = torch.rand(BATCH, KEYS, generator=generator) < 0.7
    return attn.prepare(states, torch.tensor([KEYS, 3, 0, 5]) if lengths else None, mask=visible if mask else None)


@pytest.mark.parametrize("rows", [[2, 0], [3, 3, 1, 0, 2], [], [1]], ids=str)
@pytest.mark.parametrize("hidden", [True, False])
def test_selected_rows_are_attended_as_in_the_whole(attn: BahdanauAttention, rows: list[int], hidden: bool) -> None:
    attn, query = attn.double(), torch.randn(BATCH, QUERY, dtype=torch.float64)
    memory = memory_of(attn, lengths=hidden, mask=hidden)
    indices = torch.tensor(rows, dtype=torch.int64)
    some = memory.select(indices)
    assert some.prepared is not None
    assert memory.prepared is not None
    assert torch.equal(some.prepared.exp_key, memory.prepared.exp_key[indices])
    expected = attn(query, memory, need_weights=True)
    actual = attn(query[indices], some, need_weights=True)
    for x, y in zip(actual, expected, strict=True):
        assert y is not None
        torch.testing.assert_close(x, y[indices], rtol=1e-12, atol=1e-14)


def test_gradients_reach_the_rows_that_were_taken(attn: BahdanauAttention) -> None:
    states = torch.randn(BATCH, KEYS, STATES, requires_grad=True)
    memory = attn.prepare(states).select(torch.tensor([1, 3, 1]))
    context, _ = attn(torch.randn(3, QUERY), memory)
    (grad,) = torch.autograd.grad(context.square().sum(), states)
    assert grad[[1, 3]].abs().amin((1, 2)).min() > 0
    assert grad[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("hidden", [True, False])
def test_in_another_dtype_it_is_what_prepare_would_have_made(attn: BahdanauAttention, hidden: bool) -> None:
    attn, query = attn.double(), torch.randn(BATCH, QUERY)
    memory = memory_of(attn, lengths=hidden, mask=hidden)
    moved = memory.to(dtype=torch.float32)
    assert {x.dtype for x in (moved.key, moved.value, moved.score_weight)} == {torch.float32}
    assert moved.prepared is not None
    assert moved.prepared.exp_key.dtype == torch.float32
    context, _ = attn(query.double(), memory)
    torch.testing.assert_close(attn.float()(query, moved)[0], context.float(), rtol=1e-5, atol=1e-6)
    assert memory.to("cpu") is memory
    assert memory.to(dtype=torch.float64) is memory


def test_on_another_device() -> None:
    attn = BahdanauAttention(QUERY, STATES, SIZE)
    memory = memory_of(attn)
    with pytest.warns(RuntimeWarning, match="meta"):  # which has no kernels, so that nothing is prepared
        moved = memory.to("meta")
    tensors = (moved.key, moved.value, moved.score_weight, moved.lengths, moved.mask)
    assert {x.device.type for x in tensors if x is not None} == {"meta"}
    assert moved.key.shape == memory.key.shape


def test_hypotheses_share_a_memory(attn: BahdanauAttention) -> None:
    memory, query = memory_of(attn), torch.randn(BATCH, 3, QUERY)
    context, weights, state = attn.step(query, memory, need_weights=True)
    assert state is None
    assert weights is not None
    for k in range(3):
        one, of_one, state = attn.step(query[:, k], memory, state, need_weights=True)
        torch.testing.assert_close((context[:, k], weights[:, k]), (one, of_one), rtol=1e-5, atol=1e-6)


def test_bad_arguments(attn: BahdanauAttention) -> None:
    memory = memory_of(attn)
    for error, name, call in (
        (ValueError, "indices must lie between 0 and 3, got 4", lambda: memory.select(torch.tensor([0, 4]))),
        (ValueError, "indices must lie between 0 and 3, got -1", lambda: memory.select(torch.tensor([-1]))),
        (TypeError, "indices must be a tensor of integers", lambda: memory.select(torch.tensor([True]))),
        (TypeError, "indices must be a torch.Tensor", lambda: memory.select([0])),  # type: ignore[arg-type]
        (ValueError, "indices must have 1 dimensions", lambda: memory.select(torch.tensor([[0]]))),
        (TypeError, "dtype must be", lambda: memory.to(dtype=torch.int64)),
        (TypeError, "state must be None", lambda: attn.step(torch.randn(BATCH, QUERY), memory, 1)),  # type: ignore[arg-type]
        (TypeError, "memory must be", lambda: attn.step(torch.randn(BATCH, QUERY), memory.value)),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=name):
            call()


# More slots hidden, and memories without a history.

ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "additive": lambda: BahdanauAttention(QUERY, STATES, SIZE),
    "sparsemax": lambda: BahdanauAttention(QUERY, STATES, SIZE, normalizer="sparsemax"),
    "general": lambda: LuongAttention(QUERY, STATES),
    "heads": lambda: MultiHeadAttention(QUERY, STATES, SIZE, heads=2, score="additive"),
    "location": lambda: LocationSensitiveAttention(QUERY, STATES, SIZE, filters=3, kernel_size=3),
    "monotonic": lambda: MonotonicAttention(QUERY, STATES, SIZE),
}
LENGTHS = torch.tensor([KEYS, 3, 0, 5])
MASKS = torch.rand(3, BATCH, KEYS, generator=torch.Generator().manual_seed(1)) < 0.6


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("start", ["nothing hidden", "some hidden"])
def test_each_step_hides_other_slots(make: Callable[[], nn.Module], start: str, name: str) -> None:
    """As memories prepared with those masks give it, gradients of the states included."""
    attn: Any = make().double()
    states = torch.randn(BATCH, KEYS, STATES, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(3, BATCH, QUERY, dtype=torch.float64)
    first = MASKS[0] if start == "some hidden" else None
    found, expected = [], []
    with use_backend(name):
        memory, state, others = attn.prepare(states, mask=first), None, None
        for query, mask in zip(queries, MASKS, strict=True):
            context, weights, state = attn.step(query, memory.with_mask(mask), state, need_weights=True)
            found += [context, weights]
            anew = attn.prepare(states, mask=mask if first is None else mask & first)
            context, weights, others = attn.step(query, anew, others, need_weights=True)
            expected += [context, weights]
    leaves = [states, *attn.parameters()]
    factors = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape) for y in found]
    for results in (found, expected):
        results.extend(torch.autograd.grad(results, leaves, factors, materialize_grads=True, allow_unused=True))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_lengths_hide_more(make: Callable[[], nn.Module]) -> None:
    attn: Any = make()
    states, query = torch.randn(BATCH, KEYS, STATES), torch.randn(BATCH, QUERY)
    shorter = torch.tensor([2, 4, 1, 5])
    memory = attn.prepare(states, LENGTHS, MASKS[0]).with_lengths(shorter).with_mask(MASKS[1])
    anew = attn.prepare(states, LENGTHS.minimum(shorter), MASKS[0] & MASKS[1])
    for x, y in zip(attn(query, memory, need_weights=True), attn(query, anew, need_weights=True), strict=True):
        torch.testing.assert_close(x, y)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(attn(query[rows], memory.select(rows))[0], attn(query, anew)[0][rows])
    torch.testing.assert_close(attn.double()(query.double(), memory.to(dtype=torch.float64))[0].float(),
                               attn(query.double(), anew.to(dtype=torch.float64))[0].float())  # fmt: skip


@pytest.mark.parametrize("functions", [False, True], ids=["module", "function"])
def test_what_stands_in_slots_hidden_later_reaches_nothing(attn: BahdanauAttention, functions: bool) -> None:
    states = torch.randn(BATCH, KEYS, STATES)
    states[~MASKS[0]] = torch.nan
    states.requires_grad_()
    if functions:
        keys = attn.memory_projection(states)
        memory = attnext.prepare(keys, states, attn.score_weight).with_mask(MASKS[0])
        context, _ = attnext.additive_attention(attn.query_projection(torch.randn(BATCH, QUERY)), memory)
    else:
        context, _ = attn(torch.randn(BATCH, QUERY), attn.prepare(states).with_mask(MASKS[0]))
    context.sum().backward()
    assert context.isfinite().all()
    assert states.grad is not None
    assert states.grad[MASKS[0]].isfinite().all()


def test_values_of_slots_hidden_later_are_not_taken_for_cleared() -> None:
    """Of an attention that multiplies them with weights of 0."""
    attn, states = BahdanauAttention(QUERY, STATES, SIZE, normalizer="sparsemax"), torch.randn(BATCH, KEYS, STATES)
    states[:, 4] = torch.nan
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    mask[:, 4] = False
    with torch.no_grad():
        context, weights = attn(
            torch.randn(BATCH, QUERY), attn.prepare(states, LENGTHS).with_mask(mask), need_weights=True
        )
    assert context.isfinite().all()
    assert weights is not None
    assert (weights[:, 4] == 0).all()


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_slots_are_not_replaced(make: Callable[[], nn.Module]) -> None:
    attn: Any = make().requires_grad_(False)
    memory = attn.prepare(torch.randn(BATCH, KEYS, STATES), LENGTHS, MASKS[0])
    for change in ({"mask": MASKS[1]}, {"mask": None}, {"lengths": LENGTHS.clone()}):
        with pytest.raises(ValueError, match=r"can't be replaced: memory\.with_mask\(mask\)"):
            replace(memory, **change)
    copied = copy.deepcopy(memory)  # whose tensors are others
    assert torch.equal(copied.with_mask(MASKS[1]).mask, memory.with_mask(MASKS[1]).mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (None, TypeError, "mask must be a torch.Tensor, got NoneType"),
        (torch.ones(BATCH, KEYS), TypeError, "mask must be a bool tensor"),
        (torch.ones(BATCH, 1, KEYS).bool(), ValueError, "mask must have 2 dimensions"),
        (torch.ones(2 * BATCH, KEYS).bool(), ValueError, "mask must have size 4 in dimension 0"),
    ],
)
def test_bad_masks(mask: Any, error: type[Exception], message: str) -> None:
    memory = MultiHeadAttention(QUERY, STATES, SIZE, heads=2).prepare(torch.randn(BATCH, KEYS, STATES))
    with pytest.raises(error, match=message):
        memory.with_mask(mask)
    with pytest.raises(ValueError, match="lengths must lie between 0 and the number of keys, 6, got 7"):
        memory.with_lengths(torch.tensor([7, 1, 1, 1]))


def test_a_detached_memory(attn: BahdanauAttention) -> None:
    states = torch.randn(BATCH, KEYS, STATES, requires_grad=True)
    memory, query = attn.prepare(states), torch.randn(BATCH, QUERY, requires_grad=True)
    whole, ended = attn(query, memory)[0], attn(query, memory.detach())[0]
    assert torch.equal(whole, ended)
    ended.sum().backward()
    assert states.grad is attn.memory_projection.weight.grad is None
    assert query.grad is not None
    assert attn.score_weight.grad is None
    dot = LuongAttention(STATES, STATES, score="dot").prepare(states).detach()
    assert dot.shared


def test_a_memory_shows_its_sizes(attn: BahdanauAttention) -> None:
    with use_backend("cpu"):
        shown = repr(memory_of(attn, mask=False))
    assert shown == (
        "Memory(batch=4, keys=6, key_size=8, value_size=7, torch.float32, device='cpu', lengths, prepared by cpu)"
    )
    heads = MultiHeadAttention(QUERY, STATES, SIZE, heads=2).prepare(torch.randn(BATCH, KEYS, STATES), mask=MASKS[0])
    assert (memory_of(attn).shape, heads.shape) == ((BATCH, KEYS, STATES), (BATCH, KEYS, SIZE))
    assert (
        repr(heads) == "Memory(batch=4, keys=6, key_size=4, value_size=4, heads=2, torch.float32, device='cpu', mask)"
    )


def test_a_dtype_alone(attn: BahdanauAttention) -> None:
    memory = memory_of(attn)
    assert memory.to(torch.float64).key.dtype == memory.to(dtype=torch.float64).key.dtype == torch.float64
    with pytest.raises(TypeError, match=r"device must be a device, got torch\.float64"):
        memory.to(torch.float64, torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be float32, float64, float16 or bfloat16, got torch\.int64"):
        memory.to(torch.int64)


def test_a_memory_with_gradients_is_saved(attn: BahdanauAttention) -> None:
    """And read without the arbitrary code of pickles."""
    memory, query, file = memory_of(attn), torch.randn(BATCH, QUERY), io.BytesIO()
    assert memory.steps is not None
    torch.save(memory, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.steps is None
    assert torch.equal(attn(query, loaded)[0], attn(query, memory)[0])
