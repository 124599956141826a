"""A run as text: its tables, its JSON, and two runs compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from attnext._support import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["SCHEMA", "bound", "compare", "load", "ratio", "show"]

SCHEMA = 1
Document = dict[str, Any]

# Two runs of the same code differ by some per cent as the machine does, which the samples of one run can't tell.
_MARGIN = 0.05
_RESAMPLES = 4000


def show(console: Console, document: Document) -> None:
    """Prints the tables of a run, their caption and the notes."""
    names = list(dict.fromkeys(result["case"] for result in document["results"]))
    for name in names:
        results = [result for result in document["results"] if result["case"] == name]
        first = results[0]
        _line(console, f"\n{name}: {first['kind']}, {first['sizes']}, {first['dtype']}")
        table = _table("peer", "median", "quartiles", "G el/s", "bound", "attnext is")
        for result in results:
            table.add_row(*_cells(result, results, document["peaks"]))
        console.print(table)
    for name, rows in document["studies"].items():
        if rows:
            _STUDIES[name](console, rows)
    for line in (*_caption(document), *(f"note: {text}" for text in document["notes"])):
        _line(console, line)


def _table(*columns: str) -> Table:
    """Columns of one width in all tables, 77 in all, the first aligned left."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, (name, width) in enumerate(zip(columns, (17, 9, 18, 7, 6, 14), strict=False)):
        table.add_column(name, justify="right" if index else "left", min_width=width, no_wrap=True)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _cells(result: Document, results: Sequence[Document], peaks: Document) -> tuple[str, ...]:
    seconds = result["seconds"]
    middle = median(seconds)
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    least = bound(result, peaks)
    other = result["peer"] == "sdpa" and result.get("score") != "dot"  # another function than the case's
    share = f"{least / middle:.0%}" if least and not other else "-"
    speed = f"{result['elements'] / middle / 1e9:.3g}" if not other else "-"
    times = ratio(result, results)
    than = "" if times is None else f"{times:.3g}x faster" if times >= 1 else f"{1 / times:.3g}x slower"
    return result["peer"], _time(middle), f"{_time(low)} - {_time(high)}", speed, share, than


def bound(result: Document, peaks: Document) -> float | None:
    """Seconds that the machine needs at least: for the arithmetic, or to read a step's memory that no cache holds."""
    if not peaks["multiply_adds"]:
        return None
    arithmetic = result["multiply_adds"] / peaks["multiply_adds"]
    beyond = result["memory_bytes"] > peaks["last_level_cache"]
    return float(max(arithmetic, result["memory_bytes"] / peaks["read_bandwidth"] if beyond else 0.0))


def ratio(result: Document, results: Sequence[Document]) -> float | None:
    """How many times longer a peer takes than attnext in the same case; None for attnext itself and without it."""
    ours = next((other for other in results if other["peer"].startswith("attnext")), None)
    if ours is None or ours is result:
        return None
    return float(median(result["seconds"]) / median(ours["seconds"]))


def _time(seconds: float) -> str:
    unit, factor = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("us", 1e-6))
    value = seconds / factor
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def _caption(document: Document) -> list[str]:
    peaks, versions = document["peaks"], document["versions"]
    where = f"{document['device']}, {document['machine']['cpu']}"
    lines = [f"\n{where}, {document['threads']} threads, torch {versions['torch']}"]
    if peaks["multiply_adds"]:
        lines.append(
            f"bound: share of this machine's peak that was reached, {peaks['multiply_adds'] / 1e9:.0f} G "
            f"multiply-adds/s (or {peaks['read_bandwidth'] / 1e9:.0f} GB/s read, for steps that no cache holds)"
        )
    lines.append("quartiles of the samples; el: score elements B Tq Tk D")
    if any(result["peer"] == "sdpa" and result.get("score") != "dot" for result in document["results"]):
        lines.append("sdpa beside additive attention is a yardstick of the same sizes, not the same function")
    return lines


def _show_threads(console: Console, rows: Sequence[Document]) -> None:
    _line(console, f"\nthreads: one against {rows[0]['threads']}")
    table = _table("case", "one", "all", "ratio")
    for row in rows:
        table.add_row(row["case"], _time(row["one"]), _time(row["all"]), f"{row['one'] / row['all']:.2f}x")
    console.print(table)


def _show_linearity(console: Console, rows: Sequence[Document]) -> None:
    _line(console, "\nlinearity: time grows as a size to the power of")
    table = _table("kind", "size", "from - to", "power")
    for row in rows:
        table.add_row(row["kind"], row["size"], f"{row['sizes'][0]} - {row['sizes'][-1]}", f"{row['exponent']:.2f}")
    console.print(table)


