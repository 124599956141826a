"""Triton kernels of additive attention: exponentials, scores, forward with its combination of splits.

Letters as in ARCHITECTURE.md: E = exp(2q), F = exp(2k), x = 1 + E F, r = 1/x, tanh(q + k) = 1 - 2r.

Everything of size Tq Tk is a sum of outer products: each thread holds its own part of a tile and adds a feature, key,
query or value column after the other to it; no sum crosses threads. So E and F are kept with features first, as (B,
features, padded rows).

Feature d goes with d + half: the two share a reciprocal. The weight is folded in: y = c x with c = unit max|w| / w, so
w r is 1/y up to a constant, and a pair is (y0 + y1) / (y0 y1): three multiply-adds, two additions or products, and one
reciprocal for two features.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A folded y is at least UNIT in size and at most 2^63 where a tile is near: the product of two stays a normal number.
# PLAIN is |q| + |k| up to which the product of two x = 1 + E F is finite; MAX_WEIGHT as on the CPU.
UNIT = {"float32": 2.0**-62, "float64": 2.0**-510}
FOLD_BITS = {"float32": 124.5, "float64": 1020.0}
PLAIN = {"float32": 21.5, "float64": 177.0}
MAX_WEIGHT = {"float32": 2.0**30, "float64": 2.0**200}
# A weight this much smaller than the largest, over D, counts as 0.
SMALLEST = {"float32": 2.0**-26, "float64": 2.0**-55}
HALF_LN2 = tl.constexpr(0.34657)

# Arguments that differ from batch to batch: to know whether they are 1, or 16 divides them, would make no loop faster,
# and another kernel of each combination. What is padded to a multiple of 16, or to one row, is not among them; two
# pointers into larger tensors are.
VARYING = [
    "B", "T", "Tq", "Tk", "mask_row", "count", "splits", "i_first", "rows_each", "row_splits", "key_splits",
    "add", "each", "tiles_each", "terms", "rows_of", "w_batch", "w_row", "w_term", "x_rows", "x_first", "out_rows",
    "out_first", "part_sum", "weight_parts",
]  # fmt: skip


@triton.jit
def _reciprocal(x, TARGET: tl.constexpr):
    """1/x to an ulp or two: the hardware's own estimate in float32, a division elsewhere."""
    if TARGET == "cuda" and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    if TARGET == "hip" and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def _exp_of_twice(x):
    """exp(2x) to some ulps, also where x is large: a GPU's own takes 2^(x log2 e) of one rounded product.

    In float32 the product's larger part is exact: of the first half of x's bits, and the first of the constant's.
    """
    if x.dtype == tl.float32:
        high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        low = (x - high) * 2.884765625 + x * 0.000624456777926774
        return tl.exp2(high * 2.884765625) * tl.exp2(tl.where(tl.abs(x) < float("inf"), low, 0.0))
    return tl.exp(2 * x)


