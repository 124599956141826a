"""The kernels compiled ahead of time, for GPUs that needn't be there: what they use, and whether anything spills."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import additive, dot, gradients, steps
from .tiles import Tiles, tiles

__all__ = ["DTYPES", "TARGETS", "Build", "Usage", "build", "builds", "disassembly", "try_usage", "usage"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
"""NVIDIA's A100, H100, B200 and RTX 50, AMD's MI300 and RX 7900."""

SHARED_MEMORY = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}  # fmt: skip
"""Bytes that one program may have."""

DTYPES = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16", "held": "fp32"}
"""Of the inputs; "held" is float32 with a memory in bfloat16."""
_HELD = {"key", "value", "f"}

_INPUTS = {
    "rows", "weight", "query", "key", "value", "grad_context", "context", "weights", "grad_weights", "x", "x_more",
    "filters", "projection", "of_value",
}  # fmt: skip
_OTHER_TYPES = {
    "lengths": "*i64", "seed": "*i64", "mask": "*i1", "threshold": "i64", "window": "*i64", "stays": "*i32",
} | dict.fromkeys(
    ("scale", "scale_rest", "keep_scale", "keep_rest"), "fp32",
) | dict.fromkeys(
    ("B", "T", "heads", "Tq", "Tk", "D", "H", "HALF", "both", "q_rows", "k_rows", "mask_row", "keys_each",
     "padded_rows", "padded_features", "splits", "i_first", "slab", "add", "count", "rows_each", "row_splits",
     "key_splits", "rows_of", "terms", "columns", "w_batch", "w_row", "w_term", "x_rows", "x_first", "out_rows",
     "out_first", "each", "F", "width", "tiles_each", "channel"), "i32",
)  # fmt: skip
# Arguments that a launch leaves out, as None, where a flag is not set.
_OPTIONAL = {
    "HAS_LENGTHS": ("lengths",), "HAS_MASK": ("mask",), "DROPOUT": ("seed",), "EXP": ("limits",),
    "FOLD": ("fold",), "ROWS": ("by_row",), "MORE": ("w_more", "x_more"),
    "CONTEXT": ("grad_context", "value_columns", "grad_columns"), "WEIGHTS": ("grad_weights", "grad_wide"),
    "HAS_WINDOW": ("window",), "AGENT": ("transition", "grad_transition"),
}  # fmt: skip
_FLAGS = (
    "HAS_LENGTHS",
    "HAS_MASK",
    "DROPOUT",
    "WEIGHTS",
    "EXP",
    "FOLD",
    "ROWS",
    "SHARED",
    "MORE",
    "HIDE",
    "HAS_WINDOW",
    "AGENT",
)
# Sizes of which a launch may know that 16 divides them, and those of which it always does.
_MULTIPLES_OF_16 = {"D", "H", "q_rows", "k_rows", "padded_rows", "slab", "keys_each", "columns"}
_ALWAYS_MULTIPLES_OF_16 = {"k_rows", "keys_each", "slab"}


@dataclass(frozen=True)
class Build:
    """A kernel with its constants and the compiler's options, as a launch on a target would ask for it."""

    kernel: str
    label: str
    kind: str
    """Of tiles."""
    target: str
    dtype: str
    full: bool
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.target} {self.label} {self.dtype}"

    @property
    def function(self) -> Any:
        """The kernel itself."""
        return getattr(_file(self.kernel), self.kernel)

    @property
    def warps(self) -> int:
        return int(dict(self.options)["num_warps"])


@dataclass(frozen=True)
class Usage:
    """Of one program: registers a thread, bytes of spilled registers a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


_LAUNCHES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("forward", "step of one", "step of one", {"SPLIT": True, "Tq": 1, "q_rows": 1}),
    ("forward", "step", "step", {"SPLIT": True}),
    ("forward", "forward", "forward", {}),
    ("forward", "scores", "forward", {"ONLY_SCORES": True, "WEIGHTS": False, "DROPOUT": False}),
    ("score_gradients", "backward: pairs", "pairs", {}),
    ("input_gradients", "backward: inputs", "inputs", {}),
    ("score_gradients", "scores' backward: pairs", "pairs",
     {"FROM_SCORES": True, "CONTEXT": False, "WEIGHTS": True, "DROPOUT": False}),
    ("input_gradients", "scores' backward: inputs", "inputs", {"CONTEXT": False}),
    ("row_sums", "backward: row sums", "row sums", {}),
    ("sum_parts", "backward: sums of parts", "sums of parts", {}),
    ("combine", "combine", "combine", {}),
    ("features_first", "features first", "features first", {}),
    ("fold_weight", "fold", "fold", {"BLOCK": 256}),
    ("dot_forward", "dot", "dot 1024", {"WHOLE": True}),
    ("dot_forward", "dot of one", "dot of one 1024", {"WHOLE": True, "SPLIT": True, "Tq": 1}),
    ("dot_forward", "dot, more features", "dot 1024", {"WHOLE": False, "SHARED": False}),
    ("dot_score_gradients", "dot, backward: pairs", "dot pairs", {}),
    ("weighted_sums", "dot, backward: sums", "dot sums", {}),
    ("step_scores", "past: scores", "step sums", {"CHANNELS": 2, "PROJECTED": True, "BF": 32}),
    ("step_scores", "past: scores, no projection", "step sums", {"CHANNELS": 1, "PROJECTED": False, "BF": 16}),
    ("step_context", "past: context", "step rows", {"RULE": 2}),
    ("step_slots", "past, backward: slots", "step rows", {"RULE": 2}),
    ("step_previous", "past, backward: previous", "step places", {}),
    ("step_values", "past, backward: values", "step values", {}),
    ("step_gradients", "past, backward: sums", "step sums",
     {"CHANNELS": 2, "PROJECTED": True, "BF": 32, "SIGMOID_RULE": True}),
    ("step_gradients", "past, backward: sums, no projection", "step sums",
     {"CHANNELS": 1, "PROJECTED": False, "BF": 16, "SIGMOID_RULE": False}),
    ("step_past", "past, backward: past", "step places", {"CHANNELS": 2, "TILE": 16}),
)  # fmt: skip
"""Kernel, label, kind of tiles and constants of every launch.

