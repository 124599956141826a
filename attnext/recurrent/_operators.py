"""The operators of a decoder, and what goes in and out of them.

They go through the steps: attention, layers and output vector. Rows are hypotheses: N is B, or B times the beam. The
steps come first in tensors of all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnext import _checks
from attnext.attention.base import StepParts
from attnext.memory import Memory
from attnext.ops import RULES, define

__all__ = [
    "BACKWARD_SCHEMA",
    "KEPT",
    "NO_CHOICE",
    "SCHEMA",
    "Ahead",
    "Call",
    "Found",
    "Inputs",
    "Kept",
    "Layer",
    "OfPast",
    "Results",
    "Start",
    "Weights",
    "ahead_of",
    "backward",
    "forward",
    "inputs_of",
    "options_of",
    "pack",
    "without_autocast",
]

SCORES = ("additive", "dot", "past")
"""The kinds of scores, in the order of the operators' numbers."""

_MATRICES = "Tensor[] w_hidden, Tensor[] w_below"
_OUTER = "Tensor? w_outer, Tensor? w_query"
_INPUTS = (
    f"{_MATRICES}, Tensor[] b_input, Tensor[] b_hidden, Tensor[] masks, {_OUTER}, Tensor? b_query, Tensor? w_readout, "
    "Tensor hidden, Tensor? cell, Tensor? context, Tensor? feed, Tensor key, Tensor? value, Tensor? score_weight, "
    "Tensor? exp_key, Tensor? key_limit, Tensor? lengths, Tensor? mask, Tensor? filters, Tensor? projection, "
    "Tensor? past, Tensor? cumulative, Tensor? seeds"
)
_ORDER = "bool after, bool feeds_vector"
_OPTIONS = f"float scale, float dropout_p, int score, int rule, {_ORDER}"
_CHOOSING = (
    "Tensor? w_output, Tensor? b_output, Tensor? table_gates, Tensor? table_feeds, Tensor? previous, int first, int end"
)
NO_CHOICE = (None, None, None, 0, -1)
SCHEMA = (
    f"(Tensor(a!) gates, Tensor(b!)? feeds, {_INPUTS}, Tensor? packed, {_CHOOSING}, {_OPTIONS}, bool projected, "
    "bool need_weights, bool keep) -> Tensor[]"
)
_INCOMING = ", ".join(f"Tensor? grad_{name}" for name in ("output", "contexts", "weights", "hidden", "cell", "feeds"))
BACKWARD_SCHEMA = f"({_INCOMING}, Tensor[] kept, Tensor gates, Tensor? feeds, {_INPUTS}, {_OPTIONS}) -> Tensor[]"


def _not_in_graphs(*_: Any) -> Any:
    raise RuntimeError("attnext's decoder operators are not for graphs: the modules run their steps one by one there")


forward: Callable[..., list[Tensor]] = define("attentive_decoder_cpu", SCHEMA, _not_in_graphs)
backward: Callable[..., list[Tensor]] = define("attentive_decoder_backward_cpu", BACKWARD_SCHEMA, _not_in_graphs)
pack: Callable[..., Tensor] = define(
    "attentive_decoder_pack_cpu",
    f"({_MATRICES}, {_OUTER}, Tensor? w_readout, Tensor? w_output, int values, bool lstm, {_ORDER}) -> Tensor",
    _not_in_graphs,
)


class Layer(NamedTuple):
    """The parameters of a layer of S units with G gates, as :class:`torch.nn.GRU` and LSTM have them."""

    w_input: Tensor
    w_hidden: Tensor
    b_input: Tensor | None
    b_hidden: Tensor | None


class Weights(NamedTuple):
    """The parameters of a decoder.

    Attributes:
        layers: from the lowest, whose inputs are E features, the context where it enters the step, and the last output
            vector where that does.
        w_readout: (R, E + S + H), of the output vector; None without.
        b_readout: (R,).
        parts: how a state attends.
        after: a step attends with the state it has made, and not with the one before.
        feeds_vector: the output vector enters the next step.
    """

    layers: Sequence[Layer]
    w_readout: Tensor | None
    b_readout: Tensor | None
    parts: StepParts
    after: bool
    feeds_vector: bool


class Start(NamedTuple):
    """What there was before the first step: (L, N, S) twice, (N, H), (N, R), and (N, Tk) of what a score sees."""

    hidden: Tensor
    cell: Tensor | None
    context: Tensor | None
    feed: Tensor | None
    past: Tensor | None
    cumulative: Tensor | None


class Results(NamedTuple):
    """Of all steps, (T, N, ...), and of the last (L, N, S)."""

    output: Tensor
    contexts: Tensor
    weights: Tensor | None
    hidden: Tensor
    cell: Tensor | None
    feeds: Tensor | None


class Call(NamedTuple):
    """What has no gradient."""

    memory: Memory
    parts: StepParts
    masks: list[Tensor]
    seeds: Tensor | None
    after: bool
    feeds_vector: bool
    need_weights: bool
    keep: bool
    half: bool
    """Whether products over all steps are of bfloat16."""

    @property
    def options(self) -> tuple[Any, ...]:
        return options_of(self.parts, self.after, self.feeds_vector)


