"""Triton kernels (the folder ``kernels/``) for NVIDIA and AMD GPUs, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from attnext.backends._base import Backend, Family
from attnext.ops import implement

__all__ = ["FAMILY"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _probe() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "Triton is not installed: pip install triton")
    if INTERPRETED:
        return Backend(True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET is set): to check, not to use")
    if not torch.cuda.is_available():
        return Backend(
            False, "no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, to check them"
        )
    return Backend(True, f"Triton kernels on {torch.cuda.get_device_name()}")


def _kernel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        # At the first call: importing Triton takes longer than the rest of the package.
        return importlib.import_module("attnext.kernels.launch").OPERATORS[name](*args)

    return call


implement("triton", "CPU" if INTERPRETED else "CUDA", _kernel)
FAMILY = Family(("cpu",) if INTERPRETED else ("cuda",), _probe, takes_held=True)