Those of dot products have the largest tile that is used: in one for fewer features, or one query, a thread has no more
numbers.
"""


def _file(kernel: str) -> ModuleType:
    return next(file for file in (additive, gradients, dot, steps) if hasattr(file, kernel))


def builds(target: str, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[Build]:
    """Every kernel for a target: asked for all it can do, with each of its tiles and sizes that 16 divides, and for as
    little as it can, with any sizes.
    """
    for dtype in dtypes:
        name = "float64" if dtype == "float64" else "float32"
        numbers = {
            "UNIT": additive.UNIT[name], "BITS": additive.FOLD_BITS[name], "MAX": additive.MAX_WEIGHT[name],
            "SMALLEST": additive.SMALLEST[name], "PLAIN": additive.PLAIN[name],
        }  # fmt: skip
        for full in (True, False):
            flags: dict[str, Any] = dict.fromkeys(_FLAGS, full)
            flags |= {"ONLY_SCORES": False, "SPLIT": False, "FROM_SCORES": False, "CONTEXT": True}
            flags |= {} if full else {"heads": 1}  # which a launch knows
            for kernel, label, kind, constants in _LAUNCHES:
                if _file(kernel) is dot and full != constants.get("WHOLE", True):
                    continue  # once each: with all they can do where a thread has most, with any sizes else
                if dtype == "held" and not (full and _HELD & set(getattr(_file(kernel), kernel).arg_names)):
                    continue
                candidates = tiles(kind, target, name == "float64")
                for tile in candidates if full and dtype != "held" else candidates[:1]:
                    yield _build(kernel, label, kind, target, dtype, numbers | flags | constants, tile, full)


def _build(
    kernel: str, label: str, kind: str, target: str, dtype: str, constants: dict[str, Any], tile: Tiles, full: bool
) -> Build:
    options = tile.options(TARGETS[target].backend) | {"enable_fp_fusion": True}
    sizes = {name: options.pop(name) for name, _ in tile.blocks}
    constants = constants | sizes
    label += f" ({', '.join(map(str, [*sizes.values(), f'{tile.warps} warps']))})"
    absent = (x for flag, arguments in _OPTIONAL.items() if not constants[flag] for x in arguments)
    constants = constants | dict.fromkeys(absent)
    label += ", all options" if full else ""
    what = Build(kernel, label, kind, target, dtype, full, (), tuple(options.items()))
    names = what.function.arg_names
    return replace(what, constants=tuple((name, constants[name]) for name in names if name in constants))


def build(what: Build) -> Any:
    """Compiles for a target of TARGETS.

    Raises:
        RuntimeError: in a process where Triton interprets.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels can't be compiled where TRITON_INTERPRET is set: unset it")
    gpu = TARGETS[what.target]
    accumulator = "fp64" if what.dtype == "float64" else "fp32"
    constants = dict(what.constants)
    names = what.function.arg_names
    if "ACC" in names:
        constants["ACC"] = tl.float64 if what.dtype == "float64" else tl.float32
    if "TARGET" in names:
        constants["TARGET"] = gpu.backend
    signature = {}
    for name in names:
        other = DTYPES[what.dtype] if name in _INPUTS else accumulator
        if what.dtype == "held" and name in _HELD:
            other = "bf16"
        signature[name] = "constexpr" if name in constants else _OTHER_TYPES.get(name, f"*{other}")
    multiples = _MULTIPLES_OF_16 if what.full else _ALWAYS_MULTIPLES_OF_16
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(names)
        if name not in what.function.do_not_specialize
        and (signature[name].startswith("*") or (name in multiples and name not in constants))
    }
    source = ASTSource(what.function, signature, constants, aligned)
    return triton.compile(source, target=gpu, options=dict(what.options))


def usage(compiled: Any, target: str) -> Usage:
    """What a compiled kernel takes of its target."""
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Usage(found["vgpr_count"], 4 * found["vgpr_spill_count"], compiled.metadata.shared)
    text = _cuobjdump(compiled, "--dump-resource-usage")
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def try_usage(what: Build) -> Usage | str:
    """What a kernel takes of its target, or why it can't be compiled."""
    try:
        return usage(build(what), what.target)
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {error}"


def disassembly(compiled: Any) -> str:
    """The machine code of a kernel for an NVIDIA GPU, as text."""
    return _cuobjdump(compiled, "-sass")


def _cuobjdump(compiled: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([os.fspath(tool), option, path], capture_output=True, text=True, check=True)
    return done.stdout