@triton.jit
def _mix(x):
    """The hash of reference.dropout_keep."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(seed_pointer, row, j, threshold):
    """Which weights of rows (BM,), counted over batch and queries, and keys (BN,) dropout keeps: (BM, BN)."""
    seed = tl.load(seed_pointer).to(tl.uint64)
    row = row.to(tl.uint64)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    row_hash = _mix((_mix(row.to(tl.uint32) ^ low) + (row >> 32).to(tl.uint32)) ^ high)
    bits = _mix(row_hash[:, None] ^ _mix(j.to(tl.uint32))[None, :])
    return bits.to(tl.int64) >= threshold


@triton.jit
def _of_head(folded, row, heads, HALF):
    """What :func:`fold_weight` made for the head of a row of the batch."""
    return folded + row % heads * (6 * HALF + 2)


@triton.jit
def fold_weight(
    weight, folded, D, HALF, scale, scale_rest, UNIT: tl.constexpr, BITS: tl.constexpr, MAX: tl.constexpr,
    SMALLEST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a head's score weight v, into ``folded`` (3, 2 HALF) and two numbers behind it: w = -2 scale v; c, or 0 where
    w is too small to count; c again, or 1 / unit there; max|w|, and |q| + |k| up to which folding is safe.

    The launch passes float32 numbers, so a float64 scale comes as that and what it leaves.
    """
    head = tl.program_id(0)
    folded += head * (6 * HALF + 2)
    d = tl.arange(0, BLOCK)
    v = tl.load(weight + head * D + d, d < D, 0.0).to(ACC)
    w = -2 * (v * scale + v * scale_rest)
    w = tl.where(tl.abs(w) < float("inf"), w, float("nan"))  # an infinite one would make the score of a hidden slot
    size = tl.abs(w)
    whole = tl.min((size <= MAX).to(tl.int32), 0) == 1  # no NaN, and nothing too large
    limit = tl.max(tl.where(size <= MAX, size, 0.0), 0)
    counts = (size > limit * (SMALLEST / D)) & (size > 0)
    c = tl.where(counts, UNIT * (limit / tl.where(counts, w, 1.0)), 0.0)
    smallest = tl.min(tl.where(counts, size, limit), 0)
    spread = tl.where(limit > 0, tl.log2(limit / tl.where(limit > 0, smallest, 1.0)), 0.0)
    safe = d < 2 * HALF
    tl.store(folded + d, w, safe)
    tl.store(folded + 2 * HALF + d, c, safe)
    tl.store(folded + 4 * HALF + d, tl.where(counts, c, 1 / UNIT), safe)
    tl.store(folded + 6 * HALF, limit)
    tl.store(folded + 6 * HALF + 1, tl.where(whole, (BITS - spread) * HALF_LN2, -1.0))


