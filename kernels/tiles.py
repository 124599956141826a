"""The sizes of the kernels' tiles: the one table to tune, by target.

Triton spreads a tile's columns over a warp and then over the warps, so that one warp for 128 columns, or a store that
asks for four columns a thread, gives each thread a few pairs by four: few loads. A second warp waits for the first at
each feature, where the tile changes its layout.

The first tiles of an entry are those that a kernel gets; where there are more, the first calls on a GPU time them and
Triton keeps the choice, in memory and in its cache on disk (``launch.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnext.ops import KEY_BLOCK

__all__ = [
    "FEW_QUERIES",
    "KEY_BLOCK",
    "LEAST_SLAB",
    "MOST_SPLITS",
    "TARGETS",
    "Tiles",
    "dot_kind",
    "forward_kind",
    "tiles",
]

FEW_QUERIES = 4
"""A decoder's step has so many at most: none is computed in vain."""

LEAST_SLAB = 128
"""Queries that backward takes at a time, at least, whatever D and H: fewer would be many launches."""

MOST_SPLITS = 32
"""Of the keys, between programs of dot products: one after the other is added in the launch behind."""
FEATURE_BLOCKS = (128, 256, 512, 1024)
"""Features that a tile of dot products may have: all of a key's, where there are no more."""


@dataclass(frozen=True)
class Tiles:
    """A program's share of the work, by the names of the kernel's constants, and the warps that do it."""

    blocks: tuple[tuple[str, int], ...]
    warps: int

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def options(self, backend: str) -> dict[str, Any]:
        """Arguments of a launch or a build for a backend of Triton's, "cuda" or "hip".

        Nothing is loaded ahead by stages: there are no matrix products to feed. NVIDIA's assembler, left alone, spills
        a little to fit more programs at a time.
        """
        limit = {"maxnreg": 255} if backend == "cuda" else {}
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": 1, **limit}


def _tiles(warps: int, **blocks: int) -> Tiles:
    return Tiles(tuple(blocks.items()), warps)


Kinds = dict[str, tuple[Tiles, ...]]


