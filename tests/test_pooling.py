"""Attention pooling against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnext import AttentionPooling, use_backend

BATCH, KEYS, MEMORY, SIZE = 3, 7, 6, 9
LENGTHS = torch.tensor([KEYS, 0, 4])


def module(gated: bool, dtype: torch.dtype = torch.float64) -> AttentionPooling:
    pool = AttentionPooling(MEMORY, SIZE, gated=gated).to(dtype)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    return pool


def formula(pool: AttentionPooling, states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    p = dict(pool.named_parameters())
    features = torch.tanh(states @ p["memory_projection.weight"].T + p["bias"])
    if "gate_projection.weight" in p:
        gate = states @ p["gate_projection.weight"].T + p["gate_projection.bias"]
        features = features / (1 + (-gate).exp())
    size = ((features * p["score_weight"]).sum(-1)).exp() * visible
    weights = size / size.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weights[:, :, None] * states).sum(1), weights


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("hidden", ["", "lengths", "mask"])
def test_against_the_formula(gated: bool, backend: str, hidden: str) -> None:
    pool, states = module(gated), torch.randn(BATCH, KEYS, MEMORY, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(BATCH, KEYS, dtype=torch.bool)
    if hidden == "lengths":
        visible = torch.arange(KEYS) < LENGTHS[:, None]
    if hidden == "mask":
        visible = torch.rand(BATCH, KEYS) < 0.6
    with use_backend(backend):
        pooled, weights = pool(
            states,
            lengths=LENGTHS if hidden == "lengths" else None,
            mask=visible if hidden == "mask" else None,
            need_weights=True,
        )
        leaves, grad = (states, *pool.parameters()), torch.randn_like(pooled)
        actual = torch.autograd.grad((pooled * grad).sum() + weights.square().sum(), leaves)
    expected = formula(pool, states, visible)
    torch.testing.assert_close((pooled, weights), expected, rtol=1e-10, atol=1e-12)
    expected_grads = torch.autograd.grad((expected[0] * grad).sum() + expected[1].square().sum(), leaves)
    torch.testing.assert_close(actual, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_nan_reaches_nothing(gated: bool) -> None:
    pool, states = module(gated), torch.randn(BATCH, KEYS, MEMORY, dtype=torch.float64)
    results = []
    for bad in (0.0, torch.nan):
        x = states.masked_fill((torch.arange(KEYS) >= LENGTHS[:, None])[:, :, None], bad)
        pooled, _ = pool(x, lengths=LENGTHS)
        results.append((pooled, *torch.autograd.grad(pooled.sum(), list(pool.parameters()))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_half_types(gated: bool, dtype: torch.dtype) -> None:
    pool, states = AttentionPooling(MEMORY, SIZE, gated=gated).to(dtype), torch.randn(BATCH, KEYS, MEMORY, dtype=dtype)
    pooled, weights = pool(states, need_weights=True)
    assert weights is not None
    assert pooled.dtype == weights.dtype == dtype
    exact = formula(pool.double(), states.double(), torch.ones(BATCH, KEYS, dtype=torch.bool))
    # Scores below 1 in size, off by a few roundings, and weights below 1.
    torch.testing.assert_close(weights.double(), exact[1], rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_are_dropped_in_training_alone(gated: bool, backend: str) -> None:
    pool, states = AttentionPooling(MEMORY, SIZE, gated=gated, dropout=0.5), torch.randn(BATCH, 100, MEMORY)
    with use_backend(backend):
        trained = pool(states, need_weights=True)[1]
        asked = pool.eval()(states, need_weights=True)[1]
    assert trained is not None
    assert asked is not None
    assert 0.3 < float((trained == 0).double().mean()) < 0.7
    assert not (asked == 0).any()
    torch.testing.assert_close(asked.sum(1), torch.ones(BATCH))


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_whole(gated: bool) -> None:
    pool, states = module(gated), torch.randn(BATCH, KEYS, MEMORY, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states, lengths=LENGTHS)[0], pool(states, lengths=LENGTHS)[0])


def test_a_large_bag() -> None:
    pool, bag = AttentionPooling(4, 8, gated=True), torch.randn(1, 100_000, 4)
    pooled, weights = pool(bag, need_weights=True)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        pooled, formula(pool.double(), bag.double(), torch.ones(1, 100_000))[0].float(), rtol=1e-3, atol=1e-6
    )


def test_bad_arguments() -> None:
    pool = AttentionPooling(MEMORY, SIZE)
    for name, x, options in (
        ("states", torch.randn(BATCH, MEMORY), {}),
        ("states", torch.randn(BATCH, KEYS, MEMORY + 1), {}),
        ("lengths", torch.randn(BATCH, KEYS, MEMORY), {"lengths": torch.tensor([1])}),
        ("mask", torch.randn(BATCH, KEYS, MEMORY), {"mask": torch.ones(BATCH, 2, KEYS).bool()}),
    ):
        with pytest.raises(ValueError, match=name):
            pool(x, **options)
    with pytest.raises(ValueError, match="attention_size"):
        AttentionPooling(MEMORY, 0)
