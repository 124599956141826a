"""The command line: what it prints, its exit codes, and one line for every error."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch

import attnext
from attnext import cli, demo, verify
from attnext.backends import choose, kernel_devices
from attnext.bench import command
from attnext.bench.cases import CASES
from attnext.seq2seq import Config, InputError, Seq2Seq, commands, data
from attnext.seq2seq.checkpoint import Checkpoint, load, save
from attnext.seq2seq.data import Corpus, Entry, Vocabulary, split
from attnext_command import main

WORDS = [
    Entry(f"{a}{b}{c}er{d}", ((a.upper(), "AH", c.upper(), "ER", "IY"), (a.upper(), "AH", c.upper(), "ER")))
    for a in "bdfgklmnp" for b in "ao" for c in "bdgkst" for d in ("ie", "ey")
]  # fmt: skip
"""A dictionary of 216 regular words, in place of the real one."""

PHONEMES = sorted({phoneme for entry in WORDS for target in entry.targets for phoneme in target})

SIZES = ["--embedding-size", "6", "--encoder-size", "7", "--decoder-size", "9", "--attention-size", "5"]
SHORT = ["--epochs", "2", "--batch-size", "64", "--backend", "reference", *SIZES]

PNG = b"\x89PNG"

Captured = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _small_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (data, demo):
        monkeypatch.setattr(module, "load_cmudict", lambda: WORDS)


def untrained(folder: Path, **fields: Any) -> Path:
    """A folder with the checkpoint of an untrained model, which knows the small letters."""
    torch.manual_seed(0)
    config = Config(embedding_size=6, encoder_size=7, decoder_size=9, attention_size=5, **fields)
    source, target = Vocabulary(("'", *ascii_lowercase), "characters", lower=True), Vocabulary(tuple(PHONEMES))
    save(folder, Checkpoint(Seq2Seq(config, len(source), len(target)), source, target))
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return untrained(tmp_path / "model")


def lexicon(path: Path, entries: list[Entry]) -> str:
    """A file of these words."""
    lines = ["\t".join((entry.source, *map(" ".join, entry.targets))) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def attnext_process(*arguments: str, words: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnext", *arguments]
    return subprocess.run(command, input=words, capture_output=True, text=True, check=False, timeout=120)


def error_line(captured: Captured, *, command: str = "attnext") -> str:
    """The one line on stderr, without its prefix."""
    line = captured.readouterr().err
    assert line.startswith(f"{command}: error: ")
    assert line.count("\n") == 1
    return line.removeprefix(f"{command}: error: ").rstrip()


def test_version_help_and_info(capsys: Captured) -> None:
    asked = attnext_process("--version")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"attnext {attnext.__version__}\n", "")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in ("info", "verify", "bench", "gpu-check", "train", "evaluate", "predict", "demo"):
        assert re.search(rf"^    {name}\b", shown, re.MULTILINE)
    assert main(["info"]) == 0
    assert f"attnext {attnext.__version__}" in " ".join(capsys.readouterr().out.split())


def test_info_needs_nothing_but_torch(trained: Path) -> None:
    program = """
import sys
for name in ("cmudict", "matplotlib", "rapidfuzz", "rich", "safetensors"):
    sys.modules[name] = None
from attnext_command import main
out = sys.argv[1]
assert main(["info"]) == 0
for command in (["verify"], ["train", "g2p", "--out", out], ["evaluate", out], ["predict", out, "word"]):
    assert main(command) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(trained)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for line, package in zip(lines, ("rich", "matplotlib", "safetensors", "safetensors"), strict=True):
        assert f"needs the package {package!r}" in line
        assert "pip install 'attnext[demo]'" in line


