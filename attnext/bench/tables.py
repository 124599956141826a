"""What the tables of a run are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["WIDTHS", "bound", "duration", "new_table", "write"]

Document = dict[str, Any]
WIDTHS = (17, 9, 18, 7, 6, 14)
"""Of most tables' columns: with the space between them, 77 in all."""


def new_table(*columns: str, widths: Sequence[int] = WIDTHS) -> Table:
    """The first column is aligned left."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, (name, width) in enumerate(zip(columns, widths, strict=False)):
        table.add_column(name, justify="right" if index else "left", min_width=width, no_wrap=True)
    return table


def write(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def duration(seconds: float) -> str:
    unit, factor = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("us", 1e-6))
    value = seconds / factor
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def bound(result: Document, peaks: Document) -> float | None:
    """Seconds that the machine needs at least: for the arithmetic, or to read a step's memory that no cache holds.

    Steps that are timed together read it again and again.
    """
    if not peaks["multiply_adds"]:
        return None
    arithmetic = result["multiply_adds"] / peaks["multiply_adds"]
    beyond = result["memory_bytes"] > peaks["last_level_cache"]
    reading = result.get("reads", 1) * result["memory_bytes"] / peaks["read_bandwidth"]
    return float(max(arithmetic, reading if beyond else 0.0))
