"""Recurrent units as a decoder steps them, and matrices whose gradient waits for the last step.

Automatic differentiation makes a product for the gradient of a matrix at every step, and adds it to the others. Here a
step's backward keeps the two factors, and one product over all steps makes the sum: fewer, larger products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnext import _checks
from attnext.recurrent import GRU, LSTM
from attnext.steps import PerPass, made_anew

__all__ = ["CELLS", "Cell", "Product", "over_steps"]

Product = Callable[[Tensor, Tensor], Tensor]
"""(x, base) to base + x W^T, for x (..., I) and base (..., O)."""

_Factors = PerPass[list[tuple[Tensor, Tensor]]]
"""The inputs of a matrix and the gradients of its outputs, of the steps so far."""


def over_steps(weight: Tensor) -> Product:
    """The product with a matrix (O, I) for the steps of one sequence; its derivatives are those of a linear layer."""
    if _checks.autocasts(weight.device.type) and weight.dtype != torch.float64:  # once, not at every step
        weight = weight.to(torch.get_autocast_dtype(weight.device.type))
    factors: _Factors = PerPass()
    waits = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    shared = _gathered(weight, factors) if waits else weight

    def product(x: Tensor, base: Tensor) -> Tensor:
        x, base = x.to(weight.dtype), base.to(weight.dtype)
        return _step(x, base, shared, factors) if waits else _product(x, base, weight)

    return product


def _product(x: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(base.flatten(0, -2), x.flatten(0, -2), weight.t()).view(base.shape)


class _Gathered(torch.autograd.Function):
    """The matrix itself; its backward runs after that of every step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: _Factors) -> Tensor:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, made: Tensor | None) -> tuple[Tensor | None, None]:
        factors = ctx.factors.take()
        if factors is None:
            return made, None  # as the steps made it
        inputs, gradients = (torch.cat(factor) for factor in zip(*factors, strict=True))
        total = gradients.t() @ inputs
        return total if made is None else made + total, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, weight: Tensor, factors: _Factors) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return _product(x, base, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_weight, rows = None, (x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        if made_anew(gradient):
            of_weight = rows[1].t() @ rows[0] if ctx.needs_input_grad[2] else None
        # Not where other gradients alone were asked for: nobody would take the factors.
        elif ctx.needs_input_grad[2] and torch._C._will_engine_execute_node(ctx.next_functions[2][0]):
            ctx.factors.of(list).append(rows)
        return gradient @ weight if ctx.needs_input_grad[0] else None, gradient, of_weight, None


class _LSTM(torch.autograd.Function):
    """h' and c, each (..., S), of gates (..., 4 S) in the order input, forget, output, candidate, and the last c; no
    second derivatives."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        size = cell.shape[-1]
        active = torch.cat((gates[..., : 3 * size].sigmoid(), gates[..., 3 * size :].tanh()), -1)
        keep_new, keep_old, show, candidate = active.chunk(4, -1)
        new = torch.addcmul(keep_old * cell, keep_new, candidate)
        shown = new.tanh()
        ctx.save_for_backward(active, cell, shown)
        return show * shown, new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: Tensor, of_new: Tensor) -> tuple[Tensor, Tensor]:
        active, cell, shown = ctx.saved_tensors
        keep_new, keep_old, show, candidate = active.chunk(4, -1)
        size = cell.shape[-1]
        of_new = of_new + torch.ops.aten.tanh_backward(of_hidden * show, shown)
        factors = torch.cat((of_new * candidate, of_new * cell, of_hidden * shown, of_new * keep_new), -1)
        of_gates = torch.empty_like(active)
        torch.ops.aten.sigmoid_backward(
            factors[..., : 3 * size], active[..., : 3 * size], grad_input=of_gates[..., : 3 * size]
        )
        torch.ops.aten.tanh_backward(factors[..., 3 * size :], candidate, grad_input=of_gates[..., 3 * size :])
        return of_gates, of_new * keep_old


# As mypy sees them: torch's apply has no types.
_gathered: Callable[[Tensor, _Factors], Tensor] = _Gathered.apply
_step: Callable[[Tensor, Tensor, Tensor, _Factors], Tensor] = _Step.apply
_activate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _LSTM.apply


def _lstm(gates: Tensor, recurrent: Product, bias: None, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    return _activate(recurrent(hidden, gates).to(cell.dtype), cell)


def _gru(gates: Tensor, recurrent: Product, bias: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """As in :class:`torch.nn.GRU`, the reset gate multiplies the projected state, its bias included."""
    size = hidden.shape[-1]
    projected = recurrent(hidden, bias.expand_as(gates))
    reset, update = (gates[..., : 2 * size] + projected[..., : 2 * size]).sigmoid().chunk(2, -1)
    candidate = torch.addcmul(gates[..., 2 * size :], reset, projected[..., 2 * size :]).tanh()
    return (torch.lerp(candidate.to(hidden.dtype), hidden, update.to(hidden.dtype)),)


class Cell(NamedTuple):
    """A recurrent unit.

    Attributes:
        encoder: the layers for whole sequences.
        step: from what the inputs add to the gates (N, gates S), the product with the recurrent matrix (gates S, S),
            its bias and the last state to the next state, whose first tensor is the output.
        gates: rows of the matrices, in units of the size.
        states: tensors of a state.
        recurrent_bias: whether the recurrent matrix needs a bias of its own.
    """

    encoder: type[GRU] | type[LSTM]
    step: Callable[..., tuple[Tensor, ...]]
    gates: int
    states: int
    recurrent_bias: bool


CELLS = {
    "gru": Cell(GRU, _gru, gates=3, states=1, recurrent_bias=True),
    "lstm": Cell(LSTM, _lstm, gates=4, states=2, recurrent_bias=False),
}
