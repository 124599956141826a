"""What the registry knows of a kernel family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """Whether a backend can serve on this machine.

    Attributes:
        available: it can.
        reason: what it runs, or why it can't and what to do about it.
        broken: it was installed and fails to load, so that automatic choice must not pass over it in silence.
    """

    available: bool
    reason: str
    broken: bool = False


@dataclass(frozen=True)
class Family:
    """A kernel family.

    Attributes:
        device_types, dtypes: those it serves; none named are any.
        probe: what it can do on this machine, on the GPU of an index or on the current one (None).
        takes_held: whether keys and values may be of a half type beside queries of float32.
    """

    device_types: tuple[str, ...]
    probe: Callable[[int | None], Backend]
    dtypes: tuple[torch.dtype, ...] = ()
    takes_held: bool = False

    def serves(self, device_type: str, dtype: torch.dtype | None) -> bool:
        """Whether it has kernels for tensors of a dtype (None: of any) on a device."""
        return device_type in (self.device_types or (device_type,)) and dtype in (None, *(self.dtypes or (dtype,)))
