"""One layer of recurrent units over a packed batch: an operator for the steps, matrix products around it.

What the inputs add to the gates, and the gradients of the matrices, are each one product over all steps; only what
depends on the step before is left to the operator. A packed batch has the rows of a step together, those of the
sequences that reach it, longest first (:class:`torch.nn.utils.rnn.PackedSequence`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attnext.ops import define

__all__ = ["Direction", "layer"]

_LAYER = "Tensor weight, Tensor? bias, Tensor? reverse_weight, Tensor? reverse_bias, Tensor hidden, Tensor? cell, "
_SCHEMA = (
    f"(Tensor gates, Tensor? reverse_gates, {_LAYER}Tensor batch_sizes, bool keep) -> "
    "(Tensor output, Tensor last_hidden, Tensor last_cell, Tensor kept)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor? grad_output, Tensor? grad_hidden, Tensor? grad_cell, {_LAYER}Tensor batch_sizes, Tensor output, "
    "Tensor kept) -> (Tensor grad_gates, Tensor previous, Tensor grad_bias, Tensor grad_hidden, Tensor grad_cell)"
)


class Direction(NamedTuple):
    """The parameters of a layer in one direction, of G gates and S units: (G S, I), (G S, S) and twice (G S,)."""

    w_input: Tensor
    w_hidden: Tensor
    b_input: Tensor | None
    b_hidden: Tensor | None


def _fake(gates: Tensor, reverse_gates: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    hidden, cell, _, keep = others[4:]
    (directions, _, size), rows = hidden.shape, gates.shape[0]
    output = gates.new_empty(rows, directions * size)
    kept = gates.new_empty((directions, rows, (4 if cell is None else 5) * size) if keep else 0)
    return output, hidden.new_empty(hidden.shape), hidden.new_empty(0 if cell is None else hidden.shape), kept


def _fake_backward(_: Any, __: Any, ___: Any, *others: Any) -> tuple[Tensor, ...]:
    hidden, cell, _, output, _ = others[4:]
    (directions, _, size), rows = hidden.shape, output.shape[0]
    return (
        output.new_empty(directions, rows, 4 * size),
        output.new_empty(directions, rows, size),
        output.new_empty(directions, 4 * size),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(0 if cell is None else hidden.shape),
    )


_forward: Callable[..., tuple[Tensor, ...]] = define("recurrent_layer_cpu", _SCHEMA, _fake)
_backward: Callable[..., tuple[Tensor, ...]] = define("recurrent_layer_backward_cpu", _BACKWARD_SCHEMA, _fake_backward)


def _both(directions: list[Direction]) -> tuple[Tensor | None, ...]:
    """The recurrent parameters as the operators take them."""
    one, other = directions[0], directions[1] if len(directions) > 1 else None
    return one.w_hidden, one.b_hidden, other and other.w_hidden, other and other.b_hidden


def _directions(parameters: tuple[Any, ...]) -> list[Direction]:
    return [Direction(*parameters[k : k + 4]) for k in range(0, len(parameters), 4)]


class _Layer(torch.autograd.Function):
    """The layer with its products; no second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, hidden: Tensor, cell: Tensor | None, batch_sizes: Tensor, keep: bool, *parameters: Any
    ) -> tuple[Tensor, ...]:
        directions = _directions(parameters)
        gates = [F.linear(x, one.w_input, one.b_input) for one in directions]
        output, last_hidden, last_cell, kept = _forward(
            gates[0], gates[1] if len(gates) > 1 else None, *_both(directions), hidden, cell, batch_sizes, keep
        )
        ctx.save_for_backward(x, hidden, cell, batch_sizes, output, kept, *parameters)
        ctx.set_materialize_grads(False)
        return (output, last_hidden) if cell is None else (output, last_hidden, last_cell)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        x, hidden, cell, batch_sizes, output, kept, *parameters = ctx.saved_tensors
        directions = _directions(tuple(parameters))
        grad_output, grad_hidden, grad_cell = (*incoming, None)[:3]
        if all(grad is None for grad in incoming):
            return (None,) * (5 + len(parameters))
        grad_gates, previous, grad_bias, of_hidden, of_cell = _backward(
            grad_output, grad_hidden, grad_cell, *_both(directions), hidden, cell, batch_sizes, output, kept
        )
        of_x, of_parameters = None, []
        for k, one in enumerate(directions):
            wanted = ctx.needs_input_grad[5 + 4 * k : 9 + 4 * k]
            of_parameters += _of_direction(grad_gates[k], grad_bias[k], x, previous[k], cell is None, wanted)
            if ctx.needs_input_grad[0]:
                gates = _of_input(grad_gates[k], cell is None)
                of_x = gates @ one.w_input if of_x is None else torch.addmm(of_x, gates, one.w_input)
        return of_x, of_hidden, None if cell is None else of_cell, None, None, *of_parameters


def _of_input(gates: Tensor, gated: bool) -> Tensor:
    """Of the gradients of the gates (..., 4 S) those of what the inputs add: a gated unit's first is of the states'."""
    return gates[..., gates.shape[-1] // 4 :] if gated else gates


def _of_direction(
    gates: Tensor, bias: Tensor, x: Tensor, previous: Tensor, gated: bool, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the parameters, those that are wanted."""
    of_input, size = _of_input(gates, gated), previous.shape[1]
    w_input = of_input.t() @ x if wanted[0] else None
    w_hidden = None
    if wanted[1] and not gated:
        w_hidden = gates.t() @ previous
    elif wanted[1]:  # the candidate's comes first, and is the last of the matrix
        w_hidden = torch.cat((gates[:, size : 3 * size].t() @ previous, gates[:, :size].t() @ previous))
    b_hidden = torch.cat((bias[size : 3 * size], bias[:size])) if gated else bias.clone()
    return [
        w_input, w_hidden, _of_input(bias, gated).clone() if wanted[2] else None, b_hidden if wanted[3] else None
    ]  # fmt: skip


def layer(
    x: Tensor, batch_sizes: Tensor, hidden: Tensor, cell: Tensor | None, directions: list[Direction]
) -> tuple[Tensor, ...]:
    """The states of a layer and the last of each sequence.

    Args:
        x: (rows, I), packed: the rows of each step together.
        batch_sizes: (T,) int64 on the CPU, how many sequences reach each step; B first, and none growing.
        hidden, cell: (directions, B, S), before the first step; without a cell they are gated units (GRU).
        directions: forward, and backward where there is a second.

    Returns:
        output (rows, directions S), last hidden states (directions, B, S) and of an LSTM the last cells.
    """
    parameters = [parameter for one in directions for parameter in one]
    keep = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, hidden, cell, *parameters))
    results: tuple[Tensor, ...] = _Layer.apply(x, hidden, cell, batch_sizes, keep, *parameters)  # type: ignore[no-untyped-call]
    return results
