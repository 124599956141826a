"""Pictures of attention weights."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from attnext._support import extra, write_atomically
from attnext.seq2seq.search import Pronunciation

__all__ = ["alignment"]


def alignment(path: Path, pronunciations: Sequence[Pronunciation]) -> None:
    """Writes a PNG with a heat map per word: which letters (across) each phoneme (down) attends.

    Args:
        path: of the PNG.
        pronunciations: with their weights.

    Raises:
        ValueError: there is no word, or one without weights.
        MissingExtra: matplotlib is not installed.
    """
    if not pronunciations or any(word.weights is None for word in pronunciations):
        raise ValueError("pronunciations must have attention weights: ask pronounce() for them")
    with extra("demo"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    # From paper to dark in one colour: the order is seen in grey print, and by the colour-blind.
    colours = ScalarMappable(Normalize(0.0, 1.0), "Blues")
    columns = min(len(pronunciations), 3 if len(pronunciations) < 10 else 4)
    rows = math.ceil(len(pronunciations) / columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 0.6 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, word in zip(grid.flat, pronunciations, strict=False):
        assert word.weights is not None
        if word.phonemes:
            axes.imshow(word.weights.numpy(), colours.cmap, colours.norm, aspect="auto")
        axes.set_title(word.word)
        axes.set_xticks(range(len(word.word)), list(word.word))
        axes.set_yticks(range(len(word.phonemes)), word.phonemes)
        axes.tick_params(length=0)
    for axes in grid.flat[len(pronunciations) :]:
        axes.set_visible(False)
    figure.supxlabel("letter attended")
    figure.supylabel("phoneme, from first to last")
    figure.colorbar(colours, ax=grid, label="attention weight", fraction=0.05)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
