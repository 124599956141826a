"""The reference encoder-decoder model, and grapheme-to-phoneme training with it.

What it needs beyond torch (``pip install 'attnext[demo]'``) is imported where it is used.
"""

from __future__ import annotations

from attnext._support import InputError, MissingExtra
from attnext.seq2seq.checkpoint import Checkpoint, load
from attnext.seq2seq.config import Config
from attnext.seq2seq.model import Seq2Seq
from attnext.seq2seq.search import Translator, search

__all__ = [
    "Checkpoint", "Config", "InputError", "MissingExtra", "Seq2Seq", "Translator", "load", "search",
]  # fmt: skip
