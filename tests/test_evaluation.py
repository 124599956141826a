"""Error rates, and pictures of them, of training and of alignments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnext.seq2seq import plots
from attnext.seq2seq.data import (
    Entry,
)
from attnext.seq2seq.evaluation import Errors, by_length, count_errors, total
from attnext.seq2seq.search import Output

pytestmark = pytest.mark.usefixtures("one_thread")


def test_count_errors() -> None:
    cases: list[tuple[str, list[str], int, int]] = [
        ("K AE T", ["K AE T"], 0, 3),
        ("K AE T", ["D AO G Z", "K AE T"], 0, 3),
        ("K AE", ["K AE T"], 1, 3),
        ("K AE T S", ["K AE T"], 1, 3),
        ("K AH T", ["K AE T"], 1, 3),
        ("", ["K AE T"], 3, 3),
        ("AE K T", ["K AE T"], 2, 3),
        ("K AE", ["AH B AW T", "K AE T"], 1, 3),
        ("K AE", ["K", "K AE T"], 1, 3),
        ("K AE", ["K AE T", "K"], 1, 3),
        ("K", [""], 1, 0),
    ]
    for output, right, edits, symbols in cases:
        errors = count_errors(output.split(), [one.split() for one in right])
        assert errors == Errors(edits, symbols, int(edits > 0), 1)
    with pytest.raises(ValueError, match="right must name an output"):
        count_errors(["K"], [])


def test_errors_add_up() -> None:
    errors = Errors(2, 9, 1, 3)
    assert (errors.of_symbols, errors.of_sources) == (2 / 9, 1 / 3)
    assert errors.plus(Errors(1, 2, 1, 1)) == Errors(3, 11, 2, 4)
    assert errors.describe("g2p") == "PER 22.22% WER 33.33% (3 words)"
    assert errors.describe("pairs") == "symbol errors 22.22% line errors 33.33% (3 lines)"
    assert errors.record() == {"symbol_errors": 2 / 9, "source_errors": 1 / 3, "sources": 3}
    assert (Errors().of_symbols, Errors().of_sources) == (0.0, 0.0)


def test_errors_by_length() -> None:
    entries = [Entry("ox", (("AA",),)), Entry("w", (("D", "AH"),)), Entry("it", (("IH", "T"), ("IH",)))]
    parts = by_length(entries, [("AA",), ("D",), ("IH", "K", "S")], [2, 1, 2])
    assert list(parts.items()) == [(1, Errors(1, 2, 1, 1)), (2, Errors(2, 3, 1, 2))]
    assert total(parts) == Errors(3, 5, 2, 3)
    assert (by_length([], [], []), total({})) == ({}, Errors())
    with pytest.raises(ValueError, match="shorter"):
        by_length(entries, [("AA",)], [2, 1, 2])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, so that what is in them can be looked at; they are written all the same."""
    found: list[Any] = []
    write = plots.write_picture

    def keep(path: Path, figure: Any) -> None:
        found.append(figure)
        write(path, figure)

    monkeypatch.setattr(plots, "write_picture", keep)
    return found


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 10_000


def output(source: str, symbols: tuple[str, ...], letters: int) -> Output:
    weights = torch.rand(len(symbols), letters)
    return Output(source, [symbols, ("other",)], [-0.1, -0.2], [weights, torch.rand(1, letters)])


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_alignment_picture(tmp_path: Path, figures: list[Any]) -> None:
    outputs = [output(f"word{'s' * n}", ("W", "ER")[:n], 4 + n) for n in range(11)]
    plots.alignment(tmp_path / "words.png", outputs)
    assert is_picture(tmp_path / "words.png")
    shown = [axes for axes in figures[0].axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in shown] == [one.source for one in outputs]
    assert labels(shown[2].xaxis) == list("wordss")
    assert labels(shown[2].yaxis) == ["W", "ER"]
    assert outputs[2].weights is not None
    assert torch.equal(torch.tensor(shown[2].images[0].get_array()), outputs[2].weights[0])
    assert not shown[0].images
    with pytest.raises(ValueError, match="must have attention weights"):
        plots.alignment(tmp_path / "none.png", [])
    with pytest.raises(ValueError, match="must have attention weights"):
        plots.alignment(tmp_path / "none.png", [Output("a", [("AH",)], [0.0], None)])
    assert [file.name for file in tmp_path.iterdir()] == ["words.png"]


