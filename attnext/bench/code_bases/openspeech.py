"""Openspeech's attentions, and its recurrent decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

LETTERS = 9


def _load(file: str) -> Any:
    return load("openspeech-core", f"openspeech.{file}")


def _additive(s: Sizes) -> Any:
    return _load("modules.additive_attention").AdditiveAttention(s.states)


def _located(**options: Any) -> Any:
    def make(s: Sizes) -> Any:
        attend = _load("modules.location_aware_attention").LocationAwareAttention(s.states, s.features, **options)
        nn.init.constant_(attend.fc.linear.bias, 0.3)
        return attend

    return make


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, 1, s.states) for _ in range(s.steps))]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states, states * 0.5)]


def _locate(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    found, past = [], None
    for query in queries:
        context, past = attend(query, states, past)
        found += [context, past]
    return found


def _decoder(mechanism: str) -> Any:
    def make(s: Sizes) -> Any:
        kind = _load("decoders.lstm_attention_decoder").LSTMAttentionDecoder
        options = {"attn_mechanism": mechanism, "num_layers": 1, "dropout_p": 0.0, "max_length": s.steps}
        return kind(LETTERS, hidden_state_dim=s.states, **options)

    return make


def _of_decoder(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states)]


def _decode(decoder: Any, s: Sizes, states: Tensor) -> list[Tensor]:
    letters = 3 + torch.arange(s.batch * s.steps).view(s.batch, -1) % 6
    return [decoder(states, letters), decoder(encoder_outputs=states * 0.5, teacher_forcing_ratio=0.0)]


PROGRAMS = [
    Program("openspeech.AdditiveAttention", _additive, _inputs, _run, ("score_proj.linear.bias",)),
    Program("openspeech.LocationAwareAttention", _located(), _inputs, _locate, ("fc.linear.bias",)),
    Program("openspeech.LocationAwareAttention smoothed", _located(smoothing=True), _inputs, _locate),
    loop("openspeech.LSTMAttentionDecoder", "additive", _decoder("additive"), _of_decoder, _decode,
         "attention.score_proj.linear.bias"),
    loop("openspeech.LSTMAttentionDecoder", "with filters", _decoder("loc"), _of_decoder, _decode,
         "attention.fc.linear.bias"),
]  # fmt: skip
