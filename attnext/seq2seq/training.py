"""Training by the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnext.seq2seq.data import PAD, Batch, Pairs
from attnext.seq2seq.model import Seq2Seq

__all__ = ["Progress", "TrainingPlan", "fit", "loss"]


@dataclass(frozen=True)
class TrainingPlan:
    """How to train: until the seconds or the epochs are over, whichever is first.

    Attributes:
        seconds: of wall-clock time, or None for no limit.
        epochs: times through the pairs, or None for no limit.
        batch_size: pairs in a batch.
        learning_rate: at the end of the warm-up.
        warm_up: share of the run in which the learning rate rises from 0, to fall to 0 on half a cosine.
        clip: largest norm of a step's gradient.
        seed: of the order of the pairs. With a limit in seconds runs still differ: the clock sets the rate.

    Raises:
        ValueError: there is no limit, or a number is out of its range.
    """

    seconds: float | None = None
    epochs: int | None = None
    batch_size: int = 256
    learning_rate: float = 3e-3
    warm_up: float = 0.05
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is None and self.epochs is None:
            raise ValueError("seconds or epochs must be given")
        for name in ("seconds", "epochs", "batch_size", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be from 0 to below 1, got {self.warm_up}")

    def rate(self, done: float) -> float:
        """The learning rate when this share of the run is over."""
        if done < self.warm_up:
            return self.learning_rate * done / self.warm_up
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up)))


class Progress(NamedTuple):
    """After a step: the batch's loss, pairs and whole epochs so far, the share of the run that is over."""

    loss: float
    pairs: int
    epoch: int
    done: float


def loss(model: Seq2Seq, batch: Batch) -> Tensor:
    """Mean cross-entropy of the output symbols, the end mark included."""
    logits = model(batch.source, batch.lengths, batch.previous)
    return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD)


def fit(model: Seq2Seq, pairs: Pairs, plan: TrainingPlan) -> Iterator[Progress]:
    """Trains the model with Adam, one step per item taken from the iterator."""
    if not len(pairs):
        raise ValueError("pairs must not be empty")
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(plan.seed)
    started, seen, epoch, done = time.perf_counter(), 0, 0, 0.0
    while done < 1.0:
        for batch in pairs.epoch(plan.batch_size, generator):
            seen += len(batch.lengths)
            # The middle of the step: neither the first nor the last has a rate of 0.
            optimizer.param_groups[0]["lr"] = plan.rate(
                max(done, (seen - len(batch.lengths) / 2) / len(pairs) / (plan.epochs or math.inf))
            )
            model.train()  # at every step: who takes the items may evaluate in between
            optimizer.zero_grad()
            batch_loss = loss(model, batch)
            batch_loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            done = max(
                (time.perf_counter() - started) / (plan.seconds or math.inf),
                seen / len(pairs) / (plan.epochs or math.inf),
            )
            yield Progress(batch_loss.item(), seen, epoch, min(done, 1.0))
            if done >= 1.0:
                break
        epoch += 1
