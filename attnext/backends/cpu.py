"""C++ kernels for the CPU, in the extension ``attnext._C``."""

from __future__ import annotations

import torch

from attnext import _extension
from attnext.backends._base import Backend, Family


def _probe(_: int | None) -> Backend:
    status = _extension.status()
    if not status.available:
        return Backend(False, status.reason, broken=status.broken)
    module = _extension.load()
    assert module is not None
    return Backend(True, f"C++ kernels, {module.instruction_set()} instructions")


# Now, not at the first call: a program that was exported and loaded again calls torch.ops.attnext directly.
_extension.load()
FAMILY = Family(("cpu",), _probe, takes_held=True)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; elsewhere such products are slower than those of float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def rounds_products(dtype: torch.dtype) -> bool:
    """Whether autocast, where it is at work, wants products over all steps of such numbers in bfloat16."""
    return dtype == torch.float32 and torch.get_autocast_dtype("cpu") == torch.bfloat16 and multiplies_bfloat16()
