"""The Triton kernels with each of the tiles that the table has: what ``kernels/tiles.py`` should have first.

python -m attnext.gpu.tuning --device cuda --json tiles.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

os.environ["ATTNEXT_AUTOTUNE"] = "0"  # each call has the tiles that stand first

import attnext
from attnext.bench.timing import Plan, interleaved

__all__ = ["main"]

SIZES = {
    "step of one": (64, 1, 1024, 256, 512),
    "step": (32, 4, 1024, 256, 512),
    "forward": (16, 128, 256, 256, 512),
    "pairs": (16, 64, 256, 256, 512),
    "inputs": (16, 64, 256, 256, 512),
}
"""Of B, Tq, Tk, D and H: the call that shows each kind of launch of which the table has several tiles."""
TRAINED = ("pairs", "inputs")
SMALL = (2, 4, 40, 16, 8)
"""Instead, where the kernels are interpreted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Times every candidate, prints a table, and says where the first of the table is not the fastest."""
    parser = argparse.ArgumentParser(description="Time the tiles of the Triton kernels.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a kind of launch and dtype")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = [
        row
        for dtype in (torch.float32, torch.float16)
        for kind in SIZES
        for row in _of_kind(kind, dtype, args.device, args.seconds)
    ]
    for row in rows:
        row["fastest"] = row["us"] == min(other["us"] for other in rows if _same_call(other, row))
        marks = [mark for mark in ("first of the table", "fastest") if row[mark]]
        print(f"{row['kind']:12} {row['dtype']:8} {row['tiles']:32} {row['us']:9.1f} us  {', '.join(marks)}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


def _same_call(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["kind"], a["dtype"]) == (b["kind"], b["dtype"])


def _of_kind(kind: str, dtype: torch.dtype, device: str, seconds: float) -> list[dict[str, Any]]:
    """The median time of the call for each candidate of a kind."""
    from attnext.kernels import launch
    from attnext.kernels.tiles import TARGETS, tiles

    target = launch._target(torch.device(device))
    if target not in TARGETS:  # which has those of a near one
        TARGETS[target] = next(both for both in TARGETS.values() if both[0][kind] == tiles(kind, target, False))
    as_they_are = TARGETS[target]
    candidates = (TARGETS["sm_90"] if launch.INTERPRETED else as_they_are)[0][kind]
    call = _call(kind, SMALL if launch.INTERPRETED else SIZES[kind], dtype, device)

    def run_with(number: int) -> Callable[[], object]:
        # The others stay behind it: what is padded for them is padded for each.
        kinds = as_they_are[0] | {kind: candidates[number:] + candidates[:number]}

        def run() -> object:
            TARGETS[target] = kinds, as_they_are[1]
            return call()

        return run

    try:
        runs = {str(number): run_with(number) for number in range(len(candidates))}
        for run in runs.values():
            run()
        samples = interleaved(runs, Plan("cpu" if launch.INTERPRETED else "cuda", seconds, 3))
    finally:
        TARGETS[target] = as_they_are
    return [
        {
            "kind": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "tiles": ", ".join([*(f"{block} {size}" for block, size in tile.blocks), f"{tile.warps} warps"]),
            "us": statistics.median(samples[str(number)]) * 1e6,
            "first of the table": number == 0,
        }
        for number, tile in enumerate(candidates)
    ]


def _call(kind: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> Callable[[], object]:
    batch, queries, keys, features, values = sizes
    shapes = ((batch, queries, features), (batch, keys, features), (batch, keys, values), (features,))
    x = [torch.randn(shape, dtype=dtype, device=device).requires_grad_(kind in TRAINED) for shape in shapes]
    grad = torch.randn(batch, queries, values, dtype=dtype, device=device)

    def call() -> object:
        context, _ = attnext.additive_attention(*x, backend="triton")
        return torch.autograd.grad(context, x, grad) if kind in TRAINED else context

    return call


if __name__ == "__main__":
    sys.exit(main())
