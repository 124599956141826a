"""``torch.nn.GRU`` and ``torch.nn.LSTM`` whose steps are one call.

The formulas are those of torch's documentation: long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget
gate, and the gated recurrent unit (Cho et al., 2014) whose reset gate multiplies the projected state.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from attnext import _checks
from attnext.backends import choose
from attnext.backends.cpu import rounds_products
from attnext.recurrent._layer import Direction, layer

__all__ = ["GRU", "LSTM", "GatedLayers", "MemoryLayers"]

_SERVED = (torch.float32, torch.float64)
_State = tuple[Tensor, ...]
"""(layers directions, B, S): hidden, and of an LSTM the cells."""


class _Layers(nn.RNNBase):
    """What both have in common."""

    _tensors: int
    """Of a state."""

    @property
    def _weights(self) -> list[Tensor]:
        """As torch keeps them: by layer and direction, of the input, of the state, and then their biases."""
        return cast(list[Tensor], self._flat_weights)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's own; see there.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I); or a packed sequence.
            hx: the first states (layers directions, B, S), without B for (T, I); a pair of them for an LSTM.

        Returns:
            output, as ``input`` with directions S features, and the last states, as ``hx``.
        """
        of_names, known = self._parameters, zip(self._flat_weights_names, self._flat_weights, strict=True)
        if not all(of_names.get(name) is weight for name, weight in known):  # else that call does nothing, at length
            self._update_flat_weights()
        packed = isinstance(input, PackedSequence)
        data: Any = input.data if packed else input
        state = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if packed:
            self._check_packed(input, state)
        fits = hx is None or isinstance(hx, Tensor) == (self._tensors == 1)
        if not (fits and self._serves(input, data, state)):
            return super().forward(input, hx)
        if packed:
            batch_sizes = input.batch_sizes
            batch = int(batch_sizes[0]) if not state else state[0].shape[1]
            state = tuple(_permuted(x, input.sorted_indices) for x in state)
        else:
            if single := data.dim() == 2:
                data, state = data.unsqueeze(1), tuple(x.unsqueeze(1) for x in state)
            elif self.batch_first:
                data = data.transpose(0, 1)
            steps, batch = data.shape[:2]
            batch_sizes, data = torch.full((steps,), batch, dtype=torch.int64), data.reshape(steps * batch, -1)
        rows, state = self._run(data, batch_sizes, state, batch)
        output: Any
        if packed:
            state = tuple(_permuted(x, input.unsorted_indices) for x in state)
            output = PackedSequence(rows, batch_sizes, input.sorted_indices, input.unsorted_indices)
        elif single:
            output, state = rows, tuple(x.squeeze(1) for x in state)
        else:
            output = rows.view(steps, batch, -1)
            output = output.transpose(0, 1) if self.batch_first else output
        return output, state[0] if self._tensors == 1 else state

    def _serves(self, input: Any, data: Tensor, state: _State) -> bool:
        """Whether the operator takes these; the rest, what is wrong included, is left to torch's own code."""
        packed, weights = data is not input, self._weights
        looked_at = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if self.proj_size or looked_at or _checks.in_transforms():
            return False
        if not isinstance(data, Tensor) or data.dim() not in ((2,) if packed else (2, 3)) or not data.numel():
            return False
        batch = input.batch_sizes[0] if packed else 1 if data.dim() == 2 else data.shape[0 if self.batch_first else 1]
        leading = self.num_layers * (2 if self.bidirectional else 1)
        sizes = (leading, self.hidden_size) if data.dim() == 2 and not packed else (leading, batch, self.hidden_size)
        dtype = weights[0].dtype
        cast = _checks.autocasts("cpu")
        fits = [x.dtype == dtype or (cast and x.dtype == torch.bfloat16) for x in (data, *state)]
        return (
            data.shape[-1] == self.input_size
            and dtype in _SERVED
            and all(fits)
            and all(x.dtype == dtype for x in weights)
            and all(x.is_cpu for x in (data, *state, *weights))
            and len(state) in (0, self._tensors)
            and all(tuple(x.shape) == sizes for x in state)
            and choose(None, "cpu", dtype) == "cpu"
        )

    def _run(self, data: Tensor, batch_sizes: Tensor, state: _State, batch: int) -> tuple[Tensor, _State]:
        """All layers over packed rows; under autocast in the parameters' dtype, but for products over all steps."""
        dtype = self._weights[0].dtype
        if not _checks.autocasts("cpu"):
            return self._through(data, batch_sizes, state, batch)
        wanted, half = self._dtype_under_autocast(data, batch_sizes, state), rounds_products(dtype)
        with torch.autocast("cpu", enabled=False):
            state = tuple(x.to(dtype) for x in state)
            output, state = self._through(data.to(dtype), batch_sizes, state, batch, half)
        return output.to(wanted), tuple(x.to(wanted) for x in state)

    def _through(
        self, data: Tensor, batch_sizes: Tensor, state: _State, batch: int, half: bool = False
    ) -> tuple[Tensor, _State]:
        directions, each = 2 if self.bidirectional else 1, 4 if self.bias else 2
        if not state:
            zeros = data.new_zeros(self.num_layers * directions, batch, self.hidden_size)
            state = (zeros,) * self._tensors
        last: list[_State] = []
        for k in range(self.num_layers):
            if k and self.dropout and self.training:
                data = F.dropout(data, self.dropout)
            weights = self._weights[k * directions * each : (k + 1) * directions * each]
            of = [weights[d * each : (d + 1) * each] for d in range(directions)]
            hidden, *cell = (x[k * directions : (k + 1) * directions] for x in state)
            both = [Direction(*x, *(None,) * (4 - each)) for x in of]
            data, *ended = layer(data, batch_sizes, hidden, cell[0] if cell else None, both, half)
            last.append(tuple(ended))
        return data, tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*last, strict=True))

    def _check_packed(self, input: PackedSequence, state: _State) -> None:
        """What torch's own code for packed sequences doesn't see."""

    def _dtype_under_autocast(self, data: Tensor, batch_sizes: Tensor, state: _State) -> torch.dtype:
        """Of the results, as torch's own have it."""
        return (*state, data)[0].dtype


