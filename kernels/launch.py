"""From tensors to launches: the Triton family's kernels for the operators of ``attnext.ops``.

Nothing here waits for the device, but for the first calls, which are timed, or allocates by its data: a call can be
captured into a CUDA graph. It has to have run before, with the same options: no kernel can be loaded in a capture, and
no tiles are timed there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from . import additive, dot, gradients
from .tiles import FEW_QUERIES, KEY_BLOCK, LEAST_SLAB, MOST_SPLITS, Tiles, dot_kind, forward_kind, tiles

__all__ = ["OPERATORS"]

INTERPRETED: bool = knobs.runtime.interpret
TUNED = os.environ.get("ATTNEXT_AUTOTUNE", "0" if INTERPRETED else "1") != "0"


def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _backend() -> str:
    if INTERPRETED:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


@functools.cache
def _target(device: torch.device) -> str:
    """The device's name in the table of tiles."""
    if INTERPRETED:
        return "sm_90" if TUNED else "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _tiles(kind: str, x: Tensor) -> tuple[Tiles, ...]:
    return tiles(kind, _target(x.device), x.dtype == torch.float64)


def _launch(
    kernel: Any, candidates: tuple[Tiles, ...], grid: Callable[[Mapping[str, Any]], tuple[int, ...]], *args: Any,
    **constants: Any,
) -> None:  # fmt: skip
    """Launches a kernel with the tiles that are chosen for it: of the candidates the first, or the fastest."""
    if not INTERPRETED:  # not always done unasked
        constants["enable_fp_fusion"] = True
    tiles = candidates[0]
    if len(candidates) > 1 and _may_choose():
        call = _Call(kernel, candidates, *_named(kernel, args))
        if call not in _choices and not _capturing():
            with _tuning:  # of whoever came first
                if call not in _choices:
                    _choices[call] = _fastest(call, grid, args, constants)
                    return
        tiles = _choices.get(call, tiles)
    options = tiles.options(_backend())
    kernel[grid(options)](*args, **constants, **options)


@dataclass(frozen=True)
class _Call:
    """What a choice of tiles is made for: the options of a call make no difference to it."""

    kernel: Any
    candidates: tuple[Tiles, ...]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    features: int
    values: int


_choices: dict[_Call, Tiles] = {}
_tuning = threading.Lock()


def _named(kernel: Any, args: tuple[Any, ...]) -> tuple[torch.device, tuple[torch.dtype, ...], int, int]:
    """Device and dtypes of a launch's query and key, D and H."""
    query, key, *_ = args
    features, values = (args[kernel.arg_names.index(name)] for name in ("D", "H"))
    return query.device, (query.dtype, key.dtype), features, values


def _may_choose() -> bool:
    """Whether other tiles than the first may be taken: they round otherwise, so not where torch is asked for
    deterministic algorithms, nor among ranks, which might choose differently."""
    if not TUNED or torch.are_deterministic_algorithms_enabled():
        return False
    group = torch.distributed
    return not (group.is_available() and group.is_initialized() and group.get_world_size() > 1)


def _capturing() -> bool:
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def _fastest(call: _Call, grid: Callable[..., Any], args: tuple[Any, ...], constants: dict[str, Any]) -> Tiles:
    """Makes the launch, and times the candidates for it; the first where a full card has no memory for that."""
    tuner = _tuner(call.kernel, call.candidates, call.device)
    try:
        tuner[grid](*args, **constants)
    except torch.OutOfMemoryError:
        tuner.nargs = None  # the tensors of this call, which it would keep
        first = call.candidates[0]
        options = first.options(_backend())
        call.kernel[grid(options)](*args, **constants, **options)
        return first
    best = tuner.best_config
    return next(t for t in call.candidates if dict(t.blocks) == best.kwargs and t.warps == best.num_warps)


