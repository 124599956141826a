"""The steps of a search, for which a decoder is opened once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnext import _checks
from attnext.attention.past import Past
from attnext.memory import Memory
from attnext.recurrent._operators import Ahead, without_autocast
from attnext.recurrent._ready import Output, Ready
from attnext.recurrent.state import DecoderState

if TYPE_CHECKING:
    from attnext.recurrent.decoders import _AttentiveLayers

__all__ = ["OpenedDecoder", "likeliest"]


class OpenedDecoder:
    """The steps of a search; :meth:`AttentiveGRU.opened` makes it."""

    @torch.no_grad()
    def __init__(self, decoder: _AttentiveLayers, table: Tensor | None, output: Output | None) -> None:
        self._decoder, self._table, self._output = decoder, None if table is None else table.detach().clone(), output
        self._seen: tuple[Any, tuple[Any, ...], bool] = (None, (), False)
        """A memory, what a step of it looked like, and whether the operator takes such; one piece, for any thread."""
        self._ready: Ready | None = None
        self._known: Ahead | None = None
        parts = None if decoder.training else decoder._served_parts()
        if parts is None or parts.dropout > 0.0:
            return
        with without_autocast():
            weights = decoder._weights(parts, decoder.readout is not None)
            self._ready = Ready(weights, decoder.input_size, decoder.context_size, output)
            if self._table is not None and len(self._table) <= _FEW_INPUTS:
                self._known = self._ready.ahead(self._table)

    def __call__(
        self, input: Tensor, memory: Any, state: DecoderState | None = None, *, need_weights: bool = False
    ) -> tuple[Any, ...]:
        """As :meth:`AttentiveGRU.step`, of numbers in place of vectors where there is a table.

        Raises:
            IndexError, TypeError, ValueError: an argument is not what it must be.
        """
        with torch.no_grad():
            if state is not None and self._serves(input, memory, state):
                return self._step(input, memory, state, need_weights)
            if self._table is not None:
                input = self._vectors(input)
            found = self._decoder._step(input, memory, state, need_weights)
            return found if need_weights else found[:3]

    @torch.no_grad()
    def greedy(
        self, previous: Tensor, memory: Any, state: DecoderState | None, steps: int, *, first: int = 0,
        end: int | None = None, need_weights: bool = False,
    ) -> tuple[Tensor, Tensor, DecoderState | None, Tensor | None]:  # fmt: skip
        """So many steps, each of which takes the most likely symbol of the one before.

        Args:
            previous: (B,) integers, the symbols that the first step takes.
            memory: what :meth:`AttentiveGRU.prepare` returned.
            state: before these steps; None is zeros.
            steps: how many at most, at least one.
            first: the least number that is chosen; those below, as padding and marks, have no part in probabilities.
            end: the symbol that ends an output. A row that has chosen it has it from then on, with log-probability 0;
                when all have, the steps that are left are not made.
            need_weights: also return the attention's weights.

        Returns:
            symbols (B, steps) and their log-probabilities, the state after the last step, None where all have ended,
            and weights (B, steps, Tk) or None; those after a row's end have no meaning. Where a step is one operator
            and the symbols are at most 256, all steps are one call.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        output, table = self._output, self._table
        if output is None or table is None:
            raise ValueError("greedy needs the weight of an output layer, given to opened()")
        _checks.at_least_one("steps", steps)
        if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < len(output.weight):
            raise ValueError(f"first must be the number of a symbol, got {first!r}")
        if end is not None and (
            isinstance(end, bool) or not isinstance(end, int) or not first <= end < len(output.weight)
        ):
            raise ValueError(f"end must be None or the number of a symbol from first={first} on, got {end!r}")
        previous = _checks.indices("previous", previous, len(table), table.device)
        if state is None:
            state = self._decoder.first_state(len(previous))
        if self._serves(previous, memory, state) and self._known is not None:
            return self._choose(previous, memory, state, steps, first, end, need_weights)

        def step(previous: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor | None]:
            vector, _, state, *weights = self(previous, memory, state, need_weights=need_weights)
            return F.linear(vector, *output), state, weights[0] if weights else None

        return likeliest(step, previous, state, steps, first, end)

    def _choose(
        self, previous: Tensor, memory: Memory, state: DecoderState, steps: int, first: int, end: int | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, DecoderState | None, Tensor | None]:  # fmt: skip
        decoder, ready, known = self._decoder, self._ready, self._known
        assert ready is not None
        assert known is not None
        past, start = decoder._start(state, memory, ready.parts)
        last_symbol = -1 if end is None else end
        found = ready.choose(known, previous.contiguous(), steps, first, last_symbol, start, memory, need_weights)
        weights = found.results.weights
        shown = weights.transpose(0, 1) if need_weights and weights is not None else None
        last = None if _ended(found.symbols[-1], end) else decoder._last(found.results, state, past)
        return found.symbols.t(), found.scores.t(), last, shown

    def _vectors(self, numbers: Tensor) -> Tensor:
        """Those of the table."""
        assert self._table is not None
        numbers = _checks.tensor("input", numbers, 1, 2)
        rows = _checks.indices("input", numbers.flatten(), len(self._table), self._table.device)
        return self._table[rows].view(*numbers.shape, -1)

    def _serves(self, input: Tensor, memory: Any, state: DecoderState) -> bool:
        """Whether the operator takes this step: of a memory and of sizes that it had before, as it took the last."""
        decoder = self._decoder
        if self._ready is None or type(state) is not DecoderState or _checks.autocasts("cpu"):
            return False
        if torch.compiler.is_compiling():
            return False
        like, (seen, seen_like, served) = _looks(input, state), self._seen
        if memory is seen and like == seen_like:
            return served
        vectors = input if self._table is None else self._vectors(input)
        _checks.tensor("input", vectors, 2, 3)
        decoder._checked(vectors, state, "input")
        served = decoder._parts(vectors, memory, state) is not None and not decoder.training
        self._seen = memory, like, served
        return served

    def _ahead(self, input: Tensor) -> Ahead:
        """What the inputs of a step add, with hypotheses as rows."""
        assert self._ready is not None
        known, table = self._known, self._table
        if known is not None:
            rows = input.flatten().long()
            gates = known.gates.index_select(0, rows)
            return Ahead(gates, None if known.feeds is None else known.feeds.index_select(0, rows))
        vectors = input.flatten(0, -2) if table is None else table.index_select(0, input.flatten().long())
        return self._ready.ahead(vectors)

    def _step(self, input: Tensor, memory: Memory, state: DecoderState, need_weights: bool) -> tuple[Any, ...]:
        decoder, ready = self._decoder, self._ready
        assert ready is not None
        past, start = decoder._start(state, memory, ready.parts)
        found = ready.step(self._ahead(input), start, memory, need_weights)
        last, rows = decoder._last(found, state, past), state.hidden.shape[1:-1]
        vector = found.output if found.feeds is None else found.feeds
        shown = (vector, found.contexts, found.weights if need_weights else None)
        output, context, weights = (None if x is None else x.view(*rows, x.shape[-1]) for x in shown)
        return (output, context, last, weights) if need_weights else (output, context, last)


