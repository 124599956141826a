"""The gradients of a decoder: what its steps' backward pass finds, and what is made of that at once for all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnext.recurrent import _operators
from attnext.recurrent._operators import KEPT, Call, Found, Inputs, Kept, Layer, OfPast
from attnext.steps import Shared, gradient_of_values, gradients_of_keys

__all__ = ["Gradients"]

_FOUND = len(Found._fields)


class Gradients:
    """From what the steps' backward pass has found, the gradients of all inputs."""

    def __init__(
        self, call: Call, inputs: Inputs, feeds: Tensor | None, kept: list[Tensor], incoming: Sequence[Tensor | None]
    ) -> None:
        self._call, self._inputs, self._feeds = call, inputs, feeds
        self._kept, self._inner = Kept._make(kept[:KEPT]), kept[KEPT + 1 :: 2]
        found = _operators.backward(*incoming, kept, kept[KEPT], feeds, *inputs.of_operator(call), *call.options)
        self._found = Found._make(found[:_FOUND])
        ends = _FOUND + 2 * len(inputs.layers)
        self._gates = [self._factor(x) for x in found[_FOUND:ends:2]]
        self._states = [self._factor(x) for x in found[_FOUND + 1 : ends : 2]]
        self._past = OfPast._make(found[ends:]) if call.parts.score == "past" else None

    def _factor(self, x: Tensor) -> Tensor:
        """As products take it."""
        return x.bfloat16() if self._call.half else x

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Of two factors, in the parameters' dtype."""
        if not self._call.half:
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        return torch.mm(a, b).float() if out is None else out.copy_(torch.mm(a, b))

    def all(self, needs: Inputs) -> tuple[Tensor | None, ...]:
        """Of all inputs; those that need none may be left out."""
        inputs, found, past = self._inputs, self._found, self._past
        asked = needs.key or needs.value or needs.score_weight
        key, value, score_weight = self._of_memory() if asked else (None, None, None)
        rows_of_query, there = found.queries.flatten(0, 1), _there
        of_inputs: dict[str, Any] = {
            "x": self._of_x() if needs.x else None,
            "hidden": found.hidden,
            "cell": there(inputs.cell, found.cell),
            "context": there(inputs.context, found.context),
            "feed": there(inputs.feed, found.feed),
            "past": there(inputs.past, past and past.past),
            "cumulative": there(inputs.cumulative, past and past.cumulative),
            "key": key,
            "value": value,
            "score_weight": score_weight,
            "filters": past and past.filters,
            "projection": there(inputs.projection, past and past.projection),
            "w_query": self._product(self._factor(rows_of_query).t(), self._asked()) if needs.w_query else None,
            "b_query": rows_of_query.sum(0) if needs.b_query else None,
            "w_readout": self._of_readout() if needs.w_readout else None,
            "b_readout": found.feeds.flatten(0, 1).sum(0) if needs.b_readout else None,
            "layers": tuple(self._of_layer(k, needs.layers[k]) for k in range(len(inputs.layers))),
        }
        return Inputs(**of_inputs).flat()

    def _of_input(self, k: int) -> Tensor:
        """The gradients of what inputs add to a layer's gates."""
        gates = self._gates[k]
        return gates[:, gates.shape[1] - self._inputs.layers[k].w_hidden.shape[0] :]

    def _asked(self) -> Tensor:
        """The states that were made into queries, (T N, S)."""
        return self._factor(self._kept.output.flatten(0, 1)) if self._call.after else self._states[-1]

    def _of_x(self) -> Tensor:
        inputs = self._inputs
        grad = self._product(self._of_input(0), self._factor(inputs.layers[0].w_input[:, : inputs.features]))
        if inputs.w_readout is not None:
            grad.addmm_(self._found.feeds.flatten(0, 1), inputs.w_readout[:, : inputs.features])
        return grad.view(inputs.x.shape)

    def _of_layer(self, k: int, needs: Layer) -> Layer:
        layer, biases = self._inputs.layers[k], self._found.biases[k]
        rows, size = layer.w_hidden.shape
        w_input = None
        if needs.w_input:
            w_input = self._of_lowest() if k == 0 else self._product(self._of_input(k).t(), self._below(k))
        of_hidden = torch.cat((biases[size : 3 * size], biases[:size])) if rows == 3 * size else biases
        biases_of = _there(layer.b_input, biases[4 * size - rows :]), _there(layer.b_hidden, of_hidden)
        return Layer._make((w_input, self._of_hidden(k) if needs.w_hidden else None, *biases_of))

    def _of_hidden(self, k: int) -> Tensor:
        """Of a layer's matrix of states."""
        gates, states, matrix = self._gates[k], self._states[k], self._inputs.layers[k].w_hidden
        rows, size = matrix.shape
        if rows == 4 * size:
            return self._product(gates.t(), states)
        # Of a gated unit the state's candidate comes first, and is the matrix' last.
        found = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        self._product(gates[:, size : 3 * size].t(), states, found[: 2 * size])
        self._product(gates[:, :size].t(), states, found[2 * size :])
        return found

    def _of_lowest(self) -> Tensor:
        """Of the lowest layer's matrix: columns of the inputs, of the context and of the output vector."""
        inputs, grads, contexts = self._inputs, self._of_input(0), self._kept.contexts
        weight = torch.empty_like(inputs.layers[0].w_input, memory_format=torch.contiguous_format)
        features, feeds = inputs.features, 0 if inputs.feed is None else inputs.feed.shape[1]
        self._product(grads.t(), self._factor(inputs.x.flatten(0, 1)), weight[:, :features])
        end = weight.shape[1] - feeds
        if end > features:
            self._of_fed(contexts, inputs.context, weight[:, features:end])
        if inputs.feed is not None and self._feeds is not None:
            self._of_fed(self._feeds, inputs.feed, weight[:, end:])
        return weight

    def _of_fed(self, x: Tensor, first: Tensor | None, out: Tensor) -> None:
        """The product with rows (T, N, I) that entered their own step, or the one after, and the first one others."""
        grads = self._of_input(0)
        if first is None:
            self._product(grads.t(), self._factor(x.flatten(0, 1)), out)
            return
        rows = torch.cat((first.unsqueeze(0), x[:-1])).flatten(0, 1)
        self._product(grads.t(), self._factor(rows), out)

    def _below(self, k: int) -> Tensor:
        """What a layer took of the one below, (T N, S)."""
        hidden = self._inner[k - 1][:, self._inputs.hidden.shape[2] :]
        return self._factor(hidden * self._call.masks[k - 1].flatten(0, 1) if self._call.masks else hidden)

    def _of_readout(self) -> Tensor:
        inputs, output, contexts = self._inputs, self._kept.output, self._kept.contexts
        rows = torch.cat([x.flatten(0, 1) for x in (inputs.x, output, contexts)], 1)
        return self._found.feeds.flatten(0, 1).t() @ rows

    def _of_memory(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of key, value and score weight, as of one call with the queries of all steps."""
        inputs, found, call = self._inputs, self._found, self._call
        batch = inputs.key.shape[0]
        taken = found.taken if found.taken.numel() else self._kept.wide
        incoming, weights = _by_sentence(found.contexts, batch), _by_sentence(taken, batch)
        shared = Shared(None, call.memory.lengths, call.memory.mask, call.parts.scale)
        of_value = gradient_of_values(inputs.key, shared, weights, incoming)
        if self._past is not None:
            return self._past.key, of_value, self._past.score_weight
        queries = self._kept.queries
        if inputs.w_query is None:
            output, first = self._kept.output, inputs.hidden[-1:]
            queries = output if call.after else torch.cat((first, output[:-1]))
        of_key, of_score_weight = gradients_of_keys(
            _by_sentence(queries, batch), _by_sentence(found.scores, batch), inputs.key, inputs.score_weight, shared
        )
        if inputs.value is None:
            return of_key + of_value, None, None
        return of_key, of_value, of_score_weight


def _there(x: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if x is None else grad


def _by_sentence(x: Tensor, batch: int) -> Tensor:
    """(T, N, ...) as (B, T Q, ...), of Q hypotheses each."""
    steps, rows, size = x.shape
    return x.view(steps, batch, rows // batch, size).transpose(0, 1).reshape(batch, -1, size)
