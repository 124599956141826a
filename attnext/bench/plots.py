"""The picture of a run: speed-up by case, time and memory as the source gets longer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnext._support import extra, write_picture
from attnext.bench.report import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

# Of a lightness that stands out from white as from black; told apart by the colour-blind too.
_GREY = "#868686"
_COLOURS = {"attnext": "#0e86d4", "eager": "#d9730d", "compile": "#1f9e74", "jax": "#b565c9", "sdpa": "#8c8c8c"}


def draw(path: Path, document: dict[str, Any]) -> None:
    """Writes the picture on a transparent ground.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with extra("bench"):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    words = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = dict.fromkeys(words, _GREY) | {"font.size": 9}
    with matplotlib.rc_context(style):
        # Of a case four bars, each with its number.
        height = max(5.2, 0.8 + 0.42 * len({result["case"] for result in document["results"]}))
        figure = Figure(figsize=(12.5, height), layout="constrained")
        FigureCanvasAgg(figure)
        bars, time, memory = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
        _bars(bars, document["results"])
        rows = document["studies"].get("memory", [])
        _lines(time, rows, "seconds", 1e3, "time, ms")
        _lines(memory, rows, "bytes", 2.0**-20, "peak memory beside the inputs, MiB")
        write_picture(path, figure, transparent=True)


def _colour(peer: str) -> str:
    return _COLOURS[peer.partition(" ")[0]]


def _bars(axes: Axes, results: list[dict[str, Any]]) -> None:
    cases = list(dict.fromkeys(result["case"] for result in results))
    named = set()
    for row, case in enumerate(cases):
        here = [result for result in results if result["case"] == case]
        bars = [(result["peer"], times) for result in here if (times := ratio(result, here)) is not None]
        for index, (peer, times) in enumerate(bars):
            place = row + 0.8 * ((index + 0.5) / len(bars) - 0.5)
            label = peer if peer not in named else None
            named.add(peer)
            axes.barh(place, times - 1, 0.7 / len(bars), left=1, color=_colour(peer), label=label)
            end = (max(times, 1), place)
            axes.annotate(f"{times:.3g}", end, (2, 0), textcoords="offset points", va="center", size=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.axvline(1, color=_GREY, linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    _finish(axes, "times faster than the peer", "x", legend=bool(named))


def _lines(axes: Axes, rows: list[dict[str, Any]], key: str, factor: float, label: str) -> None:
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = [(row["keys"], row[key] * factor) for row in rows if row["peer"] == peer and row.get(key)]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", color=_colour(peer), label=peer, markersize=4, linewidth=1.8)
    sizes = sorted({row["keys"] for row in rows})
    if sizes:
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("keys Tk\n(forward + backward, B 16, Tq 128, D 256, H 512)", size=8)
    _finish(axes, label, "both", legend=bool(rows))


def _finish(axes: Axes, title: str, grid: str, *, legend: bool) -> None:
    axes.set_title(title, size=10)
    axes.grid(axis=grid, alpha=0.35, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, labelcolor=_GREY, fontsize=8)
