"""Runs as Markdown, a section for each: what the README has of them."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from attnext._support import InputError
from attnext.bench import report
from attnext.bench.steps_table import short
from attnext.bench.study_tables import STUDIES, show_dot_grid_summary
from attnext.bench.tables import Document, new_table

__all__ = ["sections"]

_INSTRUCTIONS = {"x86-64-v4": "AVX-512", "x86-64-v3": "AVX2"}
# Of the grid a line; the code bases have a table of their own.
_STUDIES = {name: show for name, show in STUDIES.items() if name != "peers"} | {"dot-grid": show_dot_grid_summary}


class _Page(Console):
    """A console whose tables are Markdown, titles are paragraphs, and other lines are items of a list."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=10_000, color_system=None)

    def print(self, *objects: Any, **options: Any) -> None:
        for content in objects:
            if isinstance(content, Table):
                content.box, content.padding, content.pad_edge = MARKDOWN, (0, 1), True
                super().print(content)
            elif content.startswith("\n"):
                name, colon, rest = content.strip().partition(":")
                super().print(f"\n**{name}**{colon}{rest}\n", **options)
            else:
                super().print(f"- {content}", **options)

    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        lines = "\n".join(line.rstrip() for line in self.file.getvalue().splitlines())
        return re.sub(r"\n{3,}", "\n\n", lines).strip()


def sections(paths: Sequence[Path]) -> str:
    """A section of each file that ``--json`` wrote, with a heading.

    Raises:
        InputError: a file is not there, or is something else.
    """
    return "\n".join(map(_section, paths))


def _section(path: Path) -> str:
    document = report.load(path)
    try:
        parts = [f"### {_heading(document)}", _facts(document)]
        if document["results"]:
            parts.append(_cases(document))
        if studies := _studies(document):
            parts += ["<details><summary>More of this run</summary>", studies, "</details>"]
        parts.append("\n".join(f"- {note}" for note in document["notes"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a result of attnext bench --json") from error
    return "".join(f"{part}\n\n" for part in parts if part)[:-1]


def _heading(document: Document) -> str:
    """The processor and what of it was at work, or the GPU."""
    machine, threads = document["machine"], document["threads"]
    if document["device"] != "cpu":
        return str(machine["torch"].partition("GPUs: ")[2])
    name = machine["cpu"].rpartition(", ")[0] or machine["cpu"]  # without the number of cores
    name = " ".join(re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name, flags=re.IGNORECASE).split())
    kernels = machine.get("extension instructions", "")
    instructions = _INSTRUCTIONS.get(kernels, kernels)
    instructions += " and AMX" if "amx_tile" in document.get("capabilities", ()) else ""
    return ", ".join(filter(None, (name, instructions, "one thread" if threads == 1 else f"{threads} threads")))


def _facts(document: Document) -> str:
    versions, peaks = document["versions"], document["peaks"]
    facts = [document.get("date", "")[:10], f"torch {versions['torch']}"]
    if any(result["peer"] == "jax" for result in document["results"]):
        facts.append(f"jax {versions['jax']}")
    if peaks["multiply_adds"]:
        rates = peaks["multiply_adds"] / 1e9, peaks["read_bandwidth"] / 1e9
        facts.append("peaks of {:.0f} G multiply-adds/s and {:.0f} GB/s".format(*rates))
    return f"{', '.join(filter(None, facts))}: `{_command(document['command'])}`."


def _command(words: Sequence[str]) -> str:
    """Without the files that it wrote."""
    written = ("--json", "--plot")
    pairs = zip(words, ["", *words], strict=False)
    return shlex.join(word for word, last in pairs if last not in written and word.partition("=")[0] not in written)


def _cases(document: Document) -> str:
    """One table: a line for each case, a column for each peer."""
    results, page = document["results"], _Page()
    peers = list(dict.fromkeys(result["peer"] for result in results))[1:]  # but the first, which is attnext's
    columns = ("case", "kind and sizes", "attnext", *(f"{peer} takes" for peer in peers), "of bound")
    table = new_table(*columns, widths=[0] * len(columns))
    table.columns[1].justify = "left"
    for name in dict.fromkeys(result["case"] for result in results):
        here = [result for result in results if result["case"] == name]
        ours, ratios = here[0], {result["peer"]: report.ratio(result, here) for result in here}
        what = ", ".join([ours["kind"], ours["sizes"], *([] if ours["dtype"] == "float32" else [ours["dtype"]])])
        _, middle, quartiles, _, share, _ = report.cells(ours, here, document["peaks"])
        times = (f"{short(ratio)}x" if (ratio := ratios.get(peer)) else "-" for peer in peers)
        table.add_row(name, what, f"{middle} ({quartiles})", *times, share)
    page.print(table)
    return page.text()


def _studies(document: Document) -> str:
    page = _Page()
    for name, rows in document["studies"].items():
        if rows and name in _STUDIES:
            _STUDIES[name](page, report.bounded(rows, document["peaks"]))
    return page.text()
