"""Decoders that attend: recurrent layers with attention in the loop, called as an encoder is.

With h_j the states of an encoder, h'_t those of the decoder and y_t its inputs:

    a step that attends first    C_t = sum_j a_tj h_j of the query h'_{t-1},  h'_t = f(h'_{t-1}, [y_t; C_t])
    a step that attends last     h'_t = f(h'_{t-1}, [y_t; C_{t-1}]),  C_t = sum_j a_tj h_j of the query h'_t

f are gated units (Cho et al., 2014) or long short-term memory (Hochreiter and Schmidhuber, 1997), of one layer or
several; of several the topmost asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext import _checks
from attnext.attention.base import StepParts, has_global_hooks, has_own_hooks, plain_layer
from attnext.attention.past import Past
from attnext.backends import choose
from attnext.backends.cpu import rounds_products
from attnext.memory import Memory
from attnext.recurrent._decoder import decode
from attnext.recurrent._operators import Layer, Results, Start, Weights
from attnext.recurrent._ready import Output
from attnext.recurrent.opened import OpenedDecoder
from attnext.recurrent.state import DecoderState

__all__ = ["AttentiveGRU", "AttentiveLSTM"]

_ORDERS = ("before", "after")


class _Ahead(NamedTuple):
    """The inputs of steps, and what they add to the lowest layer's gates and to the output vector."""

    inputs: Tensor
    gates: Tensor
    vectors: Tensor | None


