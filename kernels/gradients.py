"""Triton kernels of additive attention, backward: ds of each pair, then the gradients of the inputs from it.

Letters as in ``additive.py``. r is computed again, once, for the gradients of query, key and score weight together: a
thread has a few keys and two features, d and d + half, and takes query after query, so that the sums over the keys and
those over the queries are both its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive import VARYING, _exp_of_twice, _keep, _near, _of_head, _reciprocal, _scores, _visible

UNROLL = tl.constexpr(2)  # of dC h; the scores' loop has no register left for it


@triton.jit(do_not_specialize=VARYING)
def row_sums(
    grad_context, context, grad_weights, weights, delta, Tk, H,
    CONTEXT: tl.constexpr, WEIGHTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = dC . C + dA . A of each row; a weight of 0 hides what its gradient holds."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), ACC)
    if CONTEXT:
        for h0 in range(0, H, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            c = tl.load(context + row * H + h, h < H, 0.0).to(ACC)
            g = tl.load(grad_context + row * H + h, h < H, 0.0).to(ACC)
            total += tl.where(c == 0, 0.0, c * g)
    if WEIGHTS:
        for j0 in range(0, Tk, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            a = tl.load(weights + row * Tk + j, j < Tk, 0.0).to(ACC)
            g = tl.load(grad_weights + row * Tk + j, j < Tk, 0.0).to(ACC)
            total += tl.where(a == 0, 0.0, a * g)
    tl.store(delta + row, tl.sum(total, 0))


@triton.jit(do_not_specialize=VARYING)
def score_gradients(
    query, key, folded, e, f, q_limit, k_limit, lengths, mask, seed,
    value_columns, grad_columns, grad_weights, lse, delta, ds_out, p_out, ds_sums,
    heads, Tq, Tk, D, H, HALF, q_rows, k_rows, mask_row, i_first, slab, threshold, keep_scale, keep_rest,
    UNIT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    CONTEXT: tl.constexpr, WEIGHTS: tl.constexpr, FROM_SCORES: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ds and, for the values, the weights after dropout of the queries [i_first, i_first + slab): (B, slab, k_rows).

    value_columns (B, H, k_rows) and grad_columns (B, H, q_rows) are the values and dC with the columns first. ds_sums
    (B, k_rows / BN, slab) is added the sums of ds over the keys of a tile. Tiles beyond a row's length are not written.
    """
    tiles = k_rows // BN
    j_tile = tl.program_id(0) % tiles
    of_queries = tl.program_id(0) // tiles
    q_tiles = tl.cdiv(tl.minimum(slab, Tq - i_first), BM)
    b = (of_queries // q_tiles).to(tl.int64)
    local = of_queries % q_tiles * BM + tl.arange(0, BM)
    i = i_first + local
    j = j_tile * BN + tl.arange(0, BN)
    row = b * Tq + i
    rows_in = i < Tq
    out = (b * slab + local)[:, None] * k_rows + j[None, :]
    at = row[:, None] * Tk + j[None, :]
    ds_sum = ds_sums + (b * tiles + j_tile) * slab + local
    length = Tk
    if HAS_LENGTHS:
        length = tl.load(lengths + b).to(tl.int32)
    if j_tile * BN >= length:
        return
    if FROM_SCORES:
        seen = _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS, HAS_MASK) & rows_in[:, None]
        ds = tl.load(grad_weights + at, seen, 0.0).to(ACC)
        tl.store(ds_out + out, ds)
    else:
        nothing = tl.zeros((BM, BN), ACC)
        # Sums wait in memory until all are there: that is few registers, and each in the layout of its store.
        if CONTEXT:
            dp = nothing
            g = grad_columns + b * H * q_rows + i
            v = value_columns + b * H * k_rows + j
            for _ in tl.range(0, H, loop_unroll_factor=UNROLL):
                dp += tl.load(g)[:, None] * tl.load(v)[None, :]
                g += q_rows
                v += k_rows
            tl.store(ds_out + out, dp)
        folded = _of_head(folded, b, heads, HALF)
        near = _near(folded, HALF, q_limit + b * q_rows, k_limit + b * k_rows, i, j)
        s = _scores(
            query + b * Tq * D, key + b * Tk * D, e + b * 2 * HALF * q_rows, f + b * 2 * HALF * k_rows, folded,
            near, i, j, Tq, Tk, D, HALF, q_rows, k_rows, UNIT, TARGET, ACC, BM, BN,
        )  # fmt: skip
        tl.store(p_out + out, s)
        tl.debug_barrier()
        s = tl.load(p_out + out)
        row_lse = tl.load(lse + row, rows_in, float("-inf"))
        seen = _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS, HAS_MASK)
        seen = seen & (rows_in & (row_lse != float("-inf")))[:, None]
        p = tl.where(seen, tl.exp(tl.minimum(s - row_lse[:, None], 0.0, tl.PropagateNan.ALL)), 0.0)
        dp = nothing
        if CONTEXT:
            dp = tl.load(ds_out + out)
        if WEIGHTS:
            dp += tl.load(grad_weights + at, seen, 0.0).to(ACC)
        kept = nothing + 1
        if DROPOUT:
            kept = tl.where(_keep(seed, row, j, threshold), (nothing + keep_scale) + keep_rest, 0.0)
        ds = tl.where(p == 0, 0.0, p * (kept * dp - tl.load(delta + row, rows_in, 0.0)[:, None]))
        tl.debug_barrier()  # what a thread stores there, another may have loaded
        tl.store(ds_out + out, ds)
        tl.store(p_out + out, p * kept)
    tl.store(ds_sum, tl.load(ds_sum) + tl.sum(ds, 1))


