"""GNMT's attention, which is on no index of packages: a class with its interface, parameters and formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.program import Program, Sizes


class BahdanauAttention(nn.Module):
    """``v . tanh(q + k)``, where it is normalised ``s v / |v| . tanh(q + k + b)``; time first but for batch_first."""

    def __init__(
        self, query_size: int, key_size: int, num_units: int, normalize: bool = False, batch_first: bool = False,
        init_weight: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize, self.batch_first, self.num_units = normalize, batch_first, num_units
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units).uniform_(-init_weight, init_weight))
        self.mask: Tensor | None = None
        self.normalize_scalar = nn.Parameter(torch.full((1,), num_units**-0.5)) if normalize else None
        self.normalize_bias = nn.Parameter(torch.zeros(num_units)) if normalize else None

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        places = torch.arange(context.shape[1 if self.batch_first else 0], device=context.device)
        self.mask = places >= context_len.unsqueeze(1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        single = query.dim() == 2
        if not self.batch_first:
            keys, query = keys.transpose(0, 1), query if single else query.transpose(0, 1)
        query = query.unsqueeze(1) if single else query
        sums, v = self.linear_q(query).unsqueeze(2) + self.linear_k(keys).unsqueeze(1), self.linear_att
        if self.normalize:
            sums, v = sums + self.normalize_bias, v / v.norm() * self.normalize_scalar
        scores = torch.tanh(sums).matmul(v)
        if self.mask is not None:
            scores = scores.masked_fill(self.mask.unsqueeze(1), -65504.0)
        weights = torch.softmax(scores, -1)
        results = torch.bmm(weights, keys), weights
        if single:
            return results[0].squeeze(1), results[1].squeeze(1)
        return results if self.batch_first else (results[0].transpose(0, 1), results[1].transpose(0, 1))


def _attention(**options: bool) -> Any:
    return lambda s: BahdanauAttention(s.query, s.states, s.features, **options)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), draw(s.batch, s.steps, s.query), draw(s.batch, s.query)]


def _run(attend: Any, s: Sizes, states: Tensor, many: Tensor, one: Tensor) -> list[Tensor]:
    """Without a mask, then with one: all queries, the first of them, and a single one."""
    if not attend.batch_first:
        states, many = states.transpose(0, 1), many.transpose(0, 1)
    first = many[:, :1] if attend.batch_first else many[:1]
    attend.mask = None
    found = [*attend(many, states)]
    attend.set_mask(torch.tensor(s.lengths), states)
    return found + [x for query in (many, first, one) for x in attend(query, states)]


PROGRAMS = [
    Program("gnmt.BahdanauAttention", _attention(), _inputs, _run),
    Program("gnmt.BahdanauAttention normalised", _attention(normalize=True), _inputs, _run),
    Program("gnmt.BahdanauAttention batch first", _attention(normalize=True, batch_first=True), _inputs, _run),
]
