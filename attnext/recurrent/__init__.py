"""Recurrent layers, and decoders that attend."""

from attnext.recurrent.decoders import AttentiveGRU, AttentiveLSTM, DecoderState
from attnext.recurrent.modules import GRU, LSTM

__all__ = ["GRU", "LSTM", "AttentiveGRU", "AttentiveLSTM", "DecoderState"]
