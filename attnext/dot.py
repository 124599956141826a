"""Ways to dot-product attention beside this project's kernels, and the rule that chooses one.

A call without lengths, mask and dropout is two matrix products with a softmax between them, which a library's products
or PyTorch's own attention may do faster. What the rule goes by was measured by ``attnext bench --cases dot-grid``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from attnext import _checks, _extension
from attnext.memory import Memory

__all__ = ["WAYS", "Way", "attend", "plain", "way"]

Way = Literal["kernel", "products", "attention"]

_ON_A_GPU = 128
"""Queries and keys from which PyTorch's attention is taken there."""
_DTYPES = (torch.float32, torch.float64)
_MOST_WEIGHTS = 2**21
"""Of a row of the batch, which products hold in memory."""
_MANY_QUERIES = 32
"""From which products are taken whatever the keys."""
_SMALL_MEMORY = 4096
"""Numbers of a row's keys up to which products are taken in training; without gradients four times as many."""


def plain(
    query: object, key: object, value: object, scale: object, need_weights: object
) -> tuple[Tensor, Tensor | None] | None:
    """Context and weights of a call that is right at a glance and goes another way than the kernel's; else None.

    So are most, and a short call should wait for no more questions than it has to: of tensors on the CPU, without
    lengths, mask and dropout, where nobody traces, transforms or casts.
    """
    if torch.compiler.is_compiling() or type(query) is not Tensor or type(key) is not Tensor:
        return None
    if type(scale) is not float or type(need_weights) is not bool:
        return None
    value = key if value is None else value
    if type(value) is not Tensor or not query.dim() == key.dim() == value.dim() == 3:
        return None
    (batch, queries, features), (rows, keys, of_key), (of_value, slots, values) = query.shape, key.shape, value.shape
    if not (batch == rows == of_value and features == of_key and keys == slots and min(keys, values, features) > 0):
        return None
    if not (query.is_cpu and key.is_cpu and value.is_cpu and query.dtype == key.dtype == value.dtype in _DTYPES):
        return None
    if not query.layout == key.layout == value.layout == torch.strided:
        return None
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    chosen = _by_sizes(queries, keys, features, values, need_weights, trains, "cpu")
    if chosen == "kernel" or not abs(scale) <= _checks.LARGEST:
        return None
    if _extension.load() is None:  # a call that takes its time says why
        return None
    if torch.is_autocast_enabled("cpu") or _checks.in_transforms():
        return None
    return _attended(chosen, query, key, value, scale, need_weights)


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
    (_, keys, features), values = memory.key.shape, memory.value.shape[2]
    trains = torch.is_grad_enabled() and (query.requires_grad or memory.key.requires_grad or memory.value.requires_grad)
    chosen = _by_sizes(query.shape[1], keys, features, values, need_weights, trains, device_type)
    if chosen == "kernel" or _checks.autocasts(device_type):
        return "kernel"
    return "kernel" if not torch.compiler.is_compiling() and _checks.in_transforms() else chosen


def _by_sizes(
    queries: int, keys: int, features: int, values: int, need_weights: bool, trains: bool, device_type: str
) -> Way:
    """The same of sizes alone, and of whether gradients are to come."""
    serves = not need_weights and values == features
    if device_type != "cpu":
        return "attention" if serves and min(queries, keys) >= _ON_A_GPU else "kernel"
    if queries * keys > _MOST_WEIGHTS:
        return "attention" if serves else "kernel"
    # The kernel reads keys and values once for its queries, forward and backward; products write scores and read them
    # again, which is little where there are few numbers of keys, or many queries.
    small = keys * features <= (_SMALL_MEMORY if trains else 4 * _SMALL_MEMORY)
    products = queries > 1 and (queries >= _MANY_QUERIES or keys <= 2 * queries or small)
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
    return _attended(chosen, query, memory.key, memory.value, scale, need_weights)


def _attended(
    chosen: Way, query: Tensor, key: Tensor, value: Tensor, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor | None] | None:
    context, weights = WAYS[chosen](query, key, value, scale)
    if not torch.compiler.is_compiling() and context.is_cpu and _has_nan(context):
        return None
    return context, weights if need_weights else None


def _has_nan(context: Tensor) -> bool:
    """Whether a row of a context is NaN, by its first number: by the extension, as an operation of torch's takes a
    tenth of a short call."""
    module, values = _extension.load(), context.shape[2]
    if module is None or type(context) is not Tensor or values == 0 or not context.is_contiguous():
        return bool(context.detach()[..., :1].isnan().any())
    found: bool = module.any_nan(context.data_ptr(), context.numel() // values, values, context.dtype == torch.float64)
    return found


def _by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Context and weights of queries (B, Tq, D) by two products of a library."""
    few = key.shape[1] < key.shape[2]  # what is smaller is scaled: a tensor's new pages cost more
    query = query if scale == 1.0 or few else query * scale
    scores = torch.bmm(query, key.transpose(1, 2))
    weights = (scores * scale if scale != 1.0 and few else scores).softmax(-1)
    return torch.bmm(weights, value), weights


def _by_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Context by PyTorch's own attention, whose kernels want an axis of heads."""
    q, k, v = (x.unsqueeze(1) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1), None


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]] = {
    "products": _by_products,
    "attention": _by_attention,
}
"""Each but the kernel."""
