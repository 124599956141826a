"""Error rates: of symbols (phonemes) and of whole outputs (words), in all and by the length of the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

from attnext._support import extra
from attnext.seq2seq.checkpoint import Checkpoint
from attnext.seq2seq.data import Entry
from attnext.seq2seq.search import Translator

__all__ = ["Errors", "by_length", "count_errors", "evaluate", "total"]


class Errors(NamedTuple):
    """Counts over some sources.

    Attributes:
        edits: insertions, deletions and substitutions of symbols.
        symbols: right symbols.
        wrong: outputs with any edit.
        sources: outputs.
    """

    edits: int = 0
    symbols: int = 0
    wrong: int = 0
    sources: int = 0

    @property
    def of_symbols(self) -> float:
        """Edits per right symbol."""
        return self.edits / max(self.symbols, 1)

    @property
    def of_sources(self) -> float:
        """The share of outputs that are wrong."""
        return self.wrong / max(self.sources, 1)

    def plus(self, other: Errors) -> Errors:
        return Errors(*(a + b for a, b in zip(self, other, strict=True)))

    def describe(self, task: str) -> str:
        """As the commands show them; PER and WER are phonemes' and words' error rates."""
        names = ("PER", "WER", "words") if task == "g2p" else ("symbol errors", "line errors", "lines")
        return f"{names[0]} {self.of_symbols:.2%} {names[1]} {self.of_sources:.2%} ({self.sources} {names[2]})"

    def record(self) -> dict[str, float]:
        """As JSON."""
        return {"symbol_errors": self.of_symbols, "source_errors": self.of_sources, "sources": self.sources}


def count_errors(output: Sequence[str], right: Sequence[Sequence[str]]) -> Errors:
    """The errors of one output.

    Args:
        output: symbols.
        right: all right outputs: one that equals any has no error, another the edits to the nearest.

    Raises:
        ValueError: there is no right output.
        MissingExtra: rapidfuzz is not installed.
    """
    with extra("demo"):
        from rapidfuzz.distance import Levenshtein
    if not right:
        raise ValueError("right must name an output, got none")
    # Of those equally near, the longest: the same rate in whatever order they stand.
    distance, length = min((Levenshtein.distance(output, one), -len(one)) for one in right)
    return Errors(distance, -length, int(distance > 0), 1)


def by_length(entries: Iterable[Entry], outputs: Iterable[Sequence[str]], lengths: Iterable[int]) -> dict[int, Errors]:
    """The errors of the outputs of entries, by the lengths of their sources, from the shortest."""
    found: dict[int, Errors] = {}
    for entry, output, length in zip(entries, outputs, lengths, strict=True):
        found[length] = found.get(length, Errors()).plus(count_errors(output, entry.targets))
    return dict(sorted(found.items()))


def total(parts: Mapping[int, Errors]) -> Errors:
    """The sum over all lengths."""
    return reduce(Errors.plus, parts.values(), Errors())


def evaluate(checkpoint: Checkpoint, entries: Sequence[Entry]) -> Errors:
    """The model's errors on these entries, by greedy search."""
    outputs = Translator(checkpoint)([entry.source for entry in entries])
    counts = (count_errors(output.best, entry.targets) for output, entry in zip(outputs, entries, strict=True))
    return reduce(Errors.plus, counts, Errors())
