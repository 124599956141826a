"""The command line: what it prints, its exit codes, and one line for every error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnext
from attnext import cli, demo, verify
from attnext.backends import choose, kernel_devices
from attnext.bench import command
from attnext.bench.cases import CASES
from attnext.cli import main
from attnext.seq2seq import InputError, ModelConfig, Seq2Seq, commands
from attnext.seq2seq.checkpoint import Checkpoint, load, save
from attnext.seq2seq.data import LETTERS, PHONEMES, Entry, split

WORDS = [
    Entry(f"{a}{b}{c}er{d}", ((a.upper(), "AH", c.upper(), "ER", "IY"), (a.upper(), "AH", c.upper(), "ER")))
    for a in "bdfgklmnp" for b in "ao" for c in "bdgkst" for d in ("ie", "ey")
]  # fmt: skip
"""A dictionary of 216 regular words, in place of the real one."""

SIZES = ["--embedding-size", "6", "--encoder-size", "7", "--decoder-size", "9", "--attention-size", "5"]

Captured = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _small_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (commands, demo):
        monkeypatch.setattr(module, "load_cmudict", lambda: WORDS)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with the checkpoint of an untrained model."""
    torch.manual_seed(0)
    config = ModelConfig(len(LETTERS), len(PHONEMES), "gru", 6, 7, 9, 5)
    save(tmp_path / "model", Checkpoint(Seq2Seq(config)))
    return tmp_path / "model"


def attnext_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnext", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


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
    for name in ("info", "verify", "train", "predict", "demo"):
        assert re.search(rf"^    {name}  ", shown, re.MULTILINE)
    assert main(["info"]) == 0
    assert f"attnext {attnext.__version__}" in " ".join(capsys.readouterr().out.split())


