"""The reference model as one writes it with torch's own layers and cells, and attention in plain operations.

It has the parameters of a :class:`attnext.seq2seq.Seq2Seq`, is called as that is, and :func:`attnext.seq2seq.search`
searches with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext.attention.location import LocationSensitiveAttention
from attnext.recurrent.opened import likeliest
from attnext.seq2seq.model import Seq2Seq

__all__ = ["EagerModel"]


class _Memory(NamedTuple):
    """Encoder states (B, Tx, H), their keys (B, Tx, D), and where there are none (B, Tx)."""

    states: Tensor
    keys: Tensor
    hidden_slots: Tensor

    def select(self, rows: Tensor) -> _Memory:
        return _Memory(*(x[rows] for x in self))


class _State(NamedTuple):
    """(B, ...) or (B, beam, ...): the layer's, and of location-sensitive attention the last weights and their sum."""

    hidden: Tensor
    cell: Tensor | None
    weights: Tensor | None
    total: Tensor | None

    def select(self, indices: Tensor) -> _State:
        def take(x: Tensor) -> Tensor:
            if indices.dim() == 1:
                return x[indices]
            return x.gather(1, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))

        found: Any = (None if x is None else take(x) for x in self)
        return _State(*found)

    def one_hypothesis(self) -> _State:
        found: Any = (None if x is None else x.unsqueeze(1) for x in self)
        return _State(*found)


class _Parameters(NamedTuple):
    """Of the decoder's step."""

    projection: Tensor
    v: Tensor
    convolution: Tensor | None
    location: Tensor | None
    w_input: Tensor
    w_hidden: Tensor
    b_input: Tensor
    b_hidden: Tensor


class EagerModel(nn.Module):
    """A model of one decoder layer without input feeding, with additive or location-sensitive attention.

    Args:
        model: whose parameters it has.
        compiled: whether its step is compiled.
    """

    def __init__(self, model: Seq2Seq, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.config, self.encoder = model, model.config, _with_torchs_layers(model.encoder)
        self._step: Callable[..., Any] = torch.compile(_step, fullgraph=True, dynamic=False) if compiled else _step

    @property
    def decoder(self) -> EagerModel:
        """What a search opens."""
        return self

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[_Memory, _State]:
        decoder: Any = self.model.decoder
        states, last = self.encoder(source, lengths)
        first, attention = decoder.first_state(last), decoder.recurrent.attention
        hidden_slots = torch.arange(source.shape[1]) >= lengths.unsqueeze(1)
        nothing = None
        if isinstance(attention, LocationSensitiveAttention):
            nothing = states.new_zeros(source.shape)
        cell = None if first.cell is None else first.cell[0]
        memory = _Memory(states, attention.memory_projection(states), hidden_slots)
        return memory, _State(first.hidden[0], cell, nothing, nothing)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        decoder: Any = self.model.decoder
        (memory, state), parameters = self.encode(source, lengths), self._parameters_of_step()
        embedded = decoder.embed(previous)
        outputs, contexts = [], []
        for y in embedded.unbind(1):
            context, _, state = self._step(y, state, memory, parameters)
            outputs.append(state.hidden)
            contexts.append(context)
        return self._logits(embedded, torch.stack(outputs, 1), torch.stack(contexts, 1))

    def opened(self) -> _Opened:
        """The steps of searches."""
        return _Opened(self)

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        decoder: Any = self.model.decoder
        logits: Tensor = decoder.logits(decoder.recurrent.readout(torch.cat((embedded, hidden, context), -1)).tanh())
        return logits

    def _parameters_of_step(self) -> _Parameters:
        layer: Any = self.model.decoder.recurrent
        attention, convolution, location = layer.attention, None, None
        if isinstance(attention, LocationSensitiveAttention):
            convolution, location = attention.location_convolution.weight, attention.location_projection.weight
        return _Parameters(
            attention.query_projection.weight, attention.score_weight, convolution, location,
            layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0,
        )  # fmt: skip


class _Opened:
    """Its steps, as a search takes them."""

    def __init__(self, model: EagerModel) -> None:
        self._model, self._parameters = model, model._parameters_of_step()

    def __call__(
        self, previous: Tensor, state: _State, memory: _Memory, *, need_weights: bool = False
    ) -> tuple[Tensor, _State, Tensor | None]:
        decoder: Any = self._model.model.decoder
        embedded = decoder.embed(previous)
        context, weights, state = self._model._step(embedded, state, memory, self._parameters)
        return self._model._logits(embedded, state.hidden, context), state, weights if need_weights else None

    def greedy(
        self, previous: Tensor, state: _State, memory: _Memory, steps: int, end: int, need_weights: bool
    ) -> tuple[Tensor, Tensor, _State | None, Tensor | None]:
        step = partial(self, memory=memory, need_weights=need_weights)
        return likeliest(step, previous, state, steps, end, end)


def _with_torchs_layers(encoder: nn.Module) -> nn.Module:
    """The same encoder, of the same parameters, whose recurrent layers are torch's own."""
    found = copy.copy(encoder)
    recurrent: Any = copy.copy(encoder.recurrent)
    recurrent.__class__ = nn.LSTM if recurrent.mode == "LSTM" else nn.GRU
    found._modules = dict(encoder._modules) | {"recurrent": recurrent}
    return found


def _step(y: Tensor, state: _State, memory: _Memory, parameters: _Parameters) -> tuple[Tensor, Tensor, _State]:
    """Context, weights and next state."""
    context, weights, total = _attend(state, memory, parameters)
    hidden, cell = _cell(torch.cat((y, context), -1), state, parameters)
    return context, weights, _State(hidden, cell, None if total is None else weights, total)


def _attend(state: _State, memory: _Memory, parameters: _Parameters) -> tuple[Tensor, Tensor, Tensor | None]:
    states, keys, hidden_slots = memory
    if state.hidden.dim() == 3:  # hypotheses
        keys, hidden_slots = keys.unsqueeze(1), hidden_slots.unsqueeze(1)
    sums = F.linear(state.hidden, parameters.projection).unsqueeze(-2) + keys
    if state.weights is not None and state.total is not None and parameters.convolution is not None:
        past = torch.stack((state.weights, state.total), -2)
        width = parameters.convolution.shape[2]
        features = F.conv1d(past.flatten(0, -3), parameters.convolution, padding=width // 2).mT
        assert parameters.location is not None
        sums = sums + F.linear(features, parameters.location).view(sums.shape)
    scores = torch.tanh(sums) @ parameters.v
    weights = scores.masked_fill(hidden_slots, float("-inf")).softmax(-1)
    context = weights @ states if weights.dim() == 3 else (weights.unsqueeze(1) @ states).squeeze(1)
    return context, weights, None if state.total is None else state.total + weights


def _cell(x: Tensor, state: _State, parameters: _Parameters) -> tuple[Tensor, Tensor | None]:
    shape, weights = state.hidden.shape, parameters[4:]
    flat, hidden = x.flatten(0, -2), state.hidden.flatten(0, -2)
    if state.cell is None:
        return torch.gru_cell(flat, hidden, *weights).view(shape), None
    hidden, cell = torch.lstm_cell(flat, (hidden, state.cell.flatten(0, -2)), *weights)
    return hidden.view(shape), cell.view(shape)
