"""Every op in plain PyTorch: the definition of right.

Written to be read, and to be exact in any dtype. It keeps the (B, Tq, Tk, D) tensor that the kernels avoid, follows
autograd to any order, and imports nothing of the project. Shapes: B batch, Tq queries, Tk keys, D attention size,
H value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "additive_attention",
    "additive_scores",
    "additive_step",
    "dot_attention",
    "dot_scores",
    "dropout_keep",
    "forward_weights",
    "monotonic_weights",
    "normalize",
    "valid_slots",
]

_U32 = 0xFFFFFFFF


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Additive attention (Bahdanau et al., 2015); see :func:`attnext.additive_attention` for the arguments.

    ``seed`` (a scalar int64 tensor) fixes which weights dropout removes.
    """
    if query.dim() == 2:
        context, weights = additive_attention(
            query.unsqueeze(1), key, value, score_weight, lengths=lengths, mask=mask, scale=scale,
            dropout_p=dropout_p, need_weights=need_weights, seed=seed,
        )  # fmt: skip
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    scores = additive_scores(query, key, score_weight, lengths=lengths, mask=mask, scale=scale)
    context, weights = _attention_of(scores, value, _hidden_slots(query, key, lengths, mask), dropout_p, seed)
    return context, weights if need_weights else None


