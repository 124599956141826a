"""Forward attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.alignments import forward_weights
from attnext.attention.location import LocationSensitiveAttention
from attnext.attention.past import Filters, Past, at_the_first_key
from attnext.memory import Memory

__all__ = ["ForwardAttention"]


class ForwardAttention(LocationSensitiveAttention):
    """Location-sensitive attention whose weights stay with a state or move on to the next: for speech synthesis.

    ``w_n = ((1 - u) w'_n + u w'_{n-1}) y_n`` and normalised, with w' the last step's weights and y the softmax of the
    scores (:func:`attnext.forward_weights`, which is safe where published code divides 0 by 0). Zhang, Ling and Dai,
    "Forward attention in sequence-to-sequence acoustic modeling for speech synthesis", 2018.

    Args:
        query_size, memory_size, attention_size: as in :class:`attnext.BahdanauAttention`.
        transition_agent: let u be ``sigmoid(a . [context, W query] + b)`` of the step before, learnt; without it u is
            1/2. At the first step u is 1/2 too.
        options: those of :class:`attnext.LocationSensitiveAttention` but for normalizer.

    Shapes:
        query (B, Q) for a step, (B, beam, Q) for a step of hypotheses, (B, Tq, Q) for Tq steps (``forward``); encoder
        states (B, Tk, H); context (B, H), (B, beam, H) or (B, Tq, H).

    Example:
        >>> attn = ForwardAttention(1024, 512, 128, transition_agent=True)
        >>> memory, state = attn.prepare(encoder_states, lengths), None
        >>> context, weights, state = attn.step(query, memory, state)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        transition_agent: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size, **options)
        if self.normalizer != "softmax":
            raise ValueError(f"normalizer must be left out: forward attention has its own, got {self.normalizer!r}")
        agent = _checks.flag("transition_agent", transition_agent)
        # Of the projected query, which it has at hand; the projection is learnt for both.
        self.transition_agent = nn.Linear(memory_size + attention_size, 1) if agent else None

    def reset_parameters(self) -> None:
        """Draws the parameters anew, the agent's as torch does."""
        super().reset_parameters()
        if self.transition_agent is not None:
            self.transition_agent.reset_parameters()

    @property
    def _rule(self) -> str:
        return "forward"

    def _attend_at_once(
        self, query: Tensor, memory: Memory, past: Past, filters: Filters, **options: Any
    ) -> tuple[Tensor, Tensor]:
        options |= {"previous": past.weights, "transition": past.transition}
        return super()._attend_at_once(query, memory, past, filters, **options)

    def _weights(self, scores: Tensor, past: Past) -> Tensor:
        return forward_weights(scores, past.weights, past.transition)

    def _step(self, query: Tensor, memory: Memory, past: Past) -> tuple[Tensor, Past]:
        context, past = super()._step(query, memory, past)
        if self.transition_agent is None:
            return context, past
        transition = self.transition_agent(torch.cat([context, query], -1)).sigmoid()
        return context, past._replace(transition=transition)

    def _beginning(self, memory: Memory, rows: torch.Size) -> Past:
        past = at_the_first_key(super()._beginning(memory, rows), memory)
        if self.transition_agent is None:
            return past
        return past._replace(transition=past.weights.new_full((*past.weights.shape[:-1], 1), 0.5))

    def extra_repr(self) -> str:
        return f"transition_agent={self.transition_agent is not None}, {super().extra_repr()}"
