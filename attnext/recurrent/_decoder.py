"""A decoder over whole sequences, or one of its steps, as one operator forward and one backward.

The operators go through the steps: attention, layers and output vector. What is a product over all steps is made here,
before the first step (what the inputs add) or after the last (gradients of matrices, keys and values).

Rows are hypotheses: N is B, or B times the beam. Tensors of all steps have the steps first.
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
from attnext.steps import Shared, gradient_of_values, gradients_of_keys, is_batch

__all__ = ["Ahead", "Layer", "Output", "Ready", "Results", "Start", "Weights", "decode", "without_autocast"]

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
_CHOOSING = "Tensor? w_output, Tensor? b_output, Tensor? table_gates, Tensor? table_feeds, Tensor? previous, int first"
_NO_CHOICE = (None, None, None, 0)
_SCHEMA = (
    f"(Tensor(a!) gates, Tensor(b!)? feeds, {_INPUTS}, Tensor? packed, {_CHOOSING}, {_OPTIONS}, bool projected, "
    "bool need_weights, bool keep) -> Tensor[]"
)
_INCOMING = ", ".join(f"Tensor? grad_{name}" for name in ("output", "contexts", "weights", "hidden", "cell", "feeds"))
_BACKWARD_SCHEMA = f"({_INCOMING}, Tensor[] kept, Tensor gates, Tensor? feeds, {_INPUTS}, {_OPTIONS}) -> Tensor[]"


def _not_in_graphs(*_: Any) -> Any:
    raise RuntimeError("attnext's decoder operators are not for graphs: the modules run their steps one by one there")


_forward: Callable[..., list[Tensor]] = define("attentive_decoder_cpu", _SCHEMA, _not_in_graphs)
_backward: Callable[..., list[Tensor]] = define("attentive_decoder_backward_cpu", _BACKWARD_SCHEMA, _not_in_graphs)
_pack: Callable[..., Tensor] = define(
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


class _Call(NamedTuple):
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
        return _options(self.parts, self.after, self.feeds_vector)


class _Inputs(NamedTuple):
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
    def of(cls, tensors: Sequence[Any]) -> _Inputs:
        """From one row of them, the layers' last."""
        ends = range(_FIXED, len(tensors), 4)
        return cls._make((*tensors[:_FIXED], tuple(Layer._make(tensors[k : k + 4]) for k in ends)))

    def flat(self) -> tuple[Tensor | None, ...]:
        return *self[:-1], *(x for layer in self.layers for x in layer)

    @property
    def features(self) -> int:
        """E."""
        return self.x.shape[2]

    def of_operator(self, call: _Call) -> tuple[Any, ...]:
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


_FIXED = len(_Inputs._fields) - 1


def _options(parts: StepParts, after: bool, feeds_vector: bool) -> tuple[Any, ...]:
    return parts.scale, parts.dropout, SCORES.index(parts.score), RULES.index(parts.rule), after, feeds_vector


def without_autocast() -> AbstractContextManager[Any]:
    """Products as they stand, whatever autocast the backward pass is run in."""
    return torch.autocast("cpu", enabled=False) if _checks.autocasts("cpu") else nullcontext()


class _Decoder(torch.autograd.Function):
    """The operators, and the products over all steps around them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _Inputs.of(tensors)
        steps, rows, features = inputs.x.shape
        of_input = inputs.layers[0].w_input, inputs.w_readout, inputs.b_readout
        gates, feeds = _ahead(inputs.x.view(steps * rows, features), *of_input, call.half)
        gates, feeds = gates.view(steps, rows, -1), None if feeds is None else feeds.view(steps, rows, -1)
        others = (None, None, None, *_NO_CHOICE, *call.options, False, call.need_weights, call.keep)
        kept = _forward(gates, feeds, *inputs.of_operator(call), *others)
        kept[_KEPT] = gates
        found = _Kept._make(kept[:_KEPT])
        ctx.call, ctx.count = call, len(tensors)
        ctx.save_for_backward(*tensors, feeds, *kept)
        ctx.set_materialize_grads(False)
        shown = None
        if call.need_weights:
            shown = found.weights if found.weights.numel() or not found.wide.numel() else found.wide
        cell = None if inputs.cell is None else found.cell
        return found.output, found.contexts, shown, found.hidden, cell, feeds

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, feeds, kept = _Inputs.of(saved[: ctx.count]), saved[ctx.count], list(saved[ctx.count + 1 :])
        if all(grad is None for grad in incoming):
            return (None,) * len(ctx.needs_input_grad)
        if is_batch(*incoming):
            raise RuntimeError(
                "attnext's decoder kernels take one gradient at a time: for a batch of them run the decoder inside "
                "attnext.use_backend('reference')"
            )
        needs = _Inputs.of(ctx.needs_input_grad[1:])
        with torch.no_grad(), without_autocast():
            grads: Sequence[Tensor | None] = _Gradients(ctx.call, inputs, feeds, kept, incoming).all(needs)
        if torch.is_grad_enabled():
            followed = [x for x in (*incoming, *inputs.flat()) if x is not None and x.requires_grad]
            return None, *(None if x is None else _once(x, *followed) for x in grads)
        return None, *grads


class Ahead(NamedTuple):
    """What inputs (..., E) add to the lowest layer's gates, biases aside, and to the output vector."""

    gates: Tensor
    feeds: Tensor | None


