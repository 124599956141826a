"""The keys and values of a memory as its steps attend them: their gradients are summed in place.

Automatic differentiation makes the gradients of keys and values anew at every step, and adds them to those of the other
steps. Here a step's backward pass adds to the sums of all steps, which flow on after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attnext import _checks
from attnext.ops import accumulator, summing

__all__ = ["PerPass", "Steps", "gathered", "made_anew"]


T = TypeVar("T")


class PerPass(Generic[T]):
    """What the steps of one sequence gather, apart for each backward pass that is under way."""

    def __init__(self) -> None:
        self._of_pass: dict[int, T] = {}

    def of(self, make: Callable[[], T]) -> T:
        """That of this pass, made at its first step; dropped when it ends, or with this if an exception ends it."""
        current = torch._C._current_graph_task_id()
        if current not in self._of_pass:
            self._of_pass[current] = make()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._drop(current))
        return self._of_pass[current]

    def take(self) -> T | None:
        """That of all steps; None where none of this pass has made it."""
        return None if torch.compiler.is_compiling() else self._of_pass.pop(torch._C._current_graph_task_id(), None)

    def _drop(self, one: int) -> None:
        self._of_pass.pop(one, None)


_Sums = PerPass[list[Tensor | None]]
"""The gradients of keys and values so far."""


class _Gather(torch.autograd.Function):
    """The keys and values themselves; its backward runs after that of every step."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.sums, ctx.dtype = sums, inputs[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        totals = ctx.sums.take()
        if totals is None:
            return None, *gradients  # as the steps made them
        found = (total if total is None else total.to(ctx.dtype) for total in totals[: len(gradients)])
        # Some steps may have made theirs, where the gradients of a pass are a batch for some and not for all.
        return None, *(b if a is None else a if b is None else a + b for a, b in zip(gradients, found, strict=True))


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
        *tensors, context, weights, log_sum_exp = ctx.saved_tensors  # read once: recomputation allows no more
        incoming = (grad_context, grad_weights if ctx.need_weights else None)
        arguments = (*incoming, *tensors, *ctx.options, context, weights, log_sum_exp)
        grads: list[Tensor | None] = []
        if made_anew(*incoming):
            grads = list(summing[ctx.op].whole(*arguments))
        elif any(grad is not None for grad in incoming):
            found = summing[ctx.op].into(*arguments, *ctx.sums.of(lambda: _zeros(tensors[1:3])))
            query, *others = (found,) if isinstance(found, Tensor) else found
            grads = [query, None, None, *others]
        of_inputs = [None if x is None else grad for x, grad in zip(tensors, grads, strict=False)]
        return None, None, *of_inputs, *(None,) * (len(tensors) - len(of_inputs) + 3)


def _zeros(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.new_zeros(x.shape, dtype=accumulator(x.dtype)) for x in inputs]


def made_anew(*incoming: Tensor | None) -> bool:
    """Whether a step hands on gradients of its own: they may be differentiated again, are compiled, or are a batch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return any(x is not None for x in incoming)
    batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(x is not None and any(is_batched(x) for is_batched in batched) for x in incoming)


# As mypy sees them: torch's apply has no types.
_gather: Callable[..., tuple[Tensor, ...]] = _Gather.apply
_step: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Step.apply


class Steps:
    """A key and a value for steps; without a value the keys are the values."""

    def __init__(self, key: Tensor, value: Tensor | None) -> None:
        self._sources = key, value
        self._sums: _Sums = PerPass()
        inputs = _gather(self._sums, *(x for x in self._sources if x is not None))
        self._inputs = inputs[0], None if value is None else inputs[1]

    def serve(self, op: Any, key: Tensor, value: Tensor | None) -> bool:
        """Whether they are this key and value, and the operator one that can add to sums."""
        return op in summing and key is self._sources[0] and value is self._sources[1]

    def attend(self, op: Any, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Calls an operator with the key and the value between its other arguments."""
        return _step(op, self._sums, query, *self._inputs, *others)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a memory has none: its tensors are others."""
        return type(None), ()


def gathered(key: Tensor, value: Tensor) -> Steps | None:
    """The key (B, Tk, D) and value (B, Tk, H) of a memory for its steps; None where they have no gradient to sum."""
    if torch.compiler.is_compiling() or _checks.in_transforms() or not torch.is_grad_enabled():
        return None
    if key.device.type != "cpu" or not (key.requires_grad or value.requires_grad):
        return None
    return Steps(key, None if value is key else value)
