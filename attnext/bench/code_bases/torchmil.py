"""torchmil's pooling of bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def _make(s: Sizes) -> Any:
    return load("torchmil", "torchmil.nn.attention.attention_pool").AttentionPool(s.states, s.features)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states)]


def _run(pool: Any, s: Sizes, bags: Tensor) -> list[Tensor]:
    seen = torch.arange(s.keys) < torch.tensor(s.lengths).unsqueeze(1)
    scattered = (torch.arange(s.batch * s.keys) % 5 != 3).view(s.batch, s.keys)
    return [pool(bags), pool(bags, seen.to(bags.dtype)), pool(bags, mask=scattered), pool(bags, scattered.long())]


def _run_for_scores(pool: Any, s: Sizes, bags: Tensor) -> list[Tensor]:
    seen = torch.arange(s.keys) < torch.tensor(s.lengths).unsqueeze(1)
    return [*pool(bags, return_att=True), *pool(bags, seen, True)]


PROGRAMS = [
    Program("torchmil.AttentionPool", _make, _inputs, _run),
    Program("torchmil.AttentionPool with scores", _make, _inputs, _run_for_scores),
]
