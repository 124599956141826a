"""The studies as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from attnext.bench.steps_table import share, show_steps, times
from attnext.bench.tables import Document, duration, new_table, write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["STUDIES", "show_dot_grid_summary"]


def _show_threads(console: Console, rows: Sequence[Document]) -> None:
    write(console, f"\nthreads: one against {rows[0]['threads']}")
    table = new_table("case", "one", "all", "ratio")
    for row in rows:
        table.add_row(row["case"], duration(row["one"]), duration(row["all"]), f"{row['one'] / row['all']:.2f}x")
    console.print(table)


def _show_linearity(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\nlinearity: time grows as a size to the power of")
    table = new_table("kind", "size", "from - to", "power")
    for row in rows:
        table.add_row(row["kind"], row["size"], f"{row['sizes'][0]} - {row['sizes'][-1]}", f"{row['exponent']:.2f}")
    console.print(table)


def _show_memory(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\nmemory: forward + backward, B 16, Tq 128, D 256, H 512; peak beside the inputs")
    table = new_table("peer", "Tk", "median", "peak")
    for row in rows:
        size = f"{row['bytes'] / 2**20:.0f} MiB" if "bytes" in row else "-"
        table.add_row(row["peer"], str(row["keys"]), duration(row["seconds"]), size)
    console.print(table)


def _show_family(console: Console, rows: Sequence[Document]) -> None:
    first = rows[0]
    sizes = f"B {first['batch']}, Tk {first['keys']}, Q and H {first['size']}, D {first['size'] // 2}"
    write(console, f"\nfamily: {sizes}; preparation and {first['steps']} steps of a decoder")
    table = new_table("attention", "no grad", "PyTorch takes", "training", "takes")
    for row in rows:
        cells = []
        for kind in ("decode", "train"):
            ours, eager = row[kind]["attnext"], row[kind]["reference"]
            cells += [duration(ours), f"{eager / ours:.3g}x"]
        table.add_row(row["attention"], *cells)
    console.print(table)


def _show_model(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\nmodel: a training step, and where its time goes")
    table = new_table("model", "B, Tx, Ty", "peer", "median", "ratio")
    for row in rows:
        for peer, seconds in row["seconds"].items():
            sizes = f"{row['batch']}, {row['source']}, {row['target']}"
            ratio = seconds / row["seconds"]["attnext"]
            table.add_row(row["model"], sizes, peer, duration(seconds), f"{ratio:.2f}x")
    console.print(table)
    for row in rows:
        for peer, shares in row["shares"].items():
            write(console, f"{row['model']}, {peer}: {', '.join(f'{part} {x:.0%}' for part, x in shares.items())}")
        peaks = ", ".join(f"{peer} {size / 2**20:.0f} MiB" for peer, size in row["peaks"].items())
        write(console, f"{row['model']}: peak of memory: {peaks}")


def _show_recurrent(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\nrecurrent: layers of both directions; how many times longer torch's take, median of the rounds")
    table = new_table("layer", "attnext", "bound", "torch takes", widths=(38, 9, 6, 20))
    timed = [row for row in rows if "seconds" in row]
    for name in dict.fromkeys((row["layer"], row["sizes"]) for row in timed):
        table.add_row(", ".join(name))
        for row in (row for row in timed if (row["layer"], row["sizes"]) == name):
            ours = row["seconds"]["attnext"]
            table.add_row(f"  {row['kind']}", duration(median(ours)), share(row), times(row["seconds"]["torch"], ours))
    console.print(table)
    for row in (row for row in rows if "peak" in row):
        sizes = ", ".join(f"{peer} {size / 2**20:.0f} MiB" for peer, size in row["peak"].items())
        write(console, f"{row['layer']}, {row['sizes']}: peak of forward + backward: {sizes}")


def _show_decoding(console: Console, rows: Sequence[Document]) -> None:
    write(console, f"\ndecoding: searches of {rows[0]['steps']} steps; how many times longer plain PyTorch takes")
    table = new_table("search", "attnext", "a step", "eager takes", widths=(38, 9, 9, 20))
    for row in rows:
        ours = row["seconds"]["attnext"]
        cells = duration(median(ours)), duration(median(ours) / row["steps"]), times(row["seconds"]["eager"], ours)
        table.add_row(f"{row['cell'].upper()}, {row['sizes']}", *cells)
    console.print(table)


def _show_dot_grid(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\ndot-grid: dot products, keys that are the values; how many times longer the other ways take")
    others = [name for name in rows[0]["seconds"] if name != "attnext"]
    widths = (18, 7, 9, 7, 6, 8, 9, 6)
    table = new_table("B, Tq, Tk, D", "kind", "chosen", "attnext", *others, widths=widths)
    for row in rows:
        ours, *rest = (median(row["seconds"][name]) for name in ("attnext", *others))
        cells = (f"{seconds / ours:.2f}x" for seconds in rest)
        table.add_row(row["sizes"], row["kind"], row["chosen"], duration(ours), *cells)
    console.print(table)
    write(console, _dot_grid_summary(rows))


def show_dot_grid_summary(console: Console, rows: Sequence[Document]) -> None:
    """The grid in a line."""
    write(console, f"\ndot-grid: the way that is chosen for dot products, {_dot_grid_summary(rows)}")


def _dot_grid_summary(rows: Sequence[Document]) -> str:
    times = [{name: median(samples) for name, samples in row["seconds"].items()} for row in rows]
    near = sum(one["attnext"] <= 1.1 * min(one.values()) for one in times)
    slower = sum(one["attnext"] > 1.1 * one["eager"] for one in times)
    return f"within 10% of the fastest way: {near} of {len(rows)}; slower than eager by more: {slower}"


def _show_code_bases(console: Console, rows: Sequence[Document]) -> None:
    write(console, "\npeers: how many times longer a code base takes with its own attention; quartiles of the rounds")
    sizes = list(dict.fromkeys(row["sizes"] for row in rows))
    table = new_table(
        "code base", "version", *(f"{name}, {kind}" for name in sizes for kind in ("forward", "training"))
    )
    for program in dict.fromkeys(row["program"] for row in rows):
        own = [row for row in rows if row["program"] == program]
        cells = [times(row["seconds"]["original"], row["seconds"]["accelerated"]) for row in own]
        table.add_row(program, own[0]["version"], *cells)
    console.print(table)


STUDIES: dict[str, Callable[[Console, Sequence[Document]], None]] = {
    "threads": _show_threads,
    "linearity": _show_linearity,
    "memory": _show_memory,
    "family": _show_family,
    "model": _show_model,
    "recurrent": _show_recurrent,
    "decoding": _show_decoding,
    "dot-grid": _show_dot_grid,
    "steps": show_steps,
    "peers": _show_code_bases,
}
