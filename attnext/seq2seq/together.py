"""Several models that search together: as one whose probabilities are the mean of theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnext._support import InputError
from attnext.recurrent.opened import likeliest
from attnext.seq2seq.checkpoint import Checkpoint
from attnext.seq2seq.config import Config
from attnext.seq2seq.data import END
from attnext.seq2seq.model import Seq2Seq

__all__ = ["Together", "together"]


def together(checkpoints: Mapping[Path, Checkpoint]) -> Checkpoint:
    """Models as one, of the same vocabularies; a single one is itself.

    Raises:
        InputError: they have other vocabularies.
    """
    (folder, first), *others = checkpoints.items()
    if not others:
        return first
    for other, checkpoint in others:
        if (checkpoint.source, checkpoint.target) != (first.source, first.target):
            raise InputError(
                f"the models in {str(folder)!r} and {str(other)!r} have other symbols: they can't decode together"
            )
    models = [checkpoint.model for checkpoint in checkpoints.values()]
    longest = max(checkpoint.longest for checkpoint in checkpoints.values())
    return replace(first, model=cast(Seq2Seq, Together(models)), longest=longest)


class _Several(tuple[Any, ...]):
    """What each of the models carries."""

    def select(self, indices: Tensor) -> _Several:
        return _Several(one.select(indices) for one in self)

    def one_hypothesis(self) -> _Several:
        return _Several(one.one_hypothesis() for one in self)


class Together(nn.Module):
    """Models as a search sees one: their symbols' probabilities, and their weights, are the mean of each one's."""

    def __init__(self, models: Sequence[Seq2Seq]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def config(self) -> Config:
        """Of the first, or of the first without attention, which has no weights to show."""
        configs = [cast(Seq2Seq, model).config for model in self.models]
        return next((one for one in configs if one.attention == "none"), configs[0])

    @property
    def decoder(self) -> Together:
        """What a search opens."""
        return self

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[_Several, _Several]:
        memories, states = zip(*(cast(Seq2Seq, one).encode(source, lengths) for one in self.models), strict=True)
        return _Several(memories), _Several(states)

    def opened(self) -> _Opened:
        """The steps of searches, as long as the parameters stay as they are."""
        return _Opened([cast(Any, model).decoder.opened() for model in self.models])


class _Opened:
    def __init__(self, opened: Sequence[Any]) -> None:
        self._opened = opened

    def __call__(
        self, previous: Tensor, state: _Several, memory: _Several, *, need_weights: bool = False
    ) -> tuple[Tensor, _Several, Tensor | None]:
        found = [
            step(previous, *pair, need_weights=need_weights)
            for step, *pair in zip(self._opened, state, memory, strict=True)
        ]
        logits, states, weights = zip(*found, strict=True)
        # Of outputs alone: padding and the start mark, numbered below the end mark, are none.
        each = torch.stack([one[..., END:].float().log_softmax(-1) for one in logits])
        # The mean of their probabilities, but for a factor: of logits no search takes notice of it.
        mean = nn.functional.pad(each.logsumexp(0), (END, 0), value=-math.inf)
        return mean, _Several(states), torch.stack(weights).mean(0) if need_weights else None

    def greedy(
        self, previous: Tensor, state: _Several, memory: _Several, steps: int, end: int, need_weights: bool
    ) -> tuple[Tensor, Tensor, Any, Tensor | None]:
        return likeliest(partial(self, memory=memory, need_weights=need_weights), previous, state, steps, end, end)
