"""The steps of training, which can be interrupted after any of them and gone on with later."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from attnext._support import InputError
from attnext.seq2seq.checkpoint import fill, tensors_of
from attnext.seq2seq.data import PAD, Batch, Pairs
from attnext.seq2seq.distributed import Group
from attnext.seq2seq.model import Seq2Seq

__all__ = ["Progress", "Step", "Trainer", "loss"]

_ALONE = Group(0, 1, torch.device("cpu"))
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Step(NamedTuple):
    """After a step: the batch's loss a symbol, the gradient's norm before it was clipped, the learning rate."""

    loss: float
    norm: float
    rate: float


@dataclass
class Progress:
    """How far training is.

    Attributes:
        step: steps made.
        epoch: whole epochs made.
        batch: steps made in the epoch that was begun.
        pairs: pairs seen.
        seconds: of all sittings, with what was done between the steps.
        done: the share of the run that is over.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    pairs: int = 0
    seconds: float = 0.0
    done: float = 0.0


def loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The sum of the cross-entropies of the output symbols, the end mark included."""
    logits = model(batch.source, batch.lengths, batch.previous)
    return F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        batch.target.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


class Trainer:
    """Trains a model with Adam, until the time or the epochs of its configuration are over.

    What is random at a step depends on the seed, the step and the process alone, so that a state need not hold it.
    With epochs and without minutes, a run that was stopped and gone on with ends with the same bits as one in a single
    sitting.

    Args:
        model: on the group's device.
        pairs: to train on, the same in every process: each takes its share of every batch.
        group: the processes.

    Raises:
        ValueError: there is nothing to train on.
    """

    def __init__(self, model: Seq2Seq, pairs: Pairs, group: Group = _ALONE) -> None:
        if not len(pairs):
            raise ValueError("pairs must not be empty")
        self.model, self.pairs, self.group, self.config = model, pairs, group, model.config
        self.progress = Progress()
        self.evaluated = copy.deepcopy(model) if self.config.average else model
        """The running mean of the parameters, or the model itself."""
        self._optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), weight_decay=self.config.weight_decay, fused=True
        )
        for x in model.parameters():  # as the optimizer itself has them after a step
            self._optimizer.state[x] = {
                "step": torch.zeros((), device=x.device),
                **{name: torch.zeros_like(x) for name in _MOMENTS},
            }
        self._parallel = DistributedDataParallel(model) if group.size > 1 else model
        self._batches: list[list[int]] = []

    def steps(self) -> Iterator[Step]:
        """Makes a step for each item taken; ``progress`` is up to date with it.

        Raises:
            InputError: loss or gradient is no longer finite; the parameters are still those of the step before.
        """
        progress, before = self.progress, self.progress.seconds
        started = time.perf_counter()
        while progress.done < 1.0:
            if progress.batch == 0 or not self._batches:
                self._batches = self.pairs.epoch(self.config.batch_size, self.config.seed, progress.epoch)
            rows = self._batches[progress.batch]
            step = self._step(rows)
            progress.step, progress.batch, progress.pairs = (
                progress.step + 1, progress.batch + 1, progress.pairs + len(rows),
            )  # fmt: skip
            if progress.batch == len(self._batches):
                progress.epoch, progress.batch = progress.epoch + 1, 0
            progress.seconds = self.group.of_first(before + time.perf_counter() - started)
            progress.done = self._done
            yield step

    @property
    def _done(self) -> float:
        return min(1.0, max(self._of_time, self._of_epochs(self.progress.pairs)))

    @property
    def _of_time(self) -> float:
        return self.progress.seconds / (60 * (self.config.minutes or math.inf))

    def _of_epochs(self, pairs: float) -> float:
        return pairs / len(self.pairs) / (self.config.epochs or math.inf)

    def _step(self, rows: list[int]) -> Step:
        config, group = self.config, self.group
        torch.manual_seed(((config.seed * 1_000_003 + self.progress.step) * group.size + group.rank) % 2**63)
        # The middle of the step: neither the first nor the last has a rate of 0.
        rate = config.rate(max(self._of_time, self._of_epochs(self.progress.pairs + len(rows) / 2)))
        self._optimizer.param_groups[0]["lr"] = rate
        self.model.train()  # at every step: who takes the items may evaluate in between
        self._optimizer.zero_grad()
        symbols = int(self.pairs.output_lengths[rows].sum())
        # A process without a row of its own takes one without weight: the others wait for its gradients.
        own = rows[group.rank :: group.size]
        batch = self.pairs.batch(own or rows[:1]).to(group.device)
        with torch.autocast(group.device.type, torch.bfloat16, enabled=config.amp):
            total = loss(self._parallel, batch, config.label_smoothing) * bool(own)
        (total * (group.size / symbols)).backward()
        mean = group.total([total.item() / symbols])[0]
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not math.isfinite(mean + norm):
            raise InputError(
                f"training diverged at step {self.progress.step + 1}: loss {mean:g}, norm of gradient {norm:g}; try a "
                f"smaller learning rate than {config.learning_rate:g}"
            )
        self._optimizer.step()
        self._average()
        return Step(mean, norm, rate)

    def _average(self) -> None:
        """The mean is of about the last ninth of the steps made, or of as many as its decay keeps if they are fewer."""
        if self.evaluated is self.model:
            return
        share = max(1.0 - self.config.average, 9.0 / (self.progress.step + 10))
        for mean, x in zip(self.evaluated.parameters(), self.model.parameters(), strict=True):
            mean.data.lerp_(x.data, share)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rest of the run depends on, as tensors and as JSON."""
        return self._tensors(), asdict(self.progress)

    def go_on(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], folder: Path) -> None:
        """Takes up a state, that of a folder.

        Raises:
            InputError: it is not one of such a model.
        """
        fill(self._tensors(), tensors, folder)
        self.progress, self._batches = Progress(**progress), []
        for x in self.model.parameters():
            self._optimizer.state[x]["step"].fill_(self.progress.step)
        self.progress.done = self._done  # the limits may have changed

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"model.{name}": x for name, x in tensors_of(self.model).items()}
        if self.evaluated is not self.model:
            found |= {f"average.{name}": x for name, x in tensors_of(self.evaluated).items()}
        for name, x in self.model.named_parameters():
            found |= {f"{moment}.{name}": self._optimizer.state[x][moment] for moment in _MOMENTS}
        return found
