"""CUDA kernels in the extension ``attnext._C``."""

from __future__ import annotations

import torch

from attnext import _extension
from attnext.backends._base import Backend, Family
from attnext.backends._gpu import unusable


def _probe(index: int | None) -> Backend:
    module, status = _extension.load(), _extension.status()
    if module is None:
        return Backend(False, status.reason, broken=status.broken)
    built = module.build_info().get("cuda")
    if not built:
        why = _extension.build_record().get("cuda reason") or "it was built without"
        return Backend(False, f"the extension has no CUDA kernels: {why}")
    nvidia = torch.cuda.is_available() and not torch.version.hip
    why = unusable(index) if nvidia else "no NVIDIA GPU that torch can use"
    if why:
        return Backend(False, f"CUDA kernels are there (built with {built}), but {why}")
    problem = problem_with(torch.cuda.get_device_capability(index), module.cuda_versions(), built)
    if problem:
        return Backend(False, f"the CUDA kernels (built with {built}) can't run here: {problem}")
    return Backend(True, f"CUDA kernels on {torch.cuda.get_device_name(index)}")


def problem_with(capability: tuple[int, int], versions: tuple[int, int], built: str) -> str:
    """Why kernels built as "13.0: 8.0 9.0+PTX" can't run on a GPU; empty where they can.

    Asks nothing of the GPU, which would take memory on it. ``versions``: the CUDA versions of driver and runtime.
    """
    driver, runtime = versions
    # The kernels are compressed, which drivers before 12.4 can't read, though they take code of any 12.
    least = 12040 if runtime // 1000 == 12 else runtime // 1000 * 1000
    if driver < least:
        return f"they need a driver for CUDA {_version(least)} or later, and this one is for {_version(driver)}"
    if not any(_serves(arch, capability) for arch in built.split(": ")[1].split()):
        return "the GPU is of compute capability {}.{}".format(*capability)
    return ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """Machine code is for later GPUs of the same generation too, PTX for all later ones, and 9.0a for 9.0 alone."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    return (major == capability[0] and minor <= capability[1]) or (bool(ptx) and (major, minor) <= capability)


FAMILY = Family(("cuda",), _probe, (torch.float32, torch.float16, torch.bfloat16))
