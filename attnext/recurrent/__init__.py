"""Recurrent layers, and decoders that attend."""

from attnext.recurrent.modules import GRU, LSTM

__all__ = ["GRU", "LSTM"]
