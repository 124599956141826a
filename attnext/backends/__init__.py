"""The kernel families: which are there, why one is not, and which one serves a call.

One file per family; none imports another. A family offers ``probe``, which says whether it can run on this machine,
``device_types``, and (where it has kernels) an import that registers them with ``torch.ops.attnext``.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnext.backends import cpu, cuda, reference, triton
from attnext.backends._base import Backend, Family

__all__ = ["Backend", "backends", "choose", "chosen_freely", "kernel_devices", "serves", "takes_held", "use_backend"]

_FAMILIES: dict[str, Family] = {
    "reference": reference.FAMILY,
    "cpu": cpu.FAMILY,
    "triton": triton.FAMILY,
    "cuda": cuda.FAMILY,
}
_AUTOMATIC = ("cpu", "cuda", "triton", "reference")
"""The order of automatic choice: the first that is available and serves the device."""


class _Setting(threading.local):
    """Of each thread its own."""

    forced: str | None = os.environ.get("ATTNEXT_BACKEND") or None


_setting = _Setting()


def backends() -> dict[str, Backend]:
    """What each backend can do on this machine; of several GPUs, on the current one.

    Returns:
        For every backend name whether it is available, and the reason: what it runs, or why it can't and how to get it.
    """
    return {name: family.probe(None) for name, family in _FAMILIES.items()}


def kernel_devices() -> dict[str, str]:
    """The device type that each backend with kernels serves on this machine, by name."""
    return {name: family.device_types[0] for name, family in _FAMILIES.items() if family.device_types}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Makes ``name`` the backend of every call inside that names none; None means automatic choice again.

    The setting is the thread's: others, and those that are started inside, are not touched, nor is what autograd's own
    threads run again for a GPU (checkpointing): name ``backend=`` there, or set the variable. The ``ATTNEXT_BACKEND``
    environment variable, read when attnext is imported and held to the same rules at the first call, sets it for all
    threads of the run.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not available here; the message says why.
    """
    if name is not None:
        _require(name)
    before, _setting.forced = _setting.forced, name
    try:
        yield
    finally:
        _setting.forced = before


def serves(name: str, dtype: torch.dtype) -> bool:
    """Whether a backend with kernels has them for a dtype."""
    family = _FAMILIES[name]
    return family.serves(family.device_types[0], dtype)


def takes_held(name: str) -> bool:
    """Whether a backend's kernels take keys and values that are held in a half type beside queries of float32."""
    return _FAMILIES[name].takes_held


def chosen_freely(name: str | None) -> bool:
    """Whether nobody asked for a backend by name."""
    return name is None and _setting.forced is None


def choose(
    name: str | None,
    device_type: str,
    dtype: torch.dtype | None = None,
    held: bool = False,
    index: int | None = None,
) -> str:
    """The backend that serves a call on ``device_type``: the one asked for by name, or an automatic choice.

    For keys and values that are ``held`` in a half type it is one that takes them so, where there is one. ``index`` is
    the GPU's: what serves one card may not serve another.

    Raises:
        ValueError: unknown backend, or one that doesn't serve that device or dtype.
        RuntimeError: the backend is not available here.
    """
    family: str = _resolve(name if name is not None else _setting.forced, device_type, dtype, held, index)
    return family


def _resolve(name: str | None, device_type: str, dtype: torch.dtype | None, held: bool, index: int | None) -> str:
    if name is not None and not isinstance(name, str):
        _require(name, index)  # says what it may be; the cache below takes no lists
    if name is None and _exports_onnx():
        return "reference"  # of whose operations ONNX has names
    return _resolved(name, device_type, dtype, held, index)


def _exports_onnx() -> bool:
    """Whether ``torch.onnx.export`` is at work: what ``torch.onnx.is_in_onnx_export`` asks, without its imports."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return bool(getattr(flags, "_is_onnx_exporting", False))


# A constant to the compiler: what this machine has doesn't change while it runs. The setting does, and is read outside.
# This is all that torch.compiler.assume_constant_result does, but for importing the compiler: a second, and 150 MiB.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _resolved(name: str | None, device_type: str, dtype: torch.dtype | None, held: bool, index: int | None) -> str:
    if name is None:
        return _choose_automatically(device_type, dtype, held, index)
    family = _require(name, index)
    if not family.serves(device_type, None):
        served = " and ".join(family.device_types)
        raise ValueError(f"backend={name!r} serves {served} tensors, got tensors on {device_type!r}")
    if not family.serves(device_type, dtype):
        served = ", ".join(str(x).removeprefix("torch.") for x in family.dtypes)
        raise ValueError(f"backend={name!r} serves {served}, got tensors of {str(dtype).removeprefix('torch.')}")
    return name


def _require(name: str, index: int | None = None) -> Family:
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"backend (or ATTNEXT_BACKEND) must be None or one of {', '.join(map(repr, _FAMILIES))}, got {name!r}"
        )
    status = family.probe(index)
    if not status.available:
        raise RuntimeError(f"backend={name!r} is not available: {status.reason}")
    return family


def _choose_automatically(device_type: str, dtype: torch.dtype | None, held: bool, index: int | None) -> str:
    serving = [name for name in _AUTOMATIC if _FAMILIES[name].serves(device_type, dtype)]
    # Those that take what is held first, the reference last in any case.
    for name in sorted(serving, key=lambda name: (name == "reference", held and not takes_held(name))):
        family = _FAMILIES[name]
        status = family.probe(index)
        if status.broken:
            raise RuntimeError(f"backend {name!r} is installed but broken: {status.reason}")
        if status.available:
            break
    if name == "reference":
        families = ((n, f) for n, f in _FAMILIES.items() if device_type in f.device_types)
        missing = "; ".join(f"{n}: {_why_not(f, dtype, index)}" for n, f in families)
        warnings.warn(
            f"attnext has no kernels for {device_type!r} tensors here and uses its slow reference implementation "
            f"({missing or 'no backend serves that device'})",
            RuntimeWarning,
            stacklevel=_level_of_the_caller(),
        )
    return name


def _why_not(family: Family, dtype: torch.dtype | None, index: int | None) -> str:
    if dtype is not None and family.dtypes and dtype not in family.dtypes:
        return f"has no kernels for {str(dtype).removeprefix('torch.')}"
    return family.probe(index).reason


def _level_of_the_caller() -> int:
    """How far above the function that calls this one the user's call is: past this package and torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("attnext", "torch"):
        frame, level = frame.f_back, level + 1
    return level