def test_info_needs_nothing_but_torch(trained: Path) -> None:
    program = """
import sys
for name in ("cmudict", "matplotlib", "rapidfuzz", "rich", "safetensors"):
    sys.modules[name] = None
from attnext.cli import main
out = sys.argv[1]
assert main(["info"]) == 0
assert main(["verify"]) == main(["train", "g2p", "--out", out]) == main(["predict", out, "word"]) == 2
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
    assert len(lines) == 3
    for line, package in zip(lines, ("rich", "rapidfuzz", "safetensors"), strict=True):
        assert f"needs the package {package!r}" in line
        assert "pip install 'attnext[demo]'" in line


@pytest.mark.parametrize("name", ["verify", "bench", "train", "predict", "demo"])
def test_every_command_has_help(name: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    assert f"usage: attnext {name}" in capsys.readouterr().out


@pytest.mark.usefixtures("_small_dictionary")
def test_train_then_predict(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "some" / "model"
    arguments = [
        "--epochs",
        "3",
        "--batch-size",
        "64",
        "--cell",
        "lstm",
        "--seed",
        "5",
        "--backend",
        "reference",
    ]
    assert main(["train", "g2p", "--out", str(out), *arguments, *SIZES]) == 0
    captured = capsys.readouterr()
    held_out = len(split(WORDS).test)
    assert re.fullmatch(rf"PER \d+\.\d\d% WER \d+\.\d\d% \({held_out} words\)", captured.out.splitlines()[-1])
    assert "epoch 2: loss" in captured.err
    checkpoint = load(out)
    assert checkpoint.model.config.cell == "lstm"
    assert checkpoint.metrics["plan"]["seed"] == 5
    assert checkpoint.metrics["test"]["words"] == held_out

    picture = tmp_path / "alignment.png"
    assert main(["predict", str(out), "Bado", "ma'am", "--alignment", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Bado   ")
    assert lines[1].startswith("ma'am  ")
    assert set(" ".join(lines[:2]).split()) - {"Bado", "ma'am"} <= set(PHONEMES.symbols)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_small_dictionary")
def test_training_stops_on_time_and_says_the_same_again(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "g2p", "--out", str(tmp_path), "--minutes", "0.005", *SIZES]) == 0
    assert 0.3 <= load(tmp_path).metrics["seconds"] < 5.0
    rates = []
    for _ in range(2):
        assert main(["train", "g2p", "--out", str(tmp_path), "--epochs", "1", *SIZES]) == 0
        rates.append((capsys.readouterr().out.splitlines()[-1], load(tmp_path).metrics["loss"]))
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: task"),
        (["train", "mt"], "argument task: invalid choice: 'mt'"),
        (["train", "g2p", "--seconds", "0"], "argument --seconds: must be a number above 0, got '0'"),
        (["train", "g2p", "--seconds", "-3"], "argument --seconds: must be a number above 0, got '-3'"),
        (["train", "g2p", "--minutes", "nan"], "argument --minutes: must be a number above 0, got 'nan'"),
        (["train", "g2p", "--minutes", "inf"], "argument --minutes: must be a number above 0, got 'inf'"),
        (["train", "g2p", "--minutes", "1", "--seconds", "1"], "not allowed with argument --minutes"),
        (["train", "g2p", "--epochs", "1.5"], "argument --epochs: must be an integer above 0, got '1.5'"),
        (["train", "g2p", "--batch-size", "0"], "argument --batch-size: must be an integer above 0, got '0'"),
        (
            ["train", "g2p", "--learning-rate", "x"],
            "argument --learning-rate: must be a number above 0, got 'x'",
        ),
        (
            ["train", "g2p", "--dropout", "1"],
            "argument --dropout: must be a number from 0 to below 1, got '1'",
        ),
        (
            ["train", "g2p", "--seed", "-1"],
            "argument --seed: must be an integer from 0 to below 2**63, got '-1'",
        ),
        (["train", "g2p", "--cell", "rnn"], "argument --cell: invalid choice: 'rnn'"),
        (["train", "g2p", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["predict", "folder"], "the following arguments are required: WORD"),
        (["demo", "--seconds", "soon"], "argument --seconds: must be a number above 0, got 'soon'"),
        (["info", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    named = arguments and arguments[0] not in ("fly", "info")
    assert message in error_line(capsys, command=f"attnext {arguments[0]}" if named else "attnext")


def test_unwritable_folder_is_found_before_training(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "load_cmudict", lambda: pytest.fail("too late"))
    monkeypatch.setattr(demo, "main", lambda arguments: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "model")
    for arguments in (["train", "g2p", "--out", below], ["demo", "--out", below]):
        assert main(arguments) == 2
        assert error_line(capsys) == f"can't write to the folder {below!r}: Not a directory"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "a word must have at least one letter, got an empty one"),
        (["fine", "naïve"], "the word 'naïve' has 'ï'; known are 'abcdefghijklmnopqrstuvwxyz"),
        (["b2b", "x"], "the word 'b2b' has '2'"),
        (["two words"], "the word 'two words' has ' '"),
    ],
)
def test_bad_words(trained: Path, words: list[str], message: str, capsys: Captured) -> None:
    picture = trained.parent / "alignment.png"
    assert main(["predict", str(trained), *words, "--alignment", str(picture)]) == 2
    assert error_line(capsys).startswith(message)
    assert not picture.exists()


def test_bad_checkpoints(trained: Path, capsys: Captured) -> None:
    assert main(["predict", str(trained.parent / "none"), "word"]) == 2
    assert "no checkpoint in" in error_line(capsys)
    next(trained.glob("*.safetensors")).write_bytes(b"")
    assert main(["predict", str(trained), "word"]) == 2
    assert "is damaged: its checksum" in error_line(capsys)
    (trained / "checkpoint.json").write_text(json.dumps({"format": 99}))
    assert main(["predict", str(trained), "word"]) == 2
    assert "has format 99" in error_line(capsys)


def test_bad_picture(trained: Path, capsys: Captured) -> None:
    assert main(["predict", str(trained), "word", "--alignment", str(trained)]) == 2
    assert error_line(capsys).startswith("--alignment must be a file, got the folder")
    assert main(["predict", str(trained), "word", "--alignment", str(trained / "checkpoint.json" / "a.png")]) == 2
    assert error_line(capsys).startswith("can't write to the folder")


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

    monkeypatch.setattr(commands, "pronounce", stop)
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

    monkeypatch.setattr(commands, "load_cmudict", fail)
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
        f"train g2p --seconds 0.5 --out {folder}",
    ]
    shown = capsys.readouterr().out
    for text in ("forward + backward", "eager", "PER ", "dictionary", str(folder), "alignment.png"):
        assert text in shown
    assert (tmp_path / "alignment.png").read_bytes().startswith(b"\x89PNG")
    assert load(folder).metrics["pairs"] > 0


def test_demo_stops_where_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run", lambda args: 1)
    monkeypatch.setattr(command, "run", lambda args: pytest.fail("too late"))
    assert main(["demo", "--out", str(tmp_path)]) == 1
