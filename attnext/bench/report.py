"""A run as text: its tables, its JSON, and two runs compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from attnext._support import InputError, write_atomically
from attnext.bench.study_tables import STUDIES
from attnext.bench.tables import WIDTHS, Document, bound, duration, new_table, write

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SCHEMA", "bound", "bounded", "cells", "compare", "load", "ratio", "save", "show"]

SCHEMA = 1

# Two runs of the same code differ by some per cent as the machine does, which the samples of one run can't tell.
_MARGIN = 0.05
_RESAMPLES = 4000


def show(console: Console, document: Document) -> None:
    """Prints the tables of a run, their caption and the notes."""
    names = list(dict.fromkeys(result["case"] for result in document["results"]))
    for name in names:
        results = [result for result in document["results"] if result["case"] == name]
        first = results[0]
        write(console, f"\n{name}: {first['kind']}, {first['sizes']}, {first['dtype']}")
        table = new_table("peer", "median", "quartiles", "G el/s", "bound", "attnext is")
        for result in results:
            table.add_row(*cells(result, results, document["peaks"]))
        console.print(table)
    for name, rows in document["studies"].items():
        if rows:
            STUDIES[name](console, bounded(rows, document["peaks"]))
    for line in (*_caption(document), *(f"note: {text}" for text in document["notes"])):
        write(console, line)


def bounded(rows: Sequence[Document], peaks: Document) -> list[Document]:
    """The rows of a study; the time that its work needs at least is there where work is counted."""
    return [row | {"bound": bound(row, peaks)} if "multiply_adds" in row else row for row in rows]


def cells(result: Document, results: Sequence[Document], peaks: Document) -> tuple[str, ...]:
    """A peer's: name, median, quartiles, speed, share of the bound, and how attnext compares."""
    seconds = result["seconds"]
    middle = median(seconds)
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    least = bound(result, peaks)
    other = result["peer"] == "sdpa" and result.get("score") != "dot"  # another function than the case's
    share = f"{least / middle:.0%}" if least and not other else "-"
    speed = f"{result['elements'] / middle / 1e9:.3g}" if not other else "-"
    times = ratio(result, results)
    than = "" if times is None else f"{times:.3g}x faster" if times >= 1 else f"{1 / times:.3g}x slower"
    return result["peer"], duration(middle), f"{duration(low)} - {duration(high)}", speed, share, than


def ratio(result: Document, results: Sequence[Document]) -> float | None:
    """How many times longer a peer takes than attnext in the same case; None for attnext itself and without it."""
    ours = next((other for other in results if other["peer"].startswith("attnext")), None)
    if ours is None or ours is result:
        return None
    return float(median(result["seconds"]) / median(ours["seconds"]))


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


def save(path: Path, document: Document) -> None:
    """Writes the JSON, a list of numbers on one line: there are thousands."""
    text = json.dumps(document, indent=1)
    lists = re.sub(r"\[\n[^\[\]{}\"]+\n *\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    write_atomically(path, f"{lists}\n".encode())


def load(path: Path) -> Document:
    """Reads what ``--json`` wrote.

    Raises:
        InputError: the file is not there, or is something else.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != SCHEMA:
            raise InputError(f"{str(path)!r} has schema {document['schema']!r} of results, this version reads {SCHEMA}")
        for key, seconds in _samples(document).items():
            if not min(seconds) > 0:
                raise ValueError(f"no times of {key}")
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
    old, new = _samples(before), _samples(after)
    table = new_table("case", "before", "after", "ratio", "now", widths=(29, *WIDTHS[1:]))
    table.columns[0].no_wrap = False
    for key in (key for key in old if key in new):
        a, b = old[key], new[key]
        low, high = _interval(a, b)
        verdict = "slower" if low > 1 + _MARGIN else "faster" if high < 1 / (1 + _MARGIN) else "same"
        times = f"{median(b) / median(a):.2f}x"
        table.add_row(f"{key[0]}, {key[1]}", duration(median(a)), duration(median(b)), times, verdict)
    console.print(table)
    if alone := sorted(f"{key[0]}, {key[1]}" for key in old.keys() ^ new.keys()):
        write(console, f"only in one of them: {'; '.join(alone)}")
    circumstances = zip(_circumstances(before).items(), _circumstances(after).values(), strict=True)
    if differ := [f"{name} ({one}, then {other})" for (name, one), other in circumstances if one != other]:
        write(console, f"warning: not measured alike: {'; '.join(differ)}")
    rule = f"where its 99% bootstrap interval lies beyond a change of {_MARGIN:.0%}"
    write(console, f"ratio of the medians; slower or faster {rule}")


def _samples(document: Document) -> dict[tuple[str, ...], list[float]]:
    """All that was timed in rounds, by case, peer, sizes and dtype: the cases, and the loops of the study of steps."""
    cases = {
        (result["case"], result["peer"], result["sizes"], result["dtype"]): result["seconds"]
        for result in document["results"]
    }
    loops = [row for row in document["studies"].get("steps", []) if "seconds" in row]
    return cases | {
        (f"{row['loop']}, {row['kind']}", peer, row["sizes"], "float32"): seconds
        for row in loops
        for peer, seconds in row["seconds"].items()
    }


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
