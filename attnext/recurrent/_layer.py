"""One layer of recurrent units over a packed batch, one operator forward and one backward.

A packed batch has the rows of a step together, those of the sequences that reach it, longest first
(:class:`torch.nn.utils.rnn.PackedSequence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnext.ops import define

__all__ = ["Direction", "layer"]


class Direction(NamedTuple):
    """The parameters of a layer in one direction, of G gates and S units: (G S, I), (G S, S) and twice (G S,)."""

    w_input: Tensor
    w_hidden: Tensor
    b_input: Tensor | None
    b_hidden: Tensor | None


_PARAMETERS = ("Tensor{} w_input", "Tensor{} w_hidden", "Tensor? b_input", "Tensor? b_hidden")
_LAYER = ", ".join(
    (
        "Tensor x, Tensor hidden, Tensor? cell, Tensor batch_sizes",
        *(one.format("") for one in _PARAMETERS),
        *(one.format("?").replace(" ", " reverse_") for one in _PARAMETERS),
        "bool half",
    )
)
_SCHEMA = f"({_LAYER}, bool keep) -> (Tensor, Tensor, Tensor, Tensor gates, Tensor reverse_gates, Tensor inner)"
_BACKWARD_SCHEMA = (
    f"(Tensor? grad_output, Tensor? grad_hidden, Tensor? grad_cell, {_LAYER}, Tensor gates, "
    f"Tensor reverse_gates, Tensor inner, int wanted) -> ({', '.join(['Tensor'] * 11)})"
)


def _fake(x: Tensor, hidden: Tensor, cell: Tensor | None, _sizes: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *parameters, _half, keep = others
    (directions, _, size), rows = hidden.shape, x.shape[0]
    gates = (rows, parameters[1].shape[0])
    return (
        x.new_empty(rows, directions * size),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(0 if cell is None else hidden.shape),
        x.new_empty(gates if keep else 0),
        x.new_empty(gates if keep and directions == 2 else 0),
        x.new_empty((directions, rows, 2 * size) if keep else 0),
    )


def _fake_backward(_: Any, __: Any, ___: Any, x: Tensor, hidden: Tensor, cell: Any, *others: Any) -> tuple[Tensor, ...]:
    _sizes, *parameters, _half, _gates, _reverse, _inner, wanted = others
    return (
        x.new_empty(x.shape if wanted & 1 else 0),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(0 if cell is None else hidden.shape),
        *(x.new_empty(y.shape if y is not None and wanted >> k & 1 else 0) for k, y in enumerate(parameters, 1)),
    )


_forward: Callable[..., tuple[Tensor, ...]] = define("recurrent_layer_cpu", _SCHEMA, _fake)
_backward: Callable[..., tuple[Tensor, ...]] = define("recurrent_layer_backward_cpu", _BACKWARD_SCHEMA, _fake_backward)


class _Layer(torch.autograd.Function):
    """The operators."""

    @staticmethod
    def forward(ctx: Any, half: bool, keep: bool, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        output, last_hidden, last_cell, *kept = _forward(*inputs, half, keep)
        ctx.half = half
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        return (output, last_hidden) if inputs[2] is None else (output, last_hidden, last_cell)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in incoming):
            return (None,) * 14
        needs, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
        inputs, kept = saved[:12], saved[12:]
        if torch.is_grad_enabled():  # what comes may be differentiated again
            return None, None, *_by_torch(inputs, incoming, needs)
        wanted = sum(1 << k for k, needed in enumerate((needs[0], *needs[4:])) if needed)
        grads = _backward(*(*incoming, None)[:3], *inputs, ctx.half, *kept, wanted)
        found = (*grads[:3], None, *grads[3:])
        return None, None, *(grad if needed else None for grad, needed in zip(found, needs, strict=True))


# As mypy sees it: torch's apply has no types.
_applied: Callable[..., tuple[Tensor, ...]] = _Layer.apply


def _by_torch(
    inputs: Sequence[Tensor | None], incoming: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the inputs by torch's own operations, which can be differentiated to any order.

    In float64, for which torch has no layer of oneDNN's, as that has no second derivative.
    """
    with torch.enable_grad():
        apart = [None if x is None else x.view_as(x) for x in inputs]
        x, hidden, cell, batch_sizes, *parameters = (
            y.double() if y is not None and y.is_floating_point() else y for y in apart
        )
        state = hidden if cell is None else (hidden, cell)
        run: Any = torch._VF.gru if cell is None else torch._VF.lstm
        weights = [y for y in parameters if y is not None]
        results = run(
            x, batch_sizes, state, weights, parameters[2] is not None, 1, 0.0, False, parameters[4] is not None
        )
        pairs = [(y, grad.double()) for y, grad in zip(results, incoming, strict=True) if grad is not None]
        followed = [y for y, needed in zip(apart, needs, strict=True) if y is not None and needed]
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, followed, grads, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


def layer(
    x: Tensor, batch_sizes: Tensor, hidden: Tensor, cell: Tensor | None, directions: list[Direction], half: bool = False
) -> tuple[Tensor, ...]:
    """The states of a layer and the last of each sequence.

    Args:
        x: (rows, I), packed: the rows of each step together.
        batch_sizes: (T,) int64 on the CPU, how many sequences reach each step; B first, and none growing.
        hidden, cell: (directions, B, S), before the first step; without a cell they are gated units (GRU).
        directions: forward, and backward where there is a second.
        half: of float32, round products over all steps, and their factors, to bfloat16.

    Returns:
        output (rows, directions S), last hidden states (directions, B, S) and of an LSTM the last cells.
    """
    parameters = [parameter for one in directions for parameter in one]
    inputs = (x, hidden, cell, batch_sizes, *parameters, *(None,) * (8 - len(parameters)))
    keep = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in inputs)
    if not keep:
        return _forward(*inputs, half, keep)[: 2 if cell is None else 3]
    return _applied(half, keep, *inputs)
