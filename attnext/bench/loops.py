"""Loops that are timed with what they are compared to, and how much work each is; among them a decoder's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnext import BahdanauAttention, CoverageAttention, ForwardAttention, LocationSensitiveAttention
from attnext.bench import plain
from attnext.bench.cases import Kind

__all__ = ["Decoder", "Loop", "Side", "compiled", "with_compiled_step"]

Score = Literal["additive", "coverage", "location", "forward", "forward, agent"]

# Multiply-adds of the bound, without gradients and with them. An exponential is a polynomial of degree 6, before it the
# argument is split and after it the parts put together: about 12. Backward takes it again where nothing was prepared.
_EXPONENTIAL: dict[Kind, float] = {"forward": 12.0, "forward + backward": 24.0}
# Of a score element as in ``cases``; but a step's weights are kept, so that backward needs no scores.
_SCORE: dict[Kind, float] = {"forward": 3.0, "forward + backward": 3.0 + 4.5}
# A product with a matrix, or the context: its gradients are two products more.
_PRODUCT: dict[Kind, float] = {"forward": 1.0, "forward + backward": 3.0}
# Features of the past, which backward makes again: they are too many to keep.
_FEATURE: dict[Kind, float] = {"forward": 1.0, "forward + backward": 4.0}


class Side(NamedTuple):
    """One way to compute a loop: a call that gives its contexts, and what their gradients are taken of.

    The leaves have the same order on all sides of a loop.
    """

    call: Callable[[], Tensor]
    leaves: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Loop(ABC):
    """Something to time, with the sizes that all have: B, Tk, D, H and steps."""

    name: str
    batch: int
    keys: int
    features: int
    values: int
    steps: int = 1
    kinds: tuple[Kind, ...] = ("forward", "forward + backward")

    @abstractmethod
    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        """By peer: attnext's, and one to compare it with, which is there whether it is asked for or not."""

    def __str__(self) -> str:
        sizes = f"B {self.batch}, Tk {self.keys}, D {self.features}, H {self.values}{self._details}"
        return sizes + (f", {self.steps} steps" if self.steps > 1 else "")

    @property
    def _details(self) -> str:
        return ""

    @property
    def prepared(self) -> bool:
        """Whether the exponentials of the keys are taken once, and not at every step."""
        return True

    @property
    def rows(self) -> int:
        """Queries of all steps."""
        return self.batch * self.steps

    def work(self, kind: Kind) -> dict[str, float]:
        """Multiply-adds by part, of the whole loop: the bound is their sum."""
        pairs = self.rows * self.keys
        of_keys = self.batch * self.keys * self.features * _EXPONENTIAL["forward"]
        return {
            "exponentials": of_keys if self.prepared else pairs * self.features * _EXPONENTIAL[kind],
            "scores": pairs * self.features * _SCORE[kind],
            "contexts": pairs * self.values * _PRODUCT[kind],
        }

    @property
    def memory_bytes(self) -> int:
        """What a step reads: float32 keys and values, once for all hypotheses."""
        return 4 * self.batch * self.keys * (self.features + self.values)

    def reads(self, kind: Kind) -> int:
        """How many times that is read at least: backward needs keys and values once more for each step."""
        return self.steps * (1 if kind == "forward" else 2)

    def shortened(self, steps: int) -> Loop:
        """With no more than so many steps."""
        return replace(self, steps=min(self.steps, steps))


