"""RL4CO's pointer network: its scores, and its decoder over given tours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def _class(name: str) -> Any:
    return getattr(load("rl4co", "rl4co.models.zoo.ptrnet.decoder"), name)


def _attention(**options: Any) -> Any:
    return lambda s: _class("SimpleAttention")(s.states, **options)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.keys, s.batch, s.states), *(draw(s.batch, s.states) for _ in range(s.steps))]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """With what its decoder does: hidden logits are written into, and weights multiply the projected states."""
    found = []
    hidden = torch.arange(s.keys) >= torch.tensor(s.lengths).unsqueeze(1)
    for query in queries:
        projected, logits = attend(query, states)
        found += [projected, logits.clone()]
        logits[hidden] = float("-inf")
        found.append(torch.bmm(projected, logits.softmax(1).unsqueeze(2)).squeeze(2))
    return found


def _decoder(**options: Any) -> Any:
    def make(s: Sizes) -> Any:
        return _class("Decoder")(s.query, s.states, **options)

    return make


def _of_decoder(s: Sizes, draw: Any) -> list[Tensor]:
    first = [draw(s.batch, s.states) for _ in range(2)]
    return [draw(s.batch, s.query), draw(s.keys, s.batch, s.query), draw(s.keys, s.batch, s.states), *first]


def _decode(decoder: Any, s: Sizes, start: Tensor, places: Tensor, states: Tensor, *first: Tensor) -> list[Tensor]:
    tours = (torch.arange(s.keys) * 2 + 1 if s.keys % 2 else torch.arange(s.keys)) % s.keys
    tours = torch.stack([tours.roll(row) for row in range(s.batch)])
    (found, _), last = decoder(start, places, first, states, eval_tours=tours)
    return [found, *last]


PROGRAMS = [
    Program("rl4co.SimpleAttention", _attention(), _inputs, _run),
    Program("rl4co.SimpleAttention within a tanh", _attention(use_tanh=True, C=3.0), _inputs, _run),
    loop("rl4co.Decoder", "of a glimpse", _decoder(), _of_decoder, _decode),
    loop("rl4co.Decoder", "of two glimpses", _decoder(use_tanh=False, num_glimpses=2), _of_decoder, _decode),
    loop("rl4co.Decoder", "of all places", _decoder(mask_glimpses=False), _of_decoder, _decode),
]