def _ahead(x: Tensor, w_input: Tensor, w_readout: Tensor | None, b_readout: Tensor | None, half: bool = False) -> Ahead:
    if half:
        x, w_input = x.bfloat16(), w_input.bfloat16()
        w_readout, b_readout = (None if y is None else y.bfloat16() for y in (w_readout, b_readout))
    features = x.shape[-1]
    feeds = None if w_readout is None else F.linear(x, w_readout[:, :features], b_readout)
    gates = F.linear(x, w_input[:, :features])
    return Ahead(gates.float(), None if feeds is None else feeds.float()) if half else Ahead(gates, feeds)


class _Once(torch.autograd.Function):
    """A gradient that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_followed: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "attnext's decoder kernels have no second derivative: run it inside attnext.use_backend('reference'), "
            "which follows autograd to any order"
        )


# As mypy sees them: torch's apply has no types.
_applied: Callable[..., tuple[Any, ...]] = _Decoder.apply
_once: Callable[..., Tensor] = _Once.apply


class _Kept(NamedTuple):
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


class _Found(NamedTuple):
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


class _OfPast(NamedTuple):
    """And last, where a score sees its past."""

    key: Tensor
    score_weight: Tensor
    filters: Tensor
    projection: Tensor
    past: Tensor
    cumulative: Tensor


_FOUND, _KEPT = len(_Found._fields), len(_Kept._fields)


class _Gradients:
    """From what the steps' backward pass has found, the gradients of all inputs."""

    def __init__(
        self, call: _Call, inputs: _Inputs, feeds: Tensor | None, kept: list[Tensor], incoming: Sequence[Tensor | None]
    ) -> None:
        self._call, self._inputs, self._feeds = call, inputs, feeds
        self._kept, self._inner = _Kept._make(kept[:_KEPT]), kept[_KEPT + 1 :: 2]
        found = _backward(*incoming, kept, kept[_KEPT], feeds, *inputs.of_operator(call), *call.options)
        self._found = _Found._make(found[:_FOUND])
        ends = _FOUND + 2 * len(inputs.layers)
        self._gates = [self._factor(x) for x in found[_FOUND:ends:2]]
        self._states = [self._factor(x) for x in found[_FOUND + 1 : ends : 2]]
        self._past = _OfPast._make(found[ends:]) if call.parts.score == "past" else None

    def _factor(self, x: Tensor) -> Tensor:
        """As products take it."""
        return x.bfloat16() if self._call.half else x

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Of two factors, in the parameters' dtype."""
        if not self._call.half:
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        return torch.mm(a, b).float() if out is None else out.copy_(torch.mm(a, b))

    def all(self, needs: _Inputs) -> tuple[Tensor | None, ...]:
        """Of all inputs; those that need none may be left out."""
        inputs, found, past = self._inputs, self._found, self._past
        asked = needs.key or needs.value or needs.score_weight
        key, value, score_weight = self._of_memory() if asked else (None, None, None)
        rows_of_query, there = found.queries.flatten(0, 1), _there
        return _Inputs(
            x=self._of_x() if needs.x else None,  # type: ignore[arg-type]
            hidden=found.hidden,
            cell=there(inputs.cell, found.cell),
            context=there(inputs.context, found.context),
            feed=there(inputs.feed, found.feed),
            past=there(inputs.past, past and past.past),
            cumulative=there(inputs.cumulative, past and past.cumulative),
            key=key,  # type: ignore[arg-type]
            value=value,
            score_weight=score_weight,
            filters=past and past.filters,
            projection=there(inputs.projection, past and past.projection),
            w_query=self._product(self._factor(rows_of_query).t(), self._asked()) if needs.w_query else None,
            b_query=rows_of_query.sum(0) if needs.b_query else None,
            w_readout=self._of_readout() if needs.w_readout else None,
            b_readout=found.feeds.flatten(0, 1).sum(0) if needs.b_readout else None,
            layers=tuple(self._of_layer(k, needs.layers[k]) for k in range(len(inputs.layers))),
        ).flat()

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
        return Layer(
            w_input,  # type: ignore[arg-type]
            self._of_hidden(k) if needs.w_hidden else None,  # type: ignore[arg-type]
            _there(layer.b_input, biases[4 * size - rows :]),
            _there(layer.b_hidden, of_hidden),
        )

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