@functools.cache
def _tuner(kernel: Any, candidates: tuple[Tiles, ...], device: torch.device) -> Any:
    """The kernel, tuned at a device's first call of each D, H and dtype; choices stay in Triton's cache on disk."""
    configurations = []
    for candidate in candidates:
        options = candidate.options(_backend())
        blocks = {name: options.pop(name) for name, _ in candidate.blocks}
        configurations.append(triton.Config(blocks, **options))
    return triton.autotune(
        configurations,
        key=["D", "H"],
        # What a program adds to what is there must be added once.
        restore_value=[name for name in ("ds_sums", "key_parts", "grad_value") if name in kernel.arg_names],
        do_bench=_wall_clock if INTERPRETED else None,
        cache_results=True,
    )(kernel)


def _wall_clock(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    started = time.perf_counter()
    call()
    return [time.perf_counter() - started] * len(quantiles)


@dataclass
class _Inputs:
    """What every call has, contiguous, with a query of (B, Tq, D)."""

    query: Tensor
    key: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    scale: float

    def __post_init__(self) -> None:
        self.flat = self.query.dim() == 2
        self.query = (self.query.unsqueeze(1) if self.flat else self.query).contiguous()
        self.key = self.key.contiguous()
        self.batch, self.queries, self.features = self.query.shape
        self.keys = self.key.shape[1]
        self.lengths = None if self.lengths is None else self.lengths.to(torch.int64).contiguous()
        self.mask = None if self.mask is None else self.mask.contiguous()
        self.dtype = _arithmetic(self.query.dtype)

    def tiles(self, kind: str) -> tuple[Tiles, ...]:
        return _tiles(kind, self.query)

    @property
    def mask_row(self) -> int:
        return self.keys if self.mask is not None and self.mask.dim() == 3 else 0

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_MASK": self.mask is not None,
            "ACC": _triton_type(self.dtype),
        }

    def by_query(self, x: Tensor) -> Tensor:
        """A result (B, Tq, n) as the query has it."""
        return x.squeeze(1) if self.flat else x


@dataclass
class _Problem(_Inputs):
    """Additive: with the exponentials of the inputs and the folded weight.

    The queries' rows are padded for the tiles of ``kind``; ``by_row`` asks for their exponentials with the features
    last as well, which the gradients need.
    """

    weight: Tensor
    kind: str
    by_row: bool = False
    exp_key: Tensor | None = None
    key_limit: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight = self.weight.contiguous()
        self.half = _half(self.features)
        self.name = str(self.dtype).removeprefix("torch.")
        self.heads = self.weight.shape[0] if self.weight.dim() == 2 else 1
        self.folded = self.query.new_empty(self.heads, 6 * self.half + 2, dtype=self.dtype)
        _launch(
            additive.fold_weight, self.tiles("fold"), lambda _: (self.heads,),
            self.weight, self.folded, self.features, self.half, *_two_floats(self.scale), additive.UNIT[self.name],
            additive.FOLD_BITS[self.name], additive.MAX_WEIGHT[self.name], additive.SMALLEST[self.name],
            ACC=_triton_type(self.dtype), BLOCK=triton.next_power_of_2(2 * self.half),
        )  # fmt: skip
        block = max(tile["BM"] for tile in self.tiles(self.kind))
        # Of many queries the rows are known to be a multiple of 16, so that there is one kernel, with loads of several.
        block = _round_up(block, 16) if self.queries > FEW_QUERIES else block
        # c E for the scores, and for the gradients E too.
        fold = self.folded[:, 2 * self.half :]
        self.exp_query, self.query_limit, self.exp_query_by_row = _exponentials(
            self.query, None, None, block, fold, self.by_row
        )
        if self.exp_key is None or self.key_limit is None:
            by_key = self.mask if self.mask is not None and self.mask.dim() == 2 else None
            self.exp_key, self.key_limit, _ = _exponentials(self.key, self.lengths, by_key, KEY_BLOCK)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.folded, self.exp_query, self.exp_key, self.query_limit, self.key_limit, self.lengths

    @property
    def rows(self) -> tuple[int, int]:
        """Padded rows of queries and of keys."""
        assert self.exp_key is not None
        return self.exp_query.shape[2], self.exp_key.shape[2]

    @property
    def flags(self) -> dict[str, Any]:
        return super().flags | {"UNIT": additive.UNIT[self.name], "TARGET": _backend()}