class _AttentiveLayers(nn.Module, ABC):
    """What both have in common."""

    _gates: int
    """Rows of a matrix, in units of the size."""
    _has_cell: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        attention: nn.Module,
        num_layers: int = 1,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        attend: str = "before",
        vector_size: int | None = None,
        input_feeding: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = _checks.at_least_one("input_size", input_size)
        self.hidden_size = _checks.at_least_one("hidden_size", hidden_size)
        self.num_layers = _checks.at_least_one("num_layers", num_layers)
        self.dropout = _checks.probability("dropout", dropout)
        self.attend = _checks.choice("attend", attend, _ORDERS)
        self.vector_size = None if vector_size is None else _checks.at_least_one("vector_size", vector_size)
        self.input_feeding = _checks.flag("input_feeding", input_feeding)
        if input_feeding and vector_size is None:
            raise ValueError("input_feeding needs a vector_size: the output vector is what enters the next step")
        self.context_size = self._context_size(attention)
        self.attention: Any = attention
        self.bias = _checks.flag("bias", bias)
        rows = self._gates * hidden_size
        context, vector = self.context_size if self._feeds_context else 0, vector_size if input_feeding else 0
        for k in range(num_layers):
            inputs = input_size + context + (vector or 0) if k == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{k}", nn.Parameter(torch.empty(rows, inputs)))
            self.register_parameter(f"weight_hh_l{k}", nn.Parameter(torch.empty(rows, hidden_size)))
            for name in ("bias_ih", "bias_hh"):
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(rows)) if bias else None)
        joined = input_size + hidden_size + self.context_size
        self.readout = None if self.vector_size is None else nn.Linear(joined, self.vector_size)
        self._reset_layers()

    def _context_size(self, attention: Any) -> int:
        """H, of an attention whose queries are states."""
        for name in ("prepare", "step", "query_size", "memory_size"):
            if not hasattr(attention, name):
                raise TypeError(f"attention must be one of attnext's modules, got {type(attention).__name__}")
        if attention.query_size != self.hidden_size:
            raise ValueError(
                f"attention must have query_size={self.hidden_size}, as hidden_size, got {attention.query_size}"
            )
        size: int = attention.memory_size
        return size

    @property
    def _after(self) -> bool:
        return self.attend == "after"

    @property
    def _feeds_context(self) -> bool:
        """Whether the context enters the layers: not where the output vector does that is made of the same one."""
        return not (self._after and self.input_feeding)

    def _reset_layers(self) -> None:
        bound = self.hidden_size**-0.5
        for layer in self._layers():
            for x in layer:
                if x is not None:
                    nn.init.uniform_(x, -bound, bound)

    def reset_parameters(self) -> None:
        """Draws the parameters anew: of the layers uniform within 1/sqrt(S), of attention and readout as they do."""
        self._reset_layers()
        self.attention.reset_parameters()
        if self.readout is not None:
            self.readout.reset_parameters()

    def extra_repr(self) -> str:
        rest = "" if self.vector_size is None else f", vector_size={self.vector_size}"
        rest += ", input_feeding=True" if self.input_feeding else ""
        rest += f", dropout={self.dropout}" if self.dropout else ""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, attend={self.attend!r}{rest}"

    # ------------------------------------------------------------------------------------------------- what is called

    def prepare(
        self,
        encoder_states: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Memory:
        """The memory of encoder states (B, Tk, H), as the attention's ``prepare`` makes it."""
        options = {} if dtype is None else {"dtype": dtype}  # of attentions that know none
        memory: Memory = self.attention.prepare(encoder_states, lengths, mask, **options)
        return memory

    def first_state(self, batch: int, beam: int | None = None) -> DecoderState:
        """Zeros, for so many sentences, and so many hypotheses of each."""
        rows = (batch,) if beam is None else (batch, beam)
        like = self._parameter

        def zeros(*sizes: int) -> Tensor:
            return like.new_zeros(sizes)

        return DecoderState(
            zeros(self.num_layers, *rows, self.hidden_size),
            zeros(self.num_layers, *rows, self.hidden_size) if self._has_cell else None,
            zeros(*rows, self.context_size) if self._after and self._feeds_context else None,
            zeros(*rows, self.vector_size) if self.vector_size is not None and self.input_feeding else None,
        )

    def forward(
        self, inputs: Tensor, memory: Any, state: DecoderState | None = None, *, need_weights: bool = False
    ) -> tuple[Any, ...]:
        """Goes through all steps, given the inputs of each (teacher forcing).

        Args:
            inputs: (B, T, E), of one step at least.
            memory: what :meth:`prepare` returned.
            state: what there was before; zeros by default.
            need_weights: also return the attention's weights.

        Returns:
            The topmost layer's states (B, T, S), or with ``vector_size`` the output vectors (B, T, R); the contexts
            (B, T, H); the state after the last step; and if asked for the weights (B, T, Tk).

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        inputs = _checks.tensor("inputs", inputs, 3)
        state = self._checked(inputs, state, "inputs")
        if inputs.shape[1] == 0:
            raise ValueError("inputs must have at least one step, got shape " + str(tuple(inputs.shape)))
        _checks.flag("need_weights", need_weights)
        parts = self._parts(inputs, memory, state)
        if parts is not None:
            found = self._at_once(inputs.transpose(0, 1), memory, state, parts, need_weights)
        else:
            found = self._one_by_one(inputs, memory, state, need_weights)
        return found if need_weights else found[:3]

    def step(
        self, input: Tensor, memory: Any, state: DecoderState | None = None, *, need_weights: bool = False
    ) -> tuple[Any, ...]:
        """One step; see :meth:`opened` for many.

        Args:
            input: (B, E), or (B, beam, E) for hypotheses that share the memory.
            memory: what :meth:`prepare` returned.
            state: what the last step returned, or :meth:`forward`; zeros by default.
            need_weights: also return the attention's weights.

        Returns:
            As :meth:`forward`, of one step: (B, S) or (B, R), or with a beam (B, beam, S), and so on.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        found = self._step(input, memory, state, need_weights)
        return found if need_weights else found[:3]

    def opened(
        self, table: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> OpenedDecoder:
        """:meth:`step` for the steps of a search, faster: in evaluation mode it reads the matrices once, here.

        No gradient flows through it. Call it anew when a parameter, the mode or the backend has changed.

        Args:
            table: (V, E), the inputs that there are, as the weight of an embedding. A step then takes their numbers,
                int64 (B,) or (B, beam), in place of vectors.
            weight, bias: (V, S), or (V, R) with ``vector_size``, and (V,): of the layer that gives logits of as many
                symbols, for :meth:`OpenedDecoder.greedy`.

        Raises:
            TypeError, ValueError: an argument is not that.
        """
        output = None
        if table is not None:
            table = _checks.tensor("table", table, 2)
            _checks.size("table", table, 1, self.input_size, "input_size")
            _checks.same_kind_as_module("table", table, self._parameter)
        if weight is not None:
            size, name = (
                (self.hidden_size, "hidden_size") if self.vector_size is None else (self.vector_size, "vector_size")
            )
            weight = _checks.tensor("weight", weight, 2)
            _checks.size("weight", weight, 1, size, name)
            _checks.same_kind_as_module("weight", weight, self._parameter)
            if table is None:
                raise ValueError("weight needs a table: what is chosen is the next step's input")
            _checks.size("weight", weight, 0, len(table), "table")
            if bias is not None:
                bias = _checks.tensor("bias", bias, 1)
                _checks.size("bias", bias, 0, len(weight), "weight")
                _checks.same_kind_as_module("bias", bias, self._parameter)
            output = Output(weight.detach(), None if bias is None else bias.detach())
        elif bias is not None:
            raise ValueError("bias needs a weight")
        return OpenedDecoder(self, table, output)

    # --------------------------------------------------------------------------------------------------- how it works

    def _step(self, input: Tensor, memory: Any, state: DecoderState | None, need_weights: bool) -> tuple[Any, ...]:
        input = _checks.tensor("input", input, 2, 3)
        state = self._checked(input, state, "input")
        _checks.flag("need_weights", need_weights)
        parts = self._parts(input, memory, state)
        if parts is None:
            return self._one(self._ahead(input), memory, state, need_weights)
        steps = input.reshape(1, -1, input.shape[-1])
        found, of_step, state, of_weights = self._at_once(steps, memory, state, parts, need_weights)
        output, context, weights = (
            None if x is None else x.view(*input.shape[:-1], x.shape[-1]) for x in (found, of_step, of_weights)
        )
        return output, context, state, weights

    @property
    def _parameter(self) -> Tensor:
        found = self._parameters.get("weight_ih_l0")
        if found is None:  # of a parametrization
            of_another: Any = self.weight_ih_l0
            return cast(Tensor, of_another)
        return found

    def _checked(self, inputs: Tensor, state: Any, name: str) -> DecoderState:
        """The state, once inputs and state fit the module: ``input`` of a step, or the ``inputs`` of all."""
        _checks.size(name, inputs, -1, self.input_size, "input_size")
        _checks.same_kind_as_module(name, inputs, self._parameter)
        beam = inputs.shape[1] if name == "input" and inputs.dim() == 3 else None
        rows = (inputs.shape[0],) if beam is None else (inputs.shape[0], beam)
        if state is None:
            return self.first_state(*rows)
        if not isinstance(state, DecoderState):
            raise TypeError(f"state must be None or a DecoderState, got {type(state).__name__}")
        wanted = {
            "hidden": (self.num_layers, *rows, self.hidden_size),
            "cell": (self.num_layers, *rows, self.hidden_size) if self._has_cell else None,
            "context": (*rows, self.context_size) if self._after and self._feeds_context else None,
            "vector": (*rows, self.vector_size) if self.input_feeding else None,
        }
        for field, shape in wanted.items():
            x = getattr(state, field)
            got = None if x is None else tuple(x.shape)
            if got != shape:
                raise ValueError(f"state must have {field} of shape {shape}, got {got}")
            if x is not None:
                _checks.same_kind_as_module(f"state.{field}", x, self._parameter)
        return state

    def _parts(self, inputs: Tensor, memory: Any, state: DecoderState) -> StepParts | None:
        """What the attention is made of, where the operator serves a call; None where its steps go one by one."""
        if not isinstance(memory, Memory) or memory.heads > 1 or inputs.numel() == 0 or memory.key.numel() == 0:
            return None
        parts = self._served_parts()
        return parts if parts is not None and self._fits(parts, inputs, memory, state) else None

    def _served_parts(self) -> StepParts | None:
        """The same of the module alone."""
        like, attention = self._parameter, self.attention
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _checks.in_transforms():
            return None
        if like.dtype not in (torch.float32, torch.float64) or like.device.type != "cpu" or has_global_hooks():
            return None
        if choose(None, "cpu", like.dtype) != "cpu" or has_own_hooks(attention):
            return None
        if "forward" in attention.__dict__ or "step" in attention.__dict__ or attention._compiled_call_impl is not None:
            return None
        if self.readout is not None and plain_layer(self, "readout") is None:
            return None
        parts: StepParts | None = attention._step_parts() if hasattr(attention, "_step_parts") else None
        return parts

    def _fits(self, parts: StepParts, inputs: Tensor, memory: Memory, state: DecoderState) -> bool:
        """Whether the memory is such an attention's; what is not is left to its own checks."""
        size = self.hidden_size if parts.weight is None else parts.weight.shape[0]
        slots = (*inputs.shape[: state.hidden.dim() - 2], memory.key.shape[1])
        past = state.attention
        fits_past = past is None or (
            parts.score == "past" and isinstance(past, Past) and past.weights.shape == past.cumulative.shape == slots
        )
        return (
            memory.key.shape[0] == inputs.shape[0]
            and memory.key.shape[2] == size
            and memory.value.shape[2] == self.context_size
            and (memory.score_weight is None) == (parts.score == "dot")
            and (memory.score_weight is None or memory.score_weight.dim() == 1)
            and (memory.mask is None or memory.mask.dim() == 2)
            and (self._takes(memory, inputs.dtype) or _checks.autocasts("cpu"))
            and fits_past
            and (memory.prepared is None or memory.prepared.backend == "cpu")
        )

    def _takes(self, memory: Memory, dtype: torch.dtype) -> bool:
        """Whether the operator takes its dtypes: one that is held in a half type without gradients."""
        held = dtype == torch.float32 and memory.key.dtype in _checks.HALVES and not torch.is_grad_enabled()
        return memory.value.dtype == memory.key.dtype and (memory.key.dtype == dtype or held)

    def _layers(self) -> list[Layer]:
        found: Any = self._parameters

        def parameter(name: str) -> Any:
            return found[name] if name in found else getattr(self, name)  # of a parametrization

        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [Layer._make(parameter(f"{name}_l{k}") for name in names) for k in range(self.num_layers)]

    def _weights(self, parts: StepParts, vectors: bool) -> Weights:
        """Those, with the readout if the operator is to make the output vectors."""
        readout = self.readout if vectors else None
        weight, bias = (None, None) if readout is None else (readout.weight, readout.bias)
        return Weights(self._layers(), weight, bias, parts, self._after, self.input_feeding)

    def _at_once(
        self, steps: Tensor, memory: Memory, state: DecoderState, parts: StepParts, need_weights: bool
    ) -> tuple[Tensor, Tensor, DecoderState, Tensor | None]:
        """The steps (T, N, E) by the operator; results are (N, T, ...). Under autocast in the parameters' dtype."""
        if not _checks.autocasts("cpu"):
            return self._by_operator(steps.contiguous(), memory, state, parts, need_weights)
        dtype = self._parameter.dtype
        half = rounds_products(dtype)
        with torch.autocast("cpu", enabled=False):
            state = state.map(lambda x, _: x.to(dtype), lambda past: past.map(lambda x: x.to(dtype)))
            steps, memory = steps.to(dtype).contiguous(), memory.to(dtype=dtype)
            return self._by_operator(steps, memory, state, parts, need_weights, half)

    def _by_operator(
        self, steps: Tensor, memory: Memory, state: DecoderState, parts: StepParts, need_weights: bool,
        half: bool = False,
    ) -> tuple[Tensor, Tensor, DecoderState, Tensor | None]:  # fmt: skip
        count, rows = steps.shape[:2]
        masks, seeds = [], None
        if self.training and self.dropout:
            ones = steps.new_ones(count, rows, self.hidden_size)
            masks = [F.dropout(ones, self.dropout) for _ in range(self.num_layers - 1)]
        if parts.dropout > 0.0:
            seeds = torch.randint(2**62, (count,), device=steps.device)
        past, start = self._start(state, memory, parts)
        weights = self._weights(parts, self.input_feeding)
        # A past's weights are its next state.
        found = decode(steps, start, memory, weights, masks, seeds, need_weights or past is not None, half)
        output = found.output
        if self.input_feeding:
            assert found.feeds is not None
            output = found.feeds
        elif self.readout is not None:  # of all steps one product
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                drawn = self.readout(torch.cat((steps, output, found.contexts), -1))
            output = drawn.tanh().to(output.dtype)
        shown = found.weights.transpose(0, 1) if need_weights and found.weights is not None else None
        return output.transpose(0, 1), found.contexts.transpose(0, 1), self._last(found, state, past), shown

    def _start(self, state: DecoderState, memory: Memory, parts: StepParts) -> tuple[Past | None, Start]:
        """The attention's state, and all as the operator takes it, with hypotheses as rows."""
        beam = state.hidden.dim() == 4
        past = state.attention
        if parts.score != "past":
            past = None
        elif past is None:
            past = self.attention._beginning(memory, state.hidden.shape[1:-1])
        elif past.weights.dtype != state.hidden.dtype or past.cumulative.dtype != state.hidden.dtype:
            past = Past(past.weights.to(state.hidden.dtype), past.cumulative.to(state.hidden.dtype))

        def flat(x: Tensor | None) -> Tensor | None:
            return x if x is None or not beam else x.flatten(-3, -2)

        sees = None if past is None or not parts.sees[0] else past.weights
        sees_all = None if past is None or not parts.sees[1] else past.cumulative
        hidden, *others = map(flat, (*state[:4], sees, sees_all))
        assert hidden is not None
        return past, Start(hidden, *others)

    def _last(self, found: Results, state: DecoderState, past: Past | None) -> DecoderState:
        """The state after the last step."""

        def last(x: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if x is None or like is None else x[-1].view(like.shape).clone()

        if past is not None:
            assert found.weights is not None
            weights, before = found.weights.view(-1, *past.weights.shape), past.cumulative
            past = Past(weights[-1].clone(), before + (weights[0] if len(weights) == 1 else weights.sum(0)))
        return DecoderState(
            found.hidden.view(state.hidden.shape),
            None if state.cell is None or found.cell is None else found.cell.view(state.cell.shape),
            last(found.contexts, state.context),
            last(found.feeds, state.vector),
            past,
        )

    def _ahead(self, inputs: Tensor) -> _Ahead:
        """What inputs (..., E) add to the lowest layer's gates and to the output vector: of all steps one product."""
        lowest, size = self._layers()[0], self.input_size
        gates = F.linear(inputs, lowest.w_input[:, :size], lowest.b_input)
        if self.readout is None or plain_layer(self, "readout") is None:
            return _Ahead(inputs, gates, None)
        return _Ahead(inputs, gates, F.linear(inputs, self.readout.weight[:, :size], self.readout.bias))

    def _one_by_one(
        self, inputs: Tensor, memory: Any, state: DecoderState, need_weights: bool
    ) -> tuple[Tensor, Tensor, DecoderState, Tensor | None]:
        of_all = self._ahead(inputs)
        outputs, contexts, weights = [], [], []
        for t in range(inputs.shape[1]):
            ahead = _Ahead._make(None if x is None else x[:, t] for x in of_all)
            output, context, state, of_step = self._one(ahead, memory, state, need_weights)
            outputs.append(output)
            contexts.append(context)
            weights += [] if of_step is None else [of_step]
        stacked = torch.stack(weights, 1) if need_weights else None
        return torch.stack(outputs, 1), torch.stack(contexts, 1), state, stacked

    def _one(
        self, ahead: _Ahead, memory: Any, state: DecoderState, need_weights: bool
    ) -> tuple[Tensor, Tensor, DecoderState, Tensor | None]:
        """A step by the modules, of what its input adds."""
        context, weights, past = state.context, None, state.attention
        if not self._after:
            context, weights, past = self.attention.step(state.hidden[-1], memory, past, need_weights=need_weights)
        fed = [x for x in (context if self._feeds_context else None, state.vector) if x is not None]
        hidden, cell = self._through(ahead.gates, fed, state)
        if self._after:
            context, weights, past = self.attention.step(hidden[-1], memory, past, need_weights=need_weights)
        assert context is not None
        # What autocast has left in its dtype, as the states have it.
        context = context.to(state.hidden.dtype)
        weights = None if weights is None else weights.to(state.hidden.dtype)
        output = hidden[-1] if self.readout is None else self._vector(ahead, hidden[-1], context)
        kept = context if self._after and self._feeds_context else None
        vector = output if self.input_feeding else None
        last = DecoderState(torch.stack(hidden), torch.stack(cell) if cell else None, kept, vector, past)
        return output, context, last, weights

    def _vector(self, ahead: _Ahead, hidden: Tensor, context: Tensor) -> Tensor:
        """The output vector of a step; of a readout that is more than a linear layer by its call."""
        assert self.readout is not None
        if ahead.vectors is None:
            drawn = self.readout(torch.cat((ahead.inputs, hidden, context), -1))
        else:
            weight = self.readout.weight[:, self.input_size :]
            drawn = ahead.vectors + F.linear(torch.cat((hidden, context), -1), weight)
        vector: Tensor = drawn.tanh().to(hidden.dtype)
        return vector

    def _through(self, gates: Tensor, fed: list[Tensor], state: DecoderState) -> tuple[list[Tensor], list[Tensor]]:
        """The states of all layers, of what the input adds to the lowest's gates and what else enters it."""
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        for k, layer in enumerate(self._layers()):
            if k > 0:
                gates = F.linear(F.dropout(hidden[-1], self.dropout, self.training), layer.w_input, layer.b_input)
            elif fed:
                gates = gates + F.linear(torch.cat(fed, -1), layer.w_input[:, self.input_size :])
            last = None if state.cell is None else state.cell[k]
            one, *cell = self._units(gates, F.linear(state.hidden[k], layer.w_hidden, layer.b_hidden),
                                     state.hidden[k], last)  # fmt: skip
            hidden.append(one)
            cells.extend(cell)
        return hidden, cells

    @abstractmethod
    def _units(self, gates: Tensor, projected: Tensor, hidden: Tensor, cell: Tensor | None) -> tuple[Tensor, ...]:
        """The next state of a layer, of what inputs and the last state add to its gates."""


class AttentiveGRU(_AttentiveLayers):
    """Gated recurrent units that attend a memory at every step.

    By default as Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate",
    2015: the last state asks, and the context enters the step. The units are :class:`torch.nn.GRU`'s.

    Args:
        input_size: size E of an input, as an embedded symbol.
        hidden_size: size S of a state.
        attention: any of attnext's attention modules that a decoder steps, of ``query_size`` S; its ``memory_size``
            is the size H of a context.
        num_layers: of the decoder. The context enters the lowest, the topmost asks.
        bias: whether the layers have biases.
        dropout: probability that a state is dropped on its way to the next layer, in training.
        attend: "before" the step, with the last state; or "after" it, with the new one, whose context then enters the
            next step (Chan et al., "Listen, attend and spell", 2016; Shen et al., Tacotron 2, 2018).
        vector_size: size R of an output vector ``tanh(W [input; state; context] + b)``, which is returned in place of
            the state; None for none.
        input_feeding: the output vector enters the next step (Luong, Pham and Manning, 2015); where a step attends
            last, in place of the context.

    Shapes:
        inputs (B, T, E), memory of B sentences; states (B, T, S) or vectors (B, T, R), contexts (B, T, H).

    float32 and float64 on the CPU, with additive, dot-product, location-sensitive and coverage attention, are one call
    forward and one backward; under autocast of bfloat16 in the parameters' dtype, but for products over all steps. What
    else there is (other attentions, dtypes and devices, ``torch.compile``, export) goes step by step, with the same
    results.

    Parameters are those of a ``torch.nn.GRUCell(E + H, S)`` and of the layers above, by the names of
    :class:`torch.nn.GRU`: ``weight_ih_l0`` has columns of the input, of the context and of the output vector.

    Example:
        >>> attention = attnext.BahdanauAttention(512, 1024, 256)
        >>> decoder = attnext.AttentiveGRU(300, 512, attention)
        >>> memory = decoder.prepare(encoder_states, lengths)
        >>> hidden, contexts, state = decoder(embedded, memory)   # teacher forcing
        >>> step = decoder.opened()
        >>> hidden, context, state = step(embedded_symbol, memory, state)   # at every step of a search
    """

    _gates, _has_cell = 3, False

    def _units(self, gates: Tensor, projected: Tensor, hidden: Tensor, cell: Tensor | None) -> tuple[Tensor, ...]:
        size = self.hidden_size
        reset, update = (gates[..., : 2 * size] + projected[..., : 2 * size]).sigmoid().chunk(2, -1)
        candidate = (gates[..., 2 * size :] + reset * projected[..., 2 * size :]).tanh().to(hidden.dtype)
        return (candidate + update.to(hidden.dtype) * (hidden - candidate),)


class AttentiveLSTM(_AttentiveLayers):
    """Long short-term memory that attends a memory at every step; in all else as :class:`attnext.AttentiveGRU`.

    Parameters are those of a ``torch.nn.LSTMCell(E + H, S)`` and of the layers above, by the names of
    :class:`torch.nn.LSTM`.

    Example:
        >>> attention = attnext.LuongAttention(512, 1024)
        >>> decoder = attnext.AttentiveLSTM(300, 512, attention, attend="after",
        ...                                 vector_size=512, input_feeding=True)   # as Luong 2015
    """

    _gates, _has_cell = 4, True

    def _units(self, gates: Tensor, projected: Tensor, hidden: Tensor, cell: Tensor | None) -> tuple[Tensor, ...]:
        assert cell is not None
        take, keep, candidate, show = (gates + projected).chunk(4, -1)
        new = keep.sigmoid().to(cell.dtype) * cell + (take.sigmoid() * candidate.tanh()).to(cell.dtype)
        return show.sigmoid().to(cell.dtype) * new.tanh(), new
