"""PyTorch's own recurrent layers, as encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from attnext.bench.code_bases.program import Program, Sizes


def _gru(s: Sizes) -> nn.Module:
    return nn.GRU(s.states, s.features, batch_first=True, bidirectional=True)


def _lstm(s: Sizes) -> nn.Module:
    return nn.LSTM(s.states, s.features, batch_first=True, bidirectional=True)


def _two_layers(s: Sizes) -> nn.Module:
    return nn.LSTM(s.states, s.features, 2, batch_first=True)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states)]


def _run(layers: Any, s: Sizes, x: Tensor) -> list[Tensor]:
    output, last = layers(x)
    return [output, *_tensors(last)]


def _run_packed(layers: Any, s: Sizes, x: Tensor) -> list[Tensor]:
    output, last = layers(pack_padded_sequence(x, list(s.lengths), batch_first=True, enforce_sorted=False))
    return [output.data, *_tensors(last)]


def _tensors(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


PROGRAMS = [
    Program("nn.GRU of an encoder", _gru, _inputs, _run),
    Program("nn.GRU packed", _gru, _inputs, _run_packed),
    Program("nn.LSTM of an encoder", _lstm, _inputs, _run),
    Program("nn.LSTM packed", _lstm, _inputs, _run_packed),
    Program("nn.LSTM of two layers", _two_layers, _inputs, _run),
]
