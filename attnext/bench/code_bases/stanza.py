"""Stanza's attentions, and its recurrent decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def _class(name: str) -> Any:
    return getattr(load("stanza", "stanza.models.common.seq2seq_modules"), name)


def _attention(name: str) -> Any:
    return lambda s: _class(name)(s.states)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.states) for _ in range(s.steps))]


def _hidden(s: Sizes) -> Tensor:
    return torch.arange(s.keys) >= torch.tensor(s.lengths).unsqueeze(1)


def _scattered(s: Sizes) -> Tensor:
    """Of every row but the first key some are hidden."""
    return torch.arange(s.batch * s.keys).view(s.batch, s.keys) % 3 == 1 if s.keys > 2 else torch.zeros(1, 1) > 0


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states)]


def _masked(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    found = [x for query in queries for x in attend(query, states, mask=_hidden(s))]
    return [*found, *attend(queries[0], states, _scattered(s)), attend(queries[0], states, _hidden(s), attn_only=True)]


def _logarithms(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states, return_logattn=True)]


def _decoder(s: Sizes) -> Any:
    return _class("LSTMAttention")(s.query, s.states)


def _of_decoder(s: Sizes, draw: Any) -> list[Tensor]:
    sizes = (s.batch, s.steps, s.query), (s.batch, s.keys, s.states), (s.batch, s.states), (s.batch, s.states)
    return [draw(*size) for size in sizes]


def _decode(decoder: Any, s: Sizes, letters: Tensor, states: Tensor, *first: Tensor) -> list[Tensor]:
    output, last = decoder(letters, first, states, _hidden(s))
    more, _ = decoder(letters, last, states * 0.5)
    return [output, *last, more]


def _decode_logarithms(decoder: Any, s: Sizes, letters: Tensor, states: Tensor, *first: Tensor) -> list[Tensor]:
    output, last, weights = decoder(letters, first, states, return_logattn=True)
    return [output, *last, weights]


PROGRAMS = [
    Program("stanza.BasicAttention", _attention("BasicAttention"), _inputs, _run),
    Program("stanza.BasicAttention of a mask", _attention("BasicAttention"), _inputs, _masked, takes_half=False),
    Program("stanza.SoftDotAttention", _attention("SoftDotAttention"), _inputs, _run),
    Program("stanza.SoftDotAttention of a mask", _attention("SoftDotAttention"), _inputs, _masked, takes_half=False),
    Program(
        "stanza.SoftDotAttention of logarithms", _attention("SoftDotAttention"), _inputs, _logarithms, served=False
    ),
    loop("stanza.LSTMAttention", "of weights", _decoder, _of_decoder, _decode),
    loop("stanza.LSTMAttention", "of logarithms", _decoder, _of_decoder, _decode_logarithms, served=False),
]
