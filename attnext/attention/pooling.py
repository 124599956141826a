"""Attention pooling: a set or sequence of states into one, by a learnt query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnext import _checks, functional, reference
from attnext.alignments import normalize
from attnext.attention.base import context_of
from attnext.memory import Memory

__all__ = ["AttentionPooling"]


class AttentionPooling(nn.Module):
    """The weighted mean of a sequence or a bag of states, with weights from a learnt query.

    The score of a state is ``v . tanh(W state + b)``, by the additive kernel: Yang et al., "Hierarchical attention
    networks for document classification", 2016. ``gated`` multiplies the tanh by ``sigmoid(U state + c)``, which can
    leave its almost linear part: Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", 2018.
    Memory grows with the number of states, also for bags of 10^5.

    Args:
        memory_size: size H of a state.
        attention_size: size D of the space of the scores.
        gated: the gated form.
        dropout: probability that a weight is dropped in training.

    Shapes:
        states (B, Tk, H); pooled (B, H); weights (B, Tk).

    Example:
        >>> pool = AttentionPooling(512, 128, gated=True)
        >>> bag, weights = pool(instances, lengths=lengths, need_weights=True)
    """

    def __init__(self, memory_size: int, attention_size: int, *, gated: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.memory_size = _checks.at_least_one("memory_size", memory_size)
        self.attention_size = _checks.at_least_one("attention_size", attention_size)
        self.dropout = _checks.probability("dropout", dropout)
        self.memory_projection = nn.Linear(memory_size, attention_size, bias=False)
        self.bias = nn.Parameter(torch.empty(attention_size))  # the query, as the score sees it
        self.score_weight = nn.Parameter(torch.empty(attention_size))
        self.gate_projection = nn.Linear(memory_size, attention_size) if _checks.flag("gated", gated) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: projections as torch does, v uniform within 1/sqrt(D), b of 0."""
        self.memory_projection.reset_parameters()
        if self.gate_projection is not None:
            self.gate_projection.reset_parameters()
        bound = self.attention_size**-0.5
        nn.init.uniform_(self.score_weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        states: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Pools the states of each row.

        Args:
            states: (B, Tk, H).
            lengths: (B,) integers, how many leading states of each row are real.
            mask: bool (B, Tk), True where a state counts.
            need_weights: also return the weights.

        Returns:
            pooled (B, H), 0 for a row without states, and weights (B, Tk) or None.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        states = _checks.tensor("states", states, 3)
        _checks.size("states", states, 2, self.memory_size, "memory_size")
        _checks.same_kind_as_module("states", states, self.score_weight)
        lengths, mask = _checks.lengths(lengths, states), _checks.mask(mask, states, None)
        need_weights = _checks.flag("need_weights", need_weights)
        visible = reference.valid_slots(states, states, lengths, mask).squeeze(1)
        if lengths is not None or mask is not None:  # NaN there would reach the projections' weights, as 0 * NaN
            states = states.masked_fill(~visible.unsqueeze(-1), 0.0)
        key = self.memory_projection(states)
        value, bias, score_weight = (x.to(key.dtype) for x in (states, self.bias, self.score_weight))
        dropout_p = self.dropout if self.training else 0.0
        if self.gate_projection is None:
            memory = Memory(key, value, lengths, mask, score_weight, None)
            query = bias.expand(key.shape[0], -1)
            return functional.attend(query, memory, 1.0, dropout_p, need_weights, None)
        scores = ((key + bias).tanh() * self.gate_projection(states).sigmoid()) @ score_weight
        weights = nn.functional.dropout(normalize(scores.masked_fill(~visible, -torch.inf)), dropout_p)
        return context_of(weights, value), weights if need_weights else None

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
