"""AllenNLP's additive attention, which gives weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def _make(**options: Any) -> Any:
    def make(s: Sizes) -> Any:
        kind = load("allennlp", "allennlp.modules.attention.additive_attention").AdditiveAttention
        return kind(s.query, s.states, **options)

    return make


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [attend(query, states) for query in queries]


def _masked(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """An empty row too, whose weights are 0 here."""
    seen = torch.arange(s.keys) < torch.tensor(s.lengths).unsqueeze(1)
    return [
        attend(queries[0], states, seen),
        attend(queries[1], states, matrix_mask=seen & (seen.sum(1) != 2)[:, None]),
    ]


PROGRAMS = [
    Program("allennlp.AdditiveAttention", _make(), _inputs, _run),
    Program("allennlp.AdditiveAttention of a mask", _make(), _inputs, _masked, takes_half=False),
    Program("allennlp.AdditiveAttention for scores", _make(normalize=False), _inputs, _run),
]
