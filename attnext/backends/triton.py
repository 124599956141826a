"""Triton kernels (the folder ``kernels/``) for NVIDIA and AMD GPUs, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnext.backends._base import Backend, Family
from attnext.backends._gpu import unusable
from attnext.ops import implement

__all__ = ["FAMILY"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


OLDEST = (3, 5)
"""The first Triton that compiles the kernels."""


def _probe(index: int | None) -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "Triton is not installed: pip install triton")
    if INTERPRETED:
        return Backend(True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET is set): to check, not to use")
    why = unusable(index)
    if why:
        return Backend(False, f"{why}; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, to check them")
    why = too_old() or nothing_to_build_with()
    if why:
        return Backend(False, why)
    return Backend(True, f"Triton kernels on {torch.cuda.get_device_name(index)}")


@functools.cache
def too_old() -> str:
    """What is wrong with the Triton that is installed, if its version is known and below :data:`OLDEST`."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of its own, by another name
        return ""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) >= OLDEST:
        return ""
    return f"Triton {version} is too old: {'.'.join(map(str, OLDEST))} or later is needed"


@functools.cache
def nothing_to_build_with() -> str:
    """What Triton misses to build with, which it does with a C compiler when it first runs a kernel; or empty."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # a name, as Triton takes it
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and {' or '.join(compilers)} is not there: install one, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton asks for it
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.is_file():
        return f"Triton needs Python's headers, and {header} is not there: install python3-dev or the like"
    return ""


def _kernel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        # At the first call: importing Triton takes longer than the rest of the package.
        return importlib.import_module("attnext.kernels.launch").OPERATORS[name](*args)

    return call


implement("triton", "CPU" if INTERPRETED else "CUDA", _kernel)
FAMILY = Family(("cpu",) if INTERPRETED else ("cuda",), _probe, takes_held=True)