class GatedLayers(_Layers):
    """What makes a GRU of torch's call the operator."""

    _tensors = 1


class MemoryLayers(_Layers):
    """What makes an LSTM of torch's call the operator."""

    _tensors = 2

    def _check_packed(self, input: PackedSequence, state: _State) -> None:
        if input.data.dtype != self._weights[0].dtype:
            return
        self.check_input(input.data, input.batch_sizes)
        if len(state) == self._tensors:
            self.check_forward_args(input.data, (state[0], state[1]), input.batch_sizes)  # type: ignore[arg-type]

    def _dtype_under_autocast(self, data: Tensor, batch_sizes: Tensor, state: _State) -> torch.dtype:
        of_torch = data.dtype != torch.float64 and bool(batch_sizes[-1] == batch_sizes[0])
        return torch.get_autocast_dtype("cpu") if of_torch else (*state[1:], data)[0].dtype


class GRU(GatedLayers, nn.GRU):
    """:class:`torch.nn.GRU`, with the same parameters, arguments, results and ``state_dict``, faster on the CPU.

    float32 and float64; what else there is (other dtypes and devices, ``torch.func``, ``torch.jit``, export) runs
    torch's own code, and so do second derivatives. ``torch.compile`` breaks its graph here, as at torch's own. Under
    autocast of bfloat16 products over all steps are of that where the processor has instructions for it.
    """


class LSTM(MemoryLayers, nn.LSTM):
    """:class:`torch.nn.LSTM`, with the same parameters, arguments, results and ``state_dict``, faster on the CPU.

    float32 and float64; what else there is (other dtypes and devices, ``proj_size``, ``torch.func``, ``torch.jit``,
    export) runs torch's own code, and so do second derivatives. ``torch.compile`` breaks its graph here, as at torch's
    own. Under autocast of bfloat16 products over all steps are of that where the processor has instructions for it.
    """


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)
