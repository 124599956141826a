"""The family of attentions, a line each: what the table of the README is made of, and what is timed against eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnext import (
    AttentionPooling,
    BahdanauAttention,
    CoverageAttention,
    ForwardAttention,
    LocalAttention,
    LocationSensitiveAttention,
    LuongAttention,
    MonotonicAttention,
    MultiHeadAttention,
)

__all__ = ["FAMILY", "Member", "decode"]


@dataclass(frozen=True)
class Member:
    """One kind of attention.

    Attributes:
        name: as in the tables.
        module: how it is written, without its sizes.
        paper: where it comes from.
        make: a module of a query size (also the memory's) and an attention size, with a memory of the query's size.
    """

    name: str
    module: str
    paper: str
    make: Callable[[int, int], nn.Module]


def _sized(cls: Any, **options: Any) -> Callable[[int, int], nn.Module]:
    return lambda size, attention_size: cls(size, size, attention_size, **options)


def _normalised(normalizer: str, paper: str) -> Member:
    module = f'`BahdanauAttention(normalizer="{normalizer}")`'
    return Member(normalizer, module, paper, _sized(BahdanauAttention, normalizer=normalizer))


def _luong(score: str, paper: str = "Luong 2015") -> Member:
    def make(size: int, attention_size: int) -> nn.Module:
        of_concat = {"attention_size": attention_size} if score == "concat" else {}
        return LuongAttention(size, size, score=score, **of_concat)

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
    return Member(name, module, paper, lambda size, attention_size: AttentionPooling(size, attention_size, gated=gated))


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


def decode(attn: nn.Module, query: Tensor, states: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Contexts (B, H) and weights (B, Tk) of a decoder's steps, one after another: query is (B, Tq, Q).

    A pooling attends by its own query, once.
    """
    if isinstance(attn, AttentionPooling):
        context, weights = attn(states, lengths=lengths, need_weights=True)
        assert weights is not None
        return [context, weights]
    attention: Any = attn
    memory, state = attention.prepare(states, lengths), None
    steps = []
    for one in query.unbind(1):
        context, weights, state = attention.step(one, memory, state, need_weights=True)
        steps += [context, weights]
    return steps


def inputs(batch: int, steps: int, keys: int, size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Queries and states, of size 1 or so as trained ones are."""
    query, states = (torch.randn(batch, n, size, device=device) for n in (steps, keys))
    return query.requires_grad_(), states.requires_grad_()