def decode(
    x: Tensor, start: Start, memory: Memory, weights: Weights, masks: list[Tensor], seeds: Tensor | None,
    need_weights: bool, half: bool,
) -> Results:  # fmt: skip
    """Goes through the steps.

    Args:
        x: (T, N, E) contiguous, in float32 or float64, as all that follows.
        start: what there was before the first step.
        memory: of B sentences.
        weights: the parameters.
        masks: (T, N, S), what each but the topmost layer's states are multiplied with on their way up; or none.
        seeds: (T,) int64, where the attention drops weights.
        half: products over all steps are of bfloat16.
    """
    inputs = _inputs(x, start, memory, weights).flat()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call = _Call(memory, weights.parts, masks, seeds, weights.after, weights.feeds_vector, need_weights, keep, half)
    return Results._make(_applied(call, *inputs))


def _inputs(x: Tensor, start: Start, memory: Memory, weights: Weights) -> _Inputs:
    parts, additive = weights.parts, weights.parts.score != "dot"
    return _Inputs(
        x, start.hidden, start.cell, start.context, start.feed, start.past, start.cumulative,
        memory.key, None if memory.shared and not additive else memory.value, memory.score_weight if additive else None,
        parts.filters, parts.projection, parts.weight, parts.bias, weights.w_readout, weights.b_readout,
        tuple(weights.layers),
    )  # fmt: skip


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
        self._packed = _pack(
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
        self._options = _options(parts, weights.after, weights.feeds_vector)

    def step(self, x: Ahead, start: Start, memory: Memory, need_weights: bool) -> Results:
        """One step, of what its inputs add; results are (1, N, ...)."""
        gates, feeds = x.gates.unsqueeze(0), None if x.feeds is None else x.feeds.unsqueeze(0)
        return self._run(gates, feeds, start, memory, need_weights, _NO_CHOICE)[0]

    def choose(
        self, table: Ahead, previous: Tensor, steps: int, first: int, start: Start, memory: Memory, need_weights: bool
    ) -> Chosen:
        """Steps each of which takes the most likely symbol of the one before, numbers from ``first`` on.

        Args:
            table: (V, ...), what each symbol adds as an input.
            previous: (N,) int64, of the first step.
        """
        rows = previous.shape[0]
        gates = table.gates.new_empty(steps, rows, table.gates.shape[1])
        feeds = None if table.feeds is None else table.feeds.new_empty(steps, rows, table.feeds.shape[1])
        choosing = (table.gates, table.feeds, previous, first)
        results, found = self._run(gates, feeds, start, memory, need_weights, choosing)
        return Chosen(found.symbols, found.scores, results)

    def _run(
        self, gates: Tensor, feeds: Tensor | None, start: Start, memory: Memory, need_weights: bool,
        choosing: tuple[Any, ...],
    ) -> tuple[Results, _Kept]:  # fmt: skip
        taken = self._taken
        if taken is None or taken.memory is not memory:
            taken = self._taken = self._take(start, memory)
        template, values = list(taken.arguments), taken.projected
        template[_START], template[_PAST] = start[:4], start[4:]
        options = (*choosing, *self._options, values > 0, need_weights, False)
        found = _Kept._make(_forward(gates, feeds, *template, self._packed, *self._output, *options)[:_KEPT])
        shown = found.weights if self.parts.score != "past" else found.wide
        contexts = found.contexts[..., values:] if values else found.contexts
        cell = None if start.cell is None else found.cell
        return Results(found.output, contexts, shown, found.hidden, cell, feeds), found

    def ahead(self, x: Tensor) -> Ahead:
        """What inputs (..., E) add."""
        weights = self._weights
        return _ahead(x, weights.layers[0].w_input, weights.w_readout, weights.b_readout)

    def _take(self, start: Start, memory: Memory) -> _Taken:
        """Looks at a memory.

        Of few rows and keys, the values are multiplied once with the matrices that each context would be multiplied
        with: those are what takes the time to read.
        """
        weights, projected = self._weights, 0
        rows, (batch, keys, _), size = start.hidden.shape[1], memory.key.shape, memory.value.shape[2]
        call = _Call(memory, weights.parts, [], None, weights.after, weights.feeds_vector, False, False, False)
        inputs = _inputs(start.hidden.new_empty(0, 0, self._features), start, memory, weights)
        if not weights.after and rows <= _FEW_ROWS and 2 * batch * keys <= size:
            lowest, readout = weights.layers[0].w_input, weights.w_readout
            matrices = [lowest[:, self._features : self._features + size]]
            matrices += [] if readout is None else [readout[:, -size:]]
            value = torch.cat([F.linear(memory.value, matrix) for matrix in matrices] + [memory.value], -1)
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
_START, _PAST = slice(9, 13), slice(22, 24)
"""Where the operators' inputs have what there was before the step."""
