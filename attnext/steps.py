"""The keys and values of a memory as its steps attend them: their gradients are summed in place.

Automatic differentiation makes the gradients of keys and values anew at every step, and adds them to those of the other
steps. Here a step's backward pass adds to the sums of all steps, which flow on after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnext import _checks
from attnext.ops import accumulator, summing

__all__ = ["Steps", "gathered"]


class _Sums:
    """The gradients of keys and values in one backward pass."""

    def __init__(self) -> None:
        self._pass, self._sums = -1, list[Tensor | None]()

    def of(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """Those of the steps so far; zero at the first of this pass, also where the last pass was broken off."""
        if self._pass != torch._C._current_graph_task_id():
            self._pass = torch._C._current_graph_task_id()
            self._sums = [x if x is None else x.new_zeros(x.shape, dtype=accumulator(x.dtype)) for x in inputs]
        return self._sums

    def take(self) -> list[Tensor | None]:
        """Those of all steps; empty where none of this pass has added to them."""
        found = self._sums if self._pass == torch._C._current_graph_task_id() else []
        self._pass, self._sums = -1, []
        return found


class _Gather(torch.autograd.Function):
    """The keys and values themselves; its backward runs after that of every step."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.sums, ctx.dtype = sums, inputs[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # The steps hand their gradients on where these may be differentiated again.
        sums = ctx.sums.take() or [None] * len(gradients)
        return None, *(x if total is None else total.to(ctx.dtype) for x, total in zip(gradients, sums, strict=False))


class _Step(torch.autograd.Function):
    """An attention operator, with the arguments of its schema."""

    @staticmethod
    def forward(ctx: Any, op: Any, sums: _Sums, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, Tensor, Tensor] = op(*arguments)
        *tensors, scale, dropout_p, need_weights = arguments
        ctx.op, ctx.sums, ctx.options, ctx.need_weights = op, sums, (scale, dropout_p), need_weights
        ctx.save_for_backward(*tensors, *results)
        ctx.mark_non_differentiable(results[2])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None, _: None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors[:-3]
        grad_weights = grad_weights if ctx.need_weights else None
        grads: list[Tensor | None] = []
        if grad_context is not None or grad_weights is not None:
            grads = _gradients(ctx, grad_context, grad_weights)
        of_inputs = [None if x is None else grad for x, grad in zip(tensors, grads, strict=False)]
        return None, None, *of_inputs, *(None,) * (len(tensors) - len(of_inputs) + 3)


def _gradients(ctx: Any, *incoming: Tensor | None) -> list[Tensor | None]:
    """Those of query, key, value and score weight, without what went into the sums."""
    *tensors, context, weights, log_sum_exp = ctx.saved_tensors
    arguments = (*incoming, *tensors, *ctx.options, context, weights, log_sum_exp)
    if torch.is_grad_enabled():  # they may be differentiated again
        return list(summing[ctx.op].whole(*arguments))
    found = summing[ctx.op].into(*arguments, *ctx.sums.of(*tensors[1:3]))
    query, *others = (found,) if isinstance(found, Tensor) else found
    return [query, None, None, *others]


# As mypy sees them: torch's apply has no types.
_gather: Callable[..., tuple[Tensor, ...]] = _Gather.apply
_step: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Step.apply


class Steps(NamedTuple):
    """Key and value for steps; without a value the keys are the values."""

    key: Tensor
    value: Tensor | None
    sums: _Sums

    def attend(self, op: Any, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Calls an operator, one of ``ops.summing``, with these keys and values between its other arguments."""
        return _step(op, self.sums, query, self.key, self.value, *others)


def gathered(key: Tensor, value: Tensor) -> Steps | None:
    """The key (B, Tk, D) and value (B, Tk, H) of a memory for its steps; None where they have no gradient to sum."""
    if torch.compiler.is_compiling() or _checks.in_transforms() or not torch.is_grad_enabled():
        return None
    if not (key.requires_grad or value.requires_grad):
        return None
    sums = _Sums()
    inputs = _gather(sums, key) if value is key else _gather(sums, key, value)
    return Steps(inputs[0], None if value is key else inputs[1], sums)
