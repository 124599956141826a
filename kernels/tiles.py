"""The sizes of the kernels' tiles, by kernel and target: the one table to tune."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["KEY_BLOCK", "Tiles", "tiles_for"]

KEY_BLOCK = 128
"""Keys of a prepared memory are padded to a multiple of this many: any tile of keys divides it."""


@dataclass(frozen=True)
class Tiles:
    """A program's share: pairs (queries, keys), values at a time, and in the gradients (features, rows)."""

    queries: int
    keys: int
    values: int
    warps: int
    rows: int = 64
    features: int = 16
    backward: bool = False

    @property
    def blocks(self) -> dict[str, Any]:
        """Arguments of the forward kernel's launch."""
        return {"BM": self.queries, "BN": self.keys, "BH": self.values, **self.options}

    @property
    def options(self) -> dict[str, int]:
        """Arguments of any launch. Nothing is loaded ahead by stages: there are no matrix products to feed."""
        return {"num_warps": self.warps, "num_stages": 1}


TILES = {
    "forward": Tiles(32, 128, 128, 4),
    "step": Tiles(8, 128, 128, 4),
    "backward": Tiles(32, 128, 128, 4, backward=True),
}


def tiles_for(kernel: str, queries: int, dtype: torch.dtype, target: str) -> Tiles:
    """The tiles of a kernel for so many queries."""
    tiles = TILES[kernel]
    if kernel == "step":
        tiles = replace(tiles, queries=min(tiles.queries, 1 << max(0, queries - 1).bit_length()))
    if target == "interpreter":  # which pays by the operation, not by the number
        tiles = replace(tiles, features=64)
    return tiles
