"""The study of decoder steps as tables: loops, steps beside one call, memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from statistics import median, quantiles
from typing import TYPE_CHECKING

from attnext.bench.tables import Document, duration, new_table, write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["by_round", "share", "short", "show_steps", "times"]

_PEERS = ("eager", "compile")
_WIDTHS = (22, 8, 5, 19, 19)


def show_steps(console: Console, rows: Sequence[Document]) -> None:
    """Prints the tables, and what each loop is made of."""
    timed = [row for row in rows if "seconds" in row]
    calls = [row for row in timed if "one call" in row["seconds"]]
    loops = [row for row in timed if "one call" not in row["seconds"]]
    kept = [row for row in rows if "kept" in row]
    for show, some in ((_show_loops, loops), (_show_calls, calls), (_show_memory, kept)):
        if some:
            show(console, some)


def _show_loops(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\nsteps: how many times longer than attnext others take, median of the rounds")
    table = new_table("loop", "attnext", "bound", *_PEERS, widths=_WIDTHS)
    names = dict.fromkeys(row["loop"] for row in rows)
    for name in names:
        table.add_row(name)
        for row in (row for row in rows if row["loop"] == name):
            ours = row["seconds"]["attnext"]
            cells = (times(row["seconds"].get(peer), ours) for peer in _PEERS)
            table.add_row(f"  {row['kind']}", duration(median(ours)), share(row), *cells)
    console.print(table)
    for name in names:
        row = next(row for row in rows if row["loop"] == name)
        total = sum(row["work"].values())
        parts = ", ".join(f"{part} {count / total:.0%}" for part, count in row["work"].items())
        write(console, f"{name}: {row['sizes']}; of the bound, {row['kind']}: {parts}")


def _show_calls(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\ntraining through steps: how many times longer than one call of the same queries")
    table = new_table("loop", "steps", "bound", "times one call", "one call", widths=_WIDTHS)
    for row in rows:
        ours, call = row["seconds"]["attnext"], row["seconds"]["one call"]
        table.add_row(row["loop"], duration(median(ours)), share(row), times(ours, call), duration(median(call)))
    console.print(table)
    for row in rows:
        write(console, f"{row['loop']}: {row['sizes']}")


def _show_memory(console: Console, rows: Sequence[Document]) -> None:
    for row in rows:
        write(console, f"\nmemory of training, {row['loop']}: {row['sizes']}; kept for backward, and at the peak")
        table = new_table("peer", "kept", "times attnext's", "peak", "times attnext's", widths=(17, 9, 18, 9, 18))
        for peer in row["kept"]:
            cells = []
            for what in ("kept", "peak"):
                size, ours = row[what][peer], row[what].get("attnext", 0)
                cells += [f"{size / 2**20:.1f} MiB", f"{size / ours:.3g}x" if ours > 0 and peer != "attnext" else ""]
            table.add_row(peer, *cells)
        console.print(table)


def share(row: Document) -> str:
    """Of the bound, that was reached."""
    return f"{row['bound'] / median(row['seconds']['attnext']):.0%}" if row["bound"] else "-"


def times(seconds: Sequence[float] | None, other: Sequence[float]) -> str:
    """The median ratio of two peers' times, and its quartiles."""
    if seconds is None:
        return "-"
    ratios = by_round(seconds, other)
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{short(middle)}x ({short(low)} - {short(high)})"


def short(ratio: float) -> str:
    """In four characters, or three beyond 100."""
    return f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}"


def by_round(seconds: Sequence[float], other: Sequence[float]) -> list[float]:
    """The ratios of two peers' times, round by round, so that a machine that gets slower does not enter.

    A peer has as many samples in each round: a common divisor of their numbers tells samples of the same round.
    """
    rounds = gcd(len(seconds), len(other))

    def medians(samples: Sequence[float]) -> list[float]:
        each = len(samples) // rounds
        return [median(samples[start : start + each]) for start in range(0, len(samples), each)]

    return [one / two for one, two in zip(medians(seconds), medians(other), strict=True)]
