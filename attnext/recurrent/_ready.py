"""The steps of a search by the operator: matrices packed once, and what stays the same looked at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnext.memory import Memory
from attnext.recurrent import _operators
from attnext.recurrent._operators import (
    KEPT,
    NO_CHOICE,
    Ahead,
    Call,
    Kept,
    Layer,
    Results,
    Start,
    Weights,
    ahead_of,
    inputs_of,
    options_of,
)

__all__ = ["Output", "Ready"]


class Output(NamedTuple):
    """The layer that gives logits of V symbols: (V, R), or (V, S) without an output vector, and (V,)."""

    weight: Tensor
    bias: Tensor | None


class Chosen(NamedTuple):
    """What steps have chosen: numbers and their log-probabilities (T, N), and the results of those steps."""

    symbols: Tensor
    scores: Tensor
    results: Results


class Ready:
    """The steps of a search, without gradients: the matrices are packed once, and what stays the same from step to step
    is looked at once for a memory.

    Args:
        weights: the parameters, which may change afterwards: what is not packed is copied.
        features, values: E and H.
        output: of the logits, for steps that choose.
    """

    def __init__(self, weights: Weights, features: int, values: int, output: Output | None) -> None:
        weights = _copied(weights)
        self.parts = weights.parts
        self._weights, self._features = weights, features
        self._output = (None, None) if output is None else (output.weight, _copy(output.bias))
        self._taken: _Taken | None = None
        lowest, readout, parts = weights.layers[0], weights.w_readout, weights.parts
        outer, lstm = lowest.w_input[:, features:], lowest.w_hidden.shape[0] == 4 * lowest.w_hidden.shape[1]
        self._packed = _operators.pack(
            [x.w_hidden for x in weights.layers],
            [x.w_input for x in weights.layers[1:]],
            outer if outer.shape[1] else None,
            parts.weight,
            None if readout is None else readout[:, features:],
            self._output[0],
            values,
            lstm,
            weights.after,
            weights.feeds_vector,
        )
        self._options = options_of(parts, weights.after, weights.feeds_vector)
        of_context = [lowest.w_input[:, features : features + values]]
        of_context += [] if readout is None else [readout[:, -values:]]
        self._of_context = None if weights.after else torch.cat(of_context)

    def step(self, x: Ahead, start: Start, memory: Memory, need_weights: bool) -> Results:
        """One step, of what its inputs add; results are (1, N, ...)."""
        gates, feeds = x.gates.unsqueeze(0), None if x.feeds is None else x.feeds.unsqueeze(0)
        return self._run(gates, feeds, start, memory, need_weights, NO_CHOICE)[0]

    def choose(
        self, table: Ahead, previous: Tensor, steps: int, first: int, end: int, start: Start, memory: Memory,
        need_weights: bool,
    ) -> Chosen:  # fmt: skip
        """Steps each of which takes the most likely symbol of the one before, numbers from ``first`` on.

        Args:
            table: (V, ...), what each symbol adds as an input.
            previous: (N,) int64, of the first step.
            end: what a row that has chosen it has from then on; -1 for none. When all have, no step follows, and of the
                results only weights are there.
        """
        rows = previous.shape[0]
        gates = table.gates.new_empty(steps, rows, table.gates.shape[1])
        feeds = None if table.feeds is None else table.feeds.new_empty(steps, rows, table.feeds.shape[1])
        choosing = (table.gates, table.feeds, previous, first, end)
        results, found = self._run(gates, feeds, start, memory, need_weights, choosing)
        return Chosen(found.symbols, found.scores, results)

    def _run(
        self, gates: Tensor, feeds: Tensor | None, start: Start, memory: Memory, need_weights: bool,
        choosing: tuple[Any, ...],
    ) -> tuple[Results, Kept]:  # fmt: skip
        taken = self._taken
        if taken is None or taken.memory is not memory:
            taken = self._taken = self._take(start, memory)
        template, values = list(taken.arguments), taken.projected
        template[_START], template[_PAST] = start[:4], start[4:]
        options = (*choosing, *self._options, values > 0, need_weights, False)
        found = Kept._make(_operators.forward(gates, feeds, *template, self._packed, *self._output, *options)[:KEPT])
        shown = found.weights if self.parts.score != "past" else found.wide
        contexts = found.contexts[..., values:] if values else found.contexts
        cell = None if start.cell is None else found.cell
        return Results(found.output, contexts, shown, found.hidden, cell, feeds), found

    def ahead(self, x: Tensor) -> Ahead:
        """What inputs (..., E) add."""
        weights = self._weights
        return ahead_of(x, weights.layers[0].w_input, weights.w_readout, weights.b_readout)

    def _take(self, start: Start, memory: Memory) -> _Taken:
        """Looks at a memory.

        Of few rows and keys, the values are multiplied once with the matrices that each context would be multiplied
        with: those are what takes the time to read.
        """
        weights, projected = self._weights, 0
        rows, (batch, keys, _), size = start.hidden.shape[1], memory.key.shape, memory.value.shape[2]
        call = Call(memory, weights.parts, [], None, weights.after, weights.feeds_vector, False, False, False)
        inputs = inputs_of(start.hidden.new_empty(0, 0, self._features), start, memory, weights)
        if self._of_context is not None and rows <= _FEW_ROWS and 2 * batch * keys <= size:
            value = memory.value.to(start.hidden.dtype)  # from the half type that it may be held in
            value = torch.cat((F.linear(value, self._of_context), value), -1)
            inputs, projected = inputs._replace(value=value), value.shape[2] - size
        return _Taken(memory, inputs.of_operator(call), projected)


class _Taken(NamedTuple):
    """A memory, the operator's arguments of its steps, and how many columns of its values are products: one piece, that
    a thread may read while another replaces it."""

    memory: Memory
    arguments: tuple[Any, ...]
    projected: int


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()


def _copied(weights: Weights) -> Weights:
    """All that steps read beside the packed matrices."""

    def layer(one: Layer) -> Layer:
        return Layer(one.w_input.detach().clone(), one.w_hidden.detach(), _copy(one.b_input), _copy(one.b_hidden))

    parts = weights.parts
    parts = parts._replace(
        weight=None if parts.weight is None else parts.weight.detach(),
        bias=_copy(parts.bias), filters=_copy(parts.filters), projection=_copy(parts.projection),
    )  # fmt: skip
    return weights._replace(
        layers=[layer(one) for one in weights.layers], w_readout=_copy(weights.w_readout),
        b_readout=_copy(weights.b_readout), parts=parts,
    )  # fmt: skip


_FEW_ROWS = 4
"""For which values are multiplied ahead."""
_START, _PAST = slice(9, 13), slice(22, 24)
"""Where the operators' inputs have what there was before the step."""
