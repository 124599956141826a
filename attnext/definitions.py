"""Second derivatives: the gradients of an operator by its definition, which autograd follows to any order.

The operators raise where a second derivative is asked of them. Modules of other code bases had one before they were
swapped, so theirs are made here: slower, and with the (B, Tq, Tk, D) tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from attnext import reference

__all__ = ["by_definition", "gradients", "wanted"]

_on: ContextVar[bool] = ContextVar("attnext_by_definition", default=False)


@contextmanager
def by_definition() -> Iterator[None]:
    """Operators called within have second derivatives."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def wanted() -> bool:
    """Whether an operator that is called now shall have them."""
    return _on.get()


def gradients(
    name: str, incoming: Sequence[Tensor | None], inputs: Sequence[Tensor | None], others: Sequence[Any]
) -> list[Tensor | None]:
    """Of an operator without its family: the gradients of its inputs, differentiable themselves.

    Args:
        name: as in the schemas of :mod:`attnext.ops`.
        incoming: the gradients of its results, None where there is none.
        inputs: the leading tensors, which have a gradient.
        others: its other arguments, up to ``need_weights``.
    """
    from attnext.ops import accumulator  # which imports this

    with torch.enable_grad():
        # Each a tensor of its own, also where a key is the value; the definition computes in one dtype.
        apart = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        results = _DEFINITIONS[name](*(None if x is None else x.to(accumulator(x.dtype)) for x in apart), *others)
        pairs = [(y, g) for y, g in zip(results, incoming, strict=False) if g is not None and y.requires_grad]
        followed = [x for x in apart if x is not None and x.requires_grad]
        grads: Any = [None] * len(followed)
        if pairs and followed:
            outputs, of_outputs = [y for y, _ in pairs], [g.to(y.dtype) for y, g in pairs]
            grads = torch.autograd.grad(outputs, followed, of_outputs, create_graph=True, allow_unused=True)
    there = iter(grads)
    return [None if x is None or not x.requires_grad else next(there) for x in apart]


def _additive_attention(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, exp_key: Any, key_limit: Any, *others: Any
) -> tuple[Tensor, Tensor]:
    lengths, mask, seed, scale, dropout_p = others[:5]
    context, weights = reference.additive_attention(query, key, value, v, lengths=lengths, mask=mask, scale=scale,
                                                    dropout_p=dropout_p, need_weights=True, seed=seed)  # fmt: skip
    assert weights is not None
    return context, weights


def _additive_scores(
    query: Tensor, key: Tensor, v: Tensor, lengths: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor]:
    return (reference.additive_scores(query, key, v, lengths=lengths, mask=mask, scale=scale),)


def _dot_attention(query: Tensor, key: Tensor, value: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    lengths, mask, seed, scale, dropout_p = others[:5]
    context, weights = reference.dot_attention(query, key, value, lengths=lengths, mask=mask, scale=scale,
                                               dropout_p=dropout_p, need_weights=True, seed=seed)  # fmt: skip
    assert weights is not None
    return context, weights


def _additive_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    from attnext.ops import RULES

    query, key, value, v, filters, projection, first, second, previous, transition = arguments[:10]
    lengths, mask, window, seed, scale, dropout_p, rule = arguments[10:]
    past = [x for x in (first, second) if x is not None]
    return reference.additive_step(query, key, value, v, filters, projection, past, rule=RULES[rule],
        previous=previous, transition=transition, lengths=lengths, mask=mask, window=window, scale=scale,
        dropout_p=dropout_p, seed=seed)  # fmt: skip


_DEFINITIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "additive_attention": _additive_attention,
    "additive_scores": _additive_scores,
    "additive_step": _additive_step,
    "dot_attention": _dot_attention,
}