class Inputs(NamedTuple):
    """What may have a gradient."""

    x: Tensor
    hidden: Tensor
    cell: Tensor | None
    context: Tensor | None
    feed: Tensor | None
    past: Tensor | None
    cumulative: Tensor | None
    key: Tensor
    value: Tensor | None
    score_weight: Tensor | None
    filters: Tensor | None
    projection: Tensor | None
    w_query: Tensor | None
    b_query: Tensor | None
    w_readout: Tensor | None
    b_readout: Tensor | None
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Inputs:
        """From one row of them, the layers' last."""
        ends = range(_FIXED, len(tensors), 4)
        return cls._make((*tensors[:_FIXED], tuple(Layer._make(tensors[k : k + 4]) for k in ends)))

    def flat(self) -> tuple[Tensor | None, ...]:
        return *self[:-1], *(x for layer in self.layers for x in layer)

    @property
    def features(self) -> int:
        """E."""
        return self.x.shape[2]

    def of_operator(self, call: Call) -> tuple[Any, ...]:
        """As the operators take them, from w_hidden to seeds."""
        features, memory = self.features, call.memory
        lowest, above = self.layers[0], self.layers[1:]
        outer = lowest.w_input[:, features:]
        prepared = memory.prepared if call.parts.score == "additive" else None
        return (
            [x.w_hidden for x in self.layers],
            [x.w_input for x in above],
            [x.b_input for x in self.layers if x.b_input is not None],
            [x.b_hidden for x in self.layers if x.b_hidden is not None],
            call.masks,
            outer if outer.shape[1] else None,
            self.w_query,
            self.b_query,
            None if self.w_readout is None else self.w_readout[:, features:],
            self.hidden,
            self.cell,
            self.context,
            self.feed,
            self.key,
            self.value,
            self.score_weight,
            prepared and prepared.exp_key,
            prepared and prepared.key_limit,
            memory.lengths,
            memory.mask,
            self.filters,
            self.projection,
            self.past,
            self.cumulative,
            call.seeds,
        )


_FIXED = len(Inputs._fields) - 1


def options_of(parts: StepParts, after: bool, feeds_vector: bool) -> tuple[Any, ...]:
    return parts.scale, parts.dropout, SCORES.index(parts.score), RULES.index(parts.rule), after, feeds_vector


def without_autocast() -> AbstractContextManager[Any]:
    """Products as they stand, whatever autocast the backward pass is run in."""
    return torch.autocast("cpu", enabled=False) if _checks.autocasts("cpu") else nullcontext()


def inputs_of(x: Tensor, start: Start, memory: Memory, weights: Weights) -> Inputs:
    parts, additive = weights.parts, weights.parts.score != "dot"
    return Inputs(
        x, start.hidden, start.cell, start.context, start.feed, start.past, start.cumulative,
        memory.key, None if memory.shared and not additive else memory.value, memory.score_weight if additive else None,
        parts.filters, parts.projection, parts.weight, parts.bias, weights.w_readout, weights.b_readout,
        tuple(weights.layers),
    )  # fmt: skip


class Ahead(NamedTuple):
    """What inputs (..., E) add to the lowest layer's gates, biases aside, and to the output vector."""

    gates: Tensor
    feeds: Tensor | None


def ahead_of(
    x: Tensor, w_input: Tensor, w_readout: Tensor | None, b_readout: Tensor | None, half: bool = False
) -> Ahead:
    if half:
        x, w_input = x.bfloat16(), w_input.bfloat16()
        w_readout, b_readout = (None if y is None else y.bfloat16() for y in (w_readout, b_readout))
    features = x.shape[-1]
    feeds = None if w_readout is None else F.linear(x, w_readout[:, :features], b_readout)
    gates = F.linear(x, w_input[:, :features])
    return Ahead(gates.float(), None if feeds is None else feeds.float()) if half else Ahead(gates, feeds)


class Kept(NamedTuple):
    """What the operator of the forward pass returns first; gates and inner states of each layer follow. What was not
    asked for has no elements."""

    output: Tensor
    contexts: Tensor
    weights: Tensor
    """After dropout; of a past ``wide`` in their place."""
    wide: Tensor
    """Before dropout."""
    hidden: Tensor
    cell: Tensor
    cumulative: Tensor
    queries: Tensor
    symbols: Tensor
    scores: Tensor


KEPT = len(Kept._fields)


class Found(NamedTuple):
    """What the operator of the backward pass returns first: gradients of all steps, and of what was there before."""

    contexts: Tensor
    feeds: Tensor
    queries: Tensor
    scores: Tensor
    taken: Tensor
    """What the values' gradient takes of each context's; without dropout a past's are its weights."""
    hidden: Tensor
    cell: Tensor
    context: Tensor
    feed: Tensor
    biases: Tensor
    """(L, 4 S), by gate; of a gated unit the projected candidate, reset, update, candidate."""


class OfPast(NamedTuple):
    """And last, where a score sees its past."""

    key: Tensor
    score_weight: Tensor
    filters: Tensor
    projection: Tensor
    past: Tensor
    cumulative: Tensor
