"""The demonstration: verify, time, train and pronounce, in about four minutes."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import attnext
from attnext.backends import choose
from attnext.cli import main, positive
from attnext.seq2seq._support import demo_extra, make_writable
from attnext.seq2seq.checkpoint import load
from attnext.seq2seq.data import Entry, load_cmudict, split
from attnext.seq2seq.plots import alignment
from attnext.seq2seq.search import pronounce

__all__ = ["add_arguments", "run"]

_SHAPE = {"B": 16, "Tq": 64, "Tk": 256, "D": 256, "H": 512}
"""Of the timings: a batch of sentences to a model of the size that speech synthesis and translation use."""
_LEAST_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=positive(float), default=120.0, help="time to train (default 120)")
    parser.add_argument(
        "--out",
        type=Path,
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
    code = _run("verify", "--cases", "20")
    if code:
        return code
    _show_timings()
    code = _run("train", "g2p", "--seconds", f"{args.seconds:g}", "--out", str(folder))
    if code:
        return code
    _show_words(folder, picture)
    print(f"\ncheckpoint: {folder}\npicture:    {picture}")
    print(f"now try:    attnext predict {folder} hello world")
    return 0


def _run(*command: str) -> int:
    print(f"\n$ attnext {' '.join(command)}", flush=True)
    return main(command)


def _show_timings() -> None:
    """Prints how long the fused op takes, and the same op in PyTorch eager."""
    with demo_extra():
        from rich.console import Console
        from rich.table import Table
    fused = choose(None, "cpu")
    sizes = " ".join(f"{name}={size}" for name, size in _SHAPE.items())
    table = Table("", "PyTorch eager", f"attnext {fused}", "ratio", title=f"additive attention, {sizes}, seconds")
    for name, backward in (("forward", False), ("forward + backward", True)):
        eager, ours = (_measure(_call(backend, backward)) for backend in ("reference", fused))
        ratio = statistics.median(eager) / statistics.median(ours)
        table.add_row(name, _quantiles(eager), _quantiles(ours), f"{ratio:.1f}x")
    Console().print("", table, f"median (min..max), {torch.get_num_threads()} threads", sep="\n", highlight=False)


def _call(backend: str, backward: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    batch, queries, keys, size, values = _SHAPE.values()
    shapes = ((batch, queries, size), (batch, keys, size), (batch, keys, values), (size,))
    inputs = [torch.randn(shape, generator=generator).requires_grad_(backward) for shape in shapes]

    def call() -> None:
        context, _ = attnext.additive_attention(*inputs, backend=backend)
        if backward:
            torch.autograd.grad(context.sum(), inputs)

    return call


def _measure(call: Callable[[], None]) -> list[float]:
    """Seconds per call, of at least three calls and for at least a second, after one that doesn't count."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _LEAST_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _quantiles(times: list[float]) -> str:
    return f"{statistics.median(times):.3g} ({min(times):.3g}..{max(times):.3g})"


def _show_words(folder: Path, picture: Path, *, count: int = 12, drawn: int = 6) -> None:
    """Prints held-out words as the model and as the dictionary has them, and draws where the model looked."""
    with demo_extra():
        from rich.console import Console
        from rich.table import Table
    # Not names' plurals and abbreviations, which tell little.
    words = [entry for entry in split(load_cmudict()).test if entry.word.isalpha() and 6 <= len(entry.word) <= 12]
    entries = random.Random(2015).sample(words, count)
    found = pronounce(load(folder), [entry.word for entry in entries], need_weights=True)
    table = Table("", "word", "model", "dictionary", title="words the model has never seen")
    for entry, word in zip(entries, found, strict=True):
        table.add_row(*_compare(entry, word.phonemes))
    Console().print("", table, sep="\n", highlight=False)
    alignment(picture, found[:drawn])


def _compare(entry: Entry, phonemes: tuple[str, ...]) -> tuple[str, str, str, str]:
    right = phonemes in entry.pronunciations
    return (
        "=" if right else "x",
        entry.word,
        " ".join(phonemes),
        " | ".join(map(" ".join, entry.pronunciations)),
    )
