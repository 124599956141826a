"""The family of attentions, a line each: names for a configuration, for the table of the README and for its timings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnext.attention.bahdanau import BahdanauAttention
from attnext.attention.coverage import CoverageAttention
from attnext.attention.heads import MultiHeadAttention
from attnext.attention.local import LocalAttention
from attnext.attention.location import LocationSensitiveAttention
from attnext.attention.luong import LuongAttention
from attnext.attention.monotonic import MonotonicAttention
from attnext.attention.onward import ForwardAttention
from attnext.attention.pooling import AttentionPooling

__all__ = ["FAMILY", "STEPPED", "Member"]


@dataclass(frozen=True)
class Member:
    """One kind of attention.

    Attributes:
        name: as in the tables.
        module: how it is written, without its sizes.
        paper: where it comes from.
        make: a module of a query size, a memory size and an attention size.
        stepped: whether a decoder asks it at every step; a pooling asks by itself, once.
    """

    name: str
    module: str
    paper: str
    make: Callable[[int, int, int], nn.Module]
    stepped: bool = True


def _sized(cls: Any, **options: Any) -> Callable[[int, int, int], nn.Module]:
    return lambda *sizes: cls(*sizes, **options)


def _normalised(normalizer: str, paper: str) -> Member:
    module = f'`BahdanauAttention(normalizer="{normalizer}")`'
    return Member(normalizer, module, paper, _sized(BahdanauAttention, normalizer=normalizer))


def _luong(score: str, paper: str = "Luong 2015") -> Member:
    def make(query_size: int, memory_size: int, attention_size: int) -> nn.Module:
        of_concat = {"attention_size": attention_size} if score == "concat" else {}
        return LuongAttention(query_size, memory_size, score=score, **of_concat)

    return Member(score.replace("_", " "), f'`LuongAttention(score="{score}")`', paper, make)


def _heads(score: str, name: str, paper: str) -> Member:
    return Member(
        name, f'`MultiHeadAttention(score="{score}")`', paper, _sized(MultiHeadAttention, heads=2, score=score)
    )


def _local(position: str, name: str, paper: str = "Luong 2015") -> Member:
    module = f'`LocalAttention(position="{position}")`'
    return Member(name, module, paper, _sized(LocalAttention, position=position))


def _location(features: str, name: str, paper: str) -> Member:
    module = f'`LocationSensitiveAttention(features="{features}")`'
    return Member(name, module, paper, _sized(LocationSensitiveAttention, features=features))


def _pooling(gated: bool, name: str, paper: str) -> Member:
    module = "`AttentionPooling(gated=True)`" if gated else "`AttentionPooling`"
    return Member(name, module, paper, lambda _, *sizes: AttentionPooling(*sizes, gated=gated), stepped=False)


FAMILY = (
    Member("additive", "`BahdanauAttention`", "Bahdanau 2015", _sized(BahdanauAttention)),
    Member("additive, normalised", "`BahdanauAttention(normalize=True)`", "Wu 2016 (GNMT)",
           _sized(BahdanauAttention, normalize=True)),
    _normalised("sigmoid", "Chorowski 2015"),
    _normalised("sparsemax", "Martins 2016"),
    _normalised("entmax15", "Peters 2019"),
    _luong("dot"),
    _luong("scaled_dot", "Vaswani 2017"),
    _luong("general"),
    _luong("concat"),
    _heads("scaled_dot", "several heads", "Vaswani 2017"),
    _heads("additive", "several heads, additive", "Bahdanau 2015"),
    _location("previous", "location, last step", "Chorowski 2015"),
    _location("both", "location, all steps", "Shen 2018 (Tacotron 2)"),
    Member("coverage", "`CoverageAttention`", "See 2017", _sized(CoverageAttention)),
    _local("steps", "local-m"),
    _local("predicted", "local-p"),
    _local("last", "window", "Chorowski 2015"),
    Member("monotonic", "`MonotonicAttention`", "Raffel 2017", _sized(MonotonicAttention)),
    Member("forward", "`ForwardAttention`", "Zhang 2018", _sized(ForwardAttention)),
    Member("forward, agent", "`ForwardAttention(transition_agent=True)`", "Zhang 2018",
           _sized(ForwardAttention, transition_agent=True)),
    _pooling(False, "pooling", "Yang 2016"),
    _pooling(True, "pooling, gated", "Ilse 2018"),
)  # fmt: skip

STEPPED = {member.name.replace(",", "").replace(" ", "-"): member for member in FAMILY if member.stepped}
"""Those a decoder asks at every step, by the names that a configuration has for them."""
