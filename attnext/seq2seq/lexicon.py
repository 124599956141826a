"""Pronunciation lexicons as the tools of the field write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attnext._support import InputError

__all__ = ["read_lexicon"]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_VARIANT = re.compile(r"\(\d+\)$")
_COMMENT = ("#", ";;")
_HEADERS = (
    {"word", "words", "grapheme", "graphemes", "orthography", "spelling", "text"},
    {
        "pronunciation",
        "pronunciations",
        "phoneme",
        "phonemes",
        "phones",
        "phone",
        "transcription",
        "ipa",
        "probability",
    },
)


class _Line(NamedTuple):
    """A line with something in it: its number from 1, its text and its columns."""

    number: int
    text: str
    columns: Sequence[str]

    def error(self, name: str, expected: str) -> InputError:
        return InputError(f"{name}, line {self.number}: expected {expected}, got {self.text[:60]!r}")


def read_lexicon(lines: Sequence[str], name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The words and pronunciations of lines of WORD, tab, phonemes; more pronunciations behind further tabs or lines.

    Case is ignored in the words, and ``word(2)`` is another pronunciation of ``word``. Phonemes are what stands between
    white space, digits of stress or tone included. Where every line has numbers before the pronunciation, in columns
    of their own or behind the word (probabilities, as of Kaldi and the Montreal aligner), these are passed over. So are
    empty lines, lines that begin with ``#`` or ``;;``, and a first line of column names.

    Args:
        lines: without their ends.
        name: of the file, for errors.

    Raises:
        InputError: a line is not of that form; or a number stands for a pronunciation, or a comment behind one.
    """
    found = list(_lines(lines))
    skipped = min((_leading_numbers(line) for line in found), default=0)
    weighted = bool(found) and all(_weighted(line.columns[0]) for line in found)
    numbers = all(_is_number(x) for line in found for column in line.columns[1 + skipped :] for x in column.split())
    for line in found:
        word = line.columns[0].rpartition(" ")[0].rstrip() if weighted else line.columns[0]
        pronunciations = [tuple(column.split()) for column in line.columns[1 + skipped :]]
        if not word or not pronunciations or not all(pronunciations):
            raise line.error(name, "WORD, a tab and phonemes")
        for one in pronunciations:
            if any(map(_is_probability, one)) or (len(one) == 1 and _is_number(one[0]) and not numbers):
                raise line.error(name, "phonemes in place of a number (probabilities stand in every line, or in none)")
            if any(x.startswith("#") for x in one[1:]):
                raise line.error(name, "phonemes alone (a comment has a line of its own)")
        word = _VARIANT.sub("", word).rstrip() or word
        yield from ((word.lower(), one) for one in pronunciations)


def _lines(lines: Sequence[str]) -> Iterator[_Line]:
    first = True
    for number, text in enumerate(lines, 1):
        if text.strip() and not text.lstrip().startswith(_COMMENT):
            line = _Line(number, text, [column.strip() for column in text.split("\t")])
            if not (first and _is_header(line.columns)):
                yield line
            first = False


def _is_header(columns: Sequence[str]) -> bool:
    return len(columns) > 1 and columns[0].lower() in _HEADERS[0] and columns[1].lower() in _HEADERS[1]


def _leading_numbers(line: _Line) -> int:
    """How many columns behind the word are numbers, before one that is none."""
    after = line.columns[1:]
    return next((count for count, column in enumerate(after) if not _is_number(column)), 0)


def _weighted(word: str) -> bool:
    """Whether a probability stands behind it, in its column."""
    last = word.rpartition(" ")[2]
    return last != word and _is_probability(last) and 0.0 <= float(last) <= 1.0


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_probability(text: str) -> bool:
    """A number that no phoneme is called by."""
    return _is_number(text) and not text.isdigit()
