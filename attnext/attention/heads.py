"""Attention with several heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.attention.base import Attention
from attnext.memory import Memory

__all__ = ["MultiHeadAttention"]

_SCORES = ("scaled_dot", "dot", "additive")


class MultiHeadAttention(Attention):
    """Several attentions side by side, each in a space of its own, and a projection of what they found.

    Head i has the projections ``W_i query``, ``U_i state`` and ``V_i state``, and the score is their product ("dot"),
    that over the root of its size ("scaled_dot": Vaswani et al., "Attention is all you need", 2017) or ``v_i . tanh(W_i
    query + U_i state)`` ("additive"). The heads are rows of the batch to the kernels.

    Args:
        query_size: size Q of a query (a decoder state).
        memory_size: size H of an encoder state, and of the context.
        attention_size: size D of all heads together.
        heads: their number, of which D is a multiple.
        score: "scaled_dot", "dot" or "additive".
        dropout: probability that a weight is dropped in training.

    Shapes:
        query (B, Q) or (B, Tq, Q); encoder states (B, Tk, H); context (B, H) or (B, Tq, H); weights, the heads' mean,
        (B, Tk) or (B, Tq, Tk).

    Example:
        >>> attn = MultiHeadAttention(512, 1024, 512, 8)
        >>> memory = attn.prepare(encoder_states, lengths)   # once a sentence
        >>> context, weights = attn(state, memory, need_weights=True)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        heads: int,
        *,
        score: str = "scaled_dot",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size, dropout)
        self.heads = _checks.at_least_one("heads", heads)
        if attention_size % heads:
            raise ValueError(f"attention_size must be a multiple of heads, {heads}, got {attention_size}")
        self.score = _checks.choice("score", score, _SCORES)
        self.head_size = attention_size // heads
        self.query_projection = nn.Linear(query_size, attention_size, bias=False)
        self.memory_projection = nn.Linear(memory_size, attention_size, bias=False)
        self.value_projection = nn.Linear(memory_size, attention_size, bias=False)
        self.output_projection = nn.Linear(attention_size, memory_size, bias=False)
        self.score_weight = nn.Parameter(torch.empty(heads, self.head_size)) if score == "additive" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: projections as torch does, v uniform within 1/sqrt(D) of a head."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        if self.score_weight is not None:
            bound = self.head_size**-0.5
            nn.init.uniform_(self.score_weight, -bound, bound)

    def _split(self, x: Tensor) -> Tensor:
        """(B, [T,] D) as (B * heads, [T,] D / heads)."""
        x = x.reshape(*x.shape[:-1], self.heads, self.head_size)
        return (x if x.dim() == 3 else x.transpose(1, 2)).flatten(0, 1)

    def _project_query(self, query: Tensor) -> Tensor:
        return self._split(self.query_projection(query))

    def _project_states(self, states: Tensor) -> Tensor:
        return self._split(self.memory_projection(states))

    def _kept_weight(self) -> Tensor | None:
        v = self.score_weight
        return v[0] if v is not None and self.heads == 1 else v

    @property
    def _value_size(self) -> int:
        return self.head_size

    @property
    def _scale(self) -> float:
        return self.head_size**-0.5 if self.score == "scaled_dot" else 1.0

    def _project(
        self, name: str, encoder_states: Tensor, lengths: Tensor | None, mask: Tensor | None, queries: int | None
    ) -> Memory:
        memory = super()._project(name, encoder_states, lengths, mask, queries)
        lengths, mask = (
            None if x is None else x.repeat_interleave(self.heads, 0) for x in (memory.lengths, memory.mask)
        )
        value = self._split(self.value_projection(memory.value))
        return replace(memory, value=value, lengths=lengths, mask=mask, heads=self.heads)

    def scores(self, query: Tensor, memory: Memory) -> Tensor:
        """The scores of each head before the softmax; see :meth:`attnext.BahdanauAttention.scores`.

        Returns:
            (B, heads, Tk) or (B, heads, Tq, Tk), minus infinity in masked slots.
        """
        return self._by_head(super().scores(query, memory))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B * heads, ...) as (B, heads, ...)."""
        return x.reshape(x.shape[0] // self.heads, self.heads, *x.shape[1:])

    def _attend(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        context, weights = super()._attend(query, memory, need_weights)
        context = self._by_head(context)
        context = (context if context.dim() == 3 else context.transpose(1, 2)).flatten(-2)
        projected: Tensor = self.output_projection(context)
        return projected, None if weights is None else self._by_head(weights).mean(1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, score={self.score!r}, dropout={self.dropout}"
