"""Encoder states projected once and attended at every decoder step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Memory"]


class Prepared(NamedTuple):
    """What one backend precomputes from projected keys: exp(2 key), and how far it may be trusted."""

    backend: str
    exp_key: Tensor
    """float32 or float64, in the backend's own layout: exp(2 key), 0 in masked slots and in the padding."""
    key_limit: Tensor
    """(B, Tk or more): the largest |key| of each row, infinity for a row that is not finite."""


@dataclass(frozen=True)
class Memory:
    """Projected encoder states, made by the ``prepare`` of an attention module.

    Attributes:
        key: (B, Tk, D) projected encoder states, with their gradient.
        value: (B, Tk, H) the encoder states themselves.
        lengths: (B,) int64, or None: how many leading states of each row are real.
        mask: (B, Tk) bool, or None: True where a state may be attended.
        score_weight: (D,) the weight vector of the score, as it was when the memory was prepared.
        prepared: what the backend computed ahead of the steps, or None.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    score_weight: Tensor
    prepared: Prepared | None