def _show_memory(console: Console, rows: Sequence[Document]) -> None:
    _line(console, "\nmemory: forward + backward, B 16, Tq 128, D 256, H 512; peak beside the inputs")
    table = _table("peer", "Tk", "median", "peak")
    for row in rows:
        size = f"{row['bytes'] / 2**20:.0f} MiB" if "bytes" in row else "-"
        table.add_row(row["peer"], str(row["keys"]), _time(row["seconds"]), size)
    console.print(table)


def _show_family(console: Console, rows: Sequence[Document]) -> None:
    first = rows[0]
    sizes = f"B {first['batch']}, Tk {first['keys']}, Q and H {first['size']}, D {first['size'] // 2}"
    _line(console, f"\nfamily: {sizes}; preparation and {first['steps']} steps of a decoder")
    table = _table("attention", "no grad", "PyTorch takes", "training", "takes")
    for row in rows:
        cells = []
        for kind in ("decode", "train"):
            ours, eager = row[kind]["attnext"], row[kind]["reference"]
            cells += [_time(ours), f"{eager / ours:.3g}x"]
        table.add_row(row["attention"], *cells)
    console.print(table)


def _show_model(console: Console, rows: Sequence[Document]) -> None:
    _line(console, "\nmodel: a training step, and where its time goes")
    table = _table("model", "B, Tx, Ty", "peer", "median", "ratio")
    for row in rows:
        for peer, seconds in row["seconds"].items():
            sizes = f"{row['batch']}, {row['source']}, {row['target']}"
            ratio = seconds / row["seconds"]["attnext"]
            table.add_row(row["model"], sizes, peer, _time(seconds), f"{ratio:.2f}x")
    console.print(table)
    for row in rows:
        for peer, shares in row["shares"].items():
            _line(console, f"{row['model']}, {peer}: {', '.join(f'{part} {x:.0%}' for part, x in shares.items())}")


_STUDIES = {
    "threads": _show_threads,
    "linearity": _show_linearity,
    "memory": _show_memory,
    "family": _show_family,
    "model": _show_model,
}


def load(path: Path) -> Document:
    """Reads what ``--json`` wrote.

    Raises:
        InputError: the file is not there, or is something else.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA:
            raise InputError(f"{str(path)!r} has schema {document['schema']!r} of results, this version reads {SCHEMA}")
        for result in document["results"]:
            if not (_key(result) and min(result["seconds"]) > 0):
                raise ValueError(f"no times of {_key(result)}")
        _circumstances(document)
    except OSError as error:
        raise InputError(f"can't read {str(path)!r}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not a result of attnext bench --json") from error
    return dict(document)


def compare(console: Console, first: Path, second: Path) -> None:
    """Prints what changed from one run to another, and by how much.

    Raises:
        InputError: a file is not a result of ``--json``.
    """
    before, after = load(first), load(second)
    old, new = ({_key(result): result for result in document["results"]} for document in (before, after))
    table = _table("case", "before", "after", "ratio", "now")
    table.columns[0].min_width = 29
    for key in (key for key in old if key in new):
        a, b = old[key]["seconds"], new[key]["seconds"]
        low, high = _interval(a, b)
        verdict = "slower" if low > 1 + _MARGIN else "faster" if high < 1 / (1 + _MARGIN) else "same"
        times = f"{median(b) / median(a):.2f}x"
        table.add_row(f"{key[0]}, {key[1]}", _time(median(a)), _time(median(b)), times, verdict)
    console.print(table)
    if alone := sorted(f"{key[0]}, {key[1]}" for key in old.keys() ^ new.keys()):
        _line(console, f"only in one of them: {'; '.join(alone)}")
    circumstances = zip(_circumstances(before).items(), _circumstances(after).values(), strict=True)
    if differ := [f"{name} ({one}, then {other})" for (name, one), other in circumstances if one != other]:
        _line(console, f"warning: not measured alike: {'; '.join(differ)}")
    rule = f"where its 99% bootstrap interval lies beyond a change of {_MARGIN:.0%}"
    _line(console, f"ratio of the medians; slower or faster {rule}")


def _key(result: Document) -> tuple[str, ...]:
    return result["case"], result["peer"], result["sizes"], result["dtype"]


def _circumstances(document: Document) -> dict[str, Any]:
    machine, versions = document["machine"], document["versions"]
    same = {"machine": machine["cpu"], "device": document["device"], "threads": document["threads"]}
    return same | {f"version of {name}": versions[name] for name in ("torch", "jax", "python")}


def _interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The 99% bootstrap interval of the ratio of two medians."""
    generator = torch.Generator().manual_seed(0)

    def medians(values: Sequence[float]) -> torch.Tensor:
        draws = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
        return torch.tensor(values, dtype=torch.float64)[draws].quantile(0.5, dim=1)

    low, high = (medians(after) / medians(before)).quantile(torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    return low, high
