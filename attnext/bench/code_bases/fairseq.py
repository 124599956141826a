"""fairseq's attentions, of translation and of speech translation: alone, and in their decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

_LSTM, _BERARD = "fairseq.models.lstm", "fairseq.models.speech_to_text.berard"


class Words:
    """As much of a dictionary as the decoders ask for."""

    def __len__(self) -> int:
        return 11

    def pad(self) -> int:
        return 1


def _luong(bias: bool) -> Any:
    return lambda s: load("fairseq", _LSTM).AttentionLayer(s.query, s.states, s.features, bias)


def _mlp(s: Sizes) -> Any:
    return load("fairseq", _BERARD).MLPAttention(s.query, s.states, s.features)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.keys, s.batch, s.states), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _mask(s: Sizes) -> Tensor:
    return torch.arange(s.keys).unsqueeze(1) >= torch.tensor(s.lengths)


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states, None)]


def _with_mask(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states, _mask(s))]


def _lstm_decoder(s: Sizes) -> Any:
    decoder = load("fairseq", _LSTM).LSTMDecoder
    return decoder(Words(), 3, s.features, s.features, 2, 0.0, 0.0, True, s.states)


def _berard_decoder(s: Sizes) -> Any:
    decoder = load("fairseq", _BERARD).LSTMDecoder  # whose first hidden state is a mean of states
    return decoder(Words(), s.states, 2, s.states, 0.0, s.states, s.features, 5)


def _states(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.keys, s.batch, s.states), draw(2, s.batch, s.states), draw(2, s.batch, s.states)]


def _letters(s: Sizes) -> Tensor:
    return torch.arange(s.batch * s.steps).view(s.batch, s.steps) % 11


def _decode(hides: bool) -> Any:
    """All letters at once, then one after another, as a search does."""

    def run(decoder: Any, s: Sizes, *states: Tensor) -> list[Tensor]:
        encoded, letters = (*states, _mask(s) if hides else None), _letters(s)
        scores, weights = decoder(letters, encoded)
        kept: dict[str, Any] = {}
        steps = [decoder(letters[:, : k + 1], encoded, kept)[0] for k in range(s.steps)]
        return [scores, *steps] if weights is None else [scores, weights, *steps]

    return run


def _decode_speech(hides: bool) -> Any:
    def run(decoder: Any, s: Sizes, states: Tensor, *_: Tensor) -> list[Tensor]:
        encoded = {"encoder_out": states, "encoder_padding_mask": _mask(s) if hides else None}
        kept: dict[str, Any] = {}
        steps = [decoder(_letters(s)[:, : k + 1], encoded, kept)[0] for k in range(s.steps)]
        return [decoder(_letters(s), encoded)[0], *steps]

    return run


_FLOAT: dict[str, Any] = {"exact": torch.float32}  # in which the originals hide keys
PROGRAMS = [
    Program("fairseq.AttentionLayer", _luong(False), _inputs, _run),
    Program("fairseq.AttentionLayer with a bias and a mask", _luong(True), _inputs, _with_mask, **_FLOAT),
    Program("fairseq.MLPAttention", _mlp, _inputs, _run),
    Program("fairseq.MLPAttention with a mask", _mlp, _inputs, _with_mask, **_FLOAT),
    loop("fairseq.LSTMDecoder", "of translation", _lstm_decoder, _states, _decode(False)),
    loop("fairseq.LSTMDecoder", "of translation with a mask", _lstm_decoder, _states, _decode(True), **_FLOAT),
    loop("fairseq.LSTMDecoder", "of speech", _berard_decoder, _states, _decode_speech(False)),
    loop("fairseq.LSTMDecoder", "of speech with a mask", _berard_decoder, _states, _decode_speech(True), **_FLOAT),
]
