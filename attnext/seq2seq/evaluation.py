"""Phoneme and word error rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attnext._support import extra
from attnext.seq2seq.checkpoint import Checkpoint
from attnext.seq2seq.data import Entry
from attnext.seq2seq.search import pronounce

__all__ = ["ErrorRates", "error_rates", "evaluate"]


class ErrorRates(NamedTuple):
    """Edits per true phoneme, wrong words per word (both as fractions), and the number of words."""

    phoneme: float
    word: float
    words: int

    def __str__(self) -> str:
        return f"PER {self.phoneme:.2%} WER {self.word:.2%} ({self.words} words)"


def error_rates(outputs: Iterable[Sequence[str]], references: Iterable[Sequence[Sequence[str]]]) -> ErrorRates:
    """Phoneme and word error rates.

    Args:
        outputs: a sequence of phonemes per word.
        references: all right pronunciations of each word: an output equal to any is right, and the edits
            (insertions, deletions, substitutions) of another are those to the nearest.

    Raises:
        ValueError: there are more outputs than references or fewer, or a word has no reference.
        MissingExtra: rapidfuzz is not installed.
    """
    with extra("demo"):
        from rapidfuzz.distance import Levenshtein
    edits = phonemes = wrong = words = 0
    for output, right in zip(outputs, references, strict=True):
        if not right:
            raise ValueError(f"references must name a pronunciation for every word, got none for word {words}")
        # Of references equally near, the longest: the same rate in whatever order they stand.
        distance, length = min((Levenshtein.distance(output, one), -len(one)) for one in right)
        edits, phonemes = edits + distance, phonemes - length
        wrong, words = wrong + (distance > 0), words + 1
    return ErrorRates(edits / max(phonemes, 1), wrong / max(words, 1), words)


def evaluate(checkpoint: Checkpoint, entries: Sequence[Entry]) -> ErrorRates:
    """The model's error rates on these words."""
    outputs = pronounce(checkpoint, [entry.word for entry in entries])
    return error_rates([output.phonemes for output in outputs], [entry.pronunciations for entry in entries])
