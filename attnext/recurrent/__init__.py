"""Recurrent layers, and decoders that attend."""

from attnext.recurrent.decoders import AttentiveGRU, AttentiveLSTM
from attnext.recurrent.modules import GRU, LSTM
from attnext.recurrent.opened import OpenedDecoder
from attnext.recurrent.state import DecoderState

__all__ = ["GRU", "LSTM", "AttentiveGRU", "AttentiveLSTM", "DecoderState", "OpenedDecoder"]