def _half(features: int) -> int:
    """Pairs of features: at least one, so that there is something to point to."""
    return max(1, (features + 1) // 2)


def _triton_type(dtype: torch.dtype) -> Any:
    return {torch.float32: triton.language.float32, torch.float64: triton.language.float64}[dtype]


def _exponentials(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, block: int, fold: Tensor | None = None,
    by_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """exp(2x), times a head's ``fold`` if there is one, features first, in pairs; the rows' limits; exp(2x) by row."""
    limit = x.new_empty(x.shape[0], _round_up(max(x.shape[1], 1), block), dtype=_arithmetic(x.dtype))
    features = 2 * _half(x.shape[2])
    rows = limit.new_empty(*limit.shape, features) if by_row else None
    return _features_first(x, limit, lengths, mask, fold, limit.shape[1], features, rows), limit, rows


def _columns(x: Tensor, padded_rows: int) -> Tensor:
    """x (B, T, n) as (B, n, padded rows), in the arithmetic's dtype."""
    return _features_first(x, None, None, None, None, padded_rows, x.shape[2])


def _features_first(
    x: Tensor, limit: Tensor | None, lengths: Tensor | None, mask: Tensor | None, fold: Tensor | None,
    padded_rows: int, padded_features: int, by_row: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, rows, features = x.shape
    heads = 1 if fold is None else fold.shape[0]
    dtype = _arithmetic(x.dtype)
    out = x.new_empty(batch, padded_features, padded_rows, dtype=dtype)
    if out.numel():
        _launch(
            additive.features_first, _tiles("features first", x),
            lambda meta: (triton.cdiv(padded_rows, meta["BT"]) * batch,),
            x, lengths, mask, fold, out, by_row, limit, heads, rows, features, padded_rows, padded_features,
            EXP=limit is not None, FOLD=fold is not None, ROWS=by_row is not None, HAS_LENGTHS=lengths is not None,
            HAS_MASK=mask is not None, ACC=_triton_type(dtype),
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
    """x, which the functions have checked, as a float32 and what that leaves: launches pass no more."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def prepare(key: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    with _on(key.device):
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
        mask = None if mask is None else mask.contiguous()
        return _exponentials(key.contiguous(), lengths, mask, KEY_BLOCK)[:2]


def _splits(p: _Problem) -> tuple[int, int]:
    """Programs that share a tile of queries, and the keys of each: enough of them to fill the device."""
    programs = max(1, p.batch * triton.cdiv(p.queries, p.tiles(p.kind)[0]["BM"]))
    blocks = max(1, triton.cdiv(p.keys, KEY_BLOCK))
    wanted = min(max(1, 2 * _multiprocessors(p.query.device) // programs), triton.cdiv(blocks, 2))
    blocks_each = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, blocks_each), blocks_each * KEY_BLOCK


class _Results:
    """What an attention makes of a problem, and the parts of it that splits of the keys make."""

    def __init__(self, p: _Inputs, size: int, need_weights: bool, splits: int, staged: bool) -> None:
        """``staged``: the sums of an only split are kept in memory, too: where the context will be if its dtype is
        theirs.
        """
        self.problem, self.splits, self.size, self.need_weights = p, splits, size, need_weights
        shape, dtype = (p.batch, p.queries), _rounded_by_kernels(p.query.dtype)
        native = dtype == p.dtype

        def new(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
            return p.query.new_empty(shape, dtype=dtype)

        self.context, self.log_sum_exp = new(*shape, size, dtype=dtype), new(*shape)
        self.weights = new(*((*shape, p.keys) if need_weights else (0,)), dtype=dtype)
        part = self.context if splits == 1 and (native or not staged) else new(splits, *shape, size)
        partial = new(2, splits if splits > 1 else 0, *shape)
        self.parts = part, partial[0], partial[1]
        raw = self.weights if native else new(*self.weights.shape)
        self.outputs = self.context, self.log_sum_exp, raw, self.weights

    def combine(self, seed: Tensor | None, numbers: tuple[int, float, float], options: dict[str, bool]) -> None:
        p = self.problem
        if self.splits > 1:
            _launch(
                additive.combine, p.tiles("combine"), lambda _: (p.queries * p.batch,),
                *self.parts, *self.outputs, p.lengths, seed, p.batch, p.queries, p.keys, self.size, self.splits,
                *numbers, **options, HAS_LENGTHS=p.lengths is not None, ACC=_triton_type(p.dtype),
            )  # fmt: skip

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        p, kind = self.problem, self.problem.query.dtype
        context, weights = self.context.to(kind), self.weights.to(kind)
        return p.by_query(context), p.by_query(weights) if self.need_weights else weights, self.log_sum_exp


def _queries(query: Tensor) -> int:
    return query.shape[1] if query.dim() == 3 else 1


def attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, exp_key: Tensor | None, key_limit: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        kind = forward_kind(_queries(query))
        p = _Problem(query, key, lengths, mask, scale, score_weight, kind, False, exp_key, key_limit)
        value, size = value.contiguous(), value.shape[2]
        splits, keys_each = _splits(p)
        r = _Results(p, size, need_weights, splits, True)
        stage = query.new_empty(splits * p.batch * p.rows[0] * KEY_BLOCK, dtype=p.dtype)
        numbers, dropout = _dropout(dropout_p, seed)
        options = {**dropout, "WEIGHTS": need_weights}
        if p.batch and p.queries:
            _launch(
                additive.forward, p.tiles(kind), lambda meta: (triton.cdiv(p.queries, meta["BM"]) * p.batch, splits),
                p.query, p.key, value, *p.inputs, p.mask, seed, *r.parts, stage, *r.outputs, p.batch, p.heads,
                p.queries, p.keys, p.features, size, p.half, *p.rows, p.mask_row, keys_each, *numbers, **p.flags,
                **options, ONLY_SCORES=False, SPLIT=splits > 1,
            )  # fmt: skip
            r.combine(seed, numbers, options)
        return r.finished()


def scores(
    query: Tensor, key: Tensor, score_weight: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    with _on(query.device):
        kind = forward_kind(_queries(query))
        p = _Problem(query, key, lengths, mask, scale, score_weight, kind)
        out = query.new_empty(p.batch, p.queries, p.keys, dtype=_rounded_by_kernels(query.dtype))
        if out.numel():
            nothing = query.new_empty(0)
            splits, keys_each = _splits(p)
            _launch(
                additive.forward, p.tiles(kind), lambda meta: (triton.cdiv(p.queries, meta["BM"]) * p.batch, splits),
                p.query, p.key, nothing, *p.inputs, p.mask, None, nothing, nothing, nothing, nothing, nothing, nothing,
                out, nothing, p.batch, p.heads, p.queries, p.keys, p.features, 0, p.half, *p.rows, p.mask_row,
                keys_each, 0, 1.0, 0.0, **p.flags, DROPOUT=False, WEIGHTS=False, ONLY_SCORES=True, SPLIT=False,
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


def _incoming(
    p: _Inputs, grad_context: Tensor | None, grad_weights: Tensor | None, value: Tensor, context: Tensor,
    weights: Tensor, log_sum_exp: Tensor, seed: Tensor | None, dropout_p: float,
) -> _Incoming:  # fmt: skip
    size = value.shape[2]
    # (B, Tq, n), also where the query has no Tq.
    grad_context = None if grad_context is None else grad_context.reshape(p.batch, p.queries, size).contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    delta = torch.empty_like(log_sum_exp)
    if delta.numel():
        _launch(
            gradients.row_sums, p.tiles("row sums"), lambda _: (delta.numel(),),
            grad_context, context, grad_weights, weights, delta, p.keys, size, CONTEXT=grad_context is not None,
            WEIGHTS=grad_weights is not None, ACC=_triton_type(p.dtype),
        )  # fmt: skip
    return _Incoming(grad_context, grad_weights, value.contiguous(), log_sum_exp, delta, seed, dropout_p, False)


def _parts(p: _Problem, slabs: int) -> tuple[int, int]:
    """How many programs share the queries, and the keys, of a batch row's features: enough to fill the device.

    Each keeps its sums for all keys, or all queries; all of them together never hold more than about four times as many
    numbers as the gradients of queries and keys.
    """
    tile = p.tiles("inputs")[0]
    programs = max(1, p.batch * triton.cdiv(p.half, tile["BD"]))
    wanted = max(1, 16 * _multiprocessors(p.query.device) // programs)
    both = 2 * (p.queries + p.keys)
    key_splits = min(wanted, triton.cdiv(p.keys, 2 * tile["BJ"]), max(1, both // p.queries))
    rows = triton.cdiv(p.queries, slabs)
    row_splits = min(triton.cdiv(wanted, key_splits), triton.cdiv(rows, 2 * tile["BJ"]), max(1, both // p.keys))
    return row_splits, key_splits


def _slab(p: _Inputs, size: int) -> int:
    """Queries whose ds and p are kept at a time: about four times the numbers of the gradients of keys and values, or
    of as many queries as make few launches."""
    return min(p.queries, max(LEAST_SLAB, 2 * (p.features + size)))


def _gradients(p: _Problem, incoming: _Incoming) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and score weight, slab by slab of the queries.

    ds and p of a slab are kept between the two launches, so that memory stays linear in each of Tq and Tk.
    """
    batch, size, kind = p.batch, incoming.value.shape[2], p.query.dtype
    if min(batch, p.queries, p.keys) == 0:
        like = (p.by_query(p.query), p.key, incoming.value, p.weight)
        nothing = tuple(torch.zeros_like(x) for x in like)
        return nothing[0], nothing[1], nothing[2], nothing[3]
    q_rows, k_rows = p.rows
    slab = _round_up(_slab(p, size), max(16, *(tile["BM"] for tile in p.tiles("pairs"))))
    slabs = triton.cdiv(p.queries, slab)
    row_splits, key_splits = _parts(p, slabs)
    rows_each = triton.cdiv(min(slab, p.queries), row_splits)
    keys_each = _round_up(triton.cdiv(p.keys, key_splits), max(tile["BJ"] for tile in p.tiles("inputs")))

    def new(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return p.query.new_empty(shape, dtype=dtype)

    query_parts = new(key_splits, batch, p.queries, 2 * p.half)
    key_parts = new(row_splits, batch, p.keys, 2 * p.half)
    weight_parts = new(slabs, row_splits * key_splits * batch, 2 * p.half)
    ds_sums = new(batch, k_rows // KEY_BLOCK, slab).zero_()
    ds = new(batch, slab, k_rows)
    weights = ds if incoming.from_scores else torch.empty_like(ds)
    grad_value = new(*incoming.value.shape, dtype=_rounded_by_kernels(kind) if slabs == 1 else p.dtype)
    numbers, dropout = _dropout(incoming.dropout_p, incoming.seed)
    of_context = incoming.grad_context is not None and size > 0
    columns: tuple[Tensor | None, Tensor | None] = (None, None)
    if of_context:
        assert incoming.grad_context is not None
        columns = _columns(incoming.value, k_rows), _columns(incoming.grad_context, q_rows)
    else:
        grad_value.zero_()
    flags = {name: p.flags[name] for name in ("HAS_LENGTHS", "TARGET", "ACC")}

    def of_slab(number: int) -> None:
        first = number * slab
        rows = min(slab, p.queries - first)
        _launch(
            gradients.score_gradients, p.tiles("pairs"),
            lambda meta: (k_rows // meta["BN"] * triton.cdiv(rows, meta["BM"]) * batch,),
            p.query, p.key, *p.inputs, p.mask, incoming.seed, *columns, incoming.grad_weights, incoming.lse,
            incoming.delta, ds, weights, ds_sums, p.heads, p.queries, p.keys, p.features, size, p.half, q_rows, k_rows,
            p.mask_row, first, slab, *numbers, **p.flags, **dropout, CONTEXT=of_context,
            WEIGHTS=incoming.grad_weights is not None, FROM_SCORES=incoming.from_scores,
        )  # fmt: skip
        _launch(
            gradients.input_gradients, p.tiles("inputs"),
            lambda meta: (
                batch * row_splits * key_splits * triton.cdiv(p.half, meta["BD"])
                + batch * of_context * triton.cdiv(p.keys, meta["BN"]) * triton.cdiv(size, meta["BH"]),
            ),
            p.query, p.key, p.exp_query_by_row, p.query_limit, p.key_limit, p.lengths, ds, weights,
            incoming.grad_context, query_parts, key_parts, weight_parts[number], grad_value, batch, p.queries, p.keys,
            p.features, size, p.half, 2 * p.half, q_rows, k_rows, first, slab, rows_each, keys_each, row_splits,
            key_splits, int(number > 0), PLAIN=additive.PLAIN[p.name], CONTEXT=of_context, **flags,
        )  # fmt: skip

    for number in range(slabs):
        of_slab(number)
    grad_query, grad_key = (_sum_parts(p, parts, x.shape) for parts, x in ((query_parts, p.query), (key_parts, p.key)))
    return p.by_query(grad_query), grad_key, grad_value.to(kind), _weight_gradient(p, ds_sums, weight_parts)


def _weight_gradient(p: _Problem, ds_sums: Tensor, parts: Tensor) -> Tensor:
    """scale ds tanh, summed for each head: tanh is 1 - 2r, ``parts`` have ds r, both of row after row of the batch."""
    of_ds = ds_sums.view(-1, p.heads, ds_sums[0].numel()).sum((0, 2))
    of_r = parts.view(-1, p.heads, 2 * p.half).sum(0)[:, : p.features]
    return (p.scale * (of_ds.unsqueeze(1) - 2 * of_r)).to(p.query.dtype).view(p.weight.shape)


def _sum_parts(p: _Problem, parts: Tensor, shape: torch.Size) -> Tensor:
    out = p.query.new_empty(shape, dtype=_rounded_by_kernels(p.query.dtype))
    _launch(
        gradients.sum_parts, p.tiles("sums of parts"), lambda meta: (triton.cdiv(out.numel(), meta["BLOCK"]),),
        parts, p.folded, out, parts.shape[0], out.numel(), p.heads, shape[1], p.features, p.half,
        ACC=_triton_type(p.dtype),
    )  # fmt: skip
    return out.to(p.query.dtype)


def attention_backward(
    grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    score_weight: Tensor, exp_key: Tensor | None, key_limit: Tensor | None, lengths: Tensor | None,
    mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, context: Tensor, weights: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Problem(query, key, lengths, mask, scale, score_weight, "pairs", True, exp_key, key_limit)
        incoming = _incoming(p, grad_context, grad_weights, value, context, weights, log_sum_exp, seed, dropout_p)
        return _gradients(p, incoming)


def scores_backward(
    grad: Tensor, query: Tensor, key: Tensor, score_weight: Tensor, lengths: Tensor | None, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Problem(query, key, lengths, mask, scale, score_weight, "pairs", True)
        nothing = p.key.new_empty(p.batch, p.keys, 0)
        empty = nothing.new_empty(0, dtype=p.dtype)
        grads = _gradients(p, _Incoming(None, grad.contiguous(), nothing, empty, empty, None, 0.0, True))
        return grads[0], grads[1], grads[3]


def _dot_splits(p: _Inputs, tile: Tiles, columns: int) -> tuple[int, int]:
    """As :func:`_splits`; a warp takes many keys, so that the parts are small beside them."""
    warps = tile.warps * max(1, p.batch * triton.cdiv(p.queries, tile["BM"]) * columns)
    wanted = max(1, min(8 * _multiprocessors(p.query.device) // warps, MOST_SPLITS, p.keys // (2 * tile["BN"])))
    keys_each = _round_up(max(1, triton.cdiv(p.keys, wanted)), max(16, tile["BN"]))
    return max(1, triton.cdiv(p.keys, keys_each)), keys_each


def dot_attention(
    query: Tensor, key: Tensor, value: Tensor | None, lengths: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Inputs(query, key, lengths, mask, scale)
        shared, value = value is None, p.key if value is None else value.contiguous()
        size = value.shape[2]
        kinds = p.tiles(dot_kind(p.queries, max(p.features, size)))
        block = kinds[0]["BD"]
        columns = max(1, triton.cdiv(size, block))
        splits, keys_each = _dot_splits(p, kinds[0], columns)
        r = _Results(p, size, need_weights, splits, False)
        numbers, dropout = _dropout(dropout_p, seed)
        options = {**dropout, "WEIGHTS": need_weights}
        whole = p.features <= block
        if p.batch and p.queries:
            _launch(
                dot.dot_forward, kinds,
                lambda meta: (triton.cdiv(p.queries, meta["BM"]) * p.batch, splits, columns),
                p.query, p.key, value, p.lengths, p.mask, seed, *r.parts, *r.outputs, p.batch, p.queries, p.keys,
                p.features, size, p.mask_row, keys_each, *_two_floats(scale), *numbers, **p.flags, **options,
                WHOLE=whole, SHARED=shared and whole, SPLIT=splits > 1,
            )  # fmt: skip
            r.combine(seed, numbers, options)
        return r.finished()


def dot_attention_backward(
    grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, key: Tensor, value: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, context: Tensor,
    weights: Tensor, log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _on(query.device):
        p = _Inputs(query, key, lengths, mask, scale)
        rows = p.key if value is None else value
        incoming = _incoming(p, grad_context, grad_weights, rows, context, weights, log_sum_exp, seed, dropout_p)
        grad_query, grad_key, grad_value = _dot_gradients(p, incoming, value is None)
        return p.by_query(grad_query), grad_key, grad_value


def _dot_gradients(p: _Inputs, incoming: _Incoming, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, slab by slab of the queries, as :func:`_gradients` has them."""
    size, kind = incoming.value.shape[2], p.query.dtype
    of_values = p.key.new_zeros((0,) if shared else incoming.value.shape)
    if min(p.batch, p.queries, p.keys) == 0:
        return torch.zeros_like(p.query), torch.zeros_like(p.key), of_values
    slab = _slab(p, size)
    splits, rounded = _term_splits(p, slab), _rounded_by_kernels(kind)
    query_parts = p.query.new_empty(splits, *p.query.shape, dtype=rounded if splits == 1 else p.dtype)
    sums = rounded if slab == p.queries else p.dtype
    grad_key, grad_value = torch.empty_like(p.key, dtype=sums), of_values.to(sums)
    ds = p.query.new_empty(p.batch, slab, p.keys, dtype=p.dtype)
    weights = torch.empty_like(ds)
    context = incoming.grad_context if size else None
    for first in range(0, p.queries, slab):
        rows, add = min(slab, p.queries - first), first > 0
        _dot_score_gradients(p, incoming, context, ds, weights, first, rows)
        by_key, of_keys, of_context = (slab * p.keys, 1, p.keys), (ds, p.query), (weights, context)
        more = of_context if shared and context is not None else None
        _weighted_sums(p, grad_key, of_keys, more, p.keys, rows, by_key, (first, 0), add=add)
        if not shared and context is not None:
            _weighted_sums(p, grad_value, of_context, None, p.keys, rows, by_key, (first, 0), add=add)
        by_row = (slab * p.keys, p.keys, 1)
        _weighted_sums(p, query_parts, (ds, p.key), None, rows, p.keys, by_row, (0, first), p.lengths, splits)
    grad_query = query_parts.sum(0) if splits > 1 else query_parts[0]
    return grad_query.to(kind), grad_key.to(kind), grad_value.to(kind)


def _dot_score_gradients(
    p: _Inputs, incoming: _Incoming, context: Tensor | None, ds: Tensor, kept: Tensor, first: int, rows: int
) -> None:
    numbers, dropout = _dropout(incoming.dropout_p, incoming.seed)
    _launch(
        dot.dot_score_gradients, p.tiles("dot pairs of one" if p.queries == 1 else "dot pairs"),
        lambda meta: (triton.cdiv(p.keys, meta["BN"]) * triton.cdiv(rows, meta["BM"]) * p.batch,),
        p.query, p.key, incoming.value, p.lengths, p.mask, incoming.seed, context, incoming.grad_weights, incoming.lse,
        incoming.delta, ds, kept, p.queries, p.keys, p.features, incoming.value.shape[2], p.mask_row, first,
        ds.shape[1], *_two_floats(p.scale), *numbers, **p.flags, **dropout, CONTEXT=context is not None,
        WEIGHTS=incoming.grad_weights is not None,
    )  # fmt: skip


def _term_splits(p: _Inputs, rows: int) -> int:
    """Programs that share the keys in the sums for so many queries; what they keep is bounded as in :func:`_parts`."""
    tile = p.tiles("dot sums of one" if rows == 1 else "dot sums")[0]
    programs = max(1, p.batch * triton.cdiv(rows, tile["BR"]) * triton.cdiv(p.features, tile["BC"]))
    wanted: int = 8 * _multiprocessors(p.query.device) // programs
    most = min(MOST_SPLITS, p.keys // (4 * tile["BT"]), 2 * (p.queries + p.keys) // p.queries)
    return max(1, min(wanted, most))


def _weighted_sums(
    p: _Inputs, out: Tensor, pair: tuple[Tensor, Tensor | None], more: tuple[Tensor, Tensor | None] | None, rows: int,
    terms: int, strides: tuple[int, int, int], starts: tuple[int, int], lengths: Tensor | None = None, splits: int = 1,
    *, add: bool = False,
) -> None:  # fmt: skip
    """Into ``rows`` rows of ``out``, as :func:`dot.weighted_sums` does: a pair's weights, of ``strides``, times its x.

    ``starts``: the first rows of x and of ``out``.
    """
    if out.numel() == 0:
        return
    (w, x), (w_more, x_more), columns = pair, more or (None, None), out.shape[-1]
    assert x is not None
    _launch(
        dot.weighted_sums, p.tiles("dot sums of one" if rows == 1 else "dot sums"),
        lambda meta: (p.batch * triton.cdiv(rows, meta["BR"]) * triton.cdiv(columns, meta["BC"]), splits),
        w, x, w_more, x_more, lengths, out, p.batch, rows, terms, columns, *strides, x.shape[1], starts[0],
        out.shape[-2], starts[1], triton.cdiv(terms, splits), int(add), HAS_LENGTHS=lengths is not None,
        MORE=more is not None, HIDE=p.lengths is not None or p.mask is not None, ACC=_triton_type(p.dtype),
    )  # fmt: skip


def _of_steps(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from . import launch_steps  # which is built on this file

        return getattr(launch_steps, name)(*arguments)

    return call


OPERATORS: dict[str, Callable[..., Any]] = {
    "additive_prepare": prepare,
    "additive_attention": attention,
    "additive_attention_backward": attention_backward,
    "additive_scores": scores,
    "additive_scores_backward": scores_backward,
    "dot_attention": dot_attention,
    "dot_attention_backward": dot_attention_backward,
    "additive_step": _of_steps("step"),
    "additive_step_backward": _of_steps("step_backward"),
}
"""The family's kernels by the name of their operator, as ``attnext.ops`` defines it."""
