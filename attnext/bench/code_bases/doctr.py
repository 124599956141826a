"""docTR's attention over a feature map, and its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

HEIGHT = 2


def _class(name: str) -> Any:
    return getattr(load("python-doctr", "doctr.models.recognition.sar.pytorch"), name)


def _attention(s: Sizes) -> Any:
    return _class("AttentionModule")(s.states, s.query, s.features)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.states, HEIGHT, s.keys), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _run(attend: Any, s: Sizes, features: Tensor, *states: Tensor) -> list[Tensor]:
    return [attend(features, state) for state in states]


def _letters(s: Sizes) -> int:
    """Which are less than the units, as the class wants it."""
    return min(4, s.states - 1)


def _decoder(s: Sizes) -> Any:
    size = s.states
    return _class("SARDecoder")(size, s.steps, _letters(s), size, s.features, feat_chans=size)


def _of_decoder(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.states, HEIGHT, s.keys), draw(s.batch, s.states)]


def _decode(decoder: Any, s: Sizes, features: Tensor, holistic: Tensor) -> list[Tensor]:
    letters = torch.arange(s.batch * (s.steps + 1)).view(s.batch, -1) % (_letters(s) + 1)
    return [decoder(features, holistic, letters), decoder(features * 0.5, holistic, gt=letters)]


PROGRAMS = [
    Program("doctr.AttentionModule", _attention, _inputs, _run),
    loop("doctr.SARDecoder", "of letters", _decoder, _of_decoder, _decode),
]
