"""Monotonic attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.alignments import monotonic_weights
from attnext.attention.past import Past, PastAttention, at_the_first_key
from attnext.memory import Memory

__all__ = ["MonotonicAttention"]


class MonotonicAttention(PastAttention):
    """Attention that reads on and never goes back: at each state it stops with probability ``sigmoid(score + r)``.

    In training the weights are the expectation over all ways to read, by a recurrence that divides by nothing
    (:func:`attnext.monotonic_weights`); in evaluation the reader is hard: it stops at the first state with a
    probability above 1/2, and the context is that state. Raffel, Luong, Liu, Weiss and Eck, "Online and linear-time
    attention by enforcing monotonic alignments", 2017. As there, v is normalised and r learnt.

    Args:
        query_size, memory_size, attention_size: as in :class:`attnext.BahdanauAttention`.
        mode: how training computes the weights: "parallel" or "recursive"; the results are the same.
        hard: read hard in evaluation; with False the weights are those of training.
        noise: standard deviation of normal noise on the scores in training, which teaches the reader to be sure.
        initial_bias: r at the start. Below 0, so that the first weights reach far into the source.
        options: bias, normalize (here True by default), temperature and dropout of
            :class:`attnext.BahdanauAttention`.

    Shapes:
        query (B, Q) for a step, (B, beam, Q) for a step of hypotheses, (B, Tq, Q) for Tq steps (``forward``); encoder
        states (B, Tk, H); context (B, H), (B, beam, H) or (B, Tq, H). Weights may sum to less than 1, or be all 0
        where the reader has come to the end.

    Example:
        >>> attn = MonotonicAttention(512, 1024, 256, noise=1.0)
        >>> memory, state = attn.prepare(encoder_states, lengths), None
        >>> context, weights, state = attn.step(query, memory, state)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        mode: str = "parallel",
        hard: bool = True,
        noise: float = 0.0,
        initial_bias: float = -1.0,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size, normalize=normalize, **options)
        if self.normalizer != "softmax":
            raise ValueError(f"normalizer must be left out: monotonic attention has its own, got {self.normalizer!r}")
        self.mode = _checks.choice("mode", mode, ("parallel", "recursive"))
        self.hard = _checks.flag("hard", hard)
        self.noise = 0.0 if noise == 0 else _checks.positive("noise", noise)
        self.initial_bias = _checks.scale(initial_bias)
        self.score_bias = nn.Parameter(torch.tensor(self.initial_bias))

    def reset_parameters(self) -> None:
        """Draws the parameters anew; r is ``initial_bias``."""
        super().reset_parameters()
        nn.init.constant_(self.score_bias, self.initial_bias)

    @property
    def _rule(self) -> None:
        return None

    def _weights(self, scores: Tensor, past: Past) -> Tensor:
        energies = scores + self.score_bias
        if self.training and self.noise > 0:
            energies = energies + self.noise * torch.randn_like(energies)
        mode = "hard" if self.hard and not self.training else self.mode
        return monotonic_weights(energies, past.weights, mode)

    def _beginning(self, memory: Memory, rows: torch.Size) -> Past:
        return at_the_first_key(super()._beginning(memory, rows), memory)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, hard={self.hard}, noise={self.noise:g}, {super().extra_repr()}"