@triton.jit(do_not_specialize=VARYING)
def features_first(
    rows, lengths, mask, fold, out, by_row, limits, heads, T, D, padded_rows, padded_features,
    EXP: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out (B, padded_features, padded_rows) = rows (B, T, D), with EXP exp(2 rows); 0 in the padding and hidden rows.

    With EXP also limits (B, padded_rows) = max|x|, infinity where a row is not finite, -1 where it is hidden; with ROWS
    also by_row (B, padded_rows, padded_features), the same with the features last; with FOLD each feature of ``out`` is
    multiplied by its entry of ``fold``, which is of a head.
    """
    tiles = tl.cdiv(padded_rows, BT)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    here = t < T
    if HAS_LENGTHS:
        here = here & (t < tl.load(lengths + b))
    if HAS_MASK:
        here = here & (tl.load(mask + b * T + t, here, 0) != 0)
    size = tl.zeros((BT,), ACC)
    broken = tl.zeros((BT,), tl.int32)
    x_row = rows + (b * T + t)[:, None] * D
    out_row = out + b * padded_features * padded_rows + t[:, None]
    if FOLD:
        fold = _of_head(fold, b, heads, padded_features // 2)
    for d0 in range(0, padded_features, BD):
        d = d0 + tl.arange(0, BD)
        inside = here[:, None] & (d < D)[None, :]
        x = tl.load(x_row + d[None, :], inside, 0.0).to(ACC)
        if EXP:
            finite = tl.abs(x) < float("inf")
            broken += tl.sum(tl.where(finite, 0, 1), 1)
            size = tl.maximum(size, tl.max(tl.where(finite, tl.abs(x), 0.0), 1))
            x = tl.where(inside, _exp_of_twice(x), 0.0)
        stored = (t < padded_rows)[:, None] & (d < padded_features)[None, :]
        if ROWS:
            tl.store(by_row + (b * padded_rows + t)[:, None] * padded_features + d[None, :], x, stored)
        if FOLD:
            x = x * tl.load(fold + d, d < padded_features, 0.0)[None, :]
        tl.store(out_row + d.to(tl.int64)[None, :] * padded_rows, x, stored)
    if EXP:
        limit = tl.where(here, tl.where(broken > 0, float("inf"), size), -1.0)
        tl.store(limits + b * padded_rows + t, limit, t < padded_rows)


@triton.jit
def _scores(
    query, key, e, f, folded, near, i, j, Tq, Tk, D, HALF, q_rows, k_rows,
    UNIT: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scale * (v . tanh(q_i + k_j) - sum v) of a tile. query, key, e = c E and f point to the batch row."""
    acc = tl.zeros((BM, BN), ACC)
    if near:
        e_d = e + i
        f_d = f + j
        e_half = tl.cast(HALF, tl.int64) * q_rows
        f_half = tl.cast(HALF, tl.int64) * k_rows
        c = folded + 4 * HALF
        for _ in range(HALF):
            f0, f1 = tl.load(f_d).to(ACC), tl.load(f_d + f_half).to(ACC)  # a half type where the memory is held in it
            y0 = tl.load(e_d)[:, None] * f0[None, :] + tl.load(c)
            y1 = tl.load(e_d + e_half)[:, None] * f1[None, :] + tl.load(c + HALF)
            acc += (y0 + y1) * _reciprocal(y0 * y1, TARGET)
            e_d += q_rows
            f_d += k_rows
            c += 1
        # In two steps, as their product may be too small for a number.
        acc = acc * UNIT * tl.load(folded + 6 * HALF)
    else:  # exp of the sum itself saturates on both sides
        q_d = query + i.to(tl.int64) * D
        k_d = key + j.to(tl.int64) * D
        for d in range(D):
            total = tl.load(q_d + d, i < Tq, 0.0).to(ACC)[:, None] + tl.load(k_d + d, j < Tk, 0.0).to(ACC)[None, :]
            acc += tl.load(folded + d) / (tl.exp(2 * total) + 1)
    return acc


@triton.jit
def _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which slots of a tile may be attended, (BM, BN), rows beyond Tq included where no mask hides them."""
    seen = (j < Tk)[None, :] & (i >= 0)[:, None]
    if HAS_LENGTHS:
        seen = seen & (j < tl.load(lengths + b))[None, :]
    if HAS_MASK:  # mask_row is 0 for a mask of (B, Tk)
        rows = tl.where(mask_row == 0, 1, Tq)
        at = (b * rows * Tk + i.to(tl.int64) * mask_row)[:, None] + j[None, :]
        seen = seen & (tl.load(mask + at, seen & (i < Tq)[:, None], 0) != 0)
    return seen


@triton.jit
def _near(folded, HALF, q_limit, k_limit, i, j):
    """Whether the folded form is safe for a tile."""
    limit = tl.max(tl.load(q_limit + i), 0) + tl.max(tl.load(k_limit + j), 0)
    return limit <= tl.load(folded + 6 * HALF + 1)


@triton.jit
def _softened(s, top, total):
    """A tile's weights before they are divided, what the sums so far are worth, and the new largest score and sum."""
    high = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp(s - shift[:, None])
    alpha = tl.exp(top - shift)
    return p, alpha, high, total * alpha + tl.sum(p, 1)


@triton.jit
def _log_sum(top, total):
    """The log-sum-exp, minus infinity of nothing, and 1 / total, 0 of nothing."""
    lse = tl.where(total > 0, top + tl.log(total), tl.where(total == 0, float("-inf"), total))
    return lse, tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))


@triton.jit
def _dropped(p, seed, row, j, threshold, keep_scale, keep_rest):
    """The weights of rows and keys after dropout."""
    return tl.where(_keep(seed, row, j, threshold), p * keep_scale + p * keep_rest, 0.0)


