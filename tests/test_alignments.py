"""The weighting rules against their definitions, and where numbers end: masks, empty rows, extremes, half types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnext import reference
from attnext.alignments import coverage_loss, forward_weights, monotonic_weights, normalize

NORMALIZERS = ("softmax", "sigmoid", "sparsemax", "entmax15")
KEYS = (1, 2, 3, 17, 64, 130)
BATCHES = ((2,), (2, 3))
HALF = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("one_thread")
sizes = pytest.mark.parametrize("keys", KEYS)
batches = pytest.mark.parametrize("batch", BATCHES, ids=str)

Function = Callable[..., Tensor]


def drawn_scores(batch: tuple[int, ...], keys: int, spread: float = 2.0) -> Tensor:
    """Random scores; the first row is whole, the last one all hidden, those between end early and have holes."""
    scores = spread * torch.randn(*batch, keys, dtype=torch.float64)
    lengths = torch.randint(1, keys + 1, batch).unsqueeze(-1)
    hidden = (torch.arange(keys) >= lengths) | (torch.rand_like(scores) < 0.2)
    rows = hidden.view(-1, keys)
    rows[0], rows[-1] = False, True
    return scores.masked_fill(hidden, -torch.inf)


def drawn_weights(batch: tuple[int, ...], keys: int) -> Tensor:
    return torch.randn(*batch, keys, dtype=torch.float64).softmax(-1)


def one_hot(position: int, keys: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.arange(keys) == position).to(dtype)


def run(function: Function, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradient of a fixed weighted sum of it to each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    cotangent = torch.linspace(-1.0, 9.0, result.numel(), dtype=torch.float64).cos().view(result.shape)
    cotangent = (64 * cotangent).round() / 64  # exact in every dtype
    return result.detach(), list(torch.autograd.grad(result, leaves, cotangent.to(result.dtype)))


def same(function: Function, definition: Function, *inputs: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Values and gradients agree; the definition sees the inputs in float64."""
    result, grads = run(function, *inputs)
    expected, expected_grads = run(definition, *(x.double() for x in inputs))
    assert result.dtype == inputs[0].dtype
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=atol)


def all_finite(function: Function, *inputs: Tensor) -> Tensor:
    result, grads = run(function, *inputs)
    for x in (result, *grads):
        assert x.isfinite().all()
    return result


def coverage_in_words(weights: Tensor, coverage: Tensor) -> Tensor:
    return torch.where(weights < coverage, weights, coverage).sum(-1)


