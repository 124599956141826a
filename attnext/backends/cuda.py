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
    name = torch.cuda.get_device_name()
    if problem := module.cuda_problem():  # a driver older than the toolkit, or a GPU that they were not built for
        return Backend(False, f"the CUDA kernels (built with {built}) can't run on {name}: {problem}")
    return Backend(True, f"CUDA kernels on {name}")


FAMILY = Family(("cuda",), _probe, (torch.float32, torch.float16, torch.bfloat16))