@triton.jit
def _write_weights(
    raw, weights, seed, lse, b, i, first, length, end, Tq, Tk, threshold, keep_scale, keep_rest,
    DROPOUT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Weights of keys [first, end) from the raw scores of the same slots; 0 from ``length`` on."""
    row = b * Tq + i
    for j0 in range(first, end, BN):
        j = j0 + tl.arange(0, BN)
        at = row.to(tl.int64)[:, None] * Tk + j[None, :]
        inside = (i < Tq)[:, None] & (j < Tk)[None, :]
        s = tl.load(raw + at, inside & (j < length)[None, :], float("-inf"))
        p = tl.exp(tl.minimum(s - lse[:, None], 0.0, tl.PropagateNan.ALL))
        p = tl.where(s == float("-inf"), 0.0, p)
        if DROPOUT:
            p = _dropped(p, seed, row, j, threshold, keep_scale, keep_rest)
        tl.store(weights + at, p.to(weights.dtype.element_ty), inside)


@triton.jit(do_not_specialize=VARYING)
def forward(
    query, key, value, folded, e, f, q_limit, k_limit, lengths, mask, seed,
    part, part_max, part_sum, stage, context, lse_out, raw, weights,
    B, heads, Tq, Tk, D, H, HALF, q_rows, k_rows, mask_row, keys_each, threshold, keep_scale, keep_rest,
    UNIT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHTS: tl.constexpr, ONLY_SCORES: tl.constexpr, SPLIT: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Scores, online softmax and context of a tile of queries over the keys [split keys_each, ...).

    The context of a tile of queries is summed in ``part`` (splits, B, Tq, H), and a tile's p goes through ``stage``
    (programs, BM, BN), which only this program touches; without SPLIT the context is divided by the sum and written
    here, with SPLIT by :func:`combine`. ``raw`` (B, Tq, Tk) takes the scores, from which the weights come once the sum
    is known, or, with ONLY_SCORES, all that was asked for.
    """
    tiles = tl.cdiv(Tq, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    row = b * Tq + i
    first = split.to(tl.int32) * keys_each
    end = tl.minimum(first + keys_each, Tk)
    stop = end
    if HAS_LENGTHS:
        stop = tl.minimum(end.to(tl.int64), tl.load(lengths + b)).to(tl.int32)
    folded = _of_head(folded, b, heads, HALF)
    e += b * 2 * HALF * q_rows
    f += b * 2 * HALF * k_rows
    q_limit += b * q_rows
    k_limit += b * k_rows
    constant = tl.zeros((), ACC)
    if ONLY_SCORES:
        for d in range(D):
            constant -= tl.load(folded + d) / 2
    rows_in = (i < Tq)[:, None]
    part_row = part + ((split * B + b) * Tq + i)[:, None] * H
    program = split * tl.num_programs(0) + tl.program_id(0)
    stage += program * (BM * BN) + tl.arange(0, BM) * BN
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    if not ONLY_SCORES:
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)[None, :]
            tl.store(part_row + h, tl.zeros((BM, BH), ACC), rows_in & (h < H))
        tl.debug_barrier()
    for j0 in range(first, stop, BN):
        j = j0 + tl.arange(0, BN)
        near = _near(folded, HALF, q_limit, k_limit, i, j)
        s = _scores(
            query + b * Tq * D, key + b * Tk * D, e, f, folded, near, i, j, Tq, Tk, D, HALF, q_rows, k_rows,
            UNIT, TARGET, ACC, BM, BN,
        )  # fmt: skip
        seen = _visible(lengths, mask, b, i, j, Tq, Tk, mask_row, HAS_LENGTHS, HAS_MASK)
        s = tl.where(seen, s + constant, float("-inf"))
        if WEIGHTS or ONLY_SCORES:
            at = row[:, None] * Tk + j[None, :]
            tl.store(raw + at, s.to(raw.dtype.element_ty), rows_in & (j < Tk)[None, :])
        if not ONLY_SCORES:
            p, alpha, top, total = _softened(s, top, total)
            if DROPOUT:
                p = _dropped(p, seed, row, j, threshold, keep_scale, keep_rest)
            tl.store(stage[:, None] + tl.arange(0, BN)[None, :], p)
            tl.debug_barrier()
            for h0 in range(0, H, BH):
                h = h0 + tl.arange(0, BH)
                summed = part_row + h[None, :]
                inside = rows_in & (h < H)[None, :]
                c = tl.load(summed, inside, 0.0) * alpha[:, None]
                v = value + (b * Tk + j0) * H + h
                p_k = stage
                for _ in range(tl.minimum(stop - j0, BN)):
                    weight = tl.load(p_k)[:, None]
                    product = weight * tl.load(v, h < H, 0.0).to(ACC)[None, :]
                    if HAS_MASK:  # a weight of 0 hides a NaN
                        product = tl.where(weight == 0, 0.0, product)
                    c += product
                    v += H
                    p_k += 1
                tl.debug_barrier()  # a thread may store what another has loaded
                tl.store(summed, c, inside)
            tl.debug_barrier()
    if ONLY_SCORES and HAS_LENGTHS:
        nothing = tl.full((BM, BN), float("-inf"), ACC).to(raw.dtype.element_ty)
        for j0 in range(first + tl.cdiv(tl.maximum(stop - first, 0), BN) * BN, end, BN):
            j = j0 + tl.arange(0, BN)
            tl.store(raw + row[:, None] * Tk + j[None, :], nothing, rows_in & (j < Tk)[None, :])
    if SPLIT:
        at = (split * B + b) * Tq + i
        tl.store(part_max + at, top, i < Tq)
        tl.store(part_sum + at, total, i < Tq)
    elif not ONLY_SCORES:
        lse, gain = _log_sum(top, total)
        tl.store(lse_out + row, lse, i < Tq)
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)[None, :]
            c = tl.load(part_row + h, rows_in & (h < H), 0.0) * gain[:, None]
            tl.store(context + row[:, None] * H + h, c.to(context.dtype.element_ty), rows_in & (h < H))
        if WEIGHTS:
            _write_weights(
                raw, weights, seed, lse, b, i, first, stop, end, Tq, Tk, threshold, keep_scale, keep_rest, DROPOUT, BN
            )


