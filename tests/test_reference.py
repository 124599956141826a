"""The reference against loops that are too plain to be wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnext import reference

INPUTS = {"batch": 2, "queries": 3, "keys": 5, "features": 4, "values": 6}


def inputs(requires_grad: bool = False) -> list[Tensor]:
    b, tq, tk, d, h = INPUTS.values()
    shapes = ((b, tq, d), (b, tk, d), (b, tk, h), (d,))
    return [torch.randn(s, dtype=torch.float64).requires_grad_(requires_grad) for s in shapes]


def attend_in_loops(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, queries, keys = visible.shape
    context = torch.zeros(batch, queries, value.shape[2], dtype=torch.float64)
    weights = torch.zeros(batch, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for i in range(queries):
            scores = {
                j: scale * sum(float(v[d]) * math.tanh(float(query[b, i, d] + key[b, j, d])) for d in range(len(v)))
                for j in range(keys)
                if visible[b, i, j]
            }
            total = sum(math.exp(s) for s in scores.values())
            for j, s in scores.items():
                weights[b, i, j] = math.exp(s) / total
                context[b, i] += math.exp(s) / total * value[b, j]
    return context, weights


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_attention_equals_loops(scale: float) -> None:
    query, key, value, v = inputs()
    lengths = torch.tensor([5, 3])
    mask = torch.rand(2, 3, 5) < 0.6
    mask[0, 1] = False  # a query that may attend nothing
    visible = mask & (torch.arange(5) < lengths.view(2, 1, 1))
    context, weights = reference.additive_attention(
        query, key, value, v, lengths=lengths, mask=mask, scale=scale, need_weights=True
    )
    expected = attend_in_loops(query, key, value, v, visible, scale)
    torch.testing.assert_close((context, weights), expected, rtol=1e-12, atol=1e-14)
    assert weights is not None
    assert (weights[0, 1] == 0).all()
    assert (context[0, 1] == 0).all()


def test_scores_equal_loops() -> None:
    query, key, _, v = inputs()
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    scores = reference.additive_scores(query, key, v, mask=mask, scale=2.0)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        expected = 2 * sum(float(v[d]) * math.tanh(float(query[b, i, d] + key[b, j, d])) for d in range(4))
        assert float(scores[b, i, j]) == pytest.approx(expected if mask[b, j] else -math.inf, rel=1e-12)


def test_a_query_of_two_dimensions_is_one_query() -> None:
    query, key, value, v = inputs()
    context, weights = reference.additive_attention(query[:, 0], key, value, v, need_weights=True)
    expected = reference.additive_attention(query[:, :1], key, value, v, need_weights=True)
    assert weights is not None
    assert expected[1] is not None
    torch.testing.assert_close((context, weights), (expected[0][:, 0], expected[1][:, 0]))


def test_second_derivatives_are_right() -> None:
    lengths = torch.tensor([5, 0])

    def attend(*x: Tensor) -> Tensor:
        return reference.additive_attention(*x, lengths=lengths)[0]

    assert torch.autograd.gradgradcheck(attend, inputs(requires_grad=True))


def test_nan_in_hidden_slots_reaches_nothing() -> None:
    query, key, value, v = inputs()
    key[0, 2], value[0, 2] = torch.nan, torch.inf
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, 1:, 2] = False  # hidden from all queries but the first, which sees the NaN
    x = [t.requires_grad_() for t in (query, key, value, v)]
    context, _ = reference.additive_attention(*x, mask=mask)
    assert context[0, 0].isnan().all()
    assert context[0, 1:].isfinite().all()
    grad_query = torch.autograd.grad(context.sum(), x)[0]
    assert grad_query[0, 1:].isfinite().all()
    assert grad_query[1].isfinite().all()


class TestDropout:
    def test_drops_the_share_it_was_asked_for(self) -> None:
        keep = reference.dropout_keep(torch.tensor(12345), (20, 50, 400), 0.3).double()
        # 400,000 draws: the standard error of the share is 7e-4.
        assert float(keep.mean()) == pytest.approx(0.7, abs=4e-3)
        # Rows and columns are independent: their means scatter as those of 400 and 1000 draws do.
        assert float(keep.mean(2).std()) == pytest.approx((0.21 / 400) ** 0.5, rel=0.1)
        assert float(keep.mean((0, 1)).std()) == pytest.approx((0.21 / 1000) ** 0.5, rel=0.2)

    def test_is_a_function_of_the_seed(self) -> None:
        shape = (2, 3, 100)
        a = reference.dropout_keep(torch.tensor(1), shape, 0.5)
        assert torch.equal(a, reference.dropout_keep(torch.tensor(1), shape, 0.5))
        for seed in (2, 1 + 2**32):  # both halves of the seed count
            other = reference.dropout_keep(torch.tensor(seed), shape, 0.5)
            assert float((a == other).double().mean()) == pytest.approx(0.5, abs=0.1)

    @pytest.mark.parametrize(("p", "kept"), [(0.0, True), (1.0, False)])
    def test_keeps_all_or_nothing_at_the_ends(self, p: float, kept: bool) -> None:
        assert (reference.dropout_keep(torch.tensor(3), (2, 3, 50), p) == kept).all()
