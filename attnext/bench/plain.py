"""Attention of decoder steps as one writes it with torch's own layers: what attnext's steps are timed against.

Layers have the names that attnext's modules have, so that parameters are copied and gradients compared by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PlainAdditive", "PlainCoverage", "PlainForward", "PlainLocation", "additive"]

Past = tuple[Tensor, ...]
_NAMES = {"score_weight": "score.weight", "coverage_weight": "coverage.weight"}
"""Vectors of attnext that are layers here."""


def additive(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    """The context (B, H) of projected queries (B, D), keys (B, Tk, D) and values."""
    weights = (torch.tanh(query.unsqueeze(1) + key) @ score_weight).softmax(-1)
    return torch.bmm(weights.unsqueeze(1), value).squeeze(1)


class PlainAdditive(nn.Module):
    """``v . tanh(W query + U state_j + features_j)``, softmax, weighted sum.

    The memory is the states and their keys, projected once; the past is what the next step needs of weights (B, Tk).
    Hypotheses are rows, for each of which the memory is there again.
    """

    def __init__(self, query_size: int, memory_size: int, size: int, beam: int = 1) -> None:
        super().__init__()
        self.query_projection = nn.Linear(query_size, size, bias=False)
        self.memory_projection = nn.Linear(memory_size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)
        self.beam = beam

    def prepare(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, Tk, H) and their keys, which all steps attend."""
        keys = self.memory_projection(states)
        if self.beam > 1:
            states, keys = (x.repeat_interleave(self.beam, 0) for x in (states, keys))
        return states, keys

    def step(
        self, query: Tensor, memory: tuple[Tensor, Tensor], past: Past | None = None
    ) -> tuple[Tensor, Tensor, Past]:
        """Context, weights and past of a step, as attnext's ``step`` has them; the query may be (B, beam, Q)."""
        past = self.beginning(memory[1]) if past is None else past
        context, weights, past = self(query.reshape(-1, query.shape[-1]), *memory, past)
        return context.view(*query.shape[:-1], -1), weights, past

    def forward(self, query: Tensor, states: Tensor, keys: Tensor, past: Past) -> tuple[Tensor, Tensor, Past]:
        query = self.query_projection(query)
        energies = self.score(torch.tanh(self.total(query.unsqueeze(1), keys, past))).squeeze(-1)
        weights = self.align(energies, past)
        context = torch.bmm(weights.unsqueeze(1), states).squeeze(1)
        return context, weights, self.remember(context, query, weights, past)

    def beginning(self, keys: Tensor) -> Past:
        """The past of the first step."""
        return ()

    def total(self, query: Tensor, keys: Tensor, past: Past) -> Tensor:
        """What the tanh is taken of, (B, Tk, D)."""
        return query + keys

    def align(self, energies: Tensor, past: Past) -> Tensor:
        """The weights of energies (B, Tk)."""
        return energies.softmax(-1)

    def remember(self, context: Tensor, query: Tensor, weights: Tensor, past: Past) -> Past:
        """The past of the next step."""
        return ()

    def counterpart(self, name: str) -> nn.Parameter:
        """The parameter that is called so in attnext's module."""
        return self.get_parameter(_NAMES.get(name, name))

    @torch.no_grad()
    def copy_from(self, module: nn.Module) -> None:
        """Takes over the parameters of attnext's module, all of which must be there."""
        for name, parameter in module.named_parameters():
            mine = self.counterpart(name)
            mine.copy_(parameter.view_as(mine))


class PlainCoverage(PlainAdditive):
    """Sees the sum of all weights so far, by a linear layer."""

    def __init__(self, query_size: int, memory_size: int, size: int) -> None:
        super().__init__(query_size, memory_size, size)
        self.coverage = nn.Linear(1, size, bias=False)

    def beginning(self, keys: Tensor) -> Past:
        return (keys.new_zeros(keys.shape[:2]),)

    def total(self, query: Tensor, keys: Tensor, past: Past) -> Tensor:
        features: Tensor = self.coverage(past[0].unsqueeze(-1))
        return query + keys + features

    def remember(self, context: Tensor, query: Tensor, weights: Tensor, past: Past) -> Past:
        return (past[0] + weights,)


class PlainLocation(PlainAdditive):
    """Sees the last weights, and with two channels their sum too, by a convolution and a projection."""

    def __init__(
        self, query_size: int, memory_size: int, size: int, channels: int, filters: int, width: int, beam: int = 1
    ) -> None:
        super().__init__(query_size, memory_size, size, beam)
        self.channels = channels
        self.location_convolution = nn.Conv1d(channels, filters, width, padding=width // 2, bias=False)
        self.location_projection = nn.Linear(filters, size, bias=False)

    def beginning(self, keys: Tensor) -> Past:
        return (keys.new_zeros(keys.shape[:2]),) * self.channels

    def total(self, query: Tensor, keys: Tensor, past: Past) -> Tensor:
        seen = self.location_convolution(torch.stack(past[: self.channels], 1))
        features: Tensor = self.location_projection(seen.transpose(1, 2))
        return query + keys + features

    def remember(self, context: Tensor, query: Tensor, weights: Tensor, past: Past) -> Past:
        return (weights,) if self.channels == 1 else (weights, past[1] + weights)


class PlainForward(PlainLocation):
    """Weights that stay or move on by a key, from the first one; with an agent that says how likely they move.

    It has two channels. An agent's answer is the third part of the past.
    """

    def __init__(
        self, query_size: int, memory_size: int, size: int, filters: int, width: int, *, agent: bool = False
    ) -> None:
        super().__init__(query_size, memory_size, size, 2, filters, width)
        self.transition_agent = nn.Linear(memory_size + size, 1) if agent else None

    def beginning(self, keys: Tensor) -> Past:
        weights, total = (keys.new_zeros(keys.shape[:2]) for _ in range(2))
        weights[:, 0] = 1.0
        even = () if self.transition_agent is None else (keys.new_full((len(keys), 1), 0.5),)
        return weights, total, *even

    def align(self, energies: Tensor, past: Past) -> Tensor:
        last = past[0]
        moved = F.pad(last[:, :-1], (1, 0))
        mix = last + moved if self.transition_agent is None else (1.0 - past[2]) * last + past[2] * moved
        weights = mix * energies.softmax(-1)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-8)

    def remember(self, context: Tensor, query: Tensor, weights: Tensor, past: Past) -> Past:
        seen = super().remember(context, query, weights, past)
        if self.transition_agent is None:
            return seen
        return (*seen, torch.sigmoid(self.transition_agent(torch.cat((context, query), -1))))
