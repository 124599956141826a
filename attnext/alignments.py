"""Scores into weights, by more rules than softmax: normalizers, and rules that start from the last step's weights.

Plain PyTorch, on scores (..., Tk) of any leading shape, minus infinity in masked slots, as
:func:`attnext.additive_scores` gives them. Half types are computed in float32 and cast back. For finite scores no
result and no gradient is NaN; a row without a visible slot has weights 0 and passes no gradient to its scores. A NaN
score makes the weights of its row NaN, those of masked slots excepted; so does plus infinity, but by the sigmoid, which
has an answer. Nothing here branches on a tensor's values, so that ``torch.compile(fullgraph=True)`` takes every
function whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnext import _checks

__all__ = ["NORMALIZERS", "coverage_loss", "forward_weights", "monotonic_weights", "normalize"]

NORMALIZERS = ("softmax", "sigmoid", "sparsemax", "entmax15")
_MODES = ("parallel", "recursive", "hard")


def normalize(scores: Tensor, normalizer: str = "softmax") -> Tensor:
    """The weights of each row of scores: none below 0, and together 1.

    Args:
        scores: (..., Tk), minus infinity in masked slots. float32, float64, float16 or bfloat16.
        normalizer: one of

            - "softmax".
            - "sigmoid": ``sigmoid(e) / sum(sigmoid(e))``, which levels the high scores. The "smoothing" of Chorowski,
              Bahdanau, Serdyuk, Cho and Bengio, "Attention-based models for speech recognition", 2015.
            - "sparsemax": the nearest point of the simplex, with weights of exactly 0. Martins and Astudillo, "From
              softmax to sparsemax", 2016.
            - "entmax15": halfway between softmax and sparsemax (alpha = 1.5), sparse and smoother. Peters, Niculae and
              Martins, "Sparse sequence-to-sequence models", 2019. Exact, by a sort, as is sparsemax.

    Returns:
        The weights, (..., Tk), exactly 0 in masked slots.

    Raises:
        TypeError: ``scores`` is not of one of these dtypes.
        ValueError: ``normalizer`` is none of these.
    """
    _checks.choice("normalizer", normalizer, NORMALIZERS)
    wide = _widened("scores", scores)
    hidden = wide == -torch.inf
    if normalizer == "sigmoid":
        # By its logarithm: where every score is far below 0, each sigmoid would be 0, and their sum too.
        wide = F.logsigmoid(wide.masked_fill(hidden, 0.0)).masked_fill(hidden, -torch.inf)
    if normalizer in ("softmax", "sigmoid"):
        return _softmax(wide).to(scores.dtype)
    if wide.shape[-1] == 0:  # no largest score to start from
        return scores.clone()
    wide = wide.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    if normalizer == "entmax15":
        wide = wide / 2
    # Neither rule sees a shift of the row, so none is differentiated. The largest score is now 0 and the threshold in
    # [-1, 0): a score of -2 is as far outside as any, and keeps minus infinity out of the sums.
    wide = (wide - wide.amax(-1, keepdim=True).detach()).clamp(min=-2.0)
    weights = _sparsemax(wide) if normalizer == "sparsemax" else _entmax15(wide)
    return weights.masked_fill(hidden, 0.0).to(scores.dtype)


def monotonic_weights(energies: Tensor, previous: Tensor, mode: str = "parallel") -> Tensor:
    """The weights of monotonic attention: how likely the reader, who only moves on, stops at each key.

    The reader starts where it last stopped, and stops at key j with probability ``p_j = sigmoid(energies_j)``, or goes
    on to the next: ``q_j = (1 - p_{j-1}) q_{j-1} + previous_j`` is the chance to look at key j, ``p_j q_j`` the weight.
    From Raffel, Luong, Liu, Weiss and Eck, "Online and linear-time attention by enforcing monotonic alignments", 2017.

    Args:
        energies: (..., Tk) logits of p, minus infinity in masked slots: the reader passes over those. float32,
            float64, float16 or bfloat16.
        previous: (..., Tk) the last step's weights; at the first step, 1 at key 0 and 0 elsewhere.
        mode: "recursive" goes through the keys one by one. "parallel" gives the same in log2(Tk) steps. Both are
            differentiable. "hard" is for inference: from the first key where ``previous`` is above 0, the first with p
            above 1/2 has weight 1; it passes no gradient. A NaN that the reader meets before is where it stops, with a
            weight of NaN.

    Returns:
        The weights, (..., Tk), of the dtype of ``energies``. They sum to less than 1 where the reader may run past the
        last key, and are all 0 where it surely does, or where ``previous`` is all 0.

    Raises:
        TypeError: an argument is not of one of these dtypes.
        ValueError: ``mode`` is none of these, or the two shapes differ.
    """
    _checks.choice("mode", mode, _MODES)
    wide, before = _widened("energies", energies), _widened("previous", previous)
    _same_shape("previous", previous, "energies", energies)
    if mode == "hard":
        # The first of several: where the running count has just become 1. Energy above 0 is p above 1/2.
        broken = (wide.isnan() | before.isnan()) & (wide != -torch.inf)
        stops = ((wide > 0) | broken) & (((before > 0) | broken).cumsum(-1) > 0)
        weights = (stops & (stops.cumsum(-1) == 1)).to(energies.dtype)
        return weights.masked_fill((weights > 0) & broken, torch.nan)
    # 1 - p as a sigmoid of its own: a difference would round to 0 long before p is 1.
    stop, go_on = wide.sigmoid(), (-wide).sigmoid()
    look = _looks_one_by_one(go_on, before) if mode == "recursive" else _looks_at_once(go_on, before)
    return (stop * look).to(energies.dtype)


def forward_weights(scores: Tensor, previous: Tensor, transition: Tensor | None = None) -> Tensor:
    """The weights of forward attention, which stay with a key or move on to the next.

    ``w_n = ((1 - u) previous_n + u previous_{n-1}) y_n``, divided by its sum over the keys, with y the softmax of the
    scores. From Zhang, Ling and Dai, "Forward attention in sequence-to-sequence acoustic modeling for speech
    synthesis", 2018.

    Args:
        scores: (..., Tk), minus infinity in masked slots. float32, float64, float16 or bfloat16.
        previous: (..., Tk) the last step's weights; at the first step, 1 at key 0 and 0 elsewhere.
        transition: (..., 1) u, from 0 to 1, how likely the reader moves on (the "transition agent"); None is the plain
            form, ``previous_n + previous_{n-1}``.

    Returns:
        The weights, (..., Tk), of the dtype of ``scores``. Where no visible key can be reached, as at the end of a
        row, they are ``previous`` in the visible slots: the reader stays. A row without a visible slot, or with
        ``previous`` all 0, has weights 0. A key that cannot be reached passes no gradient, to ``previous`` either. It
        counts as such where the factor before y is below about 1e-31 (float64: 1e-292): the gradient divides by that
        factor, and would not fit the dtype.
        A masked slot between visible ones is not crossed: the reader moves to the next slot alone.

    Raises:
        TypeError: an argument is not of one of these dtypes.
        ValueError: the shapes of ``scores`` and ``previous`` differ, or ``transition`` does not end in 1.
    """
    wide, before = _widened("scores", scores), _widened("previous", previous)
    _same_shape("previous", previous, "scores", scores)
    moved = F.pad(before, (1, 0))[..., : before.shape[-1]]
    if transition is None:
        mix = before + moved
    else:
        if isinstance(transition, Tensor) and transition.shape[-1:] != (1,):
            raise ValueError(f"transition must have shape (..., 1), got {tuple(transition.shape)}")
        move = _widened("transition", transition)
        mix = (1 - move) * before + move * moved
    hidden = wide == -torch.inf
    limits = torch.finfo(mix.dtype)
    reached = ~(mix <= limits.tiny / limits.eps) & ~hidden
    stays = ~reached.any(-1, keepdim=True)
    # Hidden before the logarithm, which would send a gradient of 0 / 0 to the slots out of reach. The softmax comes
    # before the sum: next to a score of 1e4 the logarithm would lose its digits.
    log_y = wide.masked_fill(~reached, -torch.inf).masked_fill(stays, 0.0).log_softmax(-1)
    log_mix = torch.where(reached, mix, 1.0).log()
    weights = _softmax((log_y + log_mix).masked_fill(~reached, -torch.inf))
    return torch.where(stays, before.masked_fill(hidden, 0.0), weights).to(scores.dtype)


def coverage_loss(weights: Tensor, coverage: Tensor) -> Tensor:
    """``sum_j min(weights_j, coverage_j)``: how much of this step's attention goes where attention has been already.

    From See, Liu and Manning, "Get to the point: summarization with pointer-generator networks", 2017.

    Args:
        weights: (..., Tk) this step's weights. float32, float64, float16 or bfloat16.
        coverage: (..., Tk) the sum of the weights of the steps before.

    Returns:
        The loss of each row, (...), of the dtype of ``weights``.

    Raises:
        TypeError: an argument is not of one of these dtypes.
        ValueError: the two shapes differ.
    """
    wide, seen = _widened("weights", weights), _widened("coverage", coverage)
    _same_shape("coverage", coverage, "weights", weights)
    return torch.minimum(wide, seen).sum(-1).to(weights.dtype)


def _widened(name: str, x: Tensor) -> Tensor:
    """``x`` in the dtype that it is computed in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have shape (..., Tk), got a tensor without dimensions")
    _checks.floating(name, x.dtype)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _same_shape(name: str, x: Tensor, of: str, expected: Tensor) -> None:
    if x.shape != expected.shape:
        raise ValueError(f"{name} must have the shape of {of}, {tuple(expected.shape)}, got {tuple(x.shape)}")


