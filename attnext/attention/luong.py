"""Multiplicative attention, and concat beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnext import _checks, functional
from attnext.attention.base import Attention, StepParts, plain_layer

__all__ = ["LuongAttention"]

_SCORES = ("dot", "scaled_dot", "general", "concat")


class LuongAttention(Attention):
    """Luong's attention: the score of a state is its product with the query.

    Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation", 2015: "dot" is
    ``state . query``, "general" ``state . W query``, "concat" ``v . tanh(W [query; state])``; "scaled_dot" is dot over
    the root of the size (Vaswani et al., "Attention is all you need", 2017). But for concat, which is additive
    attention with one projection of both, the states are keys and values: nothing of them is projected, and a step
    reads them once.

    Args:
        query_size: size Q of a query (a decoder state); for dot and scaled_dot it is the memory_size.
        memory_size: size H of an encoder state.
        score: "dot", "scaled_dot", "general" or "concat".
        attention_size: size D of the space of concat, memory_size by default; for the others left out.
        dropout: probability that a weight is dropped in training.

    Shapes:
        query (B, Q) or (B, Tq, Q); encoder states (B, Tk, H); context (B, H) or (B, Tq, H); weights (B, Tk) or
        (B, Tq, Tk).

    Example:
        >>> attn = LuongAttention(512, 1024)
        >>> memory = attn.prepare(encoder_states, lengths)   # once a sentence
        >>> context, weights = attn(state, memory, need_weights=True)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        *,
        score: str = "general",
        attention_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        _checks.choice("score", score, _SCORES)
        if attention_size is not None and score != "concat":
            raise ValueError(f"attention_size must be left out but for score='concat', got {attention_size!r}")
        super().__init__(query_size, memory_size, memory_size if attention_size is None else attention_size, dropout)
        if score in ("dot", "scaled_dot") and query_size != memory_size:
            raise ValueError(f"query_size must be memory_size, {memory_size}, for score={score!r}, got {query_size}")
        self.score = score
        self.query_projection = nn.Linear(query_size, memory_size, bias=False) if score == "general" else None
        self.joint_projection = self.score_weight = None
        if score == "concat":
            self.joint_projection = nn.Linear(query_size + memory_size, self.attention_size, bias=False)
            self.score_weight = nn.Parameter(torch.empty(self.attention_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: projections as torch does, v uniform within 1/sqrt(D)."""
        for projection in (self.query_projection, self.joint_projection):
            if projection is not None:
                projection.reset_parameters()
        if self.score_weight is not None:
            bound = self.attention_size**-0.5
            nn.init.uniform_(self.score_weight, -bound, bound)

    def _project_query(self, query: Tensor) -> Tensor:
        if self.joint_projection is not None:
            return nn.functional.linear(query, self.joint_projection.weight[:, : self.query_size])
        if self.query_projection is not None:
            projected: Tensor = self.query_projection(query)
            return projected
        return query

    def _step_parts(self) -> StepParts | None:
        if type(self) is not LuongAttention:
            return None
        dropout, weight = self.dropout if self.training else 0.0, None
        if self.joint_projection is not None:
            weight = self.joint_projection.weight[:, : self.query_size]
        elif self.query_projection is not None:
            layer = plain_layer(self, "query_projection")
            if layer is None:
                return None
            weight = layer.weight
        return StepParts("additive" if self._is_additive else "dot", weight, None, self._scale, dropout)

    def _project_states(self, states: Tensor) -> Tensor:
        if self.joint_projection is not None:
            return nn.functional.linear(states, self.joint_projection.weight[:, self.query_size :])
        return functional.autocast(states)[0]

    @property
    def _scale(self) -> float:
        return self.memory_size**-0.5 if self.score == "scaled_dot" else 1.0

    @property
    def _projects_states(self) -> bool:
        return self.score == "concat"

    def extra_repr(self) -> str:
        return f"score={self.score!r}, dropout={self.dropout}"
