"""Triton kernels of attention by dot products: forward, ds of each pair, and the sums that the gradients are.

A tile is (queries, keys, features), and its products are summed over one of them as soon as they are made. The
features lie along a warp and are contiguous in memory: a key is read in whole lines, once for the queries of a tile,
and its sum with a query takes the warp's shuffles. A sum over keys, of a context or a gradient, is a thread's own.
There are no matrix products of the tensor cores: theirs would round float32, and a decoder's step waits for memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive import VARYING, _dropped, _log_sum, _softened, _visible, _write_weights

WEIGHT_BLOCK = tl.constexpr(64)


@triton.jit
def _products(x, y, x_in, y_in, D, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The dot products (BM, BN) of rows of D numbers that x (BM, 1, 1) and y (1, BN, 1) point to."""
    acc = tl.zeros((BM, BN), ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)[None, None, :]
        x_d = tl.load(x + d, x_in & (d < D), 0.0).to(ACC)
        acc += tl.sum(x_d * tl.load(y + d, y_in & (d < D), 0.0).to(ACC), 2)
    return acc


@triton.jit
def _weighted_sum(weight, x, HIDE: tl.constexpr):
    """Rows x (1, n, columns) times weights (m, n), summed: (m, 1, columns). With HIDE a weight of 0 hides a NaN."""
    weight = weight[:, :, None]
    product = weight * x
    if HIDE:
        product = tl.where(weight == 0, 0.0, product)
    return tl.sum(product, 1, keep_dims=True)


