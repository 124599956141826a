"""From tensors to launches, for steps that see their past."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import steps
from .launch import (
    _dropout,
    _Inputs,
    _launch,
    _multiprocessors,
    _on,
    _rounded_by_kernels,
    _triton_type,
    _two_floats,
)

__all__ = ["step", "step_backward"]

_RULES = {"softmax": 0, "sigmoid": 1, "forward": 2}
_MOST_PROGRAMS = 4
"""For each multiprocessor, of those that keep sums of their own."""


class _Step(_Inputs):
    """A call's tensors, contiguous, with Tq."""

    def __init__(self, query: Tensor, *inputs: Any) -> None:
        key, value, weight, filters, projection, *pasts, lengths, mask, window, seed, scale, dropout_p, rule = inputs
        super().__init__(query, key, lengths, mask, scale)
        self.value, self.weight = value.contiguous(), weight.contiguous()
        self.filters, self.projection = (None if x is None else x.contiguous() for x in (filters, projection))
        self.past, self.second_past, self.previous, self.transition = (
            None if x is None else x.contiguous() for x in pasts
        )
        self.window = None if window is None else window.contiguous()
        self.dropout, self.seed, self.rule = _dropout(dropout_p, seed), seed, rule
        self.values = self.value.shape[2]
        self.rows = self.batch * self.queries
        self.channels, self.width, self.filter_count = 0, 1, 1
        if self.filters is not None:
            self.filter_count, self.channels, self.width = self.filters.shape
        self.sizes = (self.queries, self.keys)
        hidden = {"HAS_LENGTHS": lengths is not None, "HAS_MASK": mask is not None}
        self.hidden: dict[str, Any] = hidden | {"ACC": _triton_type(self.dtype)}
        self.attended = self.hidden | {"HAS_WINDOW": window is not None}
        self.linear: dict[str, Any] = {
            "CHANNELS": self.channels,
            "PROJECTED": projection is not None,
            "BF": max(16, triton.next_power_of_2(self.filter_count)) if projection is not None else 16,
        }
        self.ruled = {"RULE": rule, "AGENT": self.transition is not None}
        self.mixed = (self.previous, self.transition, self.lengths, self.mask)
        self.seen = (self.filters, self.projection, self.past, self.second_past, self.lengths, self.mask)

    def wide(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=self.dtype)

    def shaped(self, x: Tensor) -> Tensor:
        """(B, Tq, ...), or without Tq for a query of (B, D)."""
        rows = (self.batch,) if self.flat else (self.batch, self.queries)
        return x.view(*rows, x.shape[-1])


