"""Local attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.alignments import normalize
from attnext.attention.past import Filters, Past, PastAttention, first_visible
from attnext.memory import Memory
from attnext.ops import accumulator

__all__ = ["LocalAttention"]

_POSITIONS = ("steps", "predicted", "last")


class LocalAttention(PastAttention):
    """Additive attention to the states within a window: keys and values outside it are never read.

    The window is centred at step t on state t (local-m), on a learnt guess (local-p), whose weights also fall off as a
    Gaussian around it and are not normalised again, or on the state that was attended most at the last step. A step
    costs the window; of the source's size are only the returned weights. Luong, Pham and Manning, "Effective approaches
    to attention-based neural machine translation", 2015.

    Args:
        query_size, memory_size, attention_size: as in :class:`attnext.BahdanauAttention`.
        window: how many states to each side of the centre are attended (the paper's D).
        position: the centre: "steps" is t, counted from 0 and at most the last state; "predicted" is ``S sigmoid(v_p .
            tanh(W_p W query))`` for S states, with a Gaussian of standard deviation ``window / 2``; "last" is the state
            with the largest weight at the last step, at the first step the first visible one.
        options: bias, normalize, normalizer, temperature and dropout of :class:`attnext.BahdanauAttention`.

    Shapes:
        query (B, Q) for a step, (B, beam, Q) for a step of hypotheses, (B, Tq, Q) for Tq steps (``forward``); encoder
        states (B, Tk, H); context (B, H), (B, beam, H) or (B, Tq, H).

    Example:
        >>> attn = LocalAttention(512, 1024, 256, window=10, position="predicted")
        >>> memory, state = attn.prepare(encoder_states, lengths), None
        >>> context, weights, state = attn.step(query, memory, state)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        window: int = 10,
        position: str = "steps",
        **options: Any,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size, **options)
        self.window = _checks.at_least_one("window", window)
        self.position = _checks.choice("position", position, _POSITIONS)
        self.position_predictor = None
        if position == "predicted":  # from the projected query, which is at hand
            self.position_predictor = nn.Sequential(
                nn.Linear(attention_size, attention_size, bias=False),
                nn.Tanh(),
                nn.Linear(attention_size, 1, bias=False),
            )

    def reset_parameters(self) -> None:
        """Draws the parameters anew, the predictor's as torch does."""
        super().reset_parameters()
        for layer in self.position_predictor or ():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def _filters_of_kernel(self) -> Filters | None:
        return None if self.position == "predicted" else super()._filters_of_kernel()  # whose weights fall off

    def _step(self, query: Tensor, memory: Memory, past: Past) -> tuple[Tensor, Past]:
        if memory.key.shape[1] == 0:
            return super()._step(query, memory, past)
        position, filters = self._position(query, memory, past), self._filters_of_kernel()
        if filters is None:
            context, weights = self._attend_cut_out(query, memory, position)
        else:
            reach = min(self.window, memory.key.shape[1])
            window = torch.cat([position - reach, position + (reach + 1)], -1)
            context, weights = self._attend_at_once(query, memory, past, filters, window=window)
        steps = None if past.position is None else past.position + 1
        return context, Past(weights, past.cumulative + weights, position=steps)

    def _position(self, query: Tensor, memory: Memory, past: Past) -> Tensor:
        """The centre of the window, (B, 1) or (B, beam, 1): an integer, or a guess in the dtype of the weights."""
        lengths = _by_rows(_lengths(memory), query)
        if self.position_predictor is not None:
            guess: Tensor = self.position_predictor(query)
            return lengths * guess.to(past.weights.dtype).sigmoid()
        if past.position is None:
            somewhere = (past.weights > 0).any(-1, keepdim=True)
            first = _by_rows(first_visible(memory), query)
            return torch.where(somewhere, past.weights.argmax(-1, keepdim=True), first)
        return torch.minimum(past.position, lengths - 1)

    def _attend_cut_out(self, query: Tensor, memory: Memory, position: Tensor) -> tuple[Tensor, Tensor]:
        """Context and weights of windows that are cut out of the memory, each as a sentence of its own."""
        keys, rows = memory.key.shape[1], query.shape[:-1]
        reach = min(self.window, keys)
        slots = position.round().long() + torch.arange(-reach, reach + 1, device=query.device)
        lengths = _by_rows(_lengths(memory), query)
        inside = (slots >= 0) & (slots < lengths) & ((slots - position).abs() <= self.window)
        slots = slots.clamp(0, keys - 1)
        within = _window(memory, slots, inside)
        scores = self._scores(query.flatten(0, -2), within).view(slots.shape)
        weights = normalize(scores.to(accumulator(scores.dtype)), self.normalizer)
        if self.position == "predicted":
            weights = weights * (-2 * ((slots - position) / self.window).square()).exp()
        context = self._dropped_context(weights.flatten(0, -2).to(query.dtype), within.value)
        context = context.view(*rows, memory.value.shape[2])
        return context, weights.new_zeros(*rows, keys).scatter_add(-1, slots, weights)

    def _beginning(self, memory: Memory, rows: torch.Size) -> Past:
        past = super()._beginning(memory, rows)
        if self.position != "steps":
            return past
        return past._replace(position=torch.zeros(*rows, 1, dtype=torch.int64, device=memory.key.device))

    @property
    def _multiplies_values(self) -> bool:
        return False  # those of a window are hidden when it is cut out

    def extra_repr(self) -> str:
        return f"window={self.window}, position={self.position!r}, {super().extra_repr()}"


def _lengths(memory: Memory) -> Tensor:
    """How many states each row has, (B,)."""
    if memory.lengths is not None:
        return memory.lengths
    batch, keys = memory.key.shape[:2]
    return torch.full((batch,), keys, device=memory.key.device)


def _by_rows(x: Tensor, query: Tensor) -> Tensor:
    """What is (B,), beside something of each query: (B, 1) or (B, 1, 1)."""
    return x.view(-1, *(1,) * (query.dim() - 1))


def _window(memory: Memory, slots: Tensor, inside: Tensor) -> Memory:
    """The states at ``slots`` (B, n) or (B, beam, n), (B * beam, n, ...), those that are ``inside`` to be attended."""
    rows = _by_rows(torch.arange(slots.shape[0], device=slots.device), slots)
    if memory.mask is not None:
        inside = inside & memory.mask[rows, slots]
    value = memory.value[rows, slots].masked_fill(~inside.unsqueeze(-1), 0.0)  # a NaN would be one as 0 * NaN too
    key, value, inside = (x.flatten(0, slots.dim() - 2) for x in (memory.key[rows, slots], value, inside))
    return Memory(key, value, None, inside, memory.score_weight, None)