def as_half(dtype: torch.dtype, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One rounding, of a float32 result, to the half type; near 0, the error of float32 and the smallest float16."""
    return {"rtol": torch.finfo(dtype).eps, "atol": 2e-6}


# normalize


@sizes
@batches
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_equal_definition(normalizer: str, batch: tuple[int, ...], keys: int) -> None:
    scores = drawn_scores(batch, keys)
    same(lambda x: normalize(x, normalizer), lambda x: reference.normalize(x, normalizer), scores)
    weights = normalize(scores, normalizer)
    assert (weights >= 0).all()
    visible = scores > -torch.inf
    assert (weights[~visible] == 0).all()
    torch.testing.assert_close(weights.sum(-1), visible.any(-1).double())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_in_half_types(normalizer: str, dtype: torch.dtype) -> None:
    same(
        lambda x: normalize(x, normalizer),
        lambda x: reference.normalize(x, normalizer),
        *as_half(dtype, drawn_scores((2, 3), 64)),
        **tolerance(dtype),
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_at_extremes(normalizer: str) -> None:
    ends = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4]])
    hidden = torch.full((4,), -torch.inf)
    weights = all_finite(partial(normalize, normalizer=normalizer), torch.cat([ends, hidden[None]]))
    even = torch.full((4,), 0.25)
    # A sigmoid makes the score 0 half as heavy as 1e4; to every other rule it is nothing.
    first = [0.4, 0.0, 0.2, 0.4] if normalizer == "sigmoid" else [0.5, 0.0, 0.0, 0.5]
    torch.testing.assert_close(weights, torch.stack([torch.tensor(first), even, even, torch.zeros(4)]))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_on_long_rows_in_float32(normalizer: str, spread: float) -> None:
    scores = spread * torch.randn(3, 2000)
    scores[1, 7:] = -torch.inf
    weights = all_finite(partial(normalize, normalizer=normalizer), scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    # In float64 the same from the same scores: sums over 2000 slots have not worn the threshold away.
    torch.testing.assert_close(weights.double(), normalize(scores.double(), normalizer), rtol=1e-4, atol=1e-6)


def test_sparse_weights_by_hand() -> None:
    scores = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        normalize(scores, "sparsemax"), torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64), rtol=0, atol=1e-15
    )
    # Halves 0.5 and 0.25 leave tau with (0.5 - tau)**2 + (0.25 - tau)**2 = 1.
    tau = 0.375 - (0.5 - 0.125**2) ** 0.5
    expected = torch.tensor([(0.5 - tau) ** 2, (0.25 - tau) ** 2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(normalize(scores, "entmax15"), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(normalize(scores * 10, "sparsemax"), torch.tensor([1.0, 0.0, 0.0]).double())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_gradcheck(normalizer: str) -> None:
    scores = drawn_scores((2, 3), 7, spread=1.0).requires_grad_()
    function = partial(normalize, normalizer=normalizer)
    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


# monotonic_weights


@sizes
@batches
@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_monotonic_equals_definition(mode: str, batch: tuple[int, ...], keys: int) -> None:
    energies, previous = drawn_scores(batch, keys), drawn_weights(batch, keys)
    same(partial(monotonic_weights, mode=mode), reference.monotonic_weights, energies, previous)
    same(
        partial(monotonic_weights, mode=mode),
        reference.monotonic_weights,
        energies,
        one_hot(0, keys).expand(*batch, keys),
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_monotonic_in_half_types(mode: str, dtype: torch.dtype) -> None:
    inputs = as_half(dtype, drawn_scores((2, 3), 64), drawn_weights((2, 3), 64))
    same(partial(monotonic_weights, mode=mode), reference.monotonic_weights, *inputs, **tolerance(dtype))


@pytest.mark.parametrize("bias", [-8.0, 0.0, 3.0])
def test_monotonic_parallel_equals_recursive_on_a_long_row(bias: float) -> None:
    energies = torch.randn(2, 2000) + bias
    previous = torch.stack([one_hot(0, 2000), drawn_weights((), 2000)]).float()
    assert bias < 0 or (-energies).sigmoid().prod(-1).eq(0).all()  # what the paper's closed form would divide by
    parallel = run(partial(monotonic_weights, mode="parallel"), energies, previous)
    recursive = run(partial(monotonic_weights, mode="recursive"), energies.double(), previous.double())
    torch.testing.assert_close(parallel[0].double(), recursive[0], rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(parallel[1], recursive[1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_monotonic_at_extremes(mode: str) -> None:
    """Probabilities of exactly 0 and 1 move all the weight to the next sure stop, over masked slots too."""
    sure, never, hidden = 1e4, -1e4, -torch.inf
    energies = torch.tensor(
        [
            [never, hidden, sure, sure, never],
            [sure, sure, sure, sure, sure],
            [never, never, never, never, never],
            [hidden, hidden, hidden, hidden, hidden],
        ]
    )
    previous = one_hot(1, 5, torch.float32).expand(4, 5)
    weights = all_finite(partial(monotonic_weights, mode=mode), energies, previous)
    expected = torch.zeros(4, 5)
    expected[0, 2] = expected[1, 1] = 1
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_monotonic_goes_on_past_a_nearly_sure_stop(mode: str) -> None:
    weights = monotonic_weights(torch.tensor([20.0, 0.0]), torch.tensor([1.0, 0.0]), mode)
    torch.testing.assert_close(weights[1], torch.tensor(-20.0).sigmoid() / 2, rtol=1e-5, atol=0)  # float32's 1 - p is 0


@pytest.mark.parametrize("mode", ["parallel", "recursive"])
def test_monotonic_gradcheck(mode: str) -> None:
    inputs = drawn_scores((2, 2), 6).requires_grad_(), drawn_weights((2, 2), 6).requires_grad_()
    assert torch.autograd.gradcheck(partial(monotonic_weights, mode=mode), inputs)


@sizes
@batches
def test_hard_stops_at_the_first_key(batch: tuple[int, ...], keys: int) -> None:
    energies = drawn_scores(batch, keys)
    starts = torch.randint(0, keys + 1, batch)  # `keys` is a row whose previous weights are all 0
    previous = (torch.arange(keys) == starts.unsqueeze(-1)).double()
    weights = monotonic_weights(energies, previous, "hard")
    rows = zip(energies.view(-1, keys), starts.view(-1), weights.view(-1, keys), strict=True)
    for energy, start, row in rows:
        stop = next((j for j in range(int(start), keys) if energy[j].sigmoid() > 0.5), keys)
        assert row.equal(one_hot(stop, keys))


def test_hard_by_hand() -> None:
    hidden = -torch.inf
    energies = torch.tensor([2.0, -1.0, hidden, 0.0, 3.0, 4.0], dtype=torch.float16)
    found = [monotonic_weights(energies, one_hot(k, 6), "hard") for k in range(7)]
    assert [row.tolist().index(1) if row.any() else None for row in found] == [0, 4, 4, 4, 4, 5, None]
    assert all(row.dtype == torch.float16 for row in found)
    # The first of several starts counts.
    assert monotonic_weights(energies, torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.9]), "hard").argmax() == 4


# forward_weights


@sizes
@batches
@pytest.mark.parametrize("agent", [False, True])
def test_forward_equals_definition(agent: bool, batch: tuple[int, ...], keys: int) -> None:
    scores, previous = drawn_scores(batch, keys), drawn_weights(batch, keys)
    u = torch.rand(*batch, 1, dtype=torch.float64)
    if agent:
        same(forward_weights, reference.forward_weights, scores, previous, u)
    else:
        same(forward_weights, partial(reference.forward_weights, transition=None), scores, previous)
    weights = forward_weights(scores, previous, u if agent else None)
    torch.testing.assert_close(weights.sum(-1), (scores > -torch.inf).any(-1).double())


@sizes
@batches
def test_forward_from_one_key(batch: tuple[int, ...], keys: int) -> None:
    """As the first step is: everything but two keys is out of reach, or everything, where these two are hidden."""
    scores = drawn_scores(batch, keys)
    previous = one_hot(keys // 2, keys).expand(*batch, keys)
    u = torch.rand(*batch, 1, dtype=torch.float64)
    # Not to `previous`: the formula has a gradient to keys out of reach, of which the function has none.
    same(
        lambda s, move: forward_weights(s, previous, move),
        lambda s, move: reference.forward_weights(s, previous, move),
        scores,
        u,
    )
    weights = all_finite(forward_weights, scores, previous, u)
    near = one_hot(keys // 2, keys) + one_hot(keys // 2 + 1, keys)
    assert (weights * (1 - near) == 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_forward_in_half_types(dtype: torch.dtype) -> None:
    u = 0.1 + 0.8 * torch.rand(2, 3, 1)
    inputs = as_half(dtype, drawn_scores((2, 3), 64), drawn_weights((2, 3), 64), u)
    # A gradient to `previous` reaches 100 and a sum of such has float32's error.
    same(forward_weights, reference.forward_weights, *inputs, rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_forward_stays_where_nothing_is_left() -> None:
    """At the last key with u = 1, and before a masked slot; but not where the row is hidden or was empty."""
    hidden = -torch.inf
    scores = torch.tensor(
        [[0.5, 1.0, 2.0], [0.5, 1.0, hidden], [0.5, hidden, 2.0], [hidden] * 3, [1.0, 1.0, 1.0]], dtype=torch.float64
    )
    starts = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    weights = all_finite(forward_weights, scores, starts, torch.ones(5, 1, dtype=torch.float64))
    expected = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    # Staying is the identity, to the gradient too.
    _, (_, grad) = run(lambda s, p: forward_weights(s, p, torch.ones(5, 1)), scores, starts)
    assert grad[0].all()
    assert grad[1, :2].all()
    assert grad[1, 2] == 0  # a hidden slot keeps no weight


@pytest.mark.parametrize("u", [None, 0.0, 0.3, 1.0])
def test_forward_at_extremes(u: float | None) -> None:
    ends = torch.tensor([1e4, -1e4, 0.0, 1e4, -torch.inf, -1e4])
    tiny = torch.tensor([1e-45, 1e-38, 1e-33, 1e-30, 1e-20, 1e-10])
    previous = torch.stack([*(one_hot(k, 6, torch.float32) for k in range(6)), tiny, tiny.flip(0), torch.zeros(6)])
    scores = ends.expand_as(previous)
    if u is None:
        weights = all_finite(forward_weights, scores, previous)
        assert weights[1].equal(one_hot(2, 6, torch.float32))  # 0 is beyond -1e4; the 1e4 ahead is out of reach
        assert weights[0].equal(one_hot(0, 6, torch.float32))
    else:
        weights = all_finite(forward_weights, scores, previous, torch.full((9, 1), u))
    sums = weights.sum(-1)
    assert (((sums - 1).abs() < 1e-5) | (sums < 1e-5)).all()
    assert sums[-1] == 0


def test_forward_keeps_its_digits_beside_a_high_score() -> None:
    previous = torch.tensor([0.3, 0.5, 0.2])
    high, level = torch.full((3,), 1e4), torch.zeros(3)
    torch.testing.assert_close(forward_weights(high, previous), forward_weights(level, previous))


def test_forward_from_a_weight_too_small_to_divide_by() -> None:
    """A high score makes up for it, and the gradient, about 0.2 / 1e-44, would be infinite; times u = 0, NaN."""
    weights = all_finite(forward_weights, torch.tensor([101.0, 0.0]), torch.tensor([1e-44, 1.0]), torch.zeros(1))
    assert weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("agent", [False, True])
def test_forward_gradcheck(agent: bool) -> None:
    inputs = [drawn_scores((2, 2), 6), drawn_weights((2, 2), 6)] + [torch.rand(2, 2, 1, dtype=torch.float64)] * agent
    assert torch.autograd.gradcheck(forward_weights, [x.requires_grad_() for x in inputs])


# coverage_loss


@sizes
@batches
def test_coverage_equals_definition(batch: tuple[int, ...], keys: int) -> None:
    weights = drawn_weights(batch, keys)
    coverage = 2 * torch.rand_like(weights) / keys  # some above and some below; equal ones share the gradient
    same(coverage_loss, coverage_in_words, weights, coverage)
    assert coverage_loss(weights, coverage).shape == batch
    torch.testing.assert_close(coverage_loss(weights, weights), torch.ones(batch, dtype=torch.float64))
    assert (coverage_loss(weights, torch.zeros_like(weights)) == 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_coverage_in_half_types(dtype: torch.dtype) -> None:
    # 0.5 + 2000 * 2**-12: each term would vanish beside the sum in a half type.
    inputs = as_half(dtype, torch.cat([torch.tensor([0.5]), torch.full((2000,), 2.0**-12)]), torch.ones(2001))
    same(coverage_loss, coverage_in_words, *inputs, **tolerance(dtype))


def test_coverage_gradcheck() -> None:
    inputs = drawn_weights((2, 2), 6).requires_grad_(), drawn_weights((2, 2), 6).requires_grad_()
    assert torch.autograd.gradcheck(coverage_loss, inputs)


# all of them


@pytest.mark.parametrize("option", [*NORMALIZERS, "parallel", "recursive", "hard", "plain", "agent", "coverage"])
def test_compiles_whole(option: str) -> None:
    scores, weights, u = drawn_scores((2, 3), 9), drawn_weights((2, 3), 9), torch.rand(2, 3, 1, dtype=torch.float64)
    calls: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
        **{name: (partial(normalize, normalizer=name), (scores,)) for name in NORMALIZERS},
        **{m: (partial(monotonic_weights, mode=m), (scores, weights)) for m in ("parallel", "recursive", "hard")},
        "plain": (forward_weights, (scores, weights)),
        "agent": (forward_weights, (scores, weights, u)),
        "coverage": (coverage_loss, (weights, weights.flip(-1))),
    }
    function, inputs = calls[option]
    torch.compiler.reset()

    def called(*inputs: Tensor) -> Tensor:
        return function(*inputs)

    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    if option == "hard":  # has no gradient
        assert compiled(*inputs).equal(function(*inputs))
    else:
        same(compiled, function, *inputs)


def test_no_key_at_all() -> None:
    none = torch.zeros(2, 0)
    for normalizer in NORMALIZERS:
        assert normalize(none, normalizer).shape == (2, 0)
    for mode in ("parallel", "recursive", "hard"):
        assert monotonic_weights(none, none, mode).shape == (2, 0)
    assert forward_weights(none, none).shape == (2, 0)
    assert coverage_loss(none, none).equal(torch.zeros(2))


ROW = torch.zeros(2, 3)
NO_TENSOR: Any = 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalize(ROW, "entmax"), ValueError, "normalizer must be one of 'softmax', .* got 'entmax'"),
        (lambda: normalize(ROW.long()), TypeError, "scores must be float32, .* got torch.int64"),
        (lambda: monotonic_weights(ROW, ROW, "soft"), ValueError, "mode must be one of 'parallel', .* got 'soft'"),
        (lambda: monotonic_weights(ROW, ROW[:1]), ValueError, r"previous must have the shape of energies, \(2, 3\)"),
        (lambda: monotonic_weights(ROW.int(), ROW), TypeError, "energies must be float32"),
        (lambda: monotonic_weights(ROW, ROW.int()), TypeError, "previous must be float32"),
        (lambda: forward_weights(ROW, ROW[:, 1:]), ValueError, r"previous must have the shape of scores, \(2, 3\)"),
        (lambda: forward_weights(ROW.int(), ROW), TypeError, "scores must be float32"),
        (lambda: forward_weights(ROW, ROW, ROW), ValueError, r"transition must have shape \(\.\.\., 1\), got \(2, 3\)"),
        (lambda: forward_weights(ROW, ROW, torch.tensor(0.5)), ValueError, r"transition must have shape .* got \(\)"),
        (lambda: coverage_loss(ROW, ROW[0]), ValueError, r"coverage must have the shape of weights, .* got \(3,\)"),
        (lambda: coverage_loss(ROW, ROW.int()), TypeError, "coverage must be float32"),
        (lambda: normalize(NO_TENSOR), TypeError, "scores must be a torch.Tensor, got float"),
        (
            lambda: normalize(torch.tensor(1.0)),
            ValueError,
            r"scores must have shape \(\.\.\., Tk\), got a tensor",
        ),
        (lambda: coverage_loss(NO_TENSOR, NO_TENSOR), TypeError, "weights must be a torch.Tensor, got float"),
        (lambda: forward_weights(ROW, ROW, NO_TENSOR), TypeError, "transition must be a torch.Tensor, got float"),
        (lambda: monotonic_weights(ROW, NO_TENSOR), TypeError, "previous must be a torch.Tensor, got float"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
