"""CUDA kernels in the extension ``attnext._C``."""

from __future__ import annotations

import torch

from attnext import _extension
from attnext.backends._base import Backend, Family


def _probe() -> Backend:
    module, status = _extension.load(), _extension.status()
    if module is None:
        return Backend(False, status.reason, broken=status.broken)
    built = module.build_info().get("cuda")
    if not built:
        why = _extension.build_record().get("cuda reason") or "it was built without"
        return Backend(False, f"the extension has no CUDA kernels: {why}")
    if torch.version.hip or not torch.cuda.is_available():
        return Backend(False, f"CUDA kernels are there (built with {built}), but no NVIDIA GPU that torch can use")
    problem = problem_with(torch.cuda.get_device_capability(), module.cuda_versions(), built)
    if problem:
        return Backend(False, f"the CUDA kernels (built with {built}) can't run here: {problem}")
    return Backend(True, f"CUDA kernels on {torch.cuda.get_device_name()}")


def problem_with(capability: tuple[int, int], versions: tuple[int, int], built: str) -> str:
    """Why kernels built as "13.0: 8.0 9.0+PTX" can't run on a GPU; empty where they can.

    Asks nothing of the GPU, which would take memory on it. ``versions``: the CUDA versions of driver and runtime.
    """
    driver, runtime = versions
    if driver // 1000 < runtime // 1000:
        return f"they need a driver for CUDA {runtime // 1000}, and this one is for {driver // 1000}"
    if not any(_serves(arch, capability) for arch in built.split(": ")[1].split()):
        return "the GPU is of compute capability {}.{}".format(*capability)
    return ""


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """Machine code is for later GPUs of the same generation too, PTX for all later ones, and 9.0a for 9.0 alone."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    return (major == capability[0] and minor <= capability[1]) or (bool(ptx) and (major, minor) <= capability)


FAMILY = Family(("cuda",), _probe, (torch.float32, torch.float16, torch.bfloat16))
