"""Training runs: stopped at any moment and gone on with, by one process or two; what is in the folder meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnext._support import only_writer
from attnext.seq2seq import session
from attnext.seq2seq.checkpoint import load, read_record, tensors_of
from attnext.seq2seq.evaluation import Errors
from attnext.seq2seq.session import Session
from attnext.seq2seq.training import Trainer
from attnext_command import main

SIZES = ["--embedding-size", "6", "--encoder-size", "7", "--decoder-size", "9", "--attention-size", "5"]

# All that a state must hold shows: moments, a mean of the parameters, dropout, the rate, the place in an epoch.
EPOCHS, STEPS = 3, 18
OPTIONS = [
    *SIZES, "--cell", "lstm", "--input-feeding", "--dropout", "0.1", "--average", "0.7", "--weight-decay", "0.01",
    "--learning-rate", "0.02", "--batch-size", "36", "--epochs", str(EPOCHS), "--seed", "6",
]  # fmt: skip

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

TIMED = ("seconds", "words_per_second")
"""What differs in the log of two runs that are otherwise the same."""

Captured = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("one_thread", "_no_curves")


class Stopped(Exception):
    """What stops a run in these tests."""


@pytest.fixture
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes longer than a run; the tests of the command line draw it."""
    monkeypatch.setattr(session, "curves", lambda *args: None)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name three lexicons: 180 regular words to train on, one more that is alone in its batch, and
    36 words twice."""
    folder, options = tmp_path_factory.mktemp("words"), []
    lines = [
        f"{a}{b}{c}er{d}\t{a.upper()} AH {c.upper()} ER IY\n"
        for d in ("ie", "ey") for c in "bdgkst" for b in "ao" for a in "bdfgklmnp"
    ]  # fmt: skip
    for option, of_part in (
        ("lexicon", [line for number, line in enumerate(lines) if number % 6 < 5] + ["gobbledygook\tG AH B\n"]),
        ("dev-lexicon", lines[5::6]), ("test-lexicon", lines[::6]),
    ):  # fmt: skip
        (folder / option).write_text("".join(of_part))
        options += [f"--{option}", str(folder / option)]
    return options


def train(out: Path, words: Sequence[str], *options: str) -> list[str]:
    return ["train", "g2p", "--out", str(out), *words, *options]


@pytest.fixture
def whole(tmp_path: Path, words: list[str], _no_curves: None, one_thread: None) -> Path:
    """The folder of a run in one sitting, in this process."""
    assert main(train(tmp_path / "whole", words, *OPTIONS)) == 0
    return tmp_path / "whole"


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def tensors(folder: Path, name: str = "checkpoint") -> dict[str, Tensor]:
    return read_record(folder, name)[1]


def equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in some.items())


def assert_same_run(folder: Path, expected: Path) -> None:
    """To the bit, but for the time it took; and nothing is left over."""
    for name in ("checkpoint", "training"):
        assert equal(tensors(folder, name), tensors(expected, name))
    assert log(folder) == log(expected)
    ours, theirs = load(folder), load(expected)
    for name in ("dev", "test"):
        assert ours.metrics[name] == theirs.metrics[name]
    assert len(list(folder.glob("*.safetensors"))) == 2


def at_call(number: int, action: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with something done before the call of this number."""
    calls = 0

    def run(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return call(*args, **options)

    return run


def stop() -> None:
    raise Stopped


def stopped(out: Path, words: Sequence[str], *options: str, step: int) -> Path:
    """The folder of a run that got an exception in this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", at_call(step, stop, Trainer._step))
        with pytest.raises(Stopped):
            main(train(out, words, *OPTIONS, *options))
    return out


@pytest.mark.parametrize(
    ("of", "name", "numbers"),
    [
        (Trainer, "_step", (1, 2, 4, 7, 9, 12, 14, STEPS)),
        (Session, "_evaluate", (1, 2)),
        (Session, "_save", (1, 2, EPOCHS)),
        (Session, "_test", (1,)),
    ],
)
def test_an_exception_anywhere(
    tmp_path: Path, words: list[str], of: type, name: str, numbers: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A run saved at every step or at every epoch, with a log that is ahead of what was saved, ends as the one in a
    single sitting does."""
    monkeypatch.setattr(session, "_LOG_STEPS", 2)
    whole = tmp_path / "whole"
    assert main(train(whole, words, *OPTIONS)) == 0
    assert len(log(whole)) == 4 * EPOCHS
    for place, number in enumerate(numbers):
        monkeypatch.setattr(session, "_SAVE_SECONDS", (300.0, 0.0)[place % 2])
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(of, name, at_call(number, stop, getattr(of, name)))
            with pytest.raises(Stopped):
                main(train(out, words, *OPTIONS))
        assert main(train(out, words, *OPTIONS, "--resume")) == 0
        assert_same_run(out, whole)


def test_a_run_is_gone_on_with_where_it_was_saved(
    tmp_path: Path, words: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the start: what was saved is not made again."""
    steps: list[list[int]] = []
    make = Trainer._step

    def counted(trainer: Trainer, rows: list[int]) -> Any:
        steps.append(rows)
        return make(trainer, rows)

    for seconds, made in ((0.0, 7), (300.0, 6)):
        monkeypatch.setattr(session, "_SAVE_SECONDS", seconds)
        out = stopped(tmp_path / str(made), words, step=8)
        capsys.readouterr()
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", counted)
            assert main(train(out, words, *OPTIONS, "--resume")) == 0
        assert len(steps) == STEPS - made
        assert f"going on in {out} from epoch 1, step {made}\n" in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [False, True], ids=["at a terminal", "in the background"])
def test_the_second_signal_ends_at_once(ignored: bool) -> None:
    """Also where the shell has left SIGINT ignored, as it does for a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with session._asked_to_stop() as asked:
            assert not asked()
            signal.raise_signal(signal.SIGINT)
            assert asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", session._ENDS)
def test_signals_that_ask_for_an_end(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with session._asked_to_stop() as asked:
            signal.raise_signal(number)
            assert asked()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ignored", [False, True], ids=["at a terminal", "under nohup"])
def test_a_terminal_that_closes(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with session._asked_to_stop() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() != ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_has_one_run_at_a_time(whole: Path, tmp_path: Path, words: list[str], capsys: Captured) -> None:
    out = stopped(tmp_path / "run", words, step=8)
    before = contents(out)
    with only_writer(out):
        assert main(train(out, words, *OPTIONS, "--resume")) == 2
    assert f"another process is at work in the folder {str(out)!r}" in capsys.readouterr().err
    assert contents(out) == before
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert_same_run(out, whole)


def test_a_limit_that_is_over_as_the_run_is_resumed(tmp_path: Path, words: list[str]) -> None:
    """The steps since the last evaluation count: without them there may be no model at all."""
    out = tmp_path / "run"
    assert main(train(out, words, *OPTIONS)) == 0  # another model, which must not pass for this one
    for step, limit in ((4, ["--minutes", "1e-6"]), (8, ["--epochs", "1"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "_SAVE_SECONDS", 0.0)
            stopped(out, words, "--cell", "gru", "--overwrite", step=step + 1)
        assert main(train(out, words, "--resume", *limit)) == 0
        record, best = read_record(out, "training")[0], load(out)
        assert record["finished"]
        assert best.model.config.cell == "gru"
        assert [line["step"] for line in log(out) if line["event"] == "dev"][-1] == step
        assert "test" in best.metrics
        assert main(train(out, words, "--resume", *limit)) == 0
        assert read_record(out, "training")[0]["progress"] == record["progress"]


def test_a_log_that_someone_cut(whole: Path, tmp_path: Path, words: list[str]) -> None:
    out = stopped(tmp_path / "run", words, step=14)
    path = out / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert equal(tensors(out), tensors(whole))
    assert [line["step"] for line in log(out)] == [6, 6, 12, 18, 18]  # each of its lines is whole


def test_resume_with_nothing_there_begins(whole: Path, tmp_path: Path, words: list[str], capsys: Captured) -> None:
    out = tmp_path / "new"
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert f"going on in {out} from the start: no run there\n" in capsys.readouterr().err
    assert_same_run(out, whole)


def test_a_resumed_run_keeps_its_configuration(whole: Path, tmp_path: Path, words: list[str]) -> None:
    out = stopped(tmp_path / "run", words, step=8)
    assert main(train(out, words, "--resume")) == 0
    assert_same_run(out, whole)


def test_what_is_refused_of_an_unfinished_run(whole: Path, tmp_path: Path, words: list[str], capsys: Captured) -> None:
    """Every refusal is one line, and leaves the folder as it was."""
    own = tmp_path / "own"
    shutil.copy(words[1], own)
    words = ["--lexicon", str(own), *words[2:]]
    out = stopped(tmp_path / "run", words, step=8)
    before = contents(out)
    other = tmp_path / "other"
    text = own.read_text()
    other.write_text(text.replace("IY", "EE"))  # the same numbers, other symbols
    shorter = tmp_path / "shorter"
    shorter.write_text("".join(Path(words[3]).read_text().splitlines(keepends=True)[:-1]))
    begun = f"was begun with other data: train {own}, dev {words[3]}, test {words[5]}"
    capsys.readouterr()
    for arguments, message in (
        (train(out, words, *OPTIONS), "has an unfinished run: go on with it by --resume, name another --out, or"),
        (train(out, words, *OPTIONS, "--resume", "--decoder-size", "8"),
         "decoder_size can't change in a resumed run: it is 9, got 8"),
        (train(out, words, *OPTIONS, "--resume", "--seed", "1"), "seed can't change in a resumed run: it is 6, got 1"),
        (train(out, [*words, "--lexicon", str(other)], "--resume"), begun + "\n"),
        (train(out, [*words, "--dev-lexicon", str(shorter)], "--resume"), begun + "\n"),
    ):  # fmt: skip
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("attnext: error: ")
        assert error.count("\n") == 1
        assert message in error
        assert contents(out) == before
    shutil.copy(other, own)
    assert main(train(out, words, "--resume")) == 2
    assert begun + ", changed since\n" in capsys.readouterr().err
    own.write_text(text)
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert_same_run(out, whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("damage", ["tensors", "json", "missing"])
def test_a_damaged_state(tmp_path: Path, words: list[str], damage: str, capsys: Captured) -> None:
    out = stopped(tmp_path / "run", words, step=8)
    file = out / "training.json" if damage == "json" else next(out.glob("training-*.safetensors"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    capsys.readouterr()
    assert main(train(out, words, *OPTIONS, "--resume")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert file.name in error
    load(out)


def test_a_lost_log_is_no_obstacle(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # draws the curves
    out = stopped(tmp_path / "run", words, step=8)
    (out / "log.jsonl").unlink()
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert [line["epoch"] for line in log(out) if line["event"] == "dev"] == [2, 3]


def test_more_epochs_for_a_finished_run(whole: Path, tmp_path: Path, words: list[str]) -> None:
    before, lines = contents(whole), log(whole)
    assert main(train(whole, words, *OPTIONS, "--resume")) == 0
    assert log(whole) == lines
    assert contents(whole).keys() == before.keys()
    assert main(train(whole, words, *OPTIONS, "--resume", "--epochs", "5")) == 0
    assert log(whole)[: len(lines)] == lines
    assert [line["epoch"] for line in log(whole) if line["event"] == "dev"] == [1, 2, 3, 4, 5]
    progress = read_record(whole, "training")[0]["progress"]
    assert (progress["step"], progress["epoch"], progress["done"]) == (STEPS * 5 // EPOCHS, 5, 1.0)
    # Fewer than it has had: it is over.
    lines = log(whole)
    assert main(train(whole, words, *OPTIONS, "--resume", "--epochs", "4")) == 0
    assert log(whole) == lines


def test_a_run_in_place_of_a_finished_one(whole: Path, tmp_path: Path, words: list[str], capsys: Captured) -> None:
    out = tmp_path / "run"
    assert main(train(out, words, *OPTIONS, "--seed", "1", "--epochs", "2")) == 0
    old, before = tensors(out), contents(out)
    capsys.readouterr()
    assert main(train(out, words, *OPTIONS)) == 2
    assert "has a finished run: name another --out, or replace it by --overwrite\n" in capsys.readouterr().err
    assert contents(out) == before
    # Until it has a checkpoint of its own, there is the other; but the other run is not gone on with.
    stopped(out, words, "--overwrite", step=1)
    assert equal(tensors(out), old)
    capsys.readouterr()
    assert main(train(out, words, *OPTIONS, "--resume")) == 0
    assert "from the start: no run there" in capsys.readouterr().err
    assert_same_run(out, whole)


def test_a_run_in_place_of_an_unfinished_one(whole: Path, tmp_path: Path, words: list[str]) -> None:
    out = stopped(tmp_path / "run", words, "--seed", "1", step=8)
    assert main(train(out, words, *OPTIONS, "--overwrite")) == 0
    assert_same_run(out, whole)


def test_a_model_without_its_run_is_not_replaced(
    whole: Path, tmp_path: Path, words: list[str], capsys: Captured
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for file in whole.glob("checkpoint*"):
        shutil.copy(file, out)
    before = contents(out)
    capsys.readouterr()
    assert main(train(out, words, *OPTIONS)) == 2
    assert "has a model: name another --out, or replace it by --overwrite\n" in capsys.readouterr().err
    assert contents(out) == before
    assert main(train(out, words, *OPTIONS, "--overwrite")) == 0
    assert_same_run(out, whole)


WAITING_FOR_A_HANG_UP = """
import select, sys
from attnext.seq2seq.session import Session
from attnext_command import main

save, terminal = Session._save, select.poll()
terminal.register(2, 0)

def save_and_wait(self, finished):
    save(self, finished)
    terminal.poll(60_000)

Session._save = save_and_wait
sys.exit(main(sys.argv[1:]))
"""
"""A command whose run, once saved, goes on when its terminal has closed: it has not ended by then."""


def test_a_terminal_that_is_closed_loses_nothing(forks: Forks, tmp_path: Path, words: list[str]) -> None:
    """It takes no more output then, and sends the signal of a hang-up."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = [*words, *OPTIONS, "--epochs", "25", "--patience", "25"]
    assert forks.run(train(whole, options)).code == 0
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(ENVIRONMENT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which whoever runs the tests may ignore, as nohup does
        os.execv(sys.executable, [sys.executable, "-c", WAITING_FOR_A_HANG_UP, *train(out, options)])
    deadline = time.monotonic() + 60
    while not (out / "training.json").exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert not read_record(out, "training")[0]["finished"]
    assert forks.run(train(out, options, "--resume")).code == 0
    assert_same_run(out, whole)


def test_the_best_is_kept_and_patience_ends(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    edits = iter((9, 5, 7, 5, 6, 8, 3, 4))
    seen: list[dict[str, Tensor]] = []

    def evaluate(checkpoint: Any, entries: Any) -> Errors:
        if len(entries) < 36:  # the test data
            return Errors(1, 2, 1, 1)
        seen.append({name: x.clone() for name, x in tensors_of(checkpoint.model).items()})
        return Errors(next(edits), 100, 1, 36)

    monkeypatch.setattr(session, "evaluate", evaluate)
    out = tmp_path / "run"
    test = Path(words[5]).read_text().splitlines(keepends=True)
    (tmp_path / "test").write_text("".join(test[:-1]))
    options = [*words, "--test-lexicon", str(tmp_path / "test")]
    assert main(train(out, options, *OPTIONS, "--epochs", "50", "--patience", "3")) == 0
    # The second is the best, the fourth is as good and no better, and the fifth is the third after it.
    assert len(seen) == 5
    assert equal(tensors(out), seen[1])
    assert not any(equal(tensors(out), other) for other in (*seen[:1], *seen[2:]))
    assert load(out).metrics["dev"]["symbol_errors"] == 0.05
    assert load(out).metrics["dev"]["epoch"] == 2
    assert [line["best"] for line in log(out) if line["event"] == "dev"] == [True, True, False, False, False]
    lines = log(out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *args: pytest.fail("it is over"))
        assert main(train(out, options, "--resume")) == 0
    assert (len(seen), log(out)) == (5, lines)
    assert main(train(out, options, "--resume", "--patience", "5", "--epochs", "8")) == 0
    assert len(seen) == 8
    assert equal(tensors(out), seen[6])
    capsys.readouterr()


def records(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of all that the folder holds."""
    return {name: tensors(folder, name) for name in ("checkpoint", "training") if (folder / f"{name}.json").exists()}


def test_what_the_screen_says(tmp_path: Path, words: list[str], capsys: Captured) -> None:
    """A line for every epoch, however narrow the window; what is shown last is the last."""
    assert main(train(tmp_path / "run", words, *OPTIONS, "--epochs", "2")) == 0
    shown = capsys.readouterr().err.splitlines()
    dev = [line for line in log(tmp_path / "run") if line["event"] == "dev"]
    for line in dev:
        best = ", the best so far" if line["best"] else ""
        (found,) = [one for one in shown if one.startswith(f"epoch {line['epoch']}: loss ")]
        assert found.endswith(f", held-out {line['text']}{best}")
    assert len({line["text"] for line in dev}) == 2
    assert f"  held-out error {dev[-1]['symbol_errors']:.1%} " in shown[-1]


def test_a_log_that_does_not_fit(tmp_path: Path, words: list[str], capsys: Captured) -> None:
    """Neither when it is written nor when it is closed; the error names it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert main(train(tmp_path, words, *OPTIONS)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"attnext: error: [Errno 27] File too large: '{tmp_path / 'log.jsonl'}'"


def test_full_disk(
    whole: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Whatever file is the one that no longer fits, the record before it stays, and the run can be gone on with."""
    fsync, found = os.fsync, 0
    for number in range(1, 100, 2):
        out = tmp_path / str(number)
        before: list[dict[str, dict[str, Tensor]]] = [{}]

        def fail(out: Path = out, before: list[Any] = before) -> None:
            before[0] = records(out)
            raise OSError(28, "No space left on device")

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", at_call(number, fail, fsync))
            code = main(train(out, words, *OPTIONS))
        if code == 0:
            break
        found += 1
        error = capsys.readouterr().err
        assert code == 1
        message = re.escape("attnext: error: [Errno 28] No space left on device: ")
        assert re.fullmatch(rf"{message}'{re.escape(str(out))}.*'", error.splitlines()[-1])
        assert error.count("rror") == 1 + error.count("held-out error")
        after = records(out)
        # The folder is brought to the disk after a file's move: the move itself was done then.
        assert after.keys() == before[0].keys()
        for name, record in before[0].items():
            assert equal(after[name], record)
        assert not list(out.glob(".*"))
        if (out / "checkpoint.json").exists():
            load(out)
        if number % 8 == 1:
            assert main(train(out, words, *OPTIONS, "--resume")) == 0
            assert_same_run(out, whole)
    assert found >= 9 * EPOCHS // 2  # checkpoint, log and state, where each epoch is the best so far


def test_a_folder_that_cannot_be_written(tmp_path: Path, words: list[str], capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    for options in ([], ["--resume"]):
        assert main(train(out, words, *OPTIONS, *options)) == 2
        assert capsys.readouterr().err == f"attnext: error: can't write to the folder {str(out)!r}: Not a directory\n"


class Ended(NamedTuple):
    """How a process ended: its exit code or the signal's number below 0, what it said, and where it was killed."""

    code: int
    error: str
    place: str


class Forks:
    """Command lines run in processes of their own, without the time that the imports take: forked from one that has
    them. Each may be killed at one of its steps to the disk."""

    PROGRAM = """
import json, os, resource, signal, stat, sys, traceback
from pathlib import Path
import matplotlib.figure, rapidfuzz.distance, rich.progress, safetensors.torch, torch
from attnext_command import main
from attnext.seq2seq import session

def run(task, answer):
    count = 0
    def counted(call, name):
        def counting(*args, **options):
            nonlocal count
            count += 1
            if count == task["kill_at"]:
                os.write(answer, name(*args).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return counting
    def synced(descriptor):
        return "sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file"
    os.fsync = counted(os.fsync, synced)
    Path.replace = counted(Path.replace, lambda path, target: f"move {target.name}")
    Path.unlink = counted(Path.unlink, lambda path, *args: f"delete {path.name}")
    session.curves = lambda *args: None
    if task["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_size"], resource.RLIM_INFINITY))
    return main(task["arguments"])

torch.set_num_threads(1)
for line in sys.stdin:
    task = json.loads(line)
    (error, error_end), (place, place_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(error_end, 2)
        code = 99
        try:
            code = run(task, place_end)
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(error_end), os.close(place_end)
    texts = [open(end, encoding="utf-8").read() for end in (error, place)]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, *texts]), flush=True)
"""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=ENVIRONMENT,
        )  # fmt: skip

    def run(self, arguments: Sequence[str], *, kill_at: int = 0, file_size: int = 0) -> Ended:
        task = {"arguments": arguments, "kill_at": kill_at, "file_size": file_size}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return Ended(*json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    assert made.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one sitting, in a process of its own."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forks.run(train(out, words, *OPTIONS)).code == 0
    return out


def test_killed_between_any_two_steps_to_the_disk(
    undisturbed: Path, forks: Forks, tmp_path: Path, words: list[str]
) -> None:
    """Each time at another place of a save; at any time the folder has a whole checkpoint or none."""
    places = set()
    number, out = 0, tmp_path / "run"
    while True:
        number += 1
        ended = forks.run(train(out, words, *OPTIONS, "--resume"), kill_at=number)
        if (out / "checkpoint.json").exists():
            load(out)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.error
        places.add(ended.place.split("-")[0])
        assert number < 100
    assert {
        "sync file", "sync folder", "move checkpoint", "move checkpoint.json", "move training", "move training.json",
    } <= places  # fmt: skip
    assert_same_run(out, undisturbed)


def test_killed_late_in_a_run(undisturbed: Path, forks: Forks, tmp_path: Path, words: list[str]) -> None:
    """Where there is a checkpoint and a state of the epoch before, to be replaced and deleted."""
    places = set()
    for number in (16, 18, 19, 21, 24, 27, 29, 42):
        out = tmp_path / str(number)
        ended = forks.run(train(out, words, *OPTIONS), kill_at=number)
        assert ended.code == -signal.SIGKILL, ended.error
        places.add(ended.place.split("-")[0])
        load(out)
        assert forks.run(train(out, words, *OPTIONS, "--resume")).code == 0
        assert_same_run(out, undisturbed)
    assert {"delete checkpoint", "delete training"} <= places


def test_a_file_that_cannot_grow(undisturbed: Path, forks: Forks, tmp_path: Path, words: list[str]) -> None:
    """The system's own error in the middle of a file: of the checkpoint, and of the state, which is larger."""
    sizes = [next(undisturbed.glob(f"{name}-*.safetensors")).stat().st_size for name in ("checkpoint", "training")]
    for name, limit in (("checkpoint", sizes[0] // 2), ("training", (sizes[0] + sizes[1]) // 2)):
        out = tmp_path / str(limit)
        assert forks.run(train(out, words, *OPTIONS), kill_at=17).code == -signal.SIGKILL
        before = records(out)
        assert before.keys() == {"checkpoint", "training"}
        ended = forks.run(train(out, words, *OPTIONS, "--resume"), file_size=limit)
        assert ended.code == 1
        message = re.escape(f"attnext: error: [Errno 27] File too large: '{out / name}-")
        assert re.fullmatch(rf"{message}\w+\.safetensors'", ended.error.splitlines()[-1])
        assert "Traceback" not in ended.error
        after = records(out)
        assert equal(after["training"], before["training"])
        # The checkpoint that still fits is written, the other is not.
        assert equal(after["checkpoint"], before["checkpoint"]) == (name == "checkpoint")
        load(out)
        assert forks.run(train(out, words, *OPTIONS, "--resume")).code == 0
        assert_same_run(out, undisturbed)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it is; the process must not end before."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_signals(forks: Forks, tmp_path: Path, words: list[str]) -> None:
    """A run of the command itself: killed, gone on with, asked to stop by Ctrl-C, gone on with, by SIGTERM."""
    options = [*words, *OPTIONS, "--epochs", "25", "--patience", "25"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert forks.run(train(whole, options)).code == 0
    file, steps = out / "training.json", [0]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "attnext", *train(out, options, "--resume")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT,
        )  # fmt: skip
        before = file.read_bytes() if file.exists() else b""
        wait_for(lambda: file.exists() and file.read_bytes() != before, process)  # noqa: B023
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        load(out)
        record = read_record(out, "training")[0]
        assert not record["finished"]
        steps.append(record["progress"]["step"])
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 130
            assert error.splitlines()[-1] == f"saved in {out}; go on with the same command and --resume"
            assert "Traceback" not in error
    assert steps == sorted(set(steps))
    assert forks.run(train(out, options, "--resume")).code == 0
    assert_same_run(out, whole)


# What two processes learn differs from what one does by the rounding of sums alone only without dropout.
ALIKE = [*OPTIONS, "--dropout", "0"]

WORKER = """
import os, signal, sys
from pathlib import Path
from attnext_command import main
from attnext.seq2seq.training import Trainer

out, number, step, *arguments = sys.argv[1:]
second = os.environ["RANK"] == "1"
make, made = Trainer._step, 0

def counted(trainer, rows):
    global made
    made += 1
    if second and made == int(step):
        os.kill(os.getpid(), int(number))
    return make(trainer, rows)

def opened(event, args):
    if event == "open" and str(args[0]).startswith(out) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        Path(out + "-writes").write_text(str(args[0]))

Trainer._step = counted
if second:
    sys.addaudithook(opened)
code = main(arguments)
print("code", code, flush=True)
sys.exit(code)
"""


def together(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes, by the command that torchrun stands for, on a port of its choice."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(arguments[-1]).parent, env=ENVIRONMENT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> tuple[Path, str]:
    """The folder of a run of two processes in one sitting, and what it printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = together("-m", "attnext", *train(out, words, *ALIKE))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_two_processes_train_as_one(in_two: tuple[Path, str], forks: Forks, tmp_path: Path, words: list[str]) -> None:
    two, printed = in_two
    assert printed.count("PER ") == 1
    one = tmp_path / "one"
    assert forks.run(train(one, words, *ALIKE)).code == 0
    # Sums in another order differ by some 1e-7 of themselves; 18 steps of Adam, which divides a gradient by its size,
    # make that larger.
    for ours, theirs in zip(log(two), log(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == (pytest.approx(theirs[name], rel=1e-4) if name in ("loss", "norm") else theirs[name])
    assert load(two).metrics["test"] == load(one).metrics["test"]
    for name, x in tensors(two).items():
        torch.testing.assert_close(x, tensors(one)[name], rtol=1e-3, atol=1e-4)


def test_two_processes_of_which_one_ends(in_two: tuple[Path, str], tmp_path: Path, words: list[str]) -> None:
    """One is asked to stop: both do, and the run is saved. One is killed: the run ends. Then it is gone on with."""
    out, worker = tmp_path / "run", tmp_path / "worker.py"
    worker.write_text(WORKER)
    arguments = train(out, words, *ALIKE, "--resume")

    done = together(str(worker), str(out), str(int(signal.SIGTERM)), "4", *arguments)
    assert done.stdout.splitlines().count("code 130") == 2
    assert f"saved in {out}; go on with the same command and --resume" in done.stderr
    progress = read_record(out, "training")[0]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (4, 0, 4)

    done = together(str(worker), str(out), str(int(signal.SIGKILL)), "6", *arguments)
    assert done.returncode not in (0, None)
    assert "Signal 9 (SIGKILL) received" in done.stderr
    progress = read_record(out, "training")[0]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (6, 1, 0)
    load(out)
    assert not (tmp_path / "run-writes").exists(), "a second process writes"

    done = together("-m", "attnext", *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, in_two[0])
