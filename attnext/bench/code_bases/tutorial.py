"""The attention of PyTorch's tutorial on translation and its decoder, with their interface, parameters and formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.program import Program, Sizes

STEPS = 4


class BahdanauAttention(nn.Module):
    """``Va(tanh(Wa q + Ua k))`` of one query (B, 1, H), without a mask."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.Wa = nn.Linear(hidden_size, hidden_size)
        self.Ua = nn.Linear(hidden_size, hidden_size)
        self.Va = nn.Linear(hidden_size, 1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.Va(torch.tanh(self.Wa(query) + self.Ua(keys))).transpose(1, 2), -1)
        return torch.bmm(weights, keys), weights


class AttnDecoderRNN(nn.Module):
    """A GRU that reads the last letter and the context of the last state."""

    def __init__(self, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(output_size, hidden_size)
        self.attention = BahdanauAttention(hidden_size)
        self.gru = nn.GRU(2 * hidden_size, hidden_size, batch_first=True)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(
        self, encoder_outputs: Tensor, encoder_hidden: Tensor, target_tensor: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        letter = torch.zeros(len(encoder_outputs), 1, dtype=torch.int64, device=encoder_outputs.device)
        hidden, outputs, weights = encoder_hidden, [], []
        for step in range(STEPS):
            context, weight = self.attention(hidden.permute(1, 0, 2), encoder_outputs)
            output, hidden = self.gru(torch.cat([self.embedding(letter), context], 2), hidden)
            outputs.append(self.out(output))
            weights.append(weight)
            letter = outputs[-1].argmax(2) if target_tensor is None else target_tensor[:, step : step + 1]
        return torch.log_softmax(torch.cat(outputs, 1), -1), hidden, torch.cat(weights, 1)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.features), *(draw(s.batch, 1, s.features) for _ in range(s.steps))]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(query, states)]


def _decode(decoder: Any, s: Sizes, states: Tensor, first: Tensor) -> list[Tensor]:
    letters = torch.arange(s.batch * STEPS).view(s.batch, STEPS) % 11
    return [x for target in (letters, None) for x in decoder(states, first, target)]


PROGRAMS = [
    Program("tutorial.BahdanauAttention", lambda s: BahdanauAttention(s.features), _inputs, _run, ("Va.bias",)),
    loop("tutorial.AttnDecoderRNN", "of a sentence", lambda s: AttnDecoderRNN(s.features, 11),
         lambda s, draw: [draw(s.batch, s.keys, s.features), draw(1, s.batch, s.features)], _decode,
         "attention.Va.bias"),
]  # fmt: skip
