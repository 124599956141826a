"""The sizes of the kernels' tiles: the one table to tune.

Triton spreads a tile's columns over a warp and then over the warps, so that one warp for 128 columns, or a store that
asks for four columns a thread, gives each thread a few pairs by four: few loads, and no exchange between threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["KEY_BLOCK", "BackwardTiles", "Tiles", "backward_tiles", "compiler_options", "forward_tiles"]

KEY_BLOCK = 128
"""Keys of a prepared memory are padded to a multiple of this many: any tile of keys divides it."""


@dataclass(frozen=True)
class Tiles:
    """A forward program's share: pairs (queries, keys), and value columns at a time."""

    queries: int
    keys: int
    values: int
    warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """Arguments of the launch. Nothing is loaded ahead by stages: there are no matrix products to feed."""
        return {
            "BM": self.queries, "BN": self.keys, "BH": self.values, "num_warps": self.warps, "num_stages": 1,
        }  # fmt: skip


@dataclass(frozen=True)
class BackwardTiles:
    """Shares of the backward programs: pairs of one, and of the other (features, rows) or (value rows, columns)."""

    queries: int
    keys: int
    warps: int
    features: int
    rows: int
    value_rows: int
    values: int
    input_warps: int

    @property
    def pair_blocks(self) -> dict[str, int]:
        """Arguments of the launch of ``score_gradients``."""
        return {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": 1}

    @property
    def input_blocks(self) -> dict[str, int]:
        """Arguments of the launch of ``input_gradients``."""
        return {
            "BT": self.rows, "BD": self.features, "BN": self.value_rows, "BH": self.values,
            "num_warps": self.input_warps, "num_stages": 1,
        }  # fmt: skip


FORWARD = Tiles(queries=8, keys=128, values=128, warps=2)
STEP = Tiles(queries=4, keys=128, values=128, warps=2)
DOUBLE = Tiles(queries=2, keys=128, values=128, warps=1)
BACKWARD = BackwardTiles(
    queries=8, keys=128, warps=1, features=16, rows=64, value_rows=16, values=128, input_warps=2
)  # fmt: skip


def forward_tiles(queries: int, double: bool, interpreted: bool = False) -> Tiles:
    """The tiles for so many queries: a decoder's step has few, and none is computed in vain.

    A float64 takes two registers, so a program has fewer numbers.
    """
    if interpreted and queries > STEP.queries:  # where an operation costs the same for many numbers
        return replace(FORWARD, queries=32)
    tiles = DOUBLE if double else FORWARD if queries > STEP.queries else STEP
    return replace(tiles, queries=min(tiles.queries, 1 << max(0, queries - 1).bit_length()))


def backward_tiles(double: bool, interpreted: bool = False) -> BackwardTiles:
    """The tiles of the backward pass."""
    if interpreted:
        return replace(BACKWARD, queries=32, features=64, value_rows=64)
    return replace(BACKWARD, queries=4, features=8, value_rows=8, input_warps=4) if double else BACKWARD


def compiler_options(target: str) -> dict[str, Any]:
    """Options of every launch and build of a large kernel for a target, "cuda" or "hip".

    Multiplications and additions are to be fused, which Triton will not always do unasked; and NVIDIA's assembler, left
    alone, spills a little to fit more programs at a time.
    """
    return {"enable_fp_fusion": True} | ({"maxnreg": 255} if target == "cuda" else {})
