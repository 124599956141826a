"""Single calls that are timed like loops: what a step costs alone, and steps beside one call of the same queries."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnext import BahdanauAttention, additive_attention, functional, prepare
from attnext.bench import plain
from attnext.bench.cases import Kind
from attnext.bench.loops import Loop, Side, compiled, with_compiled_step

__all__ = ["Call", "ModuleStep", "OperatorStep", "StepsOfCall"]


@dataclass(frozen=True, kw_only=True)
class Call(Loop):
    """One query a call, of projected queries and keys that nothing was prepared of."""

    @property
    def prepared(self) -> bool:
        return False

    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        inputs = _projected(self, (self.batch, self.features), device)
        functions: dict[str, Callable[..., Tensor]] = {"attnext": _attended, "eager": plain.additive}
        if "compile" in others:
            functions["compile"] = compiled(plain.additive)
        return {peer: Side(partial(function, *inputs), inputs) for peer, function in functions.items()}


def _attended(*inputs: Tensor) -> Tensor:
    return additive_attention(*inputs)[0]


def _projected(loop: Loop, query: tuple[int, ...], device: str) -> list[Tensor]:
    """Query, key, value and score weight."""
    shapes = (query, (loop.batch, loop.keys, loop.features), (loop.batch, loop.keys, loop.values))
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    inputs.append(torch.randn(loop.features, device=device) * loop.features**-0.5)
    return [x.requires_grad_() for x in inputs]


@dataclass(frozen=True, kw_only=True)
class OperatorStep(Loop):
    """A step of projected queries over a memory that was prepared before."""

    kinds: tuple[Kind, ...] = ("forward",)

    def work(self, kind: Kind) -> dict[str, float]:
        return super().work(kind) | {"exponentials": 0.0}  # of the keys: before

    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        query, key, value, v = _projected(self, (self.batch, self.features), device)
        with torch.no_grad():
            memory = prepare(key, value, v)
        return {
            "attnext": Side(lambda: functional.attend(query, memory, 1.0, 0.0, False, None)[0], []),
            "eager": Side(partial(plain.additive, query, key, value, v), []),
        }


@dataclass(frozen=True, kw_only=True)
class ModuleStep(OperatorStep):
    """A step as a decoder's code calls it: of a module, whose projection of the query is part of it."""

    query: int

    @property
    def _details(self) -> str:
        return f", Q {self.query}"

    def work(self, kind: Kind) -> dict[str, float]:
        return super().work(kind) | {"projections": float(self.rows * self.query * self.features)}

    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        sizes = (self.query, self.values, self.features)
        attn, eager = BahdanauAttention(*sizes).to(device), plain.PlainAdditive(*sizes).to(device)
        eager.copy_from(attn)
        states = torch.randn(self.batch, self.keys, self.values, device=device)
        query = torch.randn(self.batch, self.query, device=device)
        with torch.no_grad():
            memory, kept = attn.prepare(states), eager.prepare(states)
        modules = {"eager": eager} | ({"compile": with_compiled_step(eager)} if "compile" in others else {})
        ours = Side(lambda: attn(query, memory, need_weights=True)[0], [])
        theirs = {peer: Side(partial(_first, module, query, *kept), []) for peer, module in modules.items()}
        return {"attnext": ours} | theirs


def _first(module: plain.PlainAdditive, query: Tensor, *memory: Tensor) -> Tensor:
    context: Tensor = module(query, *memory, ())[0]
    return context


@dataclass(frozen=True, kw_only=True)
class StepsOfCall(Loop):
    """Training through the steps of a prepared memory, beside all queries in one call."""

    kinds: tuple[Kind, ...] = ("forward + backward",)

    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        inputs = _projected(self, (self.batch, self.steps, self.features), device)
        return {
            "attnext": Side(partial(_by_step, *inputs), inputs),
            "one call": Side(partial(_attended, *inputs), inputs),
        }


def _by_step(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    memory = prepare(key, value, score_weight)
    return torch.stack([functional.attend(one, memory, 1.0, 0.0, False, None)[0] for one in query.unbind(1)], 1)
