"""The keys and values of a memory as its steps attend them: their gradients are made at the end of all steps.

Automatic differentiation makes the gradients of keys and values anew at every step, and adds them to those of the other
steps. Here a step's backward pass gives the query's alone, and keeps what is small: the gradients of its scores, its
weights and what came in for its context. Of a block of steps the others are then made at once, as of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnext import _checks, definitions
from attnext.ops import accumulator, of_steps, operators

__all__ = ["PerPass", "Shared", "Steps", "gathered", "gradient_of_values", "gradients_of_keys", "is_batch", "made_anew"]

_BLOCK = 64
"""Queries whose gradients of keys and values are made together."""
_FEW_QUERIES = 8
"""Of a call up to which it is a step: of more, the gradients of keys and values are as well made with the queries'."""

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


class Shared(NamedTuple):
    """An operator and what its steps share beside key, value and score weight."""

    op: Any
    lengths: Tensor | None
    mask: Tensor | None
    scale: float


class _Kept(NamedTuple):
    """Of one step, (B, Tq, ...), without Tq for a query of (B, D). With no ``grad_scores`` the key has its gradient."""

    query: Tensor
    grad_scores: Tensor | None
    weights: Tensor
    grad_context: Tensor


class _Collected:
    """The gradients of key, value and score weight so far, and the steps that have not yet given theirs."""

    def __init__(self, key: Tensor, value: Tensor | None, score_weight: Tensor | None) -> None:
        self._inputs = key, value, score_weight
        self._sums: list[Tensor | None] = [None, None, None]
        self._shared: Shared | None = None
        self._waiting: list[_Kept] = []
        self._queries = 0

    def key_sum(self) -> Tensor:
        """The sum of the key's gradients, to be added to."""
        key, total = self._inputs[0], self._sums[0]
        if total is None:
            total = self._sums[0] = key.new_zeros(key.shape, dtype=accumulator(key.dtype))
        return total

    def add(self, shared: Shared, kept: _Kept) -> None:
        if self._shared is not None and (self._queries >= _BLOCK or not _same(self._shared, shared)):
            self._make()
        self._shared = shared
        self._waiting.append(kept)
        self._queries += kept.query.shape[1] if kept.query.dim() == 3 else 1

    def finish(self) -> list[Tensor | None]:
        if self._waiting:
            self._make()
        return self._sums

    def _make(self) -> None:
        """The gradients of the steps that wait, in the dtype of the arithmetic."""
        assert self._shared is not None
        shared, (key, value, score_weight) = self._shared, self._inputs
        dtype = accumulator(key.dtype)
        query, grad_scores, weights, grad_context = (_joined(x, dtype) for x in zip(*self._waiting, strict=True))
        self._waiting, self._queries = [], 0
        with torch.autocast("cpu", enabled=False) if _checks.autocasts("cpu") else nullcontext():
            self._add(0 if value is None else 1, gradient_of_values(key, shared, weights, grad_context))
            if grad_scores is None:
                return
            if shared.op is _OPERATORS.dot_attention:
                score_weight = None
            of_key, of_score_weight = gradients_of_keys(query, grad_scores, key.to(dtype), score_weight, shared)
            self._add(0, of_key)
            if of_score_weight is not None:
                self._add(2, of_score_weight)

    def _add(self, place: int, gradient: Tensor) -> None:
        total = self._sums[place]
        self._sums[place] = gradient if total is None else total.add_(gradient)


def gradient_of_values(key: Tensor, shared: Shared, weights: Tensor, grad_context: Tensor) -> Tensor:
    """(B, Tk, H), of weights (B, Tq, Tk) and what came in for their contexts (B, Tq, H)."""
    # 0 times what came in may be NaN: of a row that attends nothing, and below of a slot that none may attend.
    grad_context = grad_context.masked_fill((weights == 0).all(-1, keepdim=True), 0.0)
    of_value = weights.mT @ grad_context
    if shared.lengths is not None or shared.mask is not None:
        of_value.masked_fill_(~_visible(key, shared.lengths, shared.mask), 0.0)
    return of_value


