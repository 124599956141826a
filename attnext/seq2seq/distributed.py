"""Several processes that train one model together, as ``torchrun`` starts them; one alone is a group of one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from attnext._support import InputError

__all__ = ["Group", "joined"]

# Python must let go of torch's group last: its end waits for a thread that may want the interpreter's lock. Python
# gives the lock up for that; the end of DistributedDataParallel doesn't, and some runs would never end.
_KEPT: list[Any] = []
atexit.register(_KEPT.clear)


class Group(NamedTuple):
    """The processes of a run.

    Attributes:
        rank: this process's number; 0 alone writes and shows.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def total(self, numbers: list[float]) -> list[float]:
        """The sums over all processes."""
        if self.size == 1:
            return numbers
        x = self._tensor(numbers)
        distributed.all_reduce(x)
        return [float(number) for number in x]

    def of_first(self, number: float) -> float:
        """What process 0 says."""
        if self.size == 1:
            return number
        x = self._tensor([number])
        distributed.broadcast(x, 0)
        return float(x)

    def _tensor(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)


@contextmanager
def joined(device: str | None) -> Iterator[Group]:
    """The group that the environment tells of, for as long as the block runs.

    Args:
        device: "cpu", "cuda" or None, which takes a GPU where there is one.

    Raises:
        InputError: there is no such device, or there are more processes than GPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here")
    started = "RANK" in os.environ  # by torchrun, or as it does
    size, local = (int(os.environ.get(name, "0")) if started else 0 for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size <= 1:
        yield Group(0, 1, place)
        return
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    _KEPT[:] = [distributed.group.WORLD]
    try:
        yield Group(distributed.get_rank(), size, place)
    finally:
        distributed.destroy_process_group()