@triton.jit(do_not_specialize=VARYING)
def dot_forward(
    query, key, value, lengths, mask, seed, part, part_max, part_sum, context, lse_out, raw, weights,
    B, Tq, Tk, D, H, mask_row, keys_each, scale, scale_rest, threshold, keep_scale, keep_rest,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, WEIGHTS: tl.constexpr,
    WHOLE: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Scores, online softmax and BD columns of the context, of a tile of queries over the keys [split keys_each, ...).

    WHOLE says that BD features are all; SHARED, which goes with it, that a tile of keys is that of the values. With
    SPLIT the sums go to ``part`` (splits, B, Tq, H) and ``additive.combine``. ``raw`` takes the scores, from which the
    weights come once the sum is known.
    """
    tiles = tl.cdiv(Tq, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    row = b * Tq + i
    split = tl.program_id(1)
    first = split * keys_each
    end = tl.minimum(first + keys_each, Tk)
    stop = end
    if HAS_LENGTHS:
        stop = tl.minimum(end.to(tl.int64), tl.load(lengths + b)).to(tl.int32)
    factor = tl.cast(scale, ACC) + tl.cast(scale_rest, ACC)
    d = tl.arange(0, BD)[None, None, :]
    h = tl.program_id(2) * BD + d
    q_row = query + row[:, None, None] * D
    q_in = (i < Tq)[:, None, None]
    if WHOLE:
        q = tl.load(q_row + d, q_in & (d < D), 0.0).to(ACC)
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    acc = tl.zeros((BM, 1, BD), ACC)
    for j0 in range(first, stop, BN):
        j = j0 + tl.arange(0, BN)
        here = (j < stop)[None, :, None]
        at = (b * Tk + j)[None, :, None]
        if WHOLE:
            k = tl.load(key + at * D + d, here & (d < D), 0.0).to(ACC)
            s = tl.sum(q * k, 2)
        else:
            s = _products(q_row, key + at * D, q_in, here, D, ACC, BM, BN, BD)
        seen = _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS, HAS_MASK)
        s = tl.where(seen, s * factor, float("-inf"))
        if WEIGHTS and tl.program_id(2) == 0:
            tl.store(raw + row[:, None] * Tk + j[None, :], s, (i < Tq)[:, None] & (j < Tk)[None, :])
        p, alpha, top, total = _softened(s, top, total)
        if DROPOUT:
            p = _dropped(p, seed, row, j, threshold, keep_scale, keep_rest)
        v = k if SHARED else tl.load(value + at * H + h, here & (h < H), 0.0).to(ACC)
        acc = acc * alpha[:, None, None] + _weighted_sum(p, v, HAS_MASK)
    inside = q_in & (h < H)
    if SPLIT:
        at = (split.to(tl.int64) * B + b) * Tq + i
        tl.store(part + at[:, None, None] * H + h, acc, inside)
        tl.store(part_max + at, top, i < Tq)
        tl.store(part_sum + at, total, i < Tq)
    else:
        lse, gain = _log_sum(top, total)
        tl.store(lse_out + row, lse, i < Tq)
        c = (acc * gain[:, None, None]).to(context.dtype.element_ty)
        tl.store(context + row[:, None, None] * H + h, c, inside)
        if WEIGHTS and tl.program_id(2) == 0:
            tl.debug_barrier()
            _write_weights(
                raw, weights, seed, lse, b, i, first, stop, end, Tq, Tk, threshold, keep_scale, keep_rest, DROPOUT,
                WEIGHT_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*VARYING, "slab"])
def dot_score_gradients(
    query, key, value, lengths, mask, seed, grad_context, grad_weights, lse, delta, ds_out, p_out,
    Tq, Tk, D, H, mask_row, i_first, slab, scale, scale_rest, threshold, keep_scale, keep_rest,
    HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, CONTEXT: tl.constexpr,
    WEIGHTS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """scale ds, and the weights after dropout, of the queries [i_first, i_first + slab): (B, slab, Tk)."""
    tiles = tl.cdiv(Tk, BN)
    j = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    of_queries = tl.program_id(0) // tiles
    q_tiles = tl.cdiv(tl.minimum(slab, Tq - i_first), BM)
    b = (of_queries // q_tiles).to(tl.int64)
    local = of_queries % q_tiles * BM + tl.arange(0, BM)
    i = i_first + local
    row = b * Tq + i
    rows_in = (i < Tq) & (local < slab)
    length = Tk
    if HAS_LENGTHS:
        length = tl.minimum(Tk, tl.load(lengths + b)).to(tl.int32)
    left = length - tl.program_id(0) % tiles * BN  # of the row: nothing else of it is read
    factor = tl.cast(scale, ACC) + tl.cast(scale_rest, ACC)
    q_at = row[:, None, None]
    q_in = rows_in[:, None, None]
    k_at = (b * Tk + j)[None, :, None]
    k_in = (j < length)[None, :, None]
    s = _products(query + q_at * D, key + k_at * D, q_in, k_in, tl.where(left > 0, D, 0), ACC, BM, BN, BD)
    dp = tl.zeros((BM, BN), ACC)
    if CONTEXT:
        dp = _products(grad_context + q_at * H, value + k_at * H, q_in, k_in, tl.where(left > 0, H, 0), ACC, BM, BN, BD)
    row_lse = tl.load(lse + row, rows_in, float("-inf"))
    seen = _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS, HAS_MASK)
    seen = seen & (rows_in & (row_lse != float("-inf")))[:, None]
    if WEIGHTS:
        dp += tl.load(grad_weights + row[:, None] * Tk + j[None, :], seen, 0.0).to(ACC)
    p = tl.where(seen, tl.exp(tl.minimum(s * factor - row_lse[:, None], 0.0, tl.PropagateNan.ALL)), 0.0)
    kept = tl.full((BM, BN), 1.0, ACC)
    if DROPOUT:
        kept = _dropped(kept, seed, row, j, threshold, keep_scale, keep_rest)
    ds = tl.where(p == 0, 0.0, p * (kept * dp - tl.load(delta + row, rows_in, 0.0)[:, None]))
    out = (b * slab + local)[:, None] * Tk + j[None, :]
    inside = rows_in[:, None] & (j < Tk)[None, :]
    tl.store(ds_out + out, ds * factor, inside)
    tl.store(p_out + out, p * kept, inside)


@triton.jit(do_not_specialize=VARYING)
def weighted_sums(
    w, x, w_more, x_more, lengths, out, B, rows_of, terms, columns, w_batch, w_row, w_term, x_rows, x_first, out_rows,
    out_first, each, add, HAS_LENGTHS: tl.constexpr, MORE: tl.constexpr, HIDE: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """w (B, rows_of, terms), of any strides, times x (B, x_rows, columns) from x_first on; with MORE plus two more.

    It goes to out (splits, B, out_rows, columns) from out_first on, with ``add`` on top of what stands there; a split
    takes ``each`` of the terms. lengths are of the terms.
    """
    column_tiles = tl.cdiv(columns, BC)
    row_tiles = tl.cdiv(rows_of, BR)
    c = tl.program_id(0) % column_tiles * BC + tl.arange(0, BC)[None, None, :]
    of_rows = tl.program_id(0) // column_tiles
    r = of_rows % row_tiles * BR + tl.arange(0, BR)
    b = (of_rows // row_tiles).to(tl.int64)
    first = tl.program_id(1) * each
    stop = tl.minimum(first + each, terms)
    if HAS_LENGTHS:
        stop = tl.minimum(stop.to(tl.int64), tl.load(lengths + b)).to(tl.int32)
    at = ((tl.program_id(1) * B + b) * out_rows + out_first + r)[:, None, None] * columns + c
    inside = (r < rows_of)[:, None, None] & (c < columns)
    acc = tl.zeros((BR, 1, BC), ACC)
    if add:
        acc = tl.load(out + at, inside, 0.0).to(ACC)
    for t0 in range(first, stop, BT):
        t = t0 + tl.arange(0, BT)
        w_at = b * w_batch + r.to(tl.int64)[:, None] * w_row + t.to(tl.int64)[None, :] * w_term
        w_in = (r < rows_of)[:, None] & (t < stop)[None, :]
        x_at = (b * x_rows + x_first + t)[None, :, None] * columns + c
        x_in = (t < stop)[None, :, None] & (c < columns)
        acc += _weighted_sum(tl.load(w + w_at, w_in, 0.0), tl.load(x + x_at, x_in, 0.0).to(ACC), HIDE)
        if MORE:
            more = tl.load(x_more + x_at, x_in, 0.0).to(ACC)
            acc += _weighted_sum(tl.load(w_more + w_at, w_in, 0.0), more, HIDE)
    tl.debug_barrier()  # after what was loaded there
    tl.store(out + at, acc.to(out.dtype.element_ty), inside)