def gradients_of_keys(
    query: Tensor, grad_scores: Tensor, key: Tensor, score_weight: Tensor | None, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    """(B, Tk, D), of queries (B, Tq, D) and what came in for their scores (B, Tq, Tk); and of the score weight, without
    which they are dot products."""
    if score_weight is None:
        of_key = (grad_scores * shared.scale).mT @ query
        if shared.lengths is not None or shared.mask is not None:  # 0 times a NaN of the query's
            of_key.masked_fill_(~_visible(key, shared.lengths, shared.mask), 0.0)
        return of_key, None
    inputs = (query, key, score_weight.to(key.dtype), shared.lengths, shared.mask)
    _, of_key, of_score_weight = _scores_backward(grad_scores, *inputs, shared.scale)
    return of_key, of_score_weight


def _same(a: Shared, b: Shared) -> bool:
    return a.op is b.op and a.lengths is b.lengths and a.mask is b.mask and a.scale == b.scale


def _joined(tensors: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """Those of the steps one after another, (B, T, ...)."""
    if tensors[0] is None:
        return None
    return torch.cat([x if x.dim() == 3 else x.unsqueeze(1) for x in tensors], 1).to(dtype)


def _visible(key: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """The slots that some query may attend, (B, Tk, 1)."""
    visible = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    if lengths is not None:
        visible &= torch.arange(key.shape[1], device=key.device) < lengths.unsqueeze(1)
    if mask is not None:
        visible &= mask if mask.dim() == 2 else mask.any(1)
    return visible.unsqueeze(-1)


class _Gather(torch.autograd.Function):
    """The key, the value and the score weight themselves; its backward runs after that of every step."""

    @staticmethod
    def forward(ctx: Any, collected: PerPass[_Collected], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.collected, ctx.dtypes = collected, [None if x is None else x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in inputs if x is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(gradients)
        own = [None if dtype is None else next(there) for dtype in ctx.dtypes]
        collected = ctx.collected.take()
        sums = [None] * len(own) if collected is None else collected.finish()
        # Some steps may have made theirs, where the gradients of a pass are a batch for some and not for all.
        return None, *(
            a if b is None or dtype is None else b.to(dtype) if a is None else a + b.to(dtype)
            for a, b, dtype in zip(own, sums, ctx.dtypes, strict=True)
        )


class _Call(NamedTuple):
    """An operator, what its steps collect in a backward pass, and its arguments that have no gradient."""

    op: Any
    collected: Callable[[], _Collected]
    rest: tuple[Any, ...]
    shared: Shared


class _Attention(torch.autograd.Function):
    """An operator of attention; it comes in one piece with what has no gradient, as each argument takes its time."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            context, weights, log_sum_exp, wide = of_steps[call.op].forward(*inputs, *call.rest)
        ctx.call, ctx.by_definition = call, definitions.wanted()
        ctx.save_for_backward(*inputs, context, weights, log_sum_exp, wide)
        ctx.set_materialize_grads(False)
        need_weights: bool = call.rest[-1]
        return (context, weights) if need_weights else (context,)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        *inputs, context, weights, log_sum_exp, wide = ctx.saved_tensors  # read once: recomputation allows no more
        grad_context, grad_weights = (*incoming, None)[:2]
        arguments, steps = (grad_context, grad_weights, *inputs, *call.rest[:-1]), of_steps[call.op]
        if ctx.by_definition and torch.is_grad_enabled():
            name = "dot_attention" if call.op is _OPERATORS.dot_attention else "additive_attention"
            return None, *definitions.gradients(name, (grad_context, grad_weights), inputs, call.rest[:-1])
        if made_anew(*incoming):
            return None, *_of_inputs(inputs, steps.whole(*arguments, context, weights, log_sum_exp))
        if grad_context is None and grad_weights is None:
            return (None,) * (len(inputs) + 1)
        of_query, grad_scores, kept = steps.part(*arguments, wide)
        if grad_context is None:  # and no value has a part in it, whatever its weight
            grad_context, kept = torch.zeros_like(context), torch.zeros_like(kept)
        call.collected().add(call.shared, _Kept(inputs[0], grad_scores, kept, grad_context))
        return None, of_query, *(None,) * (len(inputs) - 1)


class _Past(torch.autograd.Function):
    """The operator of a step that sees its past, likewise."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            context, weights = of_steps[call.op].forward(*inputs, *call.rest)
        ctx.call, ctx.by_definition = call, definitions.wanted()
        ctx.save_for_backward(*inputs, weights)
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        *inputs, weights = ctx.saved_tensors
        arguments, steps = (grad_context, grad_weights, *inputs, *call.rest, weights), of_steps[call.op]
        if ctx.by_definition and torch.is_grad_enabled():
            return None, *definitions.gradients("additive_step", (grad_context, grad_weights), inputs, call.rest)
        if made_anew(grad_context, grad_weights):
            return None, *_of_inputs(inputs, steps.whole(*arguments))
        if grad_context is None and grad_weights is None:
            return (None,) * (len(inputs) + 1)
        collected = call.collected()
        of_query, *others, kept = steps.part(*arguments, collected.key_sum())
        if grad_context is not None:
            dropout_p: float = call.rest[-2]
            collected.add(call.shared, _Kept(inputs[0], None, kept if dropout_p > 0.0 else weights, grad_context))
        return None, *_of_inputs(inputs, [of_query, None, None, *others])


def _of_inputs(inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of the inputs that are there."""
    return [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]


def made_anew(*incoming: Tensor | None) -> bool:
    """Whether a step hands on gradients of its own: they may be differentiated again, are compiled, or are a batch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return any(x is not None for x in incoming)
    return is_batch(*incoming)


def is_batch(*incoming: Tensor | None) -> bool:
    """Whether gradients are a batch of them (``is_grads_batched``)."""
    batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(x is not None and any(is_batched(x) for is_batched in batched) for x in incoming)


# As mypy sees them: torch's apply has no types.
_gather: Callable[..., tuple[Tensor, ...]] = _Gather.apply
_attention: Callable[..., tuple[Tensor, ...]] = _Attention.apply
_past: Callable[..., tuple[Tensor, Tensor]] = _Past.apply
_OPERATORS = operators["cpu"]
_INPUTS = {_OPERATORS.attention: 4, _OPERATORS.dot_attention: 3, _OPERATORS.step: 10}
"""How many of an operator's arguments have a gradient."""
_scores_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.attnext.additive_scores_backward_cpu.default


class Steps:
    """A key, a value and a score weight for steps; without a value the keys are the values."""

    def __init__(self, key: Tensor, value: Tensor | None, score_weight: Tensor | None) -> None:
        self._sources = key, value, score_weight
        self._collected: PerPass[_Collected] = PerPass()
        inputs = iter(_gather(self._collected, *self._sources))
        self._inputs = tuple(None if x is None else next(inputs) for x in self._sources)

    def serve(self, op: Any, key: Tensor, value: Tensor | None) -> bool:
        """Whether they are this key and value, and the operator one that can leave their gradients to the end."""
        return op in of_steps and key is self._sources[0] and value is self._sources[1]

    def attend(self, op: Any, query: Tensor, *others: Any) -> tuple[Any, ...]:
        """Calls an operator with the key and the value between its other arguments; gives context and weights."""
        key, value, score_weight = self._inputs
        assert key is not None
        inputs, rest = [query, key, value, *others[: _INPUTS[op] - 3]], others[_INPUTS[op] - 3 :]
        others_weight = op is not _OPERATORS.dot_attention and others[0] is not self._sources[2]
        if op is not _OPERATORS.dot_attention and not others_weight:
            inputs[3] = score_weight
        if op is not _OPERATORS.dot_attention and inputs[3] is not None:
            inputs[3] = inputs[3].to(query.dtype)  # of a memory that is held in autocast's dtype
        if (others_weight and op is _OPERATORS.attention) or (query.dim() == 3 and query.shape[1] > _FEW_QUERIES):
            # A gradient has nowhere to wait, or need not.
            results: tuple[Any, ...] = op(*inputs, *rest)
            return results
        if op is _OPERATORS.step:
            inputs[4:6] = (None if x is None else x.to(query.dtype) for x in inputs[4:6])  # which autocast has left
            shared = Shared(op, rest[0], rest[1], rest[-3])
            return _past(_Call(op, self._of_pass, rest, shared), *inputs)
        call = _Call(op, self._of_pass, rest, Shared(op, rest[-6], rest[-5], rest[-3]))
        return (*_attention(call, *inputs), None, None)[:3]

    def _of_pass(self) -> _Collected:
        """What this backward pass has collected."""
        key, *others = self._sources
        return self._collected.of(lambda: _Collected(key, *others))


def gathered(key: Tensor, value: Tensor, score_weight: Tensor | None = None) -> Steps | None:
    """The key (B, Tk, D), value (B, Tk, H) and score weight of a memory for its steps; None where no gradient is asked
    for."""
    if torch.compiler.is_compiling() or _checks.in_transforms() or not torch.is_grad_enabled():
        return None
    if key.device.type != "cpu" or not (key.requires_grad or value.requires_grad):
        return None
    return Steps(key, None if value is key else value, score_weight)
