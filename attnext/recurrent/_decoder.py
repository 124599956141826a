"""A decoder over whole sequences: one operator forward and one backward.

What is a product over all steps is made around them: before the first step what the inputs add, after the last the
gradients of matrices, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnext.memory import Memory
from attnext.recurrent import _operators
from attnext.recurrent._gradients import Gradients
from attnext.recurrent._operators import (
    KEPT,
    NO_CHOICE,
    Call,
    Inputs,
    Kept,
    Results,
    Start,
    Weights,
    ahead_of,
    inputs_of,
    without_autocast,
)
from attnext.steps import is_batch

__all__ = ["decode"]


class _Decoder(torch.autograd.Function):
    """The operators, and the products over all steps around them."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(tensors)
        steps, rows, features = inputs.x.shape
        of_input = inputs.layers[0].w_input, inputs.w_readout, inputs.b_readout
        gates, feeds = ahead_of(inputs.x.view(steps * rows, features), *of_input, call.half)
        gates, feeds = gates.view(steps, rows, -1), None if feeds is None else feeds.view(steps, rows, -1)
        others = (None, None, None, *NO_CHOICE, *call.options, False, call.need_weights, call.keep)
        kept = _operators.forward(gates, feeds, *inputs.of_operator(call), *others)
        kept[KEPT] = gates
        found = Kept._make(kept[:KEPT])
        ctx.call, ctx.count = call, len(tensors)
        ctx.save_for_backward(*tensors, feeds, *kept)
        ctx.set_materialize_grads(False)
        shown = None
        if call.need_weights:
            shown = found.weights if found.weights.numel() or not found.wide.numel() else found.wide
        cell = None if inputs.cell is None else found.cell
        return found.output, found.contexts, shown, found.hidden, cell, feeds

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, feeds, kept = Inputs.of(saved[: ctx.count]), saved[ctx.count], list(saved[ctx.count + 1 :])
        if all(grad is None for grad in incoming):
            return (None,) * len(ctx.needs_input_grad)
        if is_batch(*incoming):
            raise RuntimeError(
                "attnext's decoder kernels take one gradient at a time: for a batch of them run the decoder inside "
                "attnext.use_backend('reference')"
            )
        needs = Inputs.of(ctx.needs_input_grad[1:])
        with torch.no_grad(), without_autocast():
            grads: Sequence[Tensor | None] = Gradients(ctx.call, inputs, feeds, kept, incoming).all(needs)
        if torch.is_grad_enabled():
            followed = [x for x in (*incoming, *inputs.flat()) if x is not None and x.requires_grad]
            return None, *(None if x is None else _once(x, *followed) for x in grads)
        return None, *grads


class _Once(torch.autograd.Function):
    """A gradient that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_followed: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "attnext's decoder kernels have no second derivative: run it inside attnext.use_backend('reference'), "
            "which follows autograd to any order"
        )


# As mypy sees them: torch's apply has no types.
_applied: Callable[..., tuple[Any, ...]] = _Decoder.apply
_once: Callable[..., Tensor] = _Once.apply


def decode(
    x: Tensor, start: Start, memory: Memory, weights: Weights, masks: list[Tensor], seeds: Tensor | None,
    need_weights: bool, half: bool,
) -> Results:  # fmt: skip
    """Goes through the steps.

    Args:
        x: (T, N, E) contiguous, in float32 or float64, as all that follows.
        start: what there was before the first step.
        memory: of B sentences.
        weights: the parameters.
        masks: (T, N, S), what each but the topmost layer's states are multiplied with on their way up; or none.
        seeds: (T,) int64, where the attention drops weights.
        half: products over all steps are of bfloat16.
    """
    inputs = inputs_of(x, start, memory, weights).flat()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call = Call(memory, weights.parts, masks, seeds, weights.after, weights.feeds_vector, need_weights, keep, half)
    return Results._make(_applied(call, *inputs))
