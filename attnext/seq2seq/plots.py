"""Pictures: where a model looked, how training went, and errors by the length of the source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnext._support import extra, write_picture
from attnext.seq2seq.evaluation import Errors
from attnext.seq2seq.search import Output

__all__ = ["alignment", "curves", "errors_by_length"]


def alignment(path: Path, outputs: Sequence[Output], unit: str = "characters") -> None:
    """Writes a picture with a heat map per source: which of its symbols (across) each of the output (down) attends.

    Args:
        path: its name says whether it is a PNG, an SVG or a PDF.
        outputs: with their weights.
        unit: of the sources.

    Raises:
        ValueError: there is no output, or one without weights.
        MissingExtra: matplotlib is not installed.
    """
    if not outputs or any(output.weights is None for output in outputs):
        raise ValueError("outputs must have attention weights: ask for them by need_weights")
    with extra("demo"):
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
    # From paper to dark in one colour: the order is seen in grey print, and by the colour-blind.
    colours = ScalarMappable(Normalize(0.0, 1.0), "Blues")
    columns = min(len(outputs), 3 if len(outputs) < 10 else 4)
    rows = math.ceil(len(outputs) / columns)
    figure = _figure(1.2 + 3.1 * columns, 0.6 + 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, output in zip(grid.flat, outputs, strict=False):
        assert output.weights is not None
        if output.best:
            axes.imshow(output.weights[0].numpy(), colours.cmap, colours.norm, aspect="auto")
        letters = list(output.source) if unit == "characters" else output.source.split()
        # A dollar is no sign of a formula.
        axes.set_title(output.source if len(output.source) <= 30 else output.source[:29] + "…", parse_math=False)
        axes.set_xticks(range(len(letters)), letters, rotation=0 if unit == "characters" else 60, parse_math=False)
        axes.set_yticks(range(len(output.best)), output.best, parse_math=False)
        axes.tick_params(length=0)
    for axes in grid.flat[len(outputs) :]:
        axes.set_visible(False)
    figure.supxlabel("symbol of the source attended")
    figure.supylabel("symbol of the output, from first to last")
    figure.colorbar(colours, ax=grid, label="attention weight", fraction=0.05)
    write_picture(path, figure)


def curves(path: Path, log: Path, task: str) -> None:
    """Writes a picture of a run's log: loss, errors on held-out data and learning rate against the time of training.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with extra("demo"):
        from matplotlib.ticker import LogLocator
    lines = []
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError):  # one that someone has cut
            lines.append(json.loads(line))
    steps, dev = ([line for line in lines if line["event"] == event] for event in ("steps", "dev"))
    unit, over = (60.0, "minutes") if lines and lines[-1]["seconds"] > 180 else (1.0, "seconds")
    figure = _figure(7.0, 7.0)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))

    def draw(axes: Any, some: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, factor: float) -> None:
        x, y = [line["seconds"] / unit for line in some], [factor * line[name] for line in some]
        axes.plot(x, y, label=label, color=colour, marker="." if len(some) < 60 else None, linewidth=1.2)

    draw(top, steps, "loss", "training", "tab:blue", 1.0)
    draw(middle, dev, "source_errors", "words" if task == "g2p" else "lines", "tab:red", 100.0)
    draw(middle, dev, "symbol_errors", "phonemes" if task == "g2p" else "symbols", "tab:orange", 100.0)
    draw(bottom, steps, "rate", "learning rate", "tab:gray", 1.0)
    top.set_ylabel("loss a symbol (nats)")
    middle.set_ylabel("wrong on held-out data (%)")
    middle.legend()
    bottom.set(ylabel="learning rate", xlabel=f"{over} of training")
    for axes in (top, middle):
        if any(y > 0 for line in axes.lines for y in line.get_ydata()):  # a logarithm needs one
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # more labels would overlap
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    write_picture(path, figure)


def errors_by_length(path: Path, models: Mapping[str, Mapping[int, Errors]], task: str) -> None:
    """Writes a picture that sets models side by side: errors against the length of the source, and how many there are.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = _figure(7.0, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for marker, (name, lengths) in zip("osD^vPX*" * len(models), models.items(), strict=False):
        shown = {length: errors for length, errors in lengths.items() if errors.sources >= 10}
        rates = [100 * errors.of_symbols for errors in shown.values()]
        top.plot(list(shown), rates, marker=marker, markersize=4, label=name)
    counts = {length: errors.sources for lengths in models.values() for length, errors in lengths.items()}
    bottom.bar(list(counts), list(counts.values()), color="tab:gray")
    top.set_ylabel(f"{'phoneme' if task == 'g2p' else 'symbol'} errors (%)")
    top.set_ylim(bottom=0)
    top.legend()
    top.grid(alpha=0.3)
    bottom.set(
        ylabel="words" if task == "g2p" else "lines", yscale="log",
        xlabel=f"length of the source ({'letters' if task == 'g2p' else 'symbols'}); errors where there are 10 or more",
    )  # fmt: skip
    bottom.locator_params(axis="x", integer=True)
    write_picture(path, figure)


def _figure(width: float, height: float) -> Any:
    with extra("demo"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