@dataclass(frozen=True, kw_only=True)
class Decoder(Loop):
    """A prepared memory, and step after step of an attention module, its preparation included.

    With a cell, an LSTM's, the step's query is its hidden state and its input the context before.
    """

    query: int
    score: Score
    channels: int = 0
    filters: int = 0
    width: int = 0
    cell: bool = False
    beam: int = 1

    @property
    def _details(self) -> str:
        found = f", Q {self.query}"
        found += f", {self.filters} filters of {self.channels} x {self.width}" if self.filters else ""
        return found + (f", beam of {self.beam}" if self.beam > 1 else "") + (", LSTM" if self.cell else "")

    @property
    def prepared(self) -> bool:
        return self.score == "additive"

    @property
    def rows(self) -> int:
        return self.batch * self.beam * self.steps

    def work(self, kind: Kind) -> dict[str, float]:
        """Beside the attention: features of the past, projections of queries and keys, the cell."""
        pairs, seen = self.rows * self.keys, self.filters * (self.channels * self.width + self.features)
        seen = self.features if self.score == "coverage" else seen
        of_keys = self.batch * self.keys * self.values * self.features
        return super().work(kind) | {
            "location": pairs * seen * _FEATURE[kind],
            "projections": (self.rows * self.query * self.features + of_keys) * _PRODUCT[kind],
            "cell": self.rows * self._cell_weights * _PRODUCT[kind],
        }

    @property
    def _cell_weights(self) -> int:
        return 4 * self.query * (self.values + self.query) if self.cell else 0

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + 4 * (self.query * self.features + self._cell_weights)

    def sides(self, device: str, others: Collection[str]) -> dict[str, Side]:
        ours, eager = _MODULES[self.score](self)
        _feel_the_past(ours.to(device))
        eager.to(device).copy_from(ours)
        modules: dict[str, Any] = {"attnext": ours, "eager": eager}
        if "compile" in others:
            modules["compile"] = with_compiled_step(eager)
        cell = nn.LSTMCell(self.values, self.query, device=device) if self.cell else None
        states = torch.randn(self.batch, self.keys, self.values, device=device, requires_grad=True)
        shape = (self.steps, self.batch, *((self.beam,) if self.beam > 1 else ()), self.query)
        queries = None if cell else torch.randn(shape, device=device, requires_grad=True)
        shared = [states, *(cell.parameters() if cell else ()), *([] if queries is None else [queries])]
        found = {}
        for peer, module in modules.items():
            counterpart: Callable[[str], Tensor] = ours.get_parameter if module is ours else module.counterpart
            leaves = [counterpart(name) for name, _ in ours.named_parameters()]
            call = partial(_contexts, module, cell, states, queries, self.steps)
            found[peer] = Side(call, [*shared, *leaves])
        return found


@torch.no_grad()
def _feel_the_past(module: nn.Module) -> None:
    """Makes features of the past large: as first drawn they change a context so little that wrong ones would pass."""
    for name, parameter in module.named_parameters():
        if name in ("location_convolution.weight", "coverage_weight"):
            parameter.mul_(10.0)


def _contexts(attn: Any, cell: nn.LSTMCell | None, states: Tensor, queries: Tensor | None, steps: int) -> Tensor:
    """The loop itself, the same for all: (steps, B, ..., H)."""
    memory, past, hidden = attn.prepare(states), None, None
    context, contexts = states.new_zeros(states.shape[0], states.shape[2]), []
    given = iter(() if queries is None else queries.unbind())
    for _ in range(steps):
        if cell is not None:
            hidden = cell(context, hidden)
        query = next(given) if hidden is None else hidden[0]
        context, _, past = attn.step(query, memory, past)
        contexts.append(context)
    return torch.stack(contexts)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call, which is where no compiler or a bug in one shows."""
    make = cache(partial(torch.compile, function, fullgraph=True, dynamic=False))

    def call(*arguments: Any) -> Any:
        return make()(*arguments)

    return call


def with_compiled_step(module: plain.PlainAdditive) -> plain.PlainAdditive:
    """A copy whose step is compiled; the loop around it stays as it is."""
    copy = deepcopy(module)
    copy.forward = compiled(copy.forward)  # type: ignore[method-assign]
    return copy


Modules = tuple[nn.Module, plain.PlainAdditive]


def _additive(loop: Decoder) -> Modules:
    sizes = (loop.query, loop.values, loop.features)
    return BahdanauAttention(*sizes), plain.PlainAdditive(*sizes, beam=loop.beam)


def _coverage(loop: Decoder) -> Modules:
    sizes = (loop.query, loop.values, loop.features)
    return CoverageAttention(*sizes), plain.PlainCoverage(*sizes)


def _location(loop: Decoder) -> Modules:
    sizes, seen = (loop.query, loop.values, loop.features), {1: "previous", 2: "both"}[loop.channels]
    ours = LocationSensitiveAttention(*sizes, features=seen, filters=loop.filters, kernel_size=loop.width)
    return ours, plain.PlainLocation(*sizes, loop.channels, loop.filters, loop.width, loop.beam)


def _forward(agent: bool, loop: Decoder) -> Modules:
    sizes = (loop.query, loop.values, loop.features)
    ours = ForwardAttention(*sizes, transition_agent=agent, filters=loop.filters, kernel_size=loop.width)
    return ours, plain.PlainForward(*sizes, loop.filters, loop.width, agent=agent)


_MODULES: dict[Score, Callable[[Decoder], Modules]] = {
    "additive": _additive,
    "coverage": _coverage,
    "location": _location,
    "forward": partial(_forward, False),
    "forward, agent": partial(_forward, True),
}
