"""The demonstration: verify, time, train and pronounce, in about four minutes."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from attnext._support import extra, make_writable
from attnext.backends import backends, kernel_devices
from attnext.cli import path_argument, positive
from attnext.seq2seq.checkpoint import load
from attnext.seq2seq.data import Entry, load_cmudict, split
from attnext.seq2seq.plots import alignment
from attnext.seq2seq.search import Translator
from attnext_command import main

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=positive(float), default=120.0, help="time to train (default 120)")
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder of the results (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demonstration; returns the exit code of its commands, and stops at the first that fails.

    Raises:
        InputError: the folder can't be written to.
        MissingExtra: a package is missing.
    """
    make_writable(args.out)
    folder, picture = args.out / "g2p", args.out / "alignment.png"
    native = [name for name in kernel_devices() if backends()[name].available] or ["cpu"]  # which then says why not
    for command in (
        ("verify", "--cases", "20", *(word for name in native for word in ("--backend", name))),
        ("bench", "--quick", "--peers", "eager", "--cases", "forward,training,step"),
        ("train", "g2p", "--minutes", f"{args.seconds / 60:g}", "--out", str(folder), "--overwrite"),
    ):
        print(f"\n$ attnext {' '.join(command)}", flush=True)
        if code := main(command):
            return code
    _show_words(folder, picture)
    print(f"\ncheckpoint: {folder}\npicture:    {picture}")
    print(f"now try:    attnext predict {folder} hello world")
    return 0


def _show_words(folder: Path, picture: Path, *, count: int = 12, drawn: int = 6) -> None:
    """Prints held-out words as the model and as the dictionary has them, and draws where the model looked."""
    with extra("demo"):
        from rich.console import Console
        from rich.table import Table
    # Not names' plurals and abbreviations, which tell little.
    words = [entry for entry in split(load_cmudict()).test if entry.source.isalpha() and 6 <= len(entry.source) <= 12]
    entries = random.Random(2015).sample(words, count)
    outputs = Translator(load(folder))([entry.source for entry in entries], need_weights=True)
    table = Table("", "word", "model", "dictionary", title="words the model has never seen")
    for entry, output in zip(entries, outputs, strict=True):
        table.add_row(*_compare(entry, output.best))
    Console().print("", table, sep="\n", highlight=False)
    alignment(picture, outputs[:drawn])


def _compare(entry: Entry, phonemes: tuple[str, ...]) -> tuple[str, str, str, str]:
    right = phonemes in entry.targets
    return (
        "=" if right else "x",
        entry.source,
        " ".join(phonemes),
        " | ".join(map(" ".join, entry.targets)),
    )
