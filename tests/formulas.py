"""The mathematics once more, for the fuzzer: in float64, row by row, of visible slots alone.

Nothing here calls the package but for the hash of dropout. A hidden slot is never read: each row takes the keys that it
may attend out of the others. Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INF = float("inf")


def shown(batch: int, queries: int, keys: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, Tq, Tk): which slots are visible."""
    found = torch.ones(batch, queries, keys, dtype=torch.bool)
    for b in range(batch if lengths is not None else 0):
        assert lengths is not None
        found[b, :, int(lengths[b]) :] = False
    if mask is not None:
        found &= mask if mask.dim() == 3 else mask[:, None, :]
    return found


def spread(values: Tensor, where: Tensor, count: int, rest: float = 0.0) -> Tensor:
    """A row of ``count`` numbers, with ``values`` in their places."""
    return torch.full((count,), rest, dtype=torch.float64).index_put((where,), values)


def stacked(rows: Sequence[Tensor], *sizes: int) -> Tensor:
    return torch.stack(list(rows)).view(sizes) if rows else torch.zeros(sizes, dtype=torch.float64)


# Weights of a row of scores (n,), all visible.


def softmax(scores: Tensor) -> Tensor:
    """A score of minus infinity counts as hidden."""
    there = torch.nonzero(scores != -INF).squeeze(1)
    if not len(there):
        return torch.zeros_like(scores)
    exponentials = (scores[there] - scores[there].detach().max()).exp()
    return spread(exponentials / exponentials.sum(), there, len(scores))


def sigmoids(scores: Tensor) -> Tensor:
    """sigmoid(s) / sum sigmoid(s), by logarithms: log sigmoid(s) = -log(1 + exp(-s))."""
    return softmax(torch.where(scores == -INF, scores, -torch.nn.functional.softplus(-scores, threshold=700)))


class _Sparse(torch.autograd.Function):
    """max(z - tau, 0)^power of z = s / power, together 1. With r = p^(1 - 1/power): dp = r (ds - sum(r ds) / sum r)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor, power: int) -> Tensor:
        z = (scores - scores.max()) / power
        low, high = -1.0, 0.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if float((z - middle).clamp(min=0).pow(power).sum()) >= 1 else (low, middle)
        gap = (z - low).clamp(min=0)
        ctx.save_for_backward((gap > 0).double() * gap.pow(power - 1))
        return gap.pow(power) / gap.pow(power).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (root,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return root * (grad - (root * grad).sum() / root.sum()), None


def sparse(scores: Tensor, power: int) -> Tensor:
    """Sparsemax, and entmax-1.5 with a power of 2."""
    there = torch.nonzero(scores != -INF).squeeze(1)
    if not len(there):
        return torch.zeros_like(scores)
    if not (scores[there] < INF).all():
        return torch.where(scores == -INF, 0.0, torch.nan)
    found: Tensor = _Sparse.apply(scores[there], power)  # type: ignore[no-untyped-call]
    return spread(found, there, len(scores))


def normalized(scores: Tensor, normalizer: str) -> Tensor:
    if normalizer in ("sparsemax", "entmax15"):
        return sparse(scores, {"sparsemax": 1, "entmax15": 2}[normalizer])
    return {"softmax": softmax, "sigmoid": sigmoids}[normalizer](scores)


def mixture(previous: Tensor, move: Tensor | None) -> Tensor:
    """What forward attention multiplies the softmax by."""
    before = torch.cat([previous.new_zeros(1), previous[:-1]])
    return previous + before if move is None else (1 - move) * previous + move * before


def forward(scores: Tensor, mix: Tensor, stay: Tensor, least: float) -> Tensor:
    """Of a row's visible slots; where none is reached the reader stays."""
    reached = torch.nonzero(~(mix <= least) & (scores != -INF)).squeeze(1)
    if not len(reached):
        return torch.where(scores == -INF, 0.0, stay)
    weights = softmax(scores[reached]) * mix[reached]
    return spread(weights / weights.sum(), reached, len(scores))


def monotonic(energies: Tensor, previous: Tensor) -> Tensor:
    """Key by key: how likely the reader looks at it, and stops there."""
    stop, look, weights = energies.sigmoid(), torch.zeros((), dtype=torch.float64), []
    for j in range(len(energies)):
        look = (look * (-energies[j - 1]).sigmoid() if j else look) + previous[j]
        weights.append(stop[j] * look)
    return torch.stack(weights) if weights else torch.zeros_like(energies)


def hard(energies: Tensor, previous: Tensor) -> Tensor:
    """The first key from where the reader was on that stops it."""
    weights, started = torch.zeros_like(energies), False
    for j in range(len(energies)):
        started = started or bool(previous[j] > 0)
        if started and bool(energies[j] > 0):
            weights[j] = 1.0
            break
    return weights


# Attention.