def _looks(input: Tensor, state: DecoderState) -> tuple[Any, ...]:
    """All of a step's arguments that decides whether the operator takes it."""
    hidden, cell, context, vector, past = state
    return (
        getattr(input, "shape", None), getattr(input, "dtype", None), hidden.shape, hidden.dtype, type(past),
        *(None if x is None else (x.shape, x.dtype) for x in (cell, context, vector)),
        None if not isinstance(past, Past) else past.weights.shape,
    )  # fmt: skip


def likeliest(
    step: Callable[[Tensor, Any], tuple[Tensor, Any, Tensor | None]],
    previous: Tensor,
    state: Any,
    steps: int,
    first: int,
    end: int | None,
) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """Steps one by one, each taking the most likely symbol of the one before, numbers from ``first`` on.

    Args:
        step: from numbers (B,) and a state to logits (B, V), the next state and weights (B, Tk) or None.

    Returns:
        As :meth:`OpenedDecoder.greedy`.
    """
    symbols: list[Tensor] = []
    scores: list[Tensor] = []
    shown: list[Tensor] = []
    for _ in range(steps):
        logits, state, weights = step(previous, state)
        wide = torch.promote_types(logits.dtype, torch.float32)
        score, choice = logits[:, first:].to(wide).log_softmax(-1).max(-1)
        previous = choice + first
        if end is not None and symbols:
            before = symbols[-1] == end
            previous, score = previous.masked_fill(before, end), score.masked_fill(before, 0.0)
        symbols.append(previous)
        scores.append(score)
        shown += [] if weights is None else [weights]
        if previous.device.type == "cpu" and _ended(previous, end):  # elsewhere a look at it takes longer than a step
            break
    left = steps - len(symbols)  # of steps that are not made
    symbols += left * symbols[-1:]
    scores += left * [torch.zeros_like(scores[-1])]
    shown += left * [torch.zeros_like(one) for one in shown[-1:]]
    state = None if _ended(previous, end) else state
    return torch.stack(symbols, 1), torch.stack(scores, 1), state, torch.stack(shown, 1) if shown else None


def _ended(symbols: Tensor, end: int | None) -> bool:
    """Whether all rows (B,) have."""
    return end is not None and all(one == end for one in symbols.tolist())


_FEW_INPUTS = 256
"""Of a table whose products with the matrices are made ahead."""
