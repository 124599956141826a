"""From tensors to launches: the Triton family's kernels for the operators of ``attnext.ops``.

Nothing here waits for the device or allocates by its data, so that a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from . import additive as kernels
from .tiles import KEY_BLOCK, BackwardTiles, Tiles, backward_tiles, compiler_options, forward_tiles

__all__ = ["OPERATORS"]

INTERPRETED: bool = knobs.runtime.interpret


def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _target() -> str:
    if INTERPRETED:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def _compiler_options() -> dict[str, Any]:
    return {} if INTERPRETED else compiler_options(_target())


def _multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@dataclass
class _Problem:
    """The inputs of a call, contiguous, with their exponentials and folded weight."""

    query: Tensor
    key: Tensor
    weight: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    scale: float
    tiles: Tiles | BackwardTiles
    exp_key: Tensor | None = None
    key_limit: Tensor | None = None

    def __post_init__(self) -> None:
        self.flat = self.query.dim() == 2
        self.query = (self.query.unsqueeze(1) if self.flat else self.query).contiguous()
        self.key, self.weight = self.key.contiguous(), self.weight.contiguous()
        self.batch, self.queries, self.features = self.query.shape
        self.keys = self.key.shape[1]
        self.lengths = None if self.lengths is None else self.lengths.to(torch.int64).contiguous()
        self.mask = None if self.mask is None else self.mask.contiguous()
        self.half = _half(self.features)
        self.dtype = _arithmetic(self.query.dtype)
        self.name = str(self.dtype).removeprefix("torch.")
        self.folded = self.query.new_empty(6 * self.half + 2, dtype=self.dtype)
        kernels.fold_weight[(1,)](
            self.weight, self.folded, self.features, self.half, *_two_floats(self.scale), kernels.UNIT[self.name],
            kernels.FOLD_BITS[self.name], kernels.MAX_WEIGHT[self.name], kernels.SMALLEST[self.name],
            ACC=_triton_type(self.dtype), BLOCK=triton.next_power_of_2(2 * self.half),
        )  # fmt: skip
        backward = isinstance(self.tiles, BackwardTiles)
        block = (
            max(self.tiles.queries, self.tiles.rows) if isinstance(self.tiles, BackwardTiles) else self.tiles.queries
        )
        # c E for the scores, and for the gradients E too.
        self.exp_query, self.query_limit = _exponentials(self.query, None, None, block, self.folded[2 * self.half :])
        self.raw_exp_query = _exponentials(self.query, None, None, block)[0] if backward else None
        if self.exp_key is None or self.key_limit is None:
            by_key = self.mask if self.mask is not None and self.mask.dim() == 2 else None
            self.exp_key, self.key_limit = _exponentials(self.key, self.lengths, by_key, KEY_BLOCK)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.folded, self.exp_query, self.exp_key, self.query_limit, self.key_limit, self.lengths

    @property
    def rows(self) -> tuple[int, int]:
        """Padded rows of queries and of keys."""
        assert self.exp_key is not None
        return self.exp_query.shape[2], self.exp_key.shape[2]

    @property
    def mask_row(self) -> int:
        return self.keys if self.mask is not None and self.mask.dim() == 3 else 0

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "UNIT": kernels.UNIT[self.name],
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_MASK": self.mask is not None,
            "TARGET": _target(),
            "ACC": _triton_type(self.dtype),
        }

    def by_query(self, x: Tensor) -> Tensor:
        """A result (B, Tq, n) as the query has it."""
        return x.squeeze(1) if self.flat else x


def _half(features: int) -> int:
    """Pairs of features: at least one, so that there is something to point to."""
    return max(1, (features + 1) // 2)


def _triton_type(dtype: torch.dtype) -> Any:
    return {torch.float32: triton.language.float32, torch.float64: triton.language.float64}[dtype]


def _exponentials(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, block: int, fold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """exp(2x), times ``fold`` if there is one, with features first, in pairs; and the rows' limits."""
    limit = x.new_empty(x.shape[0], _round_up(max(x.shape[1], 1), block), dtype=_arithmetic(x.dtype))
    out = _features_first(x, limit, lengths, mask, fold, 2 * _half(x.shape[2]))
    return out, limit