@triton.jit
def _largest(limits, first, end, ACC: tl.constexpr):
    """The largest |x| of rows [first, end)."""
    largest = tl.zeros((64,), ACC)
    for t0 in range(first, end, 64):
        t = t0 + tl.arange(0, 64)
        largest = tl.maximum(largest, tl.load(limits + t, t < end, 0.0))
    return tl.max(largest, 0)


@triton.jit
def _feature_sums(
    query, key0, key1, ds, query_part, weight0, weight1, rows, d, features, HALF, q_step, part_step, ds_step,
    NEAR: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of ds r (1 - r) of features d and d + HALF: over the rows for a tile of keys, over its keys for each row.

    query, ds and query_part point to the first row and its first key; the sums over the keys are added to query_part,
    which has a feature a thread: what a thread loads of it, it has stored itself.
    With NEAR query and keys are exponentials. Returns the sums of the keys, and weight0 and weight1 with those of ds r.
    """
    first = d < HALF
    second = first & (d + HALF < features)
    sum0 = tl.zeros((BJ, BD), ACC)
    sum1 = tl.zeros((BJ, BD), ACC)
    for _ in range(rows):
        slot = tl.load(ds)[:, None].broadcast_to(BJ, BD)
        e0 = tl.load(query, first, 0.0).to(ACC)[None, :]
        e1 = tl.load(query + HALF, second, 0.0).to(ACC)[None, :]
        if NEAR:
            x0 = e0 * key0 + 1
            x1 = e1 * key1 + 1
            inverse = _reciprocal(x0 * x1, TARGET)
            r0 = inverse * x1
            r1 = inverse * x0
        else:  # only where ds is not 0: a hidden slot may hold a NaN
            r0 = tl.where(slot == 0, 0.0, 1 / (tl.exp(2 * (e0 + key0)) + 1))
            r1 = tl.where(slot == 0, 0.0, 1 / (tl.exp(2 * (e1 + key1)) + 1))
        slope0 = r0 - r0 * r0
        slope1 = r1 - r1 * r1
        # Fused by name: left alone, the compiler shares the products with the sums over the keys, and adds apart.
        sum0 = tl.fma(slot, slope0, sum0)
        sum1 = tl.fma(slot, slope1, sum1)
        weight0 = tl.fma(slot, r0, weight0)
        weight1 = tl.fma(slot, r1, weight1)
        tl.store(query_part, tl.load(query_part, first, 0.0) + tl.sum(slot * slope0, 0), first)
        tl.store(query_part + HALF, tl.load(query_part + HALF, first, 0.0) + tl.sum(slot * slope1, 0), first)
        query += q_step
        ds += ds_step
        query_part += part_step
    return sum0, sum1, weight0, weight1


@triton.jit
def _pair_gradients(
    query, key, exp_query, k_limit, ds, query_part, key_part, weight_part, near, rows, j_first, j_stop, j_end, d,
    D, HALF, both, k_rows, add, TARGET: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of ds r (1 - r) over keys [j_first, j_stop) and ``rows`` queries, and of ds r over both.

    query, exp_query, ds and query_part point to the first query; key, k_limit and key_part to the batch row. key_part
    is written up to j_end.
    """
    first = d < HALF
    part = query_part + d
    for _ in range(rows):
        tl.store(part, tl.zeros((BD,), ACC), first)
        tl.store(part + HALF, tl.zeros((BD,), ACC), first)
        part += both
    weight0 = tl.zeros((BJ, BD), ACC)
    weight1 = tl.zeros((BJ, BD), ACC)
    for j0 in range(j_first, j_end, BJ):
        j = j0 + tl.arange(0, BJ)
        sum0 = tl.zeros((BJ, BD), ACC)
        sum1 = tl.zeros((BJ, BD), ACC)
        tl.debug_barrier()
        if j0 < j_stop:
            k = key + j.to(tl.int64)[:, None] * D + d[None, :]
            inside = (j < j_stop)[:, None] & first[None, :]
            k0 = tl.load(k, inside & (d < D)[None, :], 0.0).to(ACC)
            k1 = tl.load(k + HALF, inside & (d + HALF < D)[None, :], 0.0).to(ACC)
            if near:
                hidden = (tl.load(k_limit + j) < 0)[:, None]
                f0 = tl.where(hidden, 0.0, _exp_of_twice(k0))
                f1 = tl.where(hidden, 0.0, _exp_of_twice(k1))
                sum0, sum1, weight0, weight1 = _feature_sums(
                    exp_query + d, f0, f1, ds + j, query_part + d, weight0, weight1, rows, d, both, HALF, both, both,
                    k_rows, True, TARGET, ACC, BJ, BD,
                )  # fmt: skip
            else:
                sum0, sum1, weight0, weight1 = _feature_sums(
                    query + d, k0, k1, ds + j, query_part + d, weight0, weight1, rows, d, D, HALF, D, both,
                    k_rows, False, TARGET, ACC, BJ, BD,
                )  # fmt: skip
        out = key_part + j.to(tl.int64)[:, None] * both + d[None, :]
        inside = (j < j_end)[:, None] & first[None, :]
        if add:
            sum0 += tl.load(out, inside, 0.0)
            sum1 += tl.load(out + HALF, inside, 0.0)
            tl.debug_barrier()
        tl.store(out, sum0, inside)
        tl.store(out + HALF, sum1, inside)
    tl.store(weight_part + d, tl.sum(weight0, 0), first)
    tl.store(weight_part + HALF + d, tl.sum(weight1, 0), first)


# What divides these must not be known: loads of several features at once would spread the keys over threads.
@triton.jit(do_not_specialize=[*VARYING, "keys_each", "D", "HALF", "both"])
def input_gradients(
    query, key, exp_query, q_limit, k_limit, lengths, ds, p, grad_context,
    query_parts, key_parts, weight_parts, grad_value,
    B, Tq, Tk, D, H, HALF, both, q_rows, k_rows, i_first, slab, rows_each, keys_each, row_splits, key_splits, add,
    PLAIN: tl.constexpr, HAS_LENGTHS: tl.constexpr, CONTEXT: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Parts of the gradients of query, key and score weight, and the gradient of the values, from ds and p of a slab.

    A program owns some features of rows_each queries and keys_each keys: its sums over the keys go to query_parts
    (key_splits, B, Tq, both), those over the queries to key_parts (row_splits, B, Tk, both), and those over all to
    weight_parts (row_splits key_splits, B, both), where both is 2 HALF. The programs behind these own tiles of
    grad_value (B, Tk, H).
    """
    each = tl.num_programs(0) // B
    b = (tl.program_id(0) // each).to(tl.int64)
    n = tl.program_id(0) % each
    length = Tk
    if HAS_LENGTHS:
        length = tl.load(lengths + b).to(tl.int32)
    rows = tl.minimum(slab, Tq - i_first)
    tiles = tl.cdiv(HALF, BD)
    splits = row_splits * key_splits
    if n < splits * tiles:
        split = n // tiles
        d = n % tiles * BD + tl.arange(0, BD)
        local = split // key_splits * rows_each
        count = tl.minimum(rows - local, rows_each)
        i = i_first + local
        j_first = split % key_splits * keys_each
        j_end = tl.minimum(j_first + keys_each, Tk)
        j_stop = tl.minimum(j_end, length)
        limit = _largest(q_limit + b * q_rows, i, i + count, ACC) + _largest(k_limit + b * k_rows, j_first, j_stop, ACC)
        _pair_gradients(
            query + (b * Tq + i) * D, key + b * Tk * D, exp_query + (b * q_rows + i) * both,
            k_limit + b * k_rows, ds + (b * slab + local) * k_rows,
            query_parts + ((split % key_splits * B + b) * Tq + i) * both,
            key_parts + (split // key_splits * B + b) * Tk * both, weight_parts + (split * B + b) * both,
            limit <= PLAIN, count, j_first, j_stop, j_end, d, D, HALF, both, k_rows, add, TARGET, ACC, BJ, BD,
        )  # fmt: skip
    elif CONTEXT:
        n -= splits * tiles
        columns = tl.cdiv(H, BH)
        j0 = n // columns * BN
        j = j0 + tl.arange(0, BN)
        h = n % columns * BH + tl.arange(0, BH)
        at = grad_value + (b * Tk + j)[:, None] * H + h[None, :]
        inside = (j < Tk)[:, None] & (h < H)[None, :]
        acc = tl.zeros((BN, BH), ACC)
        if add:
            acc = tl.load(at, inside, 0.0).to(ACC)
        p_i = p + b * slab * k_rows + j
        g = grad_context + (b * Tq + i_first) * H + h
        for _ in range(tl.where(j0 < length, rows, 0)):
            weight = tl.load(p_i)[:, None]  # 0 hides a NaN that came in for a row which attends nothing
            product = weight * tl.load(g, h < H, 0.0).to(ACC)[None, :]
            acc += tl.where(weight == 0, 0.0, product)
            p_i += k_rows
            g += H
        tl.debug_barrier()  # after what was loaded there
        tl.store(at, acc.to(grad_value.dtype.element_ty), inside)


@triton.jit(do_not_specialize=VARYING)
def sum_parts(parts, folded, out, splits, count, heads, T, D, HALF, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out (B, T, D) = 4 scale v times the sum of parts (splits, B, T, 2 HALF), in their order; count is B T D."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = at % D
    part = parts + at // D * (2 * HALF) + d
    total = tl.zeros((BLOCK,), ACC)
    for _ in range(splits):
        total += tl.load(part, inside, 0.0)
        part += tl.cast(count // D, tl.int64) * (2 * HALF)
    factor = -2 * tl.load(_of_head(folded, at // D // T, heads, HALF) + d, inside, 0.0)
    tl.store(out + at, (factor * total).to(out.dtype.element_ty), inside)
