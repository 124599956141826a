"""Attention with coverage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext.attention.base import StepParts
from attnext.attention.past import Past, PastAttention

__all__ = ["CoverageAttention"]


class CoverageAttention(PastAttention):
    """Additive attention that sees how much of each state was attended: ``v . tanh(W query + U state_j + w c_j + b)``.

    c is the sum of the weights of all steps before, w a learnt vector. Tu, Lu, Liu, Liu and Li, "Modeling coverage for
    neural machine translation", 2016; in this form by See, Liu and Manning, "Get to the point: summarization with
    pointer-generator networks", 2017. Their loss is :func:`attnext.coverage_loss`, of a step's weights and
    ``state.cumulative - weights`` of the state after it.

    Args:
        query_size, memory_size, attention_size: as in :class:`attnext.BahdanauAttention`.
        options: its bias, normalize, normalizer, temperature and dropout.

    Shapes:
        query (B, Q) for a step, (B, beam, Q) for a step of hypotheses, (B, Tq, Q) for Tq steps (``forward``); encoder
        states (B, Tk, H); context (B, H), (B, beam, H) or (B, Tq, H).

    Example:
        >>> attn = CoverageAttention(512, 1024, 256)
        >>> memory, state = attn.prepare(encoder_states, lengths), None
        >>> context, weights, state = attn.step(query, memory, state)   # at every step
    """

    def __init__(self, query_size: int, memory_size: int, attention_size: int, **options: Any) -> None:
        super().__init__(query_size, memory_size, attention_size, **options)
        self.coverage_weight = nn.Parameter(torch.empty(attention_size))
        self._reset_coverage()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, w of the coverage uniform within 1/sqrt(D)."""
        super().reset_parameters()
        self._reset_coverage()

    def _reset_coverage(self) -> None:
        bound = self.attention_size**-0.5
        nn.init.uniform_(self.coverage_weight, -bound, bound)

    def _filters(self) -> tuple[Tensor, None]:
        return self.coverage_weight.view(-1, 1, 1), None

    def _step_parts(self) -> StepParts | None:
        if type(self) is not CoverageAttention:
            return None
        return self._parts("past", filters=self._filters()[0], sees=(False, True))

    def _seen(self, past: Past) -> tuple[Tensor, ...]:
        return (past.cumulative,)

    def _features(self, past: Past) -> Tensor:
        return past.cumulative.to(self.coverage_weight.dtype).unsqueeze(-1) * self.coverage_weight