def _softmax(scores: Tensor) -> Tensor:
    """Softmax, and 0 for a row that is minus infinity throughout."""
    hidden = scores == -torch.inf
    return scores.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(hidden, 0.0)


def _ranked(z: Tensor) -> tuple[Tensor, Tensor]:
    """The scores in falling order, and the rank of each place, from 1. For the choice of the support alone."""
    ranked = z.detach().sort(dim=-1, descending=True).values
    return ranked, torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)


def _support(z: Tensor, ranked: Tensor, inside: Tensor) -> Tensor:
    """Which scores take part in the threshold: those down to the last place that is ``inside``; equal ones go along.

    Beside NaN no place is inside, and no score is below the threshold: all take part, and are NaN.
    """
    return ~(z.detach() < ranked.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0)))


def _sparsemax(z: Tensor) -> Tensor:
    """``max(z - tau, 0)`` with the tau that makes the sum 1."""
    ranked, rank = _ranked(z)
    support = _support(z, ranked, 1 + rank * ranked > ranked.cumsum(-1))
    # tau once more from the support alone: differentiable, and without the rounding of a running sum.
    tau = (torch.where(support, z, 0.0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, (z - tau).clamp(min=0.0), 0.0)


def _entmax15(z: Tensor) -> Tensor:
    """``max(z - tau, 0)**2`` with the tau that makes the sum 1; z is half the score."""
    ranked, rank = _ranked(z)
    mean = ranked.cumsum(-1) / rank
    spread = (ranked * ranked).cumsum(-1) - rank * mean * mean
    support = _support(z, ranked, mean - ((1 - spread) / rank).clamp(min=0.0).sqrt() <= ranked)
    count = support.sum(-1, keepdim=True)
    mean = torch.where(support, z, 0.0).sum(-1, keepdim=True) / count
    spread = torch.where(support, z - mean, 0.0).square().sum(-1, keepdim=True)
    # No distance to tau is above 1, so the sum of the distances is at least that of their squares: count * root >= 1.
    # Half of that bound keeps rounding from the square root of 0, whose gradient is infinite.
    root = ((1 - spread) / count).clamp(min=0.5 / (count * count)).sqrt()
    return torch.where(support, (z - mean + root).clamp(min=0.0).square(), 0.0)


def _looks_one_by_one(go_on: Tensor, previous: Tensor) -> Tensor:
    """``q_j = go_on_{j-1} q_{j-1} + previous_j`` along the last dimension."""
    looks: list[Tensor] = []
    for j in range(previous.shape[-1]):
        here = previous[..., j]
        looks.append(here if j == 0 else go_on[..., j - 1] * looks[-1] + here)
    return torch.stack(looks, -1) if looks else previous


def _looks_at_once(go_on: Tensor, previous: Tensor) -> Tensor:
    """The same by doubling (Hillis and Steele, 1986), in products and sums of numbers from 0 up only.

    After the step of reach r, each place holds the recurrence of the last 2 r keys: ``look`` is its result from q = 0,
    and ``through`` what it multiplies an earlier q by. The closed form of the paper divides by the product of all
    ``go_on`` so far, which underflows in a long row.
    """
    keys = previous.shape[-1]
    look, through = previous, F.pad(go_on, (1, 0))[..., :keys]
    reach = 1
    while reach < keys:
        # Shifted by padding: a place less than ``reach`` from the start has nothing before it, which 0 says.
        earlier = F.pad(look, (reach, 0))[..., :keys]
        look = look + through * earlier
        through = through * F.pad(through, (reach, 0))[..., :keys]
        reach *= 2
    return look
