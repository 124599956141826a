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

__all__ = ["Group", "alone", "joined"]

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


def alone(device: str | None) -> Group:
    """A process by itself, whatever the environment tells of others.

    Args:
        device: "cpu", "cuda" or None, which takes a GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    return Group(0, 1, _place(device, 0))


@contextmanager
def joined(device: str | None) -> Iterator[Group]:
    """The group that the environment tells of, as ``torchrun`` sets it, for as long as the block runs.

    Args:
        device: as of :func:`alone`, of each process its own.

    Raises:
        InputError: there is no such device, there are more processes than GPUs, or the environment's variables are not
            what they must be.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local = (_count(name) if "RANK" in os.environ else 0 for name in names)
    place = _place(device, local)
    if size <= 1:
        yield Group(0, 1, place)
        return
    if rank >= size:
        raise InputError(f"RANK must be less than WORLD_SIZE, {size}, got {rank}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(f"{name} is not set, where WORLD_SIZE is {size}: start the processes by torchrun")
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    _KEPT[:] = [distributed.group.WORLD]
    try:
        yield Group(distributed.get_rank(), size, place)
    finally:
        distributed.destroy_process_group()


def _count(name: str) -> int:
    """Of the environment's variable; 0 where it is not set."""
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise InputError(f"the environment's {name} must be a number from 0 on, got {text!r}")
    return int(text)


def _place(device: str | None, local: int) -> torch.device:
    """That of a process, by its number on this machine."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here")
    if local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place
