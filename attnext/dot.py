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

_ON_A_GPU = 128
"""Queries and keys from which PyTorch's attention is taken there."""
_MOST_WEIGHTS = 2**21
"""Of a row of the batch, which products hold in memory."""


def way(query: Tensor, memory: Memory, dropout_p: float, need_weights: bool) -> Way:
    """Which way is the fastest for a call: the kernel, matrix products, or PyTorch's attention.

    Half types take the kernel, also those that a memory is held in: the others round the weights to them. So does an
    exported program, whose sizes are open, and what ``torch.func`` does, as this project's operators take what they
    can.
    """
    if query.dim() < 3 or dropout_p > 0.0 or memory.lengths is not None or memory.mask is not None:
        return "kernel"
    if torch.compiler.is_exporting():
        return "kernel"
    device_type, dtype = query.device.type, query.dtype
    if not (dtype == torch.float32 or (dtype == torch.float64 and device_type == "cpu")) or dtype != memory.key.dtype:
        return "kernel"
    # What most calls are told by comes first: in a small call each question takes its time.
    chosen = _by_sizes(query, memory, need_weights, device_type)
    if chosen == "kernel" or _checks.autocasts(device_type):
        return "kernel"
    return "kernel" if not torch.compiler.is_compiling() and _checks.in_transforms() else chosen


def _by_sizes(query: Tensor, memory: Memory, need_weights: bool, device_type: str) -> Way:
    """The same of sizes alone."""
    queries, (_, keys, features) = query.shape[1], memory.key.shape
    serves = not need_weights and memory.value.shape[2] == features
    if device_type != "cpu":
        return "attention" if serves and min(queries, keys) >= _ON_A_GPU else "kernel"
    # The kernel reads keys and values once for many queries, the others write scores and read them again. At few
    # features the kernel's sums across lanes take longer than its products.
    if serves and ((queries >= 32 and keys >= 256 and features <= 64) or queries * keys > _MOST_WEIGHTS):
        return "attention"
    if queries * keys > _MOST_WEIGHTS:
        return "kernel"
    products = queries > 1 and (queries >= 64 or keys <= 2 * queries or keys * features <= 2048)
    return "products" if products else "kernel"


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
    few = memory.key.shape[1] < memory.key.shape[2]  # what is smaller is scaled: a tensor's new pages cost more
    query = query if scale == 1.0 or few else query * scale
    scores = torch.bmm(query, memory.key.transpose(1, 2))
    weights = (scores * scale if scale != 1.0 and few else scores).softmax(-1)
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