def additive(query: Tensor, keys: Tensor, v: Tensor, scale: float) -> Tensor:
    """Scores (n,) of a query (D,) and keys (n, D); an infinite score weight counts as NaN."""
    v = v + torch.where(v.detach().abs() == INF, torch.nan, 0.0)
    return scale * ((query + keys).tanh() * v).sum(-1)


def dot(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    return (keys * query).sum(-1) * scale if len(keys) else keys.new_zeros(0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor | None, visible: Tensor, scale: float, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, weights (times ``keep``) and scores; without v by dot products. v may be (heads, D)."""
    batch, queries, keys = visible.shape
    contexts, weights, scores = [], [], []
    for b in range(batch):
        of_head = v if v is None or v.dim() == 1 else v[b % len(v)]
        for i in range(queries):
            there = torch.nonzero(visible[b, i]).squeeze(1)
            q, k = query[b, i], key[b, there]
            s = dot(q, k, scale) if of_head is None else additive(q, k, of_head, scale)
            w = softmax(s) * keep[b, i, there]
            contexts.append((w[:, None] * value[b, there]).sum(0))
            weights.append(spread(w, there, keys))
            scores.append(spread(s, there, keys, -INF))
    sizes = (batch, queries, keys)
    return stacked(contexts, batch, queries, value.shape[2]), stacked(weights, *sizes), stacked(scores, *sizes)


def features(pasts: Sequence[Tensor], filters: Tensor | None, projection: Tensor | None) -> Tensor | float:
    """(Tk, D) of pasts (Tk,) that are 0 in hidden slots: filters around each key."""
    if filters is None:
        return 0.0
    reach = filters.shape[2] // 2
    found = torch.zeros(len(pasts[0]), filters.shape[0], dtype=torch.float64)
    for channel, past in enumerate(pasts):
        around = torch.cat([past.new_zeros(reach), past, past.new_zeros(reach)])
        for o in range(filters.shape[2]):
            found = found + around[o : o + len(past), None] * filters[:, channel, o]
    return found if projection is None else found @ projection.T


def step(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, filters: Tensor | None, projection: Tensor | None,
    pasts: Sequence[Tensor], visible: Tensor, attended: Tensor, scale: float, rule: str, previous: Tensor | None,
    transition: Tensor | None, keep: Tensor, least: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Context and weights (before ``keep``) of steps that see their past; ``attended``: visible, and in the window."""
    batch, queries, keys = visible.shape
    contexts, weights = [], []
    for b in range(batch):
        for i in range(queries):
            there, seen = torch.nonzero(attended[b, i]).squeeze(1), visible[b, i]
            past = [torch.where(seen, x[b, i], 0.0) for x in pasts]
            of_past = features(past, filters, projection)
            inner = key[b, there] + (of_past[there] if isinstance(of_past, Tensor) else of_past)
            s = additive(query[b, i], inner, v, scale)
            if rule == "forward":
                assert previous is not None
                before = torch.where(seen, previous[b, i], 0.0)
                mix = mixture(before, None if transition is None else transition[b, i])
                w = forward(s, mix[there], before[there], least)
            else:
                w = normalized(s, rule)
            weights.append(spread(w, there, keys))
            contexts.append(((w * keep[b, i, there])[:, None] * value[b, there]).sum(0))
    return stacked(contexts, batch, queries, value.shape[2]), stacked(weights, batch, queries, keys)


# Recurrent layers.


def gru(x: Tensor, h: Tensor, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A step of one sentence: the reset gate multiplies the projected state."""
    a, b = w[0] @ x + w[2], w[1] @ h + w[3]
    (r, z), n = (a[: 2 * len(h)] + b[: 2 * len(h)]).sigmoid().chunk(2), len(h)
    candidate = (a[2 * n :] + r * b[2 * n :]).tanh()
    return ((1 - z) * candidate + z * h,)


def lstm(x: Tensor, h: Tensor, c: Tensor, w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (w[0] @ x + w[2] + w[1] @ h + w[3]).chunk(4)
    cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def layers(
    x: Tensor, lengths: Sequence[int], state: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], directions: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Each sentence's outputs (its length, directions S), of inputs (B, T, I), and the last states; ``weights`` of each
    layer and direction."""
    last = [[[torch.empty(0)] * len(lengths) for _ in weights] for _ in state]
    outputs = []
    for b, length in enumerate(lengths):
        rows = list(x[b, :length])
        for k in range(0, len(weights), directions):
            both = []
            for n in range(k, k + directions):
                one, own = [y[n, b] for y in state], []
                for row in rows if n == k else rows[::-1]:
                    one = list(gru(row, one[0], weights[n]) if len(one) == 1 else lstm(row, one[0], one[1], weights[n]))
                    own.append(one[0])
                for y, of_tensor in zip(one, last, strict=True):
                    of_tensor[n][b] = y
                both.append(own if n == k else own[::-1])
            rows = [torch.cat(parts) for parts in zip(*both, strict=True)]
        outputs.append(torch.stack(rows))
    return outputs, [torch.stack([torch.stack(rows) for rows in of_tensor]) for of_tensor in last]
