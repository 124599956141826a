"""What torch says of a GPU, without an error where it can't be asked."""

from __future__ import annotations

import torch


def unusable(index: int | None) -> str:
    """Why torch can't compute on the GPU of an index, or on the current one; empty where it can."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    try:
        torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    except (RuntimeError, AssertionError) as error:  # of a driver, of a process that was forked, of no such index
        return f"torch can't use the GPU: {str(error).strip().partition(chr(10))[0]}"
    return ""
