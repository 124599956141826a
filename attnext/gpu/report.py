"""The report: what each stage said, in Markdown for people and JSON for programs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import attnext
from attnext import info
from attnext._support import InputError, write_atomically
from attnext.backends._gpu import unusable

if TYPE_CHECKING:
    from attnext.gpu.command import Done

__all__ = ["write"]

_LAST_LINES = 40


def write(out: Path, done: Sequence[Done], dry: bool) -> None:
    """``report.md`` and ``report.json`` in the folder."""
    machine = {**info.collect(), "attnext": attnext.__version__, **_cards()}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    document = {
        "schema": 1,
        "date": date,
        "dry run": dry,
        "machine": machine,
        "stages": [_as_json(entry) for entry in done],
    }
    write_atomically(out / "report.json", json.dumps(document, indent=1).encode())
    parts = [f"# attnext on {_heading(machine, dry)}", f"{date[:10]}, attnext {attnext.__version__}"]
    parts += [_table(("", ""), machine.items())]
    parts += [_table(("stage", "", "outcome", "s"), (_row(entry) for entry in done))]
    parts += [part for entry in done if entry.state != "not run" for part in _section(entry, out)]
    write_atomically(out / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def _cards() -> dict[str, str]:
    """What NVIDIA's or AMD's own tool says of the cards, and torch of their memory."""
    found = {}
    for index in range(torch.cuda.device_count()):
        if not unusable(index):
            p: Any = torch.cuda.get_device_properties(index)
            found[f"GPU {index}"] = f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        found["driver, clock, power"] = asked.stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def _heading(machine: dict[str, str], dry: bool) -> str:
    return "the CPU: a dry run" if dry else machine.get("GPU 0", "a GPU").partition(",")[0]


def _as_json(entry: Done) -> dict[str, Any]:
    found = {path.stem: _load(path) for path in entry.stage.writes if path.suffix == ".json" and path.is_file()}
    return {
        "name": entry.stage.name, "title": entry.stage.title, "command": list(entry.stage.command),
        "state": entry.state, "said": entry.said, "seconds": round(entry.seconds, 2), "found": found,
    }  # fmt: skip


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:  # of a process that was ended while it wrote
        return None


def _row(entry: Done) -> tuple[str, ...]:
    outcome = f"**{entry.state}**" if entry.wrong else entry.state
    return entry.stage.name, entry.stage.title, ": ".join(filter(None, (outcome, entry.said))), f"{entry.seconds:.0f}"


def _section(entry: Done, out: Path) -> Iterable[str]:
    """A heading, what there is to show, and the end of the log where something went wrong."""
    shown = [part for path in entry.stage.writes if path.is_file() for part in _shown(path, out)]
    log = out / f"{entry.stage.name}.log"
    if entry.state == "held" and entry.stage.name == "info":
        return  # what it says stands above
    if entry.state != "held" or not shown:
        shown.append(_quoted(log))
    yield f"## {entry.stage.title}"
    yield from shown


def _quoted(log: Path) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()]
    return "```\n" + "\n".join(lines[-_LAST_LINES:]) + "\n```"


def _shown(path: Path, out: Path) -> Iterable[str]:
    """Of a picture the picture, of results their tables."""
    if path.suffix == ".png":
        return [f"![{path.stem}]({path.relative_to(out)})"]
    found = _load(path)
    if path.stem == "bench":
        from attnext.bench import markdown

        try:
            return [markdown.sections([path]).strip()]
        except InputError as error:
            return [str(error)]
    if not found:
        return []
    if path.stem.startswith("verify"):
        return _verified(found)
    return [_table(tuple(found[0]), ([_cell(value) for value in row.values()] for row in found))]


def _verified(found: dict[str, Any]) -> list[str]:
    """The worst of all errors of a backend and dtype, in units of their tolerance, and what was beyond it."""
    rows = []
    for row in found["errors"]:
        name, worst = max(row["worst"].items(), key=lambda item: float(item[1]))
        rows.append((row["kind"], row["dtype"], str(row["cases"]), f"{worst:.2f} ({name})"))
    table = _table(("calls", "dtype", "how many", "worst error, of its tolerance"), rows)
    return [table, "\n".join(f"- {failure}" for failure in found["failures"][:_LAST_LINES])]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1e3 else f"{value:,.0f}"
    return str(value).partition("\n")[0]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