@triton.jit(do_not_specialize=VARYING)
def combine(
    part, part_max, part_sum, context, lse_out, raw, weights, lengths, seed, B, Tq, Tk, H, splits, threshold,
    keep_scale, keep_rest, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, WEIGHTS: tl.constexpr, ACC: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Context, log-sum-exp and weights of a row from its splits, in their order."""
    row = tl.program_id(0).to(tl.int64)
    b = row // Tq
    i = (row % Tq).to(tl.int32)
    top = tl.full((), float("-inf"), ACC)
    rows = tl.cast(B, tl.int64) * Tq
    for s in range(splits):
        top = tl.maximum(top, tl.load(part_max + s * rows + row))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), ACC)
    for s in range(splits):
        at = s * rows + row
        total += tl.load(part_sum + at) * tl.exp(tl.load(part_max + at) - shift)
    lse, gain = _log_sum(top, total)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        c = tl.zeros((BH,), ACC)
        for s in range(splits):
            at = s * rows + row
            c += tl.load(part + at * H + h, h < H, 0.0) * tl.exp(tl.load(part_max + at) - shift)
        tl.store(context + row * H + h, (c * gain).to(context.dtype.element_ty), h < H)
    tl.store(lse_out + row, lse)
    if WEIGHTS:
        one = i + tl.arange(0, 1)
        length = Tk
        if HAS_LENGTHS:
            length = tl.load(lengths + b).to(tl.int32)
        _write_weights(
            raw, weights, seed, lse + tl.zeros((1,), ACC), b, one, 0, length, Tk, Tq, Tk, threshold, keep_scale,
            keep_rest, DROPOUT, BN,
        )  # fmt: skip
