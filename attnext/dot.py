"""Ways to dot-product attention beside this project's kernels, and the rule that chooses one.

A call without lengths, mask and dropout is two matrix products with a softmax between them, which a library's products
or PyTorch's own attention may do faster. What the rule goes by was measured by ``attnext bench --cases dot-grid``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.memory import Memory

__all__ = ["WAYS", "Way", "attend", "way"]

Way = Literal["kernel", "products", "attention"]

_MANY_QUERIES = 128
_FEW_QUERIES = 16
_LARGE = 512


def way(query: Tensor, memory: Memory, dropout_p: float, need_weights: bool) -> Way:
    """Which way is the fastest for a call: the kernel, matrix products, or PyTorch's attention.

    Half types take the kernel: the others round the weights to them. So does an exported program, whose sizes are open,
    and what ``torch.func`` does, as this project's operators take what they can.
    """
    key, device_type = memory.key, query.device.type
    if dropout_p > 0.0 or memory.lengths is not None or memory.mask is not None or query.dim() < 3:
        return "kernel"
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and _checks.in_transforms()):
        return "kernel"
    of_float64 = query.dtype == torch.float64 and device_type == "cpu"
    if not (query.dtype == torch.float32 or of_float64) or _checks.autocasts(device_type):
        return "kernel"
    queries, keys = query.shape[1], key.shape[1]
    serves = not need_weights and memory.value.shape[2] == key.shape[2]
    if device_type != "cpu":
        return "attention" if serves and min(queries, keys) >= _MANY_QUERIES else "kernel"
    if serves and min(queries, keys) >= _LARGE:
        return "attention"
    return "products" if min(queries, keys) >= _FEW_QUERIES else "kernel"


def attend(
    query: Tensor, memory: Memory, scale: float, dropout_p: float, need_weights: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Context and weights by the way that is the fastest; None where the kernel is to serve.

    So it is where a context is NaN: of a row of scores that are all minus infinity it makes nothing, and 0. On a GPU,
    and in a graph, nobody looks.
    """
    chosen = way(query, memory, dropout_p, need_weights)
    if chosen == "kernel":
        return None
    context, weights = WAYS[chosen](query, memory, scale)
    if not torch.compiler.is_compiling() and context.is_cpu and bool(context.detach()[..., :1].isnan().any()):
        return None
    return context, weights if need_weights else None


def _by_products(query: Tensor, memory: Memory, scale: float) -> tuple[Tensor, Tensor | None]:
    """Context and weights of queries (B, Tq, D) by two products of a library."""
    key = memory.key
    # Where beta is 0, the first argument lends its dtype alone.
    scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0.0, alpha=scale)
    weights = scores.softmax(-1)
    return torch.bmm(weights, memory.value), weights


def _by_attention(query: Tensor, memory: Memory, scale: float) -> tuple[Tensor, Tensor | None]:
    """Context by PyTorch's own attention, whose kernels want an axis of heads."""
    q, k, v = (x.unsqueeze(1) for x in (query, memory.key, memory.value))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1), None


WAYS: dict[str, Callable[[Tensor, Memory, float], tuple[Tensor, Tensor | None]]] = {
    "products": _by_products,
    "attention": _by_attention,
}
"""Each but the kernel."""
