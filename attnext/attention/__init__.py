"""Attention modules: parameters around the functions of :mod:`attnext.functional`, one score a file."""

from __future__ import annotations

from attnext.attention.bahdanau import BahdanauAttention
from attnext.attention.coverage import CoverageAttention
from attnext.attention.heads import MultiHeadAttention
from attnext.attention.local import LocalAttention
from attnext.attention.location import LocationSensitiveAttention
from attnext.attention.luong import LuongAttention
from attnext.attention.monotonic import MonotonicAttention
from attnext.attention.onward import ForwardAttention
from attnext.attention.past import Past
from attnext.attention.pooling import AttentionPooling

__all__ = [
    "AttentionPooling",
    "BahdanauAttention",
    "CoverageAttention",
    "ForwardAttention",
    "LocalAttention",
    "LocationSensitiveAttention",
    "LuongAttention",
    "MonotonicAttention",
    "MultiHeadAttention",
    "Past",
]