def _columns(x: Tensor, padded_rows: int) -> Tensor:
    """x (B, T, n) as (B, n, padded rows), in the arithmetic's dtype."""
    limit = x.new_empty(x.shape[0], padded_rows, dtype=_arithmetic(x.dtype))
    return _features_first(x, limit, None, None, None, x.shape[2], exp=False)


def _features_first(
    x: Tensor, limit: Tensor, lengths: Tensor | None, mask: Tensor | None, fold: Tensor | None, padded_features: int,
    exp: bool = True,
) -> Tensor:  # fmt: skip
    batch, rows, features = x.shape
    padded_rows = limit.shape[1]
    out = x.new_empty(batch, padded_features, padded_rows, dtype=limit.dtype)
    if out.numel():
        kernels.features_first[(triton.cdiv(padded_rows, 32), batch)](
            x, lengths, mask, fold, out, limit, rows, features, padded_rows, padded_features, EXP=exp,
            FOLD=fold is not None,
            HAS_LENGTHS=lengths is not None, HAS_MASK=mask is not None, ACC=_triton_type(limit.dtype), BT=32, BD=32,
        )  # fmt: skip
    return out


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounded_by_kernels(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels write results in: Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    return _arithmetic(dtype) if INTERPRETED else dtype


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[tuple[int, float, float], dict[str, bool]]:
    """Threshold and gain of dropout, and whether there is any."""
    gain = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return (int(dropout_p * 2**32), *_two_floats(gain)), {"DROPOUT": dropout_p > 0.0 and seed is not None}


def _two_floats(x: float) -> tuple[float, float]:
    """x as a float32 and what that leaves: launches pass no more."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def prepare(key: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    with _on(key.device):
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
        return _exponentials(key.contiguous(), lengths, None if mask is None else mask.contiguous(), KEY_BLOCK)


def _splits(p: _Problem) -> tuple[int, int]:
    """Programs that share a tile of queries, and the keys of each: enough of them to fill the device."""
    programs = max(1, p.batch * triton.cdiv(p.queries, p.tiles.queries))
    tiles = max(1, triton.cdiv(p.keys, p.tiles.keys))
    wanted = min(max(1, 2 * _multiprocessors(p.query.device) // programs), triton.cdiv(tiles, 2))
    tiles_each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_each), tiles_each * p.tiles.keys


def attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, exp_key: Tensor | None, key_limit: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        queries = query.shape[1] if query.dim() == 3 else 1
        tiles = forward_tiles(queries, query.dtype == torch.float64, INTERPRETED)
        p = _Problem(query, key, score_weight, lengths, mask, scale, tiles, exp_key, key_limit)
        value, size = value.contiguous(), value.shape[2]
        splits, keys_each = _splits(p)
        shape = (p.batch, p.queries)
        dtype = _rounded_by_kernels(query.dtype)
        context, lse = query.new_empty(*shape, size, dtype=dtype), query.new_empty(shape, dtype=p.dtype)
        weights = query.new_empty((*shape, p.keys) if need_weights else (0,), dtype=dtype)
        native = dtype == p.dtype
        part = context if native and splits == 1 else query.new_empty(splits, *shape, size, dtype=p.dtype)
        partial = query.new_empty(2, splits if splits > 1 else 0, *shape, dtype=p.dtype)
        raw = weights if native else query.new_empty(weights.shape, dtype=p.dtype)
        grid = triton.cdiv(p.queries, tiles.queries), splits, p.batch
        stage = query.new_empty(grid[0] * grid[1] * grid[2], tiles.queries, tiles.keys, dtype=p.dtype)
        numbers, dropout = _dropout(dropout_p, seed)
        options = {**dropout, "WEIGHTS": need_weights}
        if p.batch and p.queries:
            kernels.forward[grid](
                p.query, p.key, value, *p.inputs, p.mask, seed, part, partial[0], partial[1], stage, context, lse, raw,
                weights, p.batch, p.queries, p.keys, p.features, size, p.half, *p.rows, p.mask_row, keys_each,
                *numbers, **p.flags, **options, ONLY_SCORES=False, SPLIT=splits > 1, **tiles.blocks,
                **_compiler_options(),
            )  # fmt: skip
            if splits > 1:
                kernels.combine[(p.queries, p.batch)](
                    part, partial[0], partial[1], context, lse, raw, weights, seed, p.batch, p.queries, p.keys, size,
                    splits, *numbers, **options, ACC=_triton_type(p.dtype), BH=128, BN=128,
                )  # fmt: skip
        context, weights = context.to(query.dtype), weights.to(query.dtype)
        return p.by_query(context), p.by_query(weights) if need_weights else weights, lse


def scores(
    query: Tensor, key: Tensor, score_weight: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    with _on(query.device):
        queries = query.shape[1] if query.dim() == 3 else 1
        tiles = forward_tiles(queries, query.dtype == torch.float64, INTERPRETED)
        p = _Problem(query, key, score_weight, lengths, mask, scale, tiles)
        out = query.new_empty(p.batch, p.queries, p.keys, dtype=_rounded_by_kernels(query.dtype))
        if out.numel():
            nothing = query.new_empty(0)
            splits, keys_each = _splits(p)
            kernels.forward[(triton.cdiv(p.queries, tiles.queries), splits, p.batch)](
                p.query, p.key, nothing, *p.inputs, p.mask, None, nothing, nothing, nothing, nothing, nothing, nothing,
                out, nothing, p.batch, p.queries, p.keys, p.features, 0, p.half, *p.rows, p.mask_row, keys_each, 0,
                1.0, 0.0, **p.flags, DROPOUT=False, WEIGHTS=False, ONLY_SCORES=True, SPLIT=False, **tiles.blocks,
                **_compiler_options(),
            )  # fmt: skip
        return p.by_query(out.to(query.dtype))


@dataclass
class _Incoming:
    """What the gradients of the inputs start from: of attention, or of the scores alone."""

    grad_context: Tensor | None
    grad_weights: Tensor | None
    value: Tensor
    lse: Tensor
    delta: Tensor
    seed: Tensor | None
    dropout_p: float
    from_scores: bool


def _gradients(p: _Problem, incoming: _Incoming) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and score weight, slab by slab of the queries.

    ds and p of a slab are kept between the two launches: never more of them than the gradients have numbers, so that
    memory stays linear in each of Tq and Tk.
    """
    batch, size, dtype, tiles = p.batch, incoming.value.shape[2], p.dtype, p.tiles
    assert isinstance(tiles, BackwardTiles)
    q_rows, k_rows = p.rows
    new = p.query.new_zeros if min(batch, p.queries, p.keys) == 0 else p.query.new_empty
    grad_query, grad_key = new(p.query.shape, dtype=dtype), new(p.key.shape, dtype=dtype)
    grad_value = new(incoming.value.shape, dtype=dtype)
    key_tiles = k_rows // tiles.rows
    slab = _round_up(min(p.queries, max(1, 4 * (p.features + size))), tiles.queries)
    slabs = triton.cdiv(p.queries, slab) if slab else 0
    by_tile = new((slabs, batch, key_tiles, 2 * p.half), dtype=dtype)
    ds = p.query.new_empty(batch, slab, k_rows, dtype=dtype)
    weights = ds if incoming.from_scores else torch.empty_like(ds)
    numbers, dropout = _dropout(incoming.dropout_p, incoming.seed)
    feature_tiles = triton.cdiv(p.half, tiles.features)
    key_programs = key_tiles * feature_tiles
    value_programs = triton.cdiv(p.keys, tiles.value_rows) * triton.cdiv(size, tiles.values)
    value_programs = 0 if incoming.from_scores or incoming.grad_context is None else value_programs
    if not value_programs:
        grad_value.zero_()
    columns: tuple[Tensor | None, Tensor | None] = (None, None)
    if value_programs:
        assert incoming.grad_context is not None
        columns = _columns(incoming.value, k_rows), _columns(incoming.grad_context, q_rows)
    for number in range(slabs if batch and p.keys else 0):
        first = number * slab
        rows = min(slab, p.queries - first)
        kernels.score_gradients[(k_rows // tiles.keys, triton.cdiv(rows, tiles.queries), batch)](
            p.query, p.key, *p.inputs, p.mask, incoming.seed, *columns, incoming.grad_weights,
            incoming.lse, incoming.delta, ds, weights, p.queries, p.keys, p.features, size,
            p.half, q_rows, k_rows, p.mask_row, first, slab, *numbers, **p.flags, **dropout,
            CONTEXT=value_programs > 0, WEIGHTS=incoming.grad_weights is not None,
            FROM_SCORES=incoming.from_scores, **tiles.pair_blocks, **_compiler_options(),
        )  # fmt: skip
        query_programs = triton.cdiv(rows, tiles.rows) * feature_tiles
        flags = {name: p.flags[name] for name in ("HAS_LENGTHS", "TARGET", "ACC")}
        kernels.input_gradients[(query_programs + key_programs + value_programs, batch)](
            p.query, p.key, p.folded, p.raw_exp_query, *p.inputs[2:], ds, weights, incoming.grad_context, grad_query,
            grad_key, grad_value, by_tile[number], p.queries, p.keys, p.features, size, p.half, q_rows, k_rows, first,
            slab, int(number > 0), query_programs, key_programs, PLAIN=kernels.PLAIN[p.name],
            CONTEXT=value_programs > 0, **flags,
            **tiles.input_blocks, **_compiler_options(),
        )  # fmt: skip
    grad_weight = by_tile.sum((0, 1, 2))[: p.features] * p.scale
    kind = p.query.dtype
    return p.by_query(grad_query.to(kind)), grad_key.to(kind), grad_value.to(kind), grad_weight.to(kind)


def attention_backward(
    grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    score_weight: Tensor, exp_key: Tensor | None, key_limit: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, context: Tensor, weights: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Problem(
            query,
            key,
            score_weight,
            lengths,
            mask,
            scale,
            backward_tiles(query.dtype == torch.float64, INTERPRETED),
            exp_key,
            key_limit,
        )
        grad_context = None if grad_context is None else grad_context.contiguous()
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        delta = torch.empty_like(log_sum_exp)
        if delta.numel():
            kernels.row_sums[(delta.numel(),)](
                grad_context, context, grad_weights, weights, delta, p.keys, value.shape[2],
                CONTEXT=grad_context is not None, WEIGHTS=grad_weights is not None, ACC=_triton_type(p.dtype),
                BLOCK=256,
            )  # fmt: skip
        value = value.contiguous()
        return _gradients(p, _Incoming(grad_context, grad_weights, value, log_sum_exp, delta, seed, dropout_p, False))


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, score_weight: Tensor, lengths: Tensor | None, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Problem(
            query, key, score_weight, lengths, mask, scale, backward_tiles(query.dtype == torch.float64, INTERPRETED)
        )
        nothing = p.key.new_empty(p.batch, p.keys, 0)
        empty = nothing.new_empty(0, dtype=p.dtype)
        grads = _gradients(p, _Incoming(None, grad.contiguous(), nothing, empty, empty, None, 0.0, True))
        return grads[0], grads[1], grads[3]


OPERATORS: dict[str, Callable[..., Any]] = {
    "additive_prepare": prepare,
    "additive_attention": attention,
    "additive_attention_backward": attention_backward,
    "additive_scores": scores,
    "additive_scores_backward": scores_backward,
}
"""The family's kernels by the name of their operator, as ``attnext.ops`` defines it."""