def additive_scores(
    query: Tensor,
    key: Tensor,
    score_weight: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``scale * v . tanh(query_i + key_j)``, minus infinity in masked slots; see :func:`attnext.additive_scores`."""
    if query.dim() == 2:
        query = query.unsqueeze(1)
        return additive_scores(query, key, score_weight, lengths=lengths, mask=mask, scale=scale).squeeze(1)
    hidden = _hidden_slots(query, key, lengths, mask)
    total = query.unsqueeze(2) + key.unsqueeze(1)
    if hidden is not None:  # before the tanh, so that a NaN in a masked slot reaches neither the result nor a gradient
        total = total.masked_fill(hidden.unsqueeze(-1), 0.0)
    v = _bounded(score_weight).view(-1, score_weight.shape[-1])  # a row for each head
    v = v.repeat(query.shape[0] // v.shape[0], 1) if len(v) > 1 else v
    scores = scale * (total.tanh() @ v[:, None, :, None]).squeeze(-1)
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def additive_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    filters: Tensor | None = None,
    projection: Tensor | None = None,
    past: Sequence[Tensor] = (),
    *,
    rule: str = "softmax",
    previous: Tensor | None = None,
    transition: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    window: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of additive attention that sees its past: ``v . tanh(q + k_j + L f_j)``, f the filtered past weights.

    See :func:`attnext.additive_step`; ``seed`` as above. What the past has in hidden slots counts as 0. A window hides
    keys from this step alone: the past is seen everywhere. Returns the context and the weights before dropout.
    """
    if query.dim() == 2:
        by_step = {name: None if x is None else x.unsqueeze(1) for name, x in
                   {"previous": previous, "transition": transition, "window": window}.items()}  # fmt: skip
        context, weights = additive_step(
            query.unsqueeze(1), key, value, score_weight, filters, projection, [x.unsqueeze(1) for x in past],
            rule=rule, lengths=lengths, mask=mask, scale=scale, dropout_p=dropout_p, seed=seed, **by_step,
        )  # fmt: skip
        return context.squeeze(1), weights.squeeze(1)
    valid = valid_slots(query, key, lengths, mask)
    key, value = (x.masked_fill(~valid.transpose(1, 2), 0.0) for x in (key, value))
    total = query.unsqueeze(2) + key.unsqueeze(1)
    if filters is not None:
        seen = torch.stack([x.masked_fill(~valid, 0.0) for x in past], 2)  # (B, Tq, C, Tk)
        total = total + _filtered(seen, filters, projection)
    slots = torch.arange(key.shape[1], device=key.device)
    inside = valid if window is None else valid & (slots >= window[..., :1]) & (slots < window[..., 1:])
    scores = (scale * (total.tanh() @ _bounded(score_weight))).masked_fill(~inside, -torch.inf)
    if rule == "forward":
        assert previous is not None
        weights = forward_weights(scores, previous.masked_fill(~valid, 0.0), transition)
    else:
        weights = normalize(scores, rule)
    kept = weights
    if dropout_p > 0.0:
        seed = torch.randint(2**62, (), device=scores.device) if seed is None else seed
        keep = dropout_keep(seed, weights.shape, dropout_p)
        kept = weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0
    return kept @ value, weights


def _bounded(score_weight: Tensor) -> Tensor:
    """NaN in the place of infinity, which would make the score of a hidden slot."""
    return score_weight + torch.zeros_like(score_weight).masked_fill(score_weight.abs() == torch.inf, torch.nan)


def _filtered(past: Tensor, filters: Tensor, projection: Tensor | None) -> Tensor:
    """(B, Tq, Tk, D) of past weights (B, Tq, C, Tk): each filter around each key, projected."""
    reach, width = filters.shape[2] // 2, filters.shape[2]
    # Padded by one more than the filters reach, as without a key nothing else would be wide enough.
    around = torch.nn.functional.pad(past, (reach, reach + 1)).unfold(-1, width, 1)[..., :-1, :]
    features = torch.einsum("bqcjo,fco->bqjf", around, filters)  # of (B, Tq, C, Tk, width)
    return features if projection is None else features @ projection.T


def dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dot-product attention (Luong et al., 2015); see :func:`attnext.dot_attention`; ``seed`` as above."""
    if query.dim() == 2:
        context, weights = dot_attention(
            query.unsqueeze(1), key, value, lengths=lengths, mask=mask, scale=scale,
            dropout_p=dropout_p, need_weights=need_weights, seed=seed,
        )  # fmt: skip
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    scores = dot_scores(query, key, lengths=lengths, mask=mask, scale=scale)
    value = key if value is None else value
    context, weights = _attention_of(scores, value, _hidden_slots(query, key, lengths, mask), dropout_p, seed)
    return context, weights if need_weights else None


def dot_scores(
    query: Tensor, key: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """``scale * query_i . key_j`` for queries (B, Tq, D), minus infinity in masked slots."""
    hidden = _hidden_slots(query, key, lengths, mask)
    if hidden is None:
        return scale * (query @ key.transpose(1, 2))
    if hidden.shape[1] == 1:
        scores = query @ key.masked_fill(hidden.transpose(1, 2), 0.0).transpose(1, 2)
    else:  # a key may be real to one query and masked, NaN even, to the next
        scores = (torch.where(hidden.unsqueeze(-1), 0.0, key.unsqueeze(1)) @ query.unsqueeze(-1)).squeeze(-1)
    # A NaN of a query, too, stays out of masked slots, here and in the gradients of their keys.
    return (scale * scores).masked_fill(hidden, -torch.inf)


def _attention_of(
    scores: Tensor, value: Tensor, hidden: Tensor | None, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context and weights of scores (B, Tq, Tk)."""
    masked = scores == -torch.inf  # of hidden slots, and of products that overflow
    # An empty row would be softmax of nothing: give it finite scores, then weights of 0.
    weights = scores.masked_fill(masked.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(masked, 0.0)
    if dropout_p > 0.0:
        if seed is None:
            seed = torch.randint(2**62, (), device=scores.device)
        keep = dropout_keep(seed, weights.shape, dropout_p)
        weights = weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0
    if hidden is None:
        context = weights @ value
    elif hidden.shape[1] == 1:
        context = weights @ value.masked_fill(hidden.transpose(1, 2), 0.0)
    else:  # a value may be real to one query and masked, NaN even, to the next
        visible = torch.where(hidden.unsqueeze(-1), 0.0, value.unsqueeze(1))
        context = (weights.unsqueeze(2) @ visible).squeeze(2)
    return context, weights


def _hidden_slots(query: Tensor, key: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which keys each query may not attend, as :func:`valid_slots` has it; None where it may attend all."""
    return None if lengths is None and mask is None else ~valid_slots(query, key, lengths, mask)


def valid_slots(query: Tensor, key: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which keys each query may attend: bool, (B, 1, Tk), or (B, Tq, Tk) for a mask of that shape."""
    batch, keys = key.shape[:2]
    valid = torch.ones(batch, 1, keys, dtype=torch.bool, device=query.device)
    if lengths is not None:
        valid = valid & (torch.arange(keys, device=query.device) < lengths.view(-1, 1, 1))
    if mask is not None:
        valid = valid & (mask if mask.dim() == 3 else mask.unsqueeze(1))
    return valid


def dropout_keep(seed: Tensor, shape: tuple[int, ...] | torch.Size, dropout_p: float) -> Tensor:
    """Which weights dropout keeps: bool of ``shape`` (B, Tq, Tk), a pure function of the seed and the position.

    A counter-based hash, so that a kernel recomputes the same choice in the backward pass and stores nothing, and every
    backend drops the same weights. Position (b, i, j) is kept where ``mix(mix(j) ^ row) >= dropout_p * 2**32``.
    """
    batch, queries, keys = shape
    row = torch.arange(batch * queries, device=seed.device)
    row_hash = _mix((_mix((row & _U32) ^ (seed & _U32)) + (row >> 32)) & _U32 ^ (seed >> 32 & _U32))
    column_hash = _mix(torch.arange(keys, device=seed.device) & _U32)
    bits = _mix(row_hash.unsqueeze(1) ^ column_hash)
    return (bits >= int(dropout_p * 2**32)).view(batch, queries, keys)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (multiply and xor-shift; constants of C. Wellons' lowbias32), in int64 arithmetic."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _U32
    x = (x ^ (x >> 15)) * 0x846CA68B & _U32
    return x ^ (x >> 16)


def normalize(scores: Tensor, normalizer: str) -> Tensor:
    """The weights of scores (..., Tk); see :func:`attnext.alignments.normalize`. For float64."""
    hidden = scores == -torch.inf
    scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # as in an empty row of additive_attention
    if normalizer == "softmax":
        weights = scores.softmax(-1)
    elif normalizer == "sigmoid":
        weights = scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
    else:
        weights = _entmax(scores, {"sparsemax": 1, "entmax15": 2}[normalizer])
    return weights.masked_fill(hidden, 0.0)


def _entmax(scores: Tensor, power: int) -> Tensor:
    """``max(z - tau, 0)**power``, z the scores over the power, with the tau that makes the sum 1, by bisection."""
    z = scores / power
    high = z.detach().amax(-1, keepdim=True)
    low = high - 1.0
    for _ in range(60):
        tau = (low + high) / 2
        above = (z.detach() - tau).clamp(min=0.0).pow(power).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    # Bisection has no gradient; a step of Newton's method moves tau by rounding only, and gives it the first
    # derivative, a second step the second and the third.
    tau = low
    for _ in range(2):
        gap = (z - tau).clamp(min=0.0)
        slope = torch.where(gap > 0.0, power * gap ** (power - 1), 0.0).sum(-1, keepdim=True)
        tau = tau + (gap.pow(power).sum(-1, keepdim=True) - 1.0) / slope
    return (z - tau).clamp(min=0.0).pow(power)


def monotonic_weights(energies: Tensor, previous: Tensor) -> Tensor:
    """Monotonic attention of (..., Tk); see :func:`attnext.alignments.monotonic_weights`.

    Over every way to stop at key j: the last step stopped at a key k, and this one passed over k to j - 1.
    """
    p = energies.sigmoid()
    weights = []
    for j in range(energies.shape[-1]):
        ways = [previous[..., k] * (1.0 - p[..., k:j]).prod(-1) for k in range(j + 1)]
        weights.append(p[..., j] * torch.stack(ways).sum(0))
    return torch.stack(weights, -1)


def forward_weights(scores: Tensor, previous: Tensor, transition: Tensor | None) -> Tensor:
    """Forward attention of (..., Tk); see :func:`attnext.alignments.forward_weights`.

    Exponentials of the scores times the mixture, over their sum. With a softmax in their place, itself divided by its
    sum, gradients would lose the more digits, the less a key of a large score is reached.
    """
    moved = torch.cat([torch.zeros_like(previous[..., :1]), previous[..., :-1]], -1)
    mix = previous + moved if transition is None else (1.0 - transition) * previous + transition * moved
    hidden = scores == -torch.inf
    out_of_reach = hidden | (mix <= 0.0)
    none = out_of_reach.all(-1, keepdim=True)
    scores = scores.masked_fill(out_of_reach, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else 0.0
    weights = mix * (scores.masked_fill(none, 0.0) - torch.where(none, 0.0, top)).exp()
    weights = weights.masked_fill(out_of_reach, 0.0)
    total = torch.where(none, 1.0, weights.sum(-1, keepdim=True))
    weights = (weights / total).masked_fill(out_of_reach, 0.0)  # over NaN
    return torch.where(none, previous.masked_fill(hidden, 0.0), weights)
