"""JoeyNMT's attentions: alone, and in its recurrent decoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def _bahdanau(s: Sizes) -> Any:
    attention = load("joeynmt", "joeynmt.attention").BahdanauAttention
    return attention(s.features, s.states, s.query)


def _luong(s: Sizes) -> Any:
    return load("joeynmt", "joeynmt.attention").LuongAttention(s.query, s.states)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, 1, s.query) for _ in range(s.steps))]


def _mask(s: Sizes) -> Tensor:
    return (torch.arange(s.keys) < torch.tensor(s.lengths).unsqueeze(1)).unsqueeze(1)


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Of a sentence, then of a part of it, with another mask and values that are not the keys."""
    attend.compute_proj_keys(states)
    found = [x for query in queries for x in attend(query=query, mask=_mask(s), values=states)]
    attend.compute_proj_keys(keys=states[:1])
    return [*found, *attend(queries[0][:1], torch.ones(1, 1, s.keys, dtype=torch.int64), 2 * states[:1])]


def _decoder(attention: str, rnn: str, feeds: bool) -> Any:
    def make(s: Sizes) -> nn.Module:
        decoder = load("joeynmt", "joeynmt.decoders").RecurrentDecoder
        encoder = SimpleNamespace(output_size=s.states)
        made: nn.Module = decoder(rnn, 3, s.features, encoder, attention, 2, 11, input_feeding=feeds)
        return made

    return make


def _decoder_inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), draw(s.batch, s.states), draw(s.batch, s.steps, 3)]


def _decode(decoder: Any, s: Sizes, states: Tensor, last: Tensor, words: Tensor) -> list[Tensor]:
    """All steps of a sentence, and one more, as a search goes on."""
    outputs, hidden, weights, vectors = decoder(words, states, last, _mask(s), s.steps)
    more = decoder(words[:, :1], states, None, _mask(s), 1, hidden, vectors[:, -1:])
    return [outputs, weights, vectors, more[0], more[2]]


PROGRAMS = [
    Program("joeynmt.BahdanauAttention", _bahdanau, _inputs, _run),
    Program("joeynmt.LuongAttention", _luong, _inputs, _run),
    Program("joeynmt.BahdanauAttention in a decoder", _decoder("bahdanau", "gru", True), _decoder_inputs, _decode,
            takes_half=False),
    loop("joeynmt.RecurrentDecoder", "bahdanau", _decoder("bahdanau", "gru", True), _decoder_inputs, _decode),
    loop("joeynmt.RecurrentDecoder", "luong", _decoder("luong", "lstm", False), _decoder_inputs, _decode),
]  # fmt: skip