@pytest.mark.parametrize("name", ["verify", "bench", "gpu-check", "train", "evaluate", "predict", "demo"])
def test_every_command_has_help(name: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    assert f"usage: attnext {name}" in capsys.readouterr().out


@pytest.mark.usefixtures("_small_dictionary")
def test_train_then_predict(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "some" / "model"
    assert main(["train", "g2p", "--out", str(out), "--cell", "lstm", "--seed", "5", *SHORT]) == 0
    captured = capsys.readouterr()
    held_out = len(split(WORDS).test)
    assert re.fullmatch(rf"PER \d+\.\d\d% WER \d+\.\d\d% \({held_out} words\)", captured.out.splitlines()[-1])
    assert "epoch 2: loss" in captured.err
    checkpoint = load(out)
    assert checkpoint.model.config.cell == "lstm"
    assert checkpoint.model.config.seed == 5
    assert checkpoint.metrics["test"]["sources"] == held_out
    assert (out / "curves.png").read_bytes().startswith(PNG)

    picture = tmp_path / "new" / "alignment.png"
    assert main(["predict", str(out), "Bado", "bet", "--alignment", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Bado\t")
    assert lines[1].startswith("bet\t")
    assert set(" ".join(lines[:2]).split()) - {"Bado", "bet"} <= set(PHONEMES)
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.usefixtures("_small_dictionary")
def test_training_stops_on_time_and_says_the_same_again(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path), "--minutes", "0.005", *SIZES]) == 0
    assert 0.3 <= seconds_of(tmp_path) < 5.0
    rates = []
    for _ in range(2):
        assert main(["train", "g2p", "--out", str(tmp_path), "--epochs", "1", "--overwrite", *SIZES]) == 0
        rates.append((capsys.readouterr().out.splitlines()[-1], load(tmp_path).metrics["dev"]))
    assert rates[0] == rates[1]


@pytest.mark.usefixtures("_small_dictionary")
def test_what_is_over_first_ends_training(tmp_path: Path) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path), "--minutes", "60", "--epochs", "1", *SIZES]) == 0
    assert seconds_of(tmp_path) < 60
    limits = ["--minutes", "0.005", "--epochs", "100000", "--patience", "100000"]
    assert main(["train", "g2p", "--out", str(tmp_path), "--overwrite", *limits, *SIZES]) == 0
    assert 0.3 <= seconds_of(tmp_path) < 60


def seconds_of(folder: Path) -> float:
    """How long the run in a folder trained."""
    seconds: float = json.loads((folder / "training.json").read_text())["progress"]["seconds"]
    return seconds


def test_predict_takes_words_from_standard_input(
    trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["predict", str(trained), "bado", "fine"]) == 0
    by_argument = capsys.readouterr().out
    for text in ("bado\n  fine \n", "\ufeffbado\r\nfine"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(["predict", str(trained)]) == 0
        assert capsys.readouterr().out == by_argument
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["predict", str(trained)]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["predict", str(trained)]) == 2
    assert error_line(capsys) == "standard input is closed: name the sources on the command line"