def step(query: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    with _on(query.device):
        return _step(_Step(query, *inputs))


def _step(p: _Step) -> tuple[Tensor, Tensor]:
    weights = p.wide(p.batch, p.queries, p.keys)
    context = p.query.new_zeros(p.batch, p.queries, p.values, dtype=_rounded_by_kernels(p.query.dtype))
    if p.rows > 0 and p.keys > 0:
        scores = p.wide(p.rows, p.keys)
        _launch(
            steps.step_scores, p.tiles("step sums"), lambda meta: (p.rows * triton.cdiv(p.keys, meta["BK"]),), p.query,
            p.key, p.weight, *p.seen, p.window, scores, *p.sizes, p.features, p.filter_count, p.width,
            *_two_floats(p.scale), **p.linear, **p.attended,
        )  # fmt: skip
        numbers, dropout = p.dropout
        _launch(
            steps.step_context, p.tiles("step rows"), lambda meta: (p.rows, max(1, triton.cdiv(p.values, meta["BH"]))),
            scores, p.value, *p.mixed, p.seed, weights, context, *p.sizes, p.values, *numbers, **p.ruled, **p.hidden,
            **dropout,
        )  # fmt: skip
    context = context.to(p.query.dtype)
    return (context.squeeze(1), weights.squeeze(1)) if p.flat else (context, weights)


def step_backward(
    grad_context: Tensor | None, grad_weights: Tensor | None, query: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *others, weights = inputs
    with _on(query.device):
        return _step_backward(_Step(query, *others), grad_context, grad_weights, weights)


def _step_backward(
    p: _Step, grad_context: Tensor | None, grad_weights: Tensor | None, weights: Tensor
) -> tuple[Tensor, ...]:
    grad_context, grad_weights = (None if x is None else x.contiguous() for x in (grad_context, grad_weights))
    kind = p.query.dtype
    zeros = torch.zeros if p.rows == 0 or p.keys == 0 else torch.empty
    dp, ds, kept = (zeros(p.rows, p.keys, dtype=p.dtype, device=p.query.device) for _ in range(3))
    found: dict[str, Tensor] = {}
    grad_value = torch.zeros_like(p.value, dtype=_rounded_by_kernels(kind))
    if p.rows > 0 and p.keys > 0:
        _slots(p, grad_context, grad_weights, weights.contiguous(), (dp, ds, kept), found)
        if grad_context is not None and p.values > 0:
            _launch(
                steps.step_values, p.tiles("step values"),
                lambda meta: (p.batch * triton.cdiv(p.keys, meta["BK"]), triton.cdiv(p.values, meta["BH"])), kept,
                grad_context, grad_value, *p.sizes, p.values, ACC=_triton_type(p.dtype),
            )  # fmt: skip
    of_query, of_key, of_weight, of_filters, of_projection, of_pasts = _gradients(p, ds)
    none = p.query.new_empty(0)
    like = {"previous": p.previous, "transition": p.transition}
    others = (none if x is None else p.shaped(found.get(name, torch.zeros_like(x))) for name, x in like.items())
    pasts = (p.shaped(of_pasts[k]) if k < p.channels else none for k in range(2))
    return (
        (of_query.squeeze(1) if p.flat else of_query).to(kind), of_key.to(kind), grad_value.to(kind),
        of_weight.to(kind),
        none if of_filters is None else of_filters.to(kind), none if of_projection is None else of_projection.to(kind),
        *pasts, *others,
    )  # fmt: skip


def _slots(
    p: _Step, grad_context: Tensor | None, grad_weights: Tensor | None, weights: Tensor,
    out: tuple[Tensor, Tensor, Tensor], found: dict[str, Tensor],
) -> None:  # fmt: skip
    """dp, ds, what the values take; and the gradients of the last weights and the transition."""
    numbers, dropout = p.dropout
    forward = p.rule == _RULES["forward"]
    stays = torch.empty(p.rows, dtype=torch.int32, device=p.query.device) if forward else None
    of_move = p.wide(p.rows, 1) if p.transition is not None else None
    dp, ds, _ = out
    _launch(
        steps.step_slots, p.tiles("step rows"), lambda meta: (p.rows,), p.value, grad_context, grad_weights, weights,
        *p.mixed, p.window, p.seed, *out, stays, of_move, *p.sizes, p.values, *numbers, **p.ruled,
        CONTEXT=grad_context is not None, WEIGHTS=grad_weights is not None, **p.attended, **dropout,
    )  # fmt: skip
    if stays is not None:
        found["previous"] = p.wide(p.rows, p.keys)
        _launch(
            steps.step_previous, p.tiles("step places"), lambda meta: (p.rows * triton.cdiv(p.keys, meta["BK"]),), ds,
            dp, stays, *p.mixed, p.window, found["previous"], *p.sizes, AGENT=p.ruled["AGENT"], **p.attended,
        )  # fmt: skip
    if of_move is not None:
        found["transition"] = of_move


def _gradients(p: _Step, ds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """Those of query, key, score weight, filters, projection and pasts, but for the pasts in the arithmetic's dtype."""
    tile = p.tiles("step sums")[0]
    tiles = max(1, triton.cdiv(p.keys, tile["BK"]))
    most = max(1, _MOST_PROGRAMS * _multiprocessors(p.query.device) // max(1, p.batch))
    each = triton.cdiv(tiles, min(tiles, most))
    parts = triton.cdiv(tiles, each)
    programs, reach = max(1, p.batch) * parts, tile["BK"] + p.width - 1
    # What no program writes, as there is nothing to do, is 0.
    nothing = p.rows == 0 or p.keys == 0
    new = torch.zeros if nothing else torch.empty

    def made(*shape: int) -> Tensor:
        return new(*shape, dtype=p.dtype, device=p.query.device)

    of_key, of_query = made(p.batch, p.keys, p.features), made(tiles, p.rows, p.features)
    of_weight = made(programs, p.features)
    of_filters = made(programs, p.channels, p.width, p.filter_count) if p.channels else None
    of_projection = made(programs, p.features, p.filter_count) if p.projection is not None else None
    past_parts = torch.zeros(p.rows, p.channels, tiles, reach, dtype=p.dtype, device=p.query.device)
    pasts = [p.wide(p.rows, p.keys) for _ in range(p.channels)]
    if not nothing:
        _launch(
            steps.step_gradients, (tile,), lambda meta: (p.batch, parts), p.query, p.key, p.weight, *p.seen, ds, of_key,
            of_query, of_weight, of_filters, of_projection, past_parts, *p.sizes, p.features, p.filter_count, p.width,
            each, *_two_floats(p.scale), SIGMOID_RULE=p.rule == _RULES["sigmoid"], **p.linear, **p.hidden,
        )  # fmt: skip
        for channel, past in enumerate(pasts):
            _launch(
                steps.step_past, p.tiles("step places"), lambda meta: (p.rows * triton.cdiv(p.keys, meta["BK"]),),
                past_parts, p.lengths, p.mask, past, *p.sizes, p.width, channel, CHANNELS=p.channels, TILE=tile["BK"],
                **p.hidden,
            )  # fmt: skip
    return (
        of_query.sum(0).view(p.batch, p.queries, p.features), of_key, of_weight.sum(0),
        None if of_filters is None else of_filters.sum(0).permute(2, 0, 1).contiguous(),
        None if of_projection is None else of_projection.sum(0), pasts,
    )  # fmt: skip