def _of_dots(share: int, keys: int) -> Kinds:
    """Forward tiles of dot products, by features: of a key's, a warp has ``share`` if there is one query, else half.

    A thread has about as many numbers of the keys for any features, and as many of a query and its sums.
    """
    found: Kinds = {}
    for block in FEATURE_BLOCKS:
        one, few = max(1, block // share), max(1, 2 * block // share)
        found[f"dot of one {block}"] = (_tiles(one, BM=1, BN=4 * share * one // block, BD=block),)
        found[f"dot {block}"] = (_tiles(few, BM=4, BN=keys * share * few // (2 * block), BD=block),)
    return found


# BM queries, BN keys, BH value columns; BJ keys and BD pairs of features, a pair a thread; BT rows. The
# pairs' BN is KEY_BLOCK, as many sums of ds as there are blocks of keys. Of dot products: BD features; BR rows, BT
# terms and BC columns of a sum. Of a step that sees its past BK keys.
_ANY: Kinds = {
    "fold": (_tiles(4),),  # one program, with all features at once
    "features first": (_tiles(4, BT=32, BD=32),),
    "combine": (_tiles(4, BH=128, BN=128),),
    "row sums": (_tiles(4, BLOCK=256),),
    "sums of parts": (_tiles(4, BLOCK=256),),
    "step sums": (_tiles(8, BK=16, BD=16),),
    "step rows": (_tiles(4, BK=32, BH=64),),
    "step values": (_tiles(4, BK=16, BH=64),),
    "step places": (_tiles(4, BK=128),),
}
_FLOAT32: Kinds = _ANY | {
    **_of_dots(512, 4),
    "step of one": (_tiles(1, BM=1, BN=128, BH=128), _tiles(2, BM=1, BN=128, BH=128)),
    "step": (_tiles(1, BM=4, BN=128, BH=128), _tiles(2, BM=4, BN=128, BH=128)),
    "forward": (_tiles(1, BM=4, BN=128, BH=128), _tiles(2, BM=8, BN=128, BH=128)),
    "pairs": (_tiles(1, BM=8, BN=128), _tiles(1, BM=4, BN=128)),
    "inputs": (_tiles(1, BJ=8, BD=32, BN=8, BH=128), _tiles(1, BJ=4, BD=32, BN=8, BH=128)),
    "dot pairs of one": (_tiles(1, BM=1, BN=8, BD=128),),
    "dot pairs": (_tiles(1, BM=4, BN=8, BD=128),),
    "dot sums of one": (_tiles(1, BR=1, BT=16, BC=128),),
    "dot sums": (_tiles(1, BR=8, BT=2, BC=128),),
}
_FLOAT64: Kinds = _ANY | {  # a number takes two registers, so a program has fewer
    **_of_dots(256, 2),
    "features first": (_tiles(4, BT=32, BD=16),),
    "step of one": (_tiles(1, BM=1, BN=128, BH=128),),
    "step": (_tiles(1, BM=2, BN=128, BH=128),),
    "forward": (_tiles(1, BM=2, BN=128, BH=128),),
    "pairs": (_tiles(1, BM=4, BN=128),),
    "inputs": (_tiles(1, BJ=4, BD=32, BN=4, BH=128),),
    "dot pairs of one": (_tiles(1, BM=1, BN=8, BD=64),),
    "dot pairs": (_tiles(1, BM=4, BN=4, BD=64),),
    "dot sums of one": (_tiles(1, BR=1, BT=8, BC=64),),
    "dot sums": (_tiles(1, BR=8, BT=2, BC=64),),
}
_OF_64_LANES: Kinds = {"inputs": (_tiles(1, BJ=8, BD=64, BN=16, BH=128), _tiles(1, BJ=4, BD=64, BN=16, BH=128))}
_FLOAT64_OF_64_LANES: Kinds = {
    "inputs": (_tiles(1, BJ=4, BD=64, BN=8, BH=128),),
    "step sums": (_tiles(4, BK=16, BD=16),),
}
_FLOAT32_OF_SM_100: Kinds = {  # the assembler spills where half types have as many columns as elsewhere
    "forward": (_tiles(1, BM=4, BN=128, BH=128), _tiles(2, BM=8, BN=128, BH=64)),
}
_INTERPRETED: Kinds = _ANY | {  # an operation costs the same for many numbers
    "step of one": (_tiles(1, BM=1, BN=128, BH=128),),
    "step": (_tiles(1, BM=4, BN=128, BH=128),),
    "features first": (_tiles(4, BT=128, BD=64),),
    "sums of parts": (_tiles(4, BLOCK=4096),),
    "forward": (_tiles(1, BM=64, BN=128, BH=128),),
    "pairs": (_tiles(1, BM=32, BN=128),),
    "inputs": (_tiles(1, BJ=128, BD=64, BN=128, BH=128),),
    **{f"dot of one {block}": (_tiles(2, BM=1, BN=32, BD=block),) for block in FEATURE_BLOCKS},
    **{f"dot {block}": (_tiles(8, BM=32, BN=32, BD=block),) for block in FEATURE_BLOCKS},
    "dot pairs of one": (_tiles(1, BM=1, BN=128, BD=64),),
    "dot pairs": (_tiles(1, BM=32, BN=64, BD=64),),
    "dot sums of one": (_tiles(1, BR=1, BT=64, BC=64),),
    "dot sums": (_tiles(1, BR=64, BT=32, BC=32),),
    "step sums": (_tiles(4, BK=64, BD=64),),
    "step rows": (_tiles(4, BK=64, BH=64),),
    "step values": (_tiles(4, BK=64, BH=64),),
}
TARGETS: dict[str, tuple[Kinds, Kinds]] = {
    "sm_80": (_FLOAT32, _FLOAT64),
    "sm_90": (_FLOAT32, _FLOAT64),
    "sm_100": (_FLOAT32 | _FLOAT32_OF_SM_100, _FLOAT64),
    "sm_120": (_FLOAT32, _FLOAT64 | _of_dots(256, 1)),  # two keys spill 16 bytes by Triton 3.7.1
    "gfx942": (_FLOAT32 | _OF_64_LANES, _FLOAT64 | _FLOAT64_OF_64_LANES),
    "gfx1100": (_FLOAT32, _FLOAT64 | {"pairs": (_tiles(1, BM=2, BN=128),)}),
    "interpreter": (_INTERPRETED, _INTERPRETED),
}
"""Tiles of each kind by target: of float32 arithmetic, and of float64."""


def tiles(kind: str, target: str, double: bool) -> tuple[Tiles, ...]:
    """The candidates for a kind of launch, best guess first; a target not in the table has those of a near one."""
    if target not in TARGETS:
        target = "gfx942" if target.startswith("gfx9") else "gfx1100" if target.startswith("gfx") else "sm_90"
    return TARGETS[target][double][kind]


def dot_kind(queries: int, features: int) -> str:
    """The kind of a forward launch of dot products for so many queries, and features of a key or a value."""
    block = next((block for block in FEATURE_BLOCKS if block >= features), FEATURE_BLOCKS[-1])
    return f"{'dot of one' if queries <= 1 else 'dot'} {block}"


def forward_kind(queries: int) -> str:
    """The kind of a forward launch for so many queries."""
    return "step of one" if queries <= 1 else "step" if queries <= FEW_QUERIES else "forward"