@pytest.mark.parametrize("form", ["tsv", "json"])
def test_predict_keeps_every_line_in_its_place(
    trained: Path, form: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty ones, and those with letters that the model doesn't know, which are noted."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("bado\n\nnaïve\nfine\n".encode())))
    assert main(["predict", str(trained), "--format", form]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("attnext: line 3 left out: 'naïve' has 'ï'; known are: ' a b ")
    assert captured.err.count("\n") == 1
    lines = captured.out.split("\n")
    assert len(lines) == 5
    if form == "tsv":
        assert [line.partition("\t")[0] for line in lines] == ["bado", "", "", "fine", ""]
        assert lines[1:3] == ["", ""]
    else:
        found = [json.loads(line) for line in lines[:-1]]
        assert [one["source"] for one in found] == ["bado", "", "naïve", "fine"]
        assert [len(one["outputs"]) for one in found] == [1, 0, 0, 1]
        assert found[0]["outputs"][0]["output"] == " ".join(found[0]["outputs"][0]["symbols"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("bado\nnaïve\n".encode())))
    assert main(["predict", str(trained), "--format", form, "--strict"]) == 2
    assert error_line(capsys).startswith("line 2: 'naïve' has 'ï'")


@pytest.mark.parametrize("count", ["1", "3"])
def test_what_predict_writes_is_a_lexicon(trained: Path, count: str, capsys: Captured) -> None:
    assert main(["predict", str(trained), "bado", "", "fine", "--nbest", count]) == 0
    written = trained.parent / "lexicon"
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert len(lines) == 2 * int(count) + 1
    lines = [line for line in lines if not line.endswith("\t\n")]  # but those of a model that finds no phoneme
    written.write_text("".join(lines))
    entries = data.Corpus().entries((str(written),))
    assert sum(len(entry.targets) for entry in entries) == sum(line != "\n" for line in lines)
    assert {symbol for entry in entries for target in entry.targets for symbol in target} <= set(PHONEMES)


def test_predict_answers_as_lines_come(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "attnext", "predict", str(trained)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for word in ("bado", "fine"):
            process.stdin.write(word + "\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(word + "\t")
        process.stdin.close()
        assert process.wait(60) == 0


def test_closed_streams_and_a_terminal_without_the_letters(trained: Path) -> None:
    command = f"{sys.executable} -m attnext"
    for redirected in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        done = subprocess.run(f"{command} predict {trained} bado {redirected}", shell=True, check=False)
        assert done.returncode == 0
    done = subprocess.run(
        f"{command} predict {trained} bado <&-", shell=True, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    checkpoint = load(trained)
    symbols = tuple(f"ə{number}" for number in range(len(checkpoint.target.symbols)))
    save(trained, replace(checkpoint, target=replace(checkpoint.target, symbols=symbols)))
    done = subprocess.run(
        [sys.executable, "-m", "attnext", "predict", str(trained), "bado"], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "attnext: error: ascii has no '\\u0259': set PYTHONIOENCODING=utf-8\n"


def test_predict_nbest(trained: Path, capsys: Captured) -> None:
    assert main(["predict", str(trained), "bado", "fine", "--nbest", "3", "--beam", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bado"] * 3 + ["fine"] * 3
    assert len(set(lines)) == 6
    scores = [float(line.split("\t")[1]) for line in lines]
    for some in (scores[:3], scores[3:]):
        assert 0 >= some[0] >= some[1] >= some[2]
    for line in lines:
        assert set(line.split()[2:]) <= set(PHONEMES)
    # As many hypotheses as outputs are asked for, at least.
    assert main(["predict", str(trained), "bado", "--nbest", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_predict_by_the_length_power_asked_for(trained: Path, capsys: Captured) -> None:
    """A score is the log-probability over (symbols and end mark) ** power; an output that is cut has no end mark."""
    scores: list[dict[str, float]] = []
    for power in ("0", "1"):
        assert main(["predict", str(trained), "bado", "--nbest", "5", "--beam", "5", "--length-power", power]) == 0
        lines = (line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines())
        scores.append({" ".join(symbols): float(score) for _, score, *symbols in lines})
    common = [output for output in scores[0].keys() & scores[1].keys() if output]
    assert common
    for output in common:
        steps = min(len(output.split()) + 1, 2 * len("bado") + 10)
        assert scores[0][output] == pytest.approx(steps * scores[1][output], rel=0.01)


def test_alignment_needs_attention(tmp_path: Path, capsys: Captured) -> None:
    folder, picture = untrained(tmp_path / "fixed", attention="none"), tmp_path / "alignment.png"
    assert main(["predict", str(folder), "word", "--alignment", str(picture)]) == 2
    assert error_line(capsys) == "--alignment: a model without attention has no weights to draw"
    assert not picture.exists()
    assert main(["predict", str(folder), "word"]) == 0


@pytest.mark.usefixtures("_small_dictionary")
def test_evaluate(trained: Path, capsys: Captured) -> None:
    """One model beside another, in the table, in the file and in the picture."""
    other = untrained(trained.parent / "fixed", attention="none")
    file, picture = trained.parent / "new" / "errors.json", trained.parent / "errors.png"
    options = ["--beside", str(other), "--json", str(file), "--plot", str(picture), "--beam", "2"]
    assert main(["evaluate", str(trained), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rates = re.fullmatch(r"PER (\d+\.\d\d)% WER (\d+\.\d\d)% \((\d+) words\)", lines[-1])
    assert rates is not None
    assert re.search(r"fixed \(no attention\): PER \d+\.\d\d% WER \d+\.\d\d% \(\d+ words\)$", lines[-2])
    assert picture.read_bytes().startswith(PNG)

    record, entries = json.loads(file.read_text()), split(WORDS).test
    assert f"{record['errors']['symbol_errors']:.2%}" == f"{rates[1]}%"
    assert f"{record['errors']['source_errors']:.2%}" == f"{rates[2]}%"
    assert record["errors"]["sources"] == int(rates[3]) == len(entries)
    assert record["by_length"].keys() == {str(len(entry.source)) for entry in entries}
    assert sum(errors["sources"] for errors in record["by_length"].values()) == len(entries)
    for found, entry in zip(record["outputs"], entries, strict=True):
        assert found["source"] == entry.source
        assert found["targets"] == [list(target) for target in entry.targets]
        assert len(found["outputs"]) == len(found["scores"]) == 2
    wrong = sum(found["outputs"][0] not in found["targets"] for found in record["outputs"])
    assert record["errors"]["source_errors"] == wrong / len(entries)

    # The other way round each has the same errors.
    assert main(["evaluate", str(other), "--beside", str(trained), "--beam", "2"]) == 0
    swapped = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith(swapped[-1])
    assert swapped[-2].endswith(lines[-1])


@pytest.mark.usefixtures("_small_dictionary")
def test_evaluate_models_together(trained: Path, capsys: Captured) -> None:
    """Of copies they are the model; beside it they are another row."""
    copy = trained.parent / "copy"
    shutil.copytree(trained, copy)
    lines = []
    for arguments in ([trained], [trained, copy], [trained, copy, "--beside", trained, "--beam", "2"]):
        assert main(["evaluate", *map(str, arguments)]) == 0
        output = capsys.readouterr()
        lines.append(output.out.splitlines())
    assert lines[0][-1] == lines[1][-1]
    assert lines[2][-2].endswith(lines[2][-1])
    assert "2 models together: beam of 2" in output.err
    other = load(trained)
    save(copy, replace(other, target=replace(other.target, symbols=other.target.symbols[::-1])))
    assert main(["evaluate", str(trained), str(copy)]) == 2
    assert "have other symbols: they can't decode together" in error_line(capsys)


@pytest.mark.usefixtures("_small_dictionary")
def test_evaluate_models_of_one_name(tmp_path: Path, capsys: Captured) -> None:
    """Two folders that differ in their path alone are two models."""
    perfect, poor = tmp_path / "one" / "model", untrained(tmp_path / "two" / "model")
    options = ["--learning-rate", "0.02", *(SHORT[2:]), "--epochs", "40"]
    assert main(["train", "g2p", "--out", str(perfect), *options]) == 0
    capsys.readouterr()
    lines = []
    for arguments in ([perfect], [poor], [perfect, "--beside", poor]):
        assert main(["evaluate", *map(str, arguments)]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0][-1] != lines[1][-1]
    assert lines[2][-1] == lines[0][-1]
    assert lines[2][-2].endswith(lines[1][-1])


def test_evaluate_refuses_what_is_another_tasks(trained: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(trained), "--test-source", "a", "--test-target", "b"]) == 2
    assert error_line(capsys) == "--test-source is for pairs, not for g2p"
    model = load(trained)
    save(trained.parent / "pairs", replace(model, corpus=Corpus("pairs", ("a", "b"))))
    assert main(["evaluate", str(trained), "--beside", str(trained.parent / "pairs")]) == 2
    assert "a model of another task" in error_line(capsys)


def test_too_many_words_to_draw(trained: Path, capsys: Captured) -> None:
    picture = trained.parent / "alignment.png"
    assert main(["predict", str(trained), *["word"] * 61, "--alignment", str(picture)]) == 2
    assert error_line(capsys) == "--alignment: at most 60 words can be drawn, got 61"
    assert not picture.exists()


def test_a_folder_whose_name_is_markup(tmp_path: Path, capsys: Captured) -> None:
    folder, words = untrained(tmp_path / "m[" / "run]"), lexicon(tmp_path / "words.txt", WORDS[:3])
    assert main(["evaluate", str(folder), "--test-lexicon", words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("(3 words)")


def test_scores_and_files_that_can_t_be(trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["predict", str(trained), "box", "--length-power", "1000"]) == 2
    assert error_line(capsys) == "length_power must be from -16 to 16, got 1000.0"
    pipe = trained.parent / "pipe"
    os.mkfifo(pipe)
    assert main(["evaluate", str(trained), "--json", str(pipe)]) == 2
    assert error_line(capsys) == f"--json must be an ordinary file, got {str(pipe)!r}"
    assert pipe.is_fifo()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"box\xff\n"), encoding="utf-8"))
    assert main(["predict", str(trained)]) == 2
    assert error_line(capsys).startswith("standard input is not UTF-8 text: ")
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some scheduler, without a rank
    assert main(["predict", str(trained), "box"]) == 0


def test_a_damaged_model_is_said_in_a_line(trained: Path, capsys: Captured) -> None:
    checkpoint = load(trained)
    with torch.no_grad():
        checkpoint.model.decoder.output.bias.fill_(float("nan"))
    save(trained, checkpoint)
    assert main(["predict", str(trained), "box"]) == 2
    assert "the model's logits are not finite" in error_line(capsys)


def test_evaluate_where_the_data_was_moved(trained: Path, capsys: Captured) -> None:
    gone = trained.parent / "gone"
    checkpoint = load(str(trained))
    save(trained, replace(checkpoint, corpus=replace(checkpoint.corpus, train=(str(gone),))))
    assert main(["evaluate", str(trained)]) == 2
    assert error_line(capsys) == (
        f"can't read {str(gone)!r}: No such file or directory (the model's own test data; name other by --test-lexicon)"
    )


def test_evaluate_on_other_words(trained: Path, capsys: Captured) -> None:
    words = lexicon(trained.parent / "words.txt", WORDS[:7])
    assert main(["evaluate", str(trained), "--test-lexicon", words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("(7 words)")
    missing = str(trained.parent / "none.txt")
    assert main(["evaluate", str(trained), "--test-lexicon", missing]) == 2
    assert error_line(capsys) == f"can't read {missing!r}: No such file or directory"
    (trained.parent / "empty.txt").touch()
    assert main(["evaluate", str(trained), "--test-lexicon", str(trained.parent / "empty.txt")]) == 2
    assert error_line(capsys) == "there is nothing in the test data"


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_pairs(tmp_path: Path, unit: str, capsys: Captured) -> None:
    """Lines of symbols and the same in the other order."""
    gap = " " if unit == "words" else ""
    symbols = {"words": ["one", "two", "three", "four"], "characters": list("abcd")}[unit]
    lines = [(a, b, c) for a in symbols for b in symbols for c in symbols]
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("".join(f"{gap.join(line)}\n" for line in lines))
    target.write_text("".join(f"{gap.join(line[::-1])}\n" for line in lines))
    out, files = tmp_path / "model", ["--dev-source", str(source), "--dev-target", str(target)]
    units = ["--source-units", unit, "--target-units", unit]
    assert main([
        "train", "pairs", "--source", str(source), "--target", str(target), *files, *units, "--out", str(out), *SHORT,
    ]) == 0  # fmt: skip
    checkpoint = load(out)
    for side in (checkpoint.source, checkpoint.target):
        assert set(side.symbols) == set(symbols)
    pattern = r"symbol errors \d+\.\d\d% line errors \d+\.\d\d% \((\d+) lines\)"
    trained_line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(pattern, trained_line)
    assert main(["evaluate", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == trained_line
    assert main(["evaluate", str(out), "--test-source", str(source), "--test-target", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("(64 lines)")

    picture = tmp_path / "alignment.png"
    asked = [gap.join(lines[5]), gap.join([*lines[7], "unheard"])]  # of pairs, what is unknown is no error
    assert main(["predict", str(out), *asked, "--alignment", str(picture)]) == 0
    for one, line in zip(asked, capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith(f"{one}\t")
        found = line.removeprefix(f"{one}\t")
        assert set(found.split() if unit == "words" else found) <= set(symbols)
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["g2p", "--source", "a"], "--source is for pairs, not for g2p"),
        (["g2p", "--source-units", "words"], "--source-units is for pairs, not for g2p"),
        (["g2p", "--test-target", "a"], "--test-target is for pairs, not for g2p"),
        (["pairs", "--lexicon", "a"], "--lexicon is for g2p, not for pairs"),
        (["pairs", "--dev-lexicon", "a"], "--dev-lexicon is for g2p, not for pairs"),
        (["pairs", "--source", "a"], "--source and --target go together"),
        (["pairs", "--source", "a", "--target", "b", "--dev-target", "c"], "--dev-source and --dev-target go together"),
        (["pairs"], "pairs needs --source and --target"),
    ],
)
def test_data_of_the_wrong_kind(tmp_path: Path, arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "model")]) == 2
    assert error_line(capsys) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("bado\tB AH\nbedo", "words, line 2: expected WORD, a tab and phonemes, got 'bedo'"),
        ("bado\tB AH\t\tB", "words, line 1: expected WORD, a tab and phonemes, got 'bado\\tB AH\\t\\tB'"),
        ("bado\tB AH", "there is nothing in the dev data: too little to hold some out, so name a file for it"),
        ("\xff", "words' is not UTF-8 text: invalid start byte at byte 0"),
        (None, "words': No such file or directory"),
    ],
)
def test_bad_lexicons(tmp_path: Path, lines: str | None, message: str, capsys: Captured) -> None:
    file = tmp_path / "words"
    if lines is not None:
        file.write_bytes(lines.encode("latin-1"))
    assert main(["train", "g2p", "--lexicon", str(file), "--out", str(tmp_path / "model")]) == 2
    assert error_line(capsys).endswith(message)


def test_lines_that_are_not_aligned(tmp_path: Path, capsys: Captured) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    command = ["train", "pairs", "--source", str(source), "--target", str(target), "--out", str(tmp_path / "model")]
    source.write_text("a\nb\n")
    target.write_text("a\n")
    assert main(command) == 2
    assert error_line(capsys) == f"{source} has 2 lines and {target} has 1: they must be aligned"
    target.write_text("a\n\n")
    assert main(command) == 2
    assert error_line(capsys) == f"line 2 is empty in {target} alone"


@pytest.mark.usefixtures("_small_dictionary")
def test_configuration_file(tmp_path: Path, capsys: Captured) -> None:
    file, out = tmp_path / "model.toml", tmp_path / "model"
    file.write_text('cell = "lstm"\nepochs = 1\nembedding_size = 6\ndecoder_size = 9\ninput_feeding = true\nseed = 3\n')
    options = ["--cell", "gru", "--encoder-size", "7", "--no-input-feeding"]
    assert main(["train", "g2p", "--out", str(out), "--config", str(file), *options]) == 0
    fields = {"epochs": 1, "embedding_size": 6, "encoder_size": 7, "decoder_size": 9, "seed": 3}
    assert load(out).model.config == Config(**fields)  # type: ignore[arg-type]
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as editors of one system write text
    assert main(["train", "g2p", "--out", str(out), "--config", str(file), "--decoder-size", "8", "--overwrite"]) == 0
    config = load(out).model.config
    assert (config.cell, config.decoder_size, config.input_feeding) == ("lstm", 8, True)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cells = 1\nseed = 2\nbeam = 3", "has unknown fields: 'beam', 'cells'"),
        ("seed = true", ": seed must be an integer from 0 to below 2**63, got True"),
        ('cell = "rnn"', ": cell must be one of gru, lstm, got 'rnn'"),
        ("epochs = 1.5", ": epochs must be an integer of at least 1, got 1.5"),
        ("seed", "is not TOML: "),
        (None, ": No such file or directory"),
    ],
)
def test_bad_configuration_file(tmp_path: Path, content: str | None, message: str, capsys: Captured) -> None:
    file = tmp_path / "model.toml"
    if content is not None:
        file.write_text(content)
    assert main(["train", "g2p", "--out", str(tmp_path / "model"), "--config", str(file)]) == 2
    line = error_line(capsys)
    assert repr(str(file)) in line
    assert message in line


@pytest.mark.usefixtures("_small_dictionary")
def test_the_largest_seed(tmp_path: Path) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path), "--seed", str(2**63 - 1), *SHORT]) == 0


@pytest.mark.usefixtures("_small_dictionary")
def test_sizes_that_an_attention_cannot_have(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path), "--attention", "dot", *SHORT]) == 2
    assert error_line(capsys).startswith("attention 'dot' can't be of these sizes: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: task"),
        (["train", "mt"], "argument task: invalid choice: 'mt'"),
        (["train", "g2p", "--seconds", "5"], "unrecognized arguments: --seconds 5"),
        (["train", "g2p", "--minutes", "0"], "argument --minutes: must be a number above 0, got '0'"),
        (["train", "g2p", "--minutes", "-3"], "argument --minutes: must be a number above 0, got '-3'"),
        (["train", "g2p", "--minutes", "nan"], "argument --minutes: must be a number above 0, got 'nan'"),
        (["train", "g2p", "--minutes", "inf"], "argument --minutes: must be a number above 0, got 'inf'"),
        (["train", "g2p", "--epochs", "1.5"], "argument --epochs: must be an integer of at least 1, got '1.5'"),
        (["train", "g2p", "--batch-size", "0"], "argument --batch-size: must be an integer of at least 1, got '0'"),
        (["train", "g2p", "--learning-rate", "x"], "argument --learning-rate: must be a number above 0, got 'x'"),
        (["train", "g2p", "--dropout", "1"], "argument --dropout: must be a number from 0 to below 1, got '1'"),
        (["train", "g2p", "--seed", "-1"], "argument --seed: must be an integer from 0 to below 2**63, got '-1'"),
        (["train", "g2p", "--seed", str(2**63)], "argument --seed: must be an integer from 0 to below 2**63, got"),
        (["train", "g2p", "--amp", "yes"], "unrecognized arguments: yes"),
        (["train", "pairs", "--source-units", "bytes"], "argument --source-units: invalid choice: 'bytes'"),
        (["train", "g2p", "--attention", "hard"], "argument --attention: invalid choice: 'hard'"),
        (["train", "g2p", "--cell", "rnn"], "argument --cell: invalid choice: 'rnn'"),
        (["train", "g2p", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["predict"], "the following arguments are required: DIR"),
        (["predict", "folder", "--nbest", "0"], "argument --nbest: must be an integer above 0, got '0'"),
        (["evaluate"], "the following arguments are required: DIR"),
        (["evaluate", "folder", "--beam", "0"], "argument --beam: must be an integer above 0, got '0'"),
        (["evaluate", "folder", "--length-power", "x"], "argument --length-power: must be a finite number, got 'x'"),
        (["predict", "folder", "--length-power", "nan"], "argument --length-power: must be a finite number, got 'nan'"),
        (["demo", "--seconds", "soon"], "argument --seconds: must be a number above 0, got 'soon'"),
        (["info", "more"], "unrecognized arguments: more"),
        (["train", "g2p", "--out", ""], "argument --out: must not be empty"),
        (["train", "g2p", "--config", " "], "argument --config: must not be empty"),
        (["evaluate", ""], "argument DIR: must not be empty"),
        (["train", "g2p", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    named = arguments and arguments[0] not in ("fly", "info") and "unrecognized" not in message
    assert message in error_line(capsys, command=f"attnext {arguments[0]}" if named else "attnext")


def test_unwritable_folder_is_found_before_training(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load_cmudict", lambda: pytest.fail("too late"))
    monkeypatch.setattr(demo, "main", lambda arguments: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "model")
    for arguments in (["train", "g2p", "--out", below], ["demo", "--out", below]):
        assert main(arguments) == 2
        assert error_line(capsys) == f"can't write to the folder {below!r}: Not a directory"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fine", "naïve"],
            "source 2: 'naïve' has 'ï'; known are: ' a b c d e f g h i j k l m n o p q r s t u v w x y z",
        ),
        (["b2b", "x"], "source 1: 'b2b' has '2'"),
        (["two words"], "source 1: 'two words' has ' '"),
    ],
)
def test_bad_words(trained: Path, words: list[str], message: str, capsys: Captured) -> None:
    picture = trained.parent / "alignment.png"
    assert main(["predict", str(trained), *words, "--strict", "--alignment", str(picture)]) == 2
    assert error_line(capsys).startswith(message)
    assert not picture.exists()


@pytest.mark.parametrize("arguments", [["predict", "word"], ["evaluate"]])
def test_bad_checkpoints(trained: Path, arguments: list[str], capsys: Captured) -> None:
    name, *words = arguments
    assert main([name, str(trained.parent / "none"), *words]) == 2
    assert "no checkpoint in" in error_line(capsys)
    next(trained.glob("*.safetensors")).write_bytes(b"")
    assert main([name, str(trained), *words]) == 2
    assert "is damaged: its checksum" in error_line(capsys)
    (trained / "checkpoint.json").write_text(json.dumps({"format": 99}))
    assert main([name, str(trained), *words]) == 2
    assert "has format 99" in error_line(capsys)


def test_bad_files_to_write(trained: Path, capsys: Captured) -> None:
    folder = trained.parent / "folder.png"
    folder.mkdir()
    for arguments in (["predict", "word", "--alignment"], ["evaluate", "--plot"], ["evaluate", "--json"]):
        name, *words, option = arguments
        assert main([name, str(trained), *words, option, str(folder)]) == 2
        assert error_line(capsys).startswith(f"{option} must be a file, got the folder")
        assert main([name, str(trained), *words, option, str(trained / "checkpoint.json" / "a.png")]) == 2
        assert error_line(capsys).startswith("can't write to the folder")
        if option != "--json":
            assert main([name, str(trained), *words, option, str(trained.parent / "a.jpeg")]) == 2
            assert error_line(capsys).startswith(f"{option} must end in .png, .svg or .pdf, got ")


def test_predict_and_evaluate_join_nobody(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """In a pod, or below a job of torchrun, the environment tells of processes that will never come."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["predict", str(trained), "bado"]) == 0
    assert main(["evaluate", str(trained)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("PER ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "the environment's RANK must be a number from 0 on, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "the environment's WORLD_SIZE must be a number from 0 on, got ''"),
        ({"RANK": "0", "LOCAL_RANK": "-1"}, "the environment's LOCAL_RANK must be a number from 0 on, got '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE, 2, got 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set, where WORLD_SIZE is 2: start the processes by"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
    ],
)
@pytest.mark.usefixtures("_small_dictionary")
def test_an_environment_of_a_group_that_there_is_not(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "g2p", "--out", str(tmp_path / "run"), *SHORT]) == 2
    assert error_line(capsys).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_small_dictionary")
def test_a_start_that_fails_leaves_no_folder(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path / "run"), "--attention", "dot", *SHORT]) == 2
    assert "attention 'dot' can't be of these sizes" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_backend_that_is_not_here(trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name, backend in attnext.backends().items() if not backend.available]
    for name in missing:
        assert main(["predict", str(trained), "word", "--backend", name]) == 2
        assert error_line(capsys).startswith(f"backend={name!r} is not available: ")
    monkeypatch.setattr(cli, "choose", _unavailable)
    assert main(["train", "g2p", "--out", str(trained.parent / "new")]) == 2
    assert error_line(capsys) == "backend='cpu' is not available: no reason"
    assert not (trained.parent / "new").exists()


def _unavailable(name: str | None, device_type: str) -> str:
    raise RuntimeError("backend='cpu' is not available:\n  no reason")


def test_backend_is_the_one_asked_for(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def stop(*args: object, **options: object) -> None:
        used.append(choose(None, "cpu"))
        raise InputError("seen")

    monkeypatch.setattr(commands, "Translator", stop)
    with attnext.use_backend("reference"):
        for options in (["--backend", "cpu"], ["--backend", "reference"], []):
            assert main(["predict", str(trained), "word", *options]) == 2
    assert used == ["cpu", "reference", "reference"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    ],
)
def test_errors_on_the_way(
    tmp_path: Path,
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    def fail() -> list[Entry]:
        raise error

    monkeypatch.setattr(data, "load_cmudict", fail)
    assert main(["train", "g2p", "--out", str(tmp_path)]) == code
    assert error_line(capsys) == message
    assert list(tmp_path.iterdir()) == []


def test_no_traceback_in_a_process_of_its_own(trained: Path) -> None:
    failed = attnext_process("predict", str(trained / "none"), "word")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("attnext: error: no checkpoint in ")
    assert failed.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough(trained: Path) -> None:
    """As in `attnext predict DIR word | true`: no traceback, no message."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attnext", "predict", str(trained), "word"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 0


@pytest.mark.usefixtures("_small_dictionary")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(command, "CASES", [replace(case, batch=2, queries=1, keys=4) for case in CASES])
    monkeypatch.setattr(command, "_QUICK_SECONDS", 0.0)
    monkeypatch.setattr(verify, "run", lambda args: 0)
    folder = tmp_path / "g2p"
    commands_run: list[str] = []

    def run(arguments: tuple[str, ...]) -> int:
        commands_run.append(" ".join(arguments))
        return main([*arguments, *SIZES] if arguments[0] == "train" else arguments)

    monkeypatch.setattr(demo, "main", run)
    assert main(["demo", "--seconds", "0.5", "--out", str(tmp_path)]) == 0
    native = [name for name in kernel_devices() if attnext.backends()[name].available]
    assert "cpu" in native
    assert commands_run == [
        " ".join(["verify --cases 20", *(f"--backend {name}" for name in native)]),
        "bench --quick --peers eager --cases forward,training,step",
        f"train g2p --minutes {0.5 / 60:g} --out {folder} --overwrite",
    ]
    shown = capsys.readouterr().out
    for text in ("forward + backward", "eager", "PER ", "dictionary", str(folder), "alignment.png"):
        assert text in shown
    assert (tmp_path / "alignment.png").read_bytes().startswith(b"\x89PNG")
    assert load(folder).metrics["progress"]["pairs"] > 0


def test_demo_stops_where_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run", lambda args: 1)
    monkeypatch.setattr(command, "run", lambda args: pytest.fail("too late"))
    assert main(["demo", "--out", str(tmp_path)]) == 1
