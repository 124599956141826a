"""attnext: fused attention for encoder-decoder models, exact and memory-linear."""

from __future__ import annotations

from attnext.attention import BahdanauAttention, CoverageAttention, LocationSensitiveAttention, Past
from attnext.backends import Backend, backends, use_backend
from attnext.functional import additive_attention, additive_scores
from attnext.memory import Memory

__all__ = [
    "Backend",
    "BahdanauAttention",
    "CoverageAttention",
    "LocationSensitiveAttention",
    "Memory",
    "Past",
    "__version__",
    "additive_attention",
    "additive_scores",
    "backends",
    "use_backend",
]

__version__ = "0.1.0"