def test_alignment_picture_of_words(tmp_path: Path, figures: list[Any]) -> None:
    long = " ".join(["word"] * 10)
    outputs = [output("it costs $5 or $\\x$", ("$", "es", "$\\y$", "a_b"), 5), output(long, ("W",), 10)]
    plots.alignment(tmp_path / "words.png", outputs, unit="words")
    assert is_picture(tmp_path / "words.png")
    first, second = figures[0].axes[:2]
    assert labels(first.xaxis) == ["it", "costs", "$5", "or", "$\\x$"]
    assert labels(first.yaxis) == ["$", "es", "$\\y$", "a_b"]
    assert second.get_title() == long[:29] + "…"


def test_curves_of_a_log(tmp_path: Path, figures: list[Any]) -> None:
    log = tmp_path / "log.jsonl"
    steps: list[dict[str, Any]] = [
        {"event": "steps", "seconds": 30.0 * n, "loss": 3.0 / n, "rate": 0.001 * n, "norm": 1} for n in (1, 2, 3)
    ]
    dev: list[dict[str, Any]] = [
        {"event": "dev", "seconds": 120.0 * n, "symbol_errors": 0.5 / n, "source_errors": 0.75 / n} for n in (1, 2)
    ]
    for unit, last in ((1.0, 120.0), (60.0, 240.0)):
        lines = [line for line in [*steps, *dev] if line["seconds"] <= last]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plots.curves(tmp_path / "curves.png", log, "g2p")
        assert is_picture(tmp_path / "curves.png")
        top, middle, bottom = figures[-1].axes
        (line,) = top.lines
        assert list(line.get_xdata()) == [30 / unit, 60 / unit, 90 / unit]
        assert list(line.get_ydata()) == [3.0, 1.5, 1.0]
        assert [line.get_label() for line in middle.lines] == ["words", "phonemes"]
        shown = len(lines) - 3
        assert [list(line.get_ydata()) for line in middle.lines] == [[75.0, 37.5][:shown], [50.0, 25.0][:shown]]
        assert list(bottom.lines[0].get_ydata()) == [0.001, 0.002, 0.003]
        assert bottom.get_xlabel() == f"{'seconds' if unit == 1.0 else 'minutes'} of training"
    plots.curves(tmp_path / "curves.png", log, "pairs")
    assert [line.get_label() for line in figures[-1].axes[1].lines] == ["lines", "symbols"]


@pytest.mark.filterwarnings("error")
def test_curves_of_a_log_without_errors(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    steps = {"event": "steps", "seconds": 1.0, "loss": 0.5, "rate": 0.001}
    for errors in ([], [{"event": "dev", "seconds": 1.0, "symbol_errors": 0.0, "source_errors": 0.0}]):
        log.write_text("".join(json.dumps(line) + "\n" for line in [steps, *errors]))
        plots.curves(tmp_path / "curves.png", log, "g2p")
        assert is_picture(tmp_path / "curves.png")
    log.write_text("")
    plots.curves(tmp_path / "curves.png", log, "g2p")


def test_errors_by_length_of_two_models(tmp_path: Path, figures: list[Any]) -> None:
    models = {
        "one": {2: Errors(5, 100, 4, 50), 3: Errors(30, 100, 20, 40), 9: Errors(1, 9, 1, 9)},
        "other": {2: Errors(10, 100, 4, 50), 3: Errors(15, 100, 20, 40), 9: Errors(2, 9, 1, 9)},
    }
    for task, unit in (("g2p", "phoneme errors (%)"), ("pairs", "symbol errors (%)")):
        plots.errors_by_length(tmp_path / "errors.png", models, task)
        assert is_picture(tmp_path / "errors.png")
        top, bottom = figures[-1].axes
        assert top.get_ylabel() == unit
        assert [line.get_label() for line in top.lines] == ["one", "other"]
        # Nine sources are too few for a rate.
        assert [list(line.get_xdata()) for line in top.lines] == [[2, 3], [2, 3]]
        assert [list(line.get_ydata()) for line in top.lines] == [[5.0, 30.0], [10.0, 15.0]]
        assert top.lines[0].get_marker() != top.lines[1].get_marker()
        assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bottom.patches] == [
            (2.0, 50), (3.0, 40), (9.0, 9),
        ]  # fmt: skip
    short = {name: {length: errors[length] for length in (2, 3)} for name, errors in models.items()}
    plots.errors_by_length(tmp_path / "errors.png", short, "g2p")
    assert all(tick == round(tick) for tick in figures[-1].axes[1].get_xticks())  # there are no halves of letters
