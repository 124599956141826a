"""attnext: fused attention for encoder-decoder models, exact and memory-linear."""

from __future__ import annotations

from attnext import pytrees
from attnext.acceleration import accelerate, restore
from attnext.alignments import coverage_loss, forward_weights, monotonic_weights, normalize
from attnext.attention import (
    AttentionPooling,
    BahdanauAttention,
    CoverageAttention,
    ForwardAttention,
    LocalAttention,
    LocationSensitiveAttention,
    LuongAttention,
    MonotonicAttention,
    MultiHeadAttention,
    Past,
)
from attnext.backends import Backend, backends, use_backend
from attnext.functional import additive_attention, additive_scores, additive_step, dot_attention, prepare
from attnext.memory import Memory
from attnext.recurrent import GRU, LSTM, AttentiveGRU, AttentiveLSTM, DecoderState, OpenedDecoder

__all__ = [
    "GRU",
    "LSTM",
    "AttentionPooling",
    "AttentiveGRU",
    "AttentiveLSTM",
    "Backend",
    "BahdanauAttention",
    "CoverageAttention",
    "DecoderState",
    "ForwardAttention",
    "LocalAttention",
    "LocationSensitiveAttention",
    "LuongAttention",
    "Memory",
    "MonotonicAttention",
    "MultiHeadAttention",
    "OpenedDecoder",
    "Past",
    "__version__",
    "accelerate",
    "additive_attention",
    "additive_scores",
    "additive_step",
    "backends",
    "coverage_loss",
    "dot_attention",
    "forward_weights",
    "monotonic_weights",
    "normalize",
    "prepare",
    "restore",
    "use_backend",
]

__version__ = "0.1.0"

pytrees.register()
