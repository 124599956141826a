"""Triton kernels of a step of additive attention that sees its past: scores, weights and context, and their gradients.

The sum inside the tanh is q + k_j + L f_j, f the filters over the past weights around key j. A program makes features
and sums of a tile of keys where it needs them, in registers; exp is taken of the sum itself, which saturates on both
sides, so that every finite input has one way. With r = 1 / (1 + exp(2 sum)), tanh is 1 - 2r and its slope 4 r (1 - r).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive import VARYING, _keep

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
FORWARD = tl.constexpr(2)


@triton.jit
def _row_and_keys(Tk, BK: tl.constexpr):
    """A program's row and tile of keys, both in the grid's first dimension: the others have no more than 65,535."""
    tiles = tl.cdiv(Tk, BK)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BK + tl.arange(0, BK)


@triton.jit
def _visible(lengths, mask, b, j, Tk, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which of the places j are keys that may be seen."""
    here = (j >= 0) & (j < Tk)
    if HAS_LENGTHS:
        here = here & (j < tl.load(lengths + b))
    if HAS_MASK:
        here = here & (tl.load(mask + b * Tk + j, here, 0) != 0)
    return here


@triton.jit
def _attended(lengths, mask, window, b, row, j, Tk, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
              HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Which of the places j a query may attend: a window hides keys from it alone."""
    here = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
    if HAS_WINDOW:
        here = here & (j >= tl.load(window + 2 * row)) & (j < tl.load(window + 2 * row + 1))
    return here


@triton.jit
def _features(
    filters, past, second_past, lengths, mask, b, row, j, f, Tk, F, width, CHANNELS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """What the filters f make of the past around the keys j, (BK, BF), place by place."""
    found = tl.zeros((BK, BF), ACC)
    for o in range(width):
        at = j + o - width // 2
        seen = _visible(lengths, mask, b, at, Tk, HAS_LENGTHS, HAS_MASK)
        place = filters + f * (CHANNELS * width) + o
        weight = tl.load(place, f < F, 0.0).to(ACC)
        found += tl.load(past + row * Tk + at, seen, 0.0)[:, None] * weight[None, :]
        if CHANNELS == 2:
            weight = tl.load(place + width, f < F, 0.0).to(ACC)
            found += tl.load(second_past + row * Tk + at, seen, 0.0)[:, None] * weight[None, :]
    return found


@triton.jit
def _product(a, b, ACC: tl.constexpr):
    """a (M, N) times b (N, K); in float64, of which not every target has products, as a sum of all terms."""
    if tl.float64 == ACC:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _features_at_once(
    filters, past, second_past, lengths, mask, b, row, j, f, Tk, F, width, CHANNELS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The same as products of 16 places: the past laid out, (BK, 16), times the filters, (16, BF)."""
    found = tl.zeros((BK, BF), ACC)
    for first in range(0, width, 16):
        o = first + tl.arange(0, 16)
        at = j[:, None] + o[None, :] - width // 2
        seen = _visible(lengths, mask, b, at, Tk, HAS_LENGTHS, HAS_MASK) & (o < width)[None, :]
        inside = (f < F)[None, :] & (o < width)[:, None]
        place = filters + f[None, :] * (CHANNELS * width) + o[:, None]
        weight = tl.load(place, inside, 0.0).to(ACC)
        found += _product(tl.load(past + row * Tk + at, seen, 0.0), weight, ACC)
        if CHANNELS == 2:
            weight = tl.load(place + width, inside, 0.0).to(ACC)
            found += _product(tl.load(second_past + row * Tk + at, seen, 0.0), weight, ACC)
    return found


@triton.jit
def _sums(
    query, key, projection, filters, past, second_past, lengths, mask, features, b, row, j, d, seen, Tk, D, F, width,
    CHANNELS: tl.constexpr, PROJECTED: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """q + k_j + L f_j of the features d, (BK, BD); a hidden key counts as 0."""
    q = tl.load(query + row * D + d, d < D, 0.0).to(ACC)
    at = key + (b * Tk + j)[:, None] * D + d[None, :]
    total = q[None, :] + tl.load(at, seen[:, None] & (d < D)[None, :], 0.0).to(ACC)
    if PROJECTED:
        f = tl.arange(0, BF)
        inside = (f < F)[:, None] & (d < D)[None, :]
        total += _product(features, tl.load(projection + d[None, :] * F + f[:, None], inside, 0.0).to(ACC), ACC)
    elif CHANNELS > 0:
        total += _features(
            filters, past, second_past, lengths, mask, b, row, j, d, Tk, D, width, CHANNELS, HAS_LENGTHS, HAS_MASK,
            ACC, BK, BD,
        )  # fmt: skip
    return total


@triton.jit
def _r(total, ACC: tl.constexpr):
    """1 / (1 + exp(2 total)), 0 or 1 to the last place far out."""
    most: tl.constexpr = 350.0 if tl.float64 == ACC else 43.0
    return 1.0 / (1.0 + tl.exp(2 * tl.minimum(total, most, propagate_nan=tl.PropagateNan.ALL)))


@triton.jit(do_not_specialize=VARYING)
def step_scores(
    query, key, weight, filters, projection, past, second_past, lengths, mask, window, scores, Tq, Tk, D, F, width,
    scale, scale_rest, CHANNELS: tl.constexpr, PROJECTED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """Scores (B, Tq, Tk), minus infinity where a query may not attend: a program a query and a tile of keys."""
    row, j = _row_and_keys(Tk, BK)
    b = row // Tq
    seen = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
    features = tl.zeros((BK, BF), ACC)
    if PROJECTED:
        features = _features_at_once(
            filters, past, second_past, lengths, mask, b, row, j, tl.arange(0, BF), Tk, F, width, CHANNELS,
            HAS_LENGTHS, HAS_MASK, ACC, BK, BF,
        )  # fmt: skip
    total = tl.zeros((BK,), ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inner = _sums(
            query, key, projection, filters, past, second_past, lengths, mask, features, b, row, j, d, seen, Tk, D, F,
            width, CHANNELS, PROJECTED, HAS_LENGTHS, HAS_MASK, ACC, BK, BD, BF,
        )  # fmt: skip
        v = tl.load(weight + d, d < D, 0.0).to(ACC)
        v = tl.where(tl.abs(2 * scale * v) < float("inf"), v, float("nan"))  # not the score of a hidden slot
        total += tl.sum(tl.where((d < D)[None, :], v[None, :] * (1 - 2 * _r(inner, ACC)), 0.0), 1)
    attended = _attended(lengths, mask, window, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, HAS_WINDOW)
    score = total * scale + total * scale_rest
    tl.store(scores + row * Tk + j, tl.where(attended, score, float("-inf")), j < Tk)


@triton.jit
def _mixture(
    previous, transition, lengths, mask, b, row, j, Tk, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    AGENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of forward attention: the last weights of the keys j, of those before them, and what the rule takes of each."""
    here = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
    before = tl.load(previous + row * Tk + j, here, 0.0)
    there = _visible(lengths, mask, b, j - 1, Tk, HAS_LENGTHS, HAS_MASK)
    moved = tl.load(previous + row * Tk + j - 1, there, 0.0)
    stay = tl.full((), 1.0, ACC)
    move = tl.full((), 1.0, ACC)
    if AGENT:
        move = tl.load(transition + row)
        stay = 1 - move
    return before, moved, stay, move


@triton.jit
def _least(ACC: tl.constexpr):
    """The smallest normal number over epsilon: below it a key is not reached, as the gradient would not fit."""
    return tl.full((), 2.0**-970 if tl.float64 == ACC else 2.0**-103, ACC)


@triton.jit
def _unnormalised(
    scores, previous, transition, lengths, mask, b, row, j, Tk, top, stays, RULE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, AGENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights before they are divided by their sum; where a reader of forward attention stays, the last ones."""
    s = tl.load(scores + row * Tk + j, j < Tk, float("-inf"))
    hidden = s == float("-inf")
    if RULE == SIGMOID:
        s = tl.where(hidden, s, tl.minimum(s, 0.0) - tl.log(1 + tl.exp(-tl.abs(s))))
    e = tl.where(hidden, 0.0, tl.exp(s - top))
    if RULE == FORWARD:
        before, moved, stay, move = _mixture(
            previous, transition, lengths, mask, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, AGENT, ACC
        )
        mix = stay * before + move * moved
        e = tl.where(hidden | (mix <= _least(ACC)), 0.0, e * mix)
        e = tl.where(stays, tl.where(hidden, 0.0, before), e)
    return e


@triton.jit(do_not_specialize=VARYING)
def step_context(
    scores, value, previous, transition, lengths, mask, seed, wide, context, Tq, Tk, H, threshold, keep_scale,
    keep_rest, RULE: tl.constexpr, AGENT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Weights (B, Tq, Tk) by a rule, before dropout, and the context (B, Tq, H): a program a query and some columns."""
    row = tl.program_id(0).to(tl.int64)
    b = row // Tq
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    top = tl.full((), float("-inf"), ACC)
    reached = tl.zeros((), tl.int32)
    for j0 in range(0, Tk, BK):
        j = j0 + tl.arange(0, BK)
        s = tl.load(scores + row * Tk + j, j < Tk, float("-inf"))
        if RULE == FORWARD:
            before, moved, stay, move = _mixture(
                previous, transition, lengths, mask, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, AGENT, ACC
            )
            s = tl.where(stay * before + move * moved <= _least(ACC), float("-inf"), s)
            reached += tl.sum((s != float("-inf")).to(tl.int32), 0)  # NaN too, which a maximum may pass over
        if RULE == SIGMOID:
            s = tl.where(s == float("-inf"), s, tl.minimum(s, 0.0) - tl.log(1 + tl.exp(-tl.abs(s))))
        top = tl.maximum(top, tl.max(s, 0))
    stays = reached == 0 if RULE == FORWARD else reached < 0
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), ACC)
    for j0 in range(0, Tk, BK):
        j = j0 + tl.arange(0, BK)
        total += tl.sum(_unnormalised(scores, previous, transition, lengths, mask, b, row, j, Tk, top, stays, RULE,
                                      HAS_LENGTHS, HAS_MASK, AGENT, ACC), 0)  # fmt: skip
    share = tl.where(stays, 1.0, tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total)))
    found = tl.zeros((BH,), ACC)
    for j0 in range(0, Tk, BK):
        j = j0 + tl.arange(0, BK)
        w = _unnormalised(scores, previous, transition, lengths, mask, b, row, j, Tk, top, stays, RULE,
                          HAS_LENGTHS, HAS_MASK, AGENT, ACC)  # fmt: skip
        w = tl.where(w == 0, 0.0, share * w)  # of a hidden slot beside NaN
        tl.store(wide + row * Tk + j, w, j < tl.where(tl.program_id(1) == 0, Tk, 0))
        if DROPOUT:
            kept = tl.reshape(_keep(seed, row + tl.zeros((1,), tl.int64), j, threshold), (BK,))
            w = tl.where(kept, w * keep_scale + w * keep_rest, 0.0)
        here = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
        at = value + (b * Tk + j)[:, None] * H + h[None, :]
        x = tl.load(at, here[:, None] & (h < H)[None, :], 0.0).to(ACC)
        found += tl.sum(w[:, None] * x, 0)
    tl.store(context + row * H + h, found, h < H)


@triton.jit(do_not_specialize=VARYING)
def step_slots(
    value, grad_context, grad_wide, wide, previous, transition, lengths, mask, window, seed, dp, ds, kept, stays,
    grad_transition, Tq, Tk, H, threshold, keep_scale, keep_rest, RULE: tl.constexpr, AGENT: tl.constexpr,
    CONTEXT: tl.constexpr, WEIGHTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dp, ds and what the values take of each context, (B, Tq, Tk): a program a query.

    ds of the sigmoid is without its factor 1 - sigmoid(s), which comes with the score. Of forward attention also
    whether the reader stays, and the transition's gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // Tq
    delta = tl.zeros((), ACC)
    reached = tl.zeros((), tl.int32)
    for j0 in range(0, Tk, BK):
        j = j0 + tl.arange(0, BK)
        here = _attended(lengths, mask, window, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, HAS_WINDOW)
        p = tl.load(wide + row * Tk + j, here, 0.0)
        found = tl.zeros((BK,), ACC)
        if CONTEXT:
            for h0 in range(0, H, BH):
                h = h0 + tl.arange(0, BH)
                g = tl.load(grad_context + row * H + h, h < H, 0.0).to(ACC)
                at = value + (b * Tk + j)[:, None] * H + h[None, :]
                x = tl.load(at, here[:, None] & (h < H)[None, :], 0.0).to(ACC)
                found += tl.sum(g[None, :] * x, 1)
        keep = tl.where(here, p, 0.0)
        if DROPOUT:
            drawn = tl.reshape(_keep(seed, row + tl.zeros((1,), tl.int64), j, threshold), (BK,))
            found = tl.where(drawn, found * keep_scale + found * keep_rest, 0.0)
            keep = tl.where(drawn, keep * keep_scale + keep * keep_rest, 0.0)
        if WEIGHTS:
            found += tl.load(grad_wide + row * Tk + j, here, 0.0).to(ACC)
        tl.store(dp + row * Tk + j, tl.where(here, found, 0.0), j < Tk)
        tl.store(kept + row * Tk + j, keep, j < Tk)
        delta += tl.sum(tl.where(p == 0, 0.0, p * found), 0)
        if RULE == FORWARD:
            before, moved, stay, move = _mixture(
                previous, transition, lengths, mask, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, AGENT, ACC
            )
            mix = stay * before + move * moved
            reached += tl.sum((here & ~(mix <= _least(ACC))).to(tl.int32), 0)
    tl.debug_barrier()  # a thread may load dp that another has stored
    of_move = tl.zeros((), ACC)
    for j0 in range(0, Tk, BK):
        j = j0 + tl.arange(0, BK)
        here = _attended(lengths, mask, window, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, HAS_WINDOW)
        p = tl.load(wide + row * Tk + j, here, 0.0)
        slot = tl.where(p == 0, 0.0, p * (tl.load(dp + row * Tk + j, here, 0.0) - delta))
        if RULE == FORWARD:
            before, moved, stay, move = _mixture(
                previous, transition, lengths, mask, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, AGENT, ACC
            )
            mix = stay * before + move * moved
            slot = tl.where((reached == 0) | (mix <= _least(ACC)), 0.0, slot)
            of_move += tl.sum(tl.where(slot == 0, 0.0, slot / tl.where(slot == 0, 1.0, mix) * (moved - before)), 0)
        tl.store(ds + row * Tk + j, slot, j < Tk)
    if RULE == FORWARD:
        tl.store(stays + row, (reached == 0).to(tl.int32))
        if AGENT:
            tl.store(grad_transition + row, of_move)


@triton.jit(do_not_specialize=VARYING)
def step_previous(
    ds, dp, stays, previous, transition, lengths, mask, window, grad_previous, Tq, Tk, AGENT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of forward attention the gradient of the last weights: those of a key and of the next come from them."""
    row, j = _row_and_keys(Tk, BK)
    b = row // Tq
    found = tl.zeros((BK,), ACC)
    for step in tl.static_range(2):
        at = j + step
        before, moved, stay, move = _mixture(
            previous, transition, lengths, mask, b, row, at, Tk, HAS_LENGTHS, HAS_MASK, AGENT, ACC
        )
        slot = tl.load(ds + row * Tk + at, at < Tk, 0.0)
        of_mix = tl.where(slot == 0, 0.0, slot / tl.where(slot == 0, 1.0, stay * before + move * moved))
        found += (stay if step == 0 else move) * of_mix
    attended = _attended(lengths, mask, window, b, row, j, Tk, HAS_LENGTHS, HAS_MASK, HAS_WINDOW)
    whole = tl.load(dp + row * Tk + j, attended, 0.0)
    found = tl.where(tl.load(stays + row) != 0, whole, found)
    found = tl.where(_visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK), found, 0.0)
    tl.store(grad_previous + row * Tk + j, found, j < Tk)


@triton.jit(do_not_specialize=VARYING)
def step_values(kept, grad_context, of_value, Tq, Tk, H, ACC: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr):
    """The gradient of the values, sum_i kept_ij dC_i: a program some keys and columns."""
    b, j = _row_and_keys(Tk, BK)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    found = tl.zeros((BK, BH), ACC)
    for i in range(Tq):
        w = tl.load(kept + (b * Tq + i) * Tk + j, j < Tk, 0.0)
        g = tl.load(grad_context + (b * Tq + i) * H + h, h < H, 0.0).to(ACC)
        found += tl.where((w == 0)[:, None], 0.0, w[:, None] * g[None, :])  # 0 times what came in may be NaN
    tl.store(of_value + (b * Tk + j)[:, None] * H + h[None, :], found, (j < Tk)[:, None] & (h < H)[None, :])


@triton.jit
def _add(at, x, inside, first):
    """Adds to what a program alone writes, or sets it at first. A number may be loaded and stored by two threads."""
    tl.debug_barrier()
    total = x + tl.where(first != 0, 0.0, tl.load(at, inside, 0.0))
    tl.debug_barrier()
    tl.store(at, total, inside)


@triton.jit(do_not_specialize=VARYING)
def step_gradients(
    query, key, weight, filters, projection, past, second_past, lengths, mask, ds, grad_key, query_parts,
    weight_parts, filter_parts, projection_parts, past_parts, Tq, Tk, D, F, width, tiles_each, scale, scale_rest,
    SIGMOID_RULE: tl.constexpr, CHANNELS: tl.constexpr, PROJECTED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """From ds all gradients of what is inside the tanh: a program some tiles of keys of a row, query after query.

    Sums over keys are the program's own parts: of the query (tiles, B Tq, D), and (programs, ...) of the others. What a
    tile gives to the past stands in (B Tq, CHANNELS, tiles, BK + width - 1).
    """
    b = tl.program_id(0).to(tl.int64)
    program = b * tl.num_programs(1) + tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64) * Tq
    f = tl.arange(0, BF)
    tiles = tl.cdiv(Tk, BK)
    for tile in range(tl.program_id(1) * tiles_each, tl.minimum((tl.program_id(1) + 1) * tiles_each, tiles)):
        j = tile * BK + tl.arange(0, BK)
        seen = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
        for i in range(Tq):
            row = b * Tq + i
            first = tl.where(tile == tl.program_id(1) * tiles_each, 1, 0) * tl.where(i == 0, 1, 0)
            slot = tl.load(ds + row * Tk + j, j < Tk, 0.0)
            features = tl.zeros((BK, BF), ACC)
            if PROJECTED:
                features = _features_at_once(
                    filters, past, second_past, lengths, mask, b, row, j, f, Tk, F, width, CHANNELS, HAS_LENGTHS,
                    HAS_MASK, ACC, BK, BF,
                )  # fmt: skip
            if SIGMOID_RULE:
                total = tl.zeros((BK,), ACC)
                for d0 in range(0, D, BD):
                    d = d0 + tl.arange(0, BD)
                    inner = _sums(
                        query, key, projection, filters, past, second_past, lengths, mask, features, b, row, j, d, seen,
                        Tk, D, F, width, CHANNELS, PROJECTED, HAS_LENGTHS, HAS_MASK, ACC, BK, BD, BF,
                    )  # fmt: skip
                    v = tl.load(weight + d, d < D, 0.0).to(ACC)
                    total += tl.sum(tl.where((d < D)[None, :], v[None, :] * (1 - 2 * _r(inner, ACC)), 0.0), 1)
                score = total * scale + total * scale_rest
                slot = tl.where(slot == 0, 0.0, slot / (1 + tl.exp(tl.minimum(score, 80.0))))
            of_features = tl.zeros((BK, BF), ACC)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                inside = d < D
                inner = _sums(
                    query, key, projection, filters, past, second_past, lengths, mask, features, b, row, j, d, seen,
                    Tk, D, F, width, CHANNELS, PROJECTED, HAS_LENGTHS, HAS_MASK, ACC, BK, BD, BF,
                )  # fmt: skip
                r = _r(inner, ACC)
                counts = (slot != 0)[:, None] & inside[None, :]
                v = tl.load(weight + d, inside, 0.0).to(ACC)
                gain = 4 * (v * scale + v * scale_rest)
                u = tl.where(counts, slot[:, None] * gain[None, :] * (r * (1 - r)), 0.0)
                of_weight = tl.sum(tl.where(counts, slot[:, None] * (1 - 2 * r), 0.0), 0)
                _add(weight_parts + program * D + d, of_weight * scale + of_weight * scale_rest, inside, first)
                tl.store(query_parts + (tile * rows + row) * D + d, tl.sum(u, 0), inside)
                at = grad_key + (b * Tk + j)[:, None] * D + d[None, :]
                _add(at, u, (j < Tk)[:, None] & inside[None, :], tl.where(i == 0, 1, 0))
                if PROJECTED:
                    both = inside[:, None] & (f < F)[None, :]
                    p = tl.load(projection + d[:, None] * F + f[None, :], both, 0.0).to(ACC)
                    of_features += _product(u, p, ACC)
                    at = projection_parts + (program * D + d)[:, None] * F + f[None, :]
                    _add(at, _product(tl.trans(u), features, ACC), both, first)
                elif CHANNELS > 0:
                    _past_gradients(
                        u, filters, past, second_past, lengths, mask, filter_parts, past_parts, b, row, program, tile,
                        tiles, j, d, first, Tk, D, width, CHANNELS, HAS_LENGTHS, HAS_MASK, ACC, BK,
                    )  # fmt: skip
            if PROJECTED:
                _past_gradients(
                    of_features, filters, past, second_past, lengths, mask, filter_parts, past_parts, b, row, program,
                    tile, tiles, j, f, first, Tk, F, width, CHANNELS, HAS_LENGTHS, HAS_MASK, ACC, BK,
                )  # fmt: skip


@triton.jit
def _past_gradients(
    of_features, filters, past, second_past, lengths, mask, filter_parts, past_parts, b, row, program, tile, tiles, j,
    f, first, Tk, F, width, CHANNELS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the features f, (BK, ...), those of the filters and of the past they lay on.

    A place of the past gets its sum from one offset after another, each from another thread: these wait for each other.
    """
    reach = BK + width - 1
    for channel in tl.static_range(CHANNELS):
        seen_in = past if channel == 0 else second_past
        own = past_parts + ((row * CHANNELS + channel) * tiles + tile) * reach
        for o in range(width):
            at = j + o - width // 2
            seen = tl.load(seen_in + row * Tk + at, _visible(lengths, mask, b, at, Tk, HAS_LENGTHS, HAS_MASK), 0.0)
            part = filter_parts + ((program * CHANNELS + channel) * width + o) * F + f
            _add(part, tl.sum(of_features * seen[:, None], 0), f < F, first)
            weight = tl.load(filters + (f * CHANNELS + channel) * width + o, f < F, 0.0).to(ACC)
            place = own + o + tl.arange(0, BK)
            tl.store(place, tl.load(place) + tl.sum(of_features * weight[None, :], 1))
            tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def step_past(
    past_parts, lengths, mask, grad_past, Tq, Tk, width, channel, CHANNELS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of a past: the tiles' parts that reach a place, in their order; 0 in hidden slots."""
    row, j = _row_and_keys(Tk, BK)
    b = row // Tq
    tiles, reach = tl.cdiv(Tk, TILE), TILE + width - 1
    found = tl.zeros((BK,), ACC)
    for tile in range(tiles):
        at = j + width // 2 - tile * TILE
        own = past_parts + ((row * CHANNELS + channel) * tiles + tile) * reach
        found += tl.load(own + at, (at >= 0) & (at < reach) & (j < Tk), 0.0)
    here = _visible(lengths, mask, b, j, Tk, HAS_LENGTHS, HAS_MASK)
    tl.store(grad_past + row * Tk + j, tl.where(here, found, 0.0), j < Tk)
