"""The kernels compiled ahead of time, for GPUs that needn't be there: what they use, and whether anything spills."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import additive as kernels
from .tiles import STEP, backward_tiles, compiler_options, forward_tiles

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

DTYPES = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}

_INPUTS = {"rows", "weight", "query", "key", "value", "grad_context", "context", "weights", "grad_weights"}
_OTHER_TYPES = {
    "lengths": "*i64", "seed": "*i64", "mask": "*i1", "threshold": "i64",
} | dict.fromkeys(
    ("scale", "scale_rest", "keep_scale", "keep_rest"), "fp32",
) | dict.fromkeys(
    ("B", "T", "Tq", "Tk", "D", "H", "HALF", "q_rows", "k_rows", "mask_row", "keys_each", "padded_rows",
     "padded_features", "splits", "i_first", "slab", "add", "query_programs", "key_programs"), "i32",
)  # fmt: skip
# Arguments that a launch leaves out, as None, where a flag is not set.
_OPTIONAL = {
    "HAS_LENGTHS": ("lengths",), "HAS_MASK": ("mask",), "DROPOUT": ("seed",), "FOLD": ("fold",),
    "CONTEXT": ("grad_context", "value_columns", "grad_columns"), "WEIGHTS": ("grad_weights",),
}  # fmt: skip
_MULTIPLES_OF_16 = {"D", "H", "q_rows", "k_rows", "padded_rows", "slab"}


@dataclass(frozen=True)
class Build:
    """A kernel with its constants, as a launch would ask for it."""

    kernel: str
    label: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int

    def __str__(self) -> str:
        return f"{self.label} {self.dtype}"


@dataclass(frozen=True)
class Usage:
    """Of one program: registers a thread, bytes of spilled registers a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def builds(dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[Build]:
    """Every kernel, with everything that can be asked of it and with as little as possible."""
    for dtype in dtypes:
        double = dtype == "float64"
        name = "float64" if double else "float32"
        numbers = {
            "UNIT": kernels.UNIT[name], "BITS": kernels.FOLD_BITS[name], "MAX": kernels.MAX_WEIGHT[name],
            "SMALLEST": kernels.SMALLEST[name], "PLAIN": kernels.PLAIN[name],
        }  # fmt: skip
        for all_options in (True, False):
            flags = dict.fromkeys(
                ("HAS_LENGTHS", "HAS_MASK", "DROPOUT", "WEIGHTS", "EXP", "FOLD", "CONTEXT"), all_options
            ) | {"ONLY_SCORES": False, "SPLIT": False, "FROM_SCORES": False, "CONTEXT": True}

            def make(
                kernel: str, label: str, blocks: dict[str, int], dtype: str = dtype,
                base: dict[str, Any] = numbers | flags, full: bool = all_options, **more: Any,
            ) -> Build:  # fmt: skip
                values = {**base, **blocks, **more}
                names = getattr(kernels, kernel).arg_names
                absent = (x for flag, arguments in _OPTIONAL.items() if not values[flag] for x in arguments)
                values |= dict.fromkeys(absent)
                constants = tuple((n, values[n]) for n in names if n in values)
                return Build(
                    kernel, f"{label}{', all options' if full else ''}", dtype, constants, blocks.get("num_warps", 4)
                )

            many = forward_tiles(STEP.queries + 1, double).blocks
            yield make("forward", "forward", many)
            for queries in (1, STEP.queries):
                yield make("forward", f"step of {queries}", forward_tiles(queries, double).blocks, SPLIT=True)
            yield make("forward", "scores", many, ONLY_SCORES=True, WEIGHTS=False, DROPOUT=False)
            yield make("score_gradients", "backward, pairs", backward_tiles(double).pair_blocks)
            yield make("input_gradients", "backward, inputs", backward_tiles(double).input_blocks)
            alone: dict[str, Any] = {"FROM_SCORES": True, "CONTEXT": False, "WEIGHTS": True, "DROPOUT": False}
            yield make("score_gradients", "scores' backward, pairs", backward_tiles(double).pair_blocks, **alone)
            yield make("input_gradients", "scores' backward, inputs", backward_tiles(double).input_blocks, **alone)
            yield make("row_sums", "backward, row sums", {"BLOCK": 256})
            yield make("combine", "combine", {"BH": 128, "BN": 128})
            yield make("features_first", "features first", {"BT": 32, "BD": 32})
            yield make("fold_weight", "fold", {"BLOCK": 256})


def build(what: Build, target: str) -> Any:
    """Compiles for a target of TARGETS.

    Raises:
        RuntimeError: in a process where Triton interprets.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels can't be compiled where TRITON_INTERPRET is set: unset it")
    gpu = TARGETS[target]
    function = getattr(kernels, what.kernel)
    accumulator = "fp64" if what.dtype == "float64" else "fp32"
    constants = dict(what.constants)
    names = function.arg_names
    if "ACC" in names:
        constants["ACC"] = tl.float64 if what.dtype == "float64" else tl.float32
    if "TARGET" in names:
        constants["TARGET"] = gpu.backend
    signature = {}
    for name in names:
        other = DTYPES[what.dtype] if name in _INPUTS else accumulator
        signature[name] = "constexpr" if name in constants else _OTHER_TYPES.get(name, f"*{other}")
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(names)
        if signature[name].startswith("*") or (name in _MULTIPLES_OF_16 and name not in constants)
    }
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": what.warps, "num_stages": 1, **compiler_options(gpu.backend)}
    return triton.compile(source, target=gpu, options=options)


def usage(compiled: Any, target: str) -> Usage:
    """What a compiled kernel takes of its target."""
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Usage(found["vgpr_count"], 4 * found["vgpr_spill_count"], compiled.metadata.shared)
    text = _cuobjdump(compiled, "--dump-resource-usage")
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def try_usage(what: Build, target: str) -> Usage | str:
    """What a kernel takes of a target, or why it can't be compiled."""
    try:
        return usage(build(what, target), target)
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
