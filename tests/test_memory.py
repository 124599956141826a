"""A prepared memory: rows taken from it, other devices and dtypes, and queries that share it."""

from __future__ import annotations

import pytest
import torch

from attnext import BahdanauAttention, Memory

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
