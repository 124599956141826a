"""``attnext gpu-check`` without a GPU: its dry run, and what it makes of stages that fail.

Its checks of the contract run in ``test_triton.py``, and on the CUDA kernels in ``test_cuda.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnext.gpu import command, running
from attnext.gpu.checking import NotHere, On, close, raises, run
from attnext.gpu.contract import NoWaiting
from attnext.gpu.stages import Stage, stages
from attnext_command import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: attnext gpu-check runs on it")

HERE = On("cpu", "cpu")


def python(code: str, name: str = "some", **options: Any) -> Stage:
    return Stage(name, f"the stage {name}", (sys.executable, "-c", code), options.pop("limit", 60), **options)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other stages in the place of the command's."""

    def put(*of_test: Stage) -> None:
        monkeypatch.setattr(command, "stages", lambda out, dry: iter(of_test))

    return put


def check(out: Path, *arguments: str) -> int:
    return main(["gpu-check", "--dry-run", "--out", str(out), *arguments])


def test_a_dry_run(tmp_path: Path) -> None:
    """Every stage that the CPU has, but for the contract."""
    pytest.importorskip("triton")
    names = [stage.name for stage in stages(tmp_path, dry=True) if not stage.name.startswith("contract")]
    asked = [sys.executable, "-m", "attnext", "gpu-check", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run([*asked, "--stages", ",".join(names)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report, text = json.loads((tmp_path / "report.json").read_bytes()), (tmp_path / "report.md").read_text()
    states = {stage["name"]: stage["state"] for stage in report["stages"]}
    assert list(states) == names
    ran = {
        "info",
        "verify-triton",
        "running-triton",
        "tiles",
        "bench",
        "kernels-triton",
        "training",
        "decoding",
        "words",
    }
    assert {name for name, state in states.items() if state == "held"} == ran
    assert {state for name, state in states.items() if name not in ran} == {"not run"}
    found = {stage["name"]: stage["found"] for stage in report["stages"]}
    (of_cases,) = found["verify-triton"].values()
    assert sum(row["cases"] for row in of_cases["errors"]) in range(6, 13)
    assert not of_cases["failures"]
    (outcomes,) = found["running-triton"].values()
    assert {outcome["name"] for outcome in outcomes} == {check.__name__ for check in running.CHECKS}
    assert sum(row["fastest"] for row in found["tiles"]["tiles"]) >= 10
    assert report["machine"]["torch"].startswith(torch.__version__)
    for shown in ("# attnext on the CPU: a dry run", "| captured | held |", "step-small", "first of the table"):
        assert shown in text
    pictures = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == ["bench.png", "errors.png"]
    assert all((tmp_path / picture).stat().st_size > 5_000 for picture in pictures)


def test_what_failed_is_told_and_the_rest_goes_on(
    tmp_path: Path, table: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    table(
        python("print('all is well')", "verify-some"),
        python("raise SystemExit('the number is wrong | here')", "wrong"),
        python("raise SystemExit('no permission')", "counters", optional=True),
        python("import time; print('begun', flush=True); time.sleep(60)", "slow", limit=3.0),
        python("1 / 0", "missing", missing="it is not installed"),
        python("print('the last')", "last"),
    )
    assert check(tmp_path) == 1
    printed, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert "FAILED: wrong, slow" in printed
    states = [stage["state"] for stage in json.loads((tmp_path / "report.json").read_bytes())["stages"]]
    assert states == ["held", "FAILED", "failed", "out of time", "not run", "held"]
    for line in ("the number is wrong | here", "no permission", "begun", "the last"):
        assert f"```\n{line}\n```" in text
    assert "| **FAILED**: exit code 1" in text
    assert "not run: it is not installed" in text


def test_nothing_wrong_but_no_family_verified(
    tmp_path: Path, table: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    table(python("pass", "verify-some", missing="no kernels were built"), python("pass", "info"))
    assert check(tmp_path) == 1
    assert "no family of kernels was verified" in capsys.readouterr().out
    assert check(tmp_path, "--stages", "info") == 0


def test_the_time_of_all_stages(tmp_path: Path, table: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    table(python("pass", "verify-some"), python("import time; time.sleep(5)", "slow"), python("1 / 0", "later"))
    assert check(tmp_path, "--minutes", "0.05") == 0  # what is at work then ends
    assert "OK: nothing was wrong; not run: later" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no GPU that torch can use; --dry-run takes the CPU"),
        (["--dry-run", "--stages", "info,verfy"], "got verfy"),
        (["--dry-run", "--stages", ","], "got none"),
        (["--minutes", "0"], "must be a number above 0"),
    ],
)
def test_what_can_not_be_done_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    try:
        code: object = main(["gpu-check", "--out", str(out), *arguments])
    except SystemExit as raised:
        code = raised.code
    assert code == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--list"]) == 0
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()][:2] == ["info", "verify-triton"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_stage_and_leaves_a_report(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pid = tmp_path / "pid"
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs the tests may ignore
from attnext.gpu import command
from attnext.gpu.stages import Stage
from attnext_command import main
sleeps = "import pathlib, os, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(99)"
command.stages = lambda out, dry: iter([
    Stage("verify-some", "short", (sys.executable, "-c", ""), 60),
    Stage("long", "long", (sys.executable, "-c", sleeps), 90),
])
sys.exit(main(["gpu-check", "--dry-run", "--out", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(30) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert [stage["name"] for stage in report["stages"]] == ["verify-some"]


def test_a_check_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(on: On) -> None:
        raise ZeroDivisionError("at the kernel")

    def elsewhere(on: On) -> None:
        raise NotHere("one card")

    def right(on: On) -> None:
        close([on.ones(2)], [torch.ones(2)])

    outcomes = list(run((wrong, elsewhere, right), HERE))
    assert [outcome.state for outcome in outcomes] == ["FAILED", "not run", "held"]
    assert outcomes[0].said == "ZeroDivisionError: at the kernel"
    assert "at the kernel" in capsys.readouterr().err  # with its traceback


def test_an_error_that_does_not_come_is_missed() -> None:
    def complain(name: str | None) -> None:
        if name:
            raise ValueError(f"{name} must be")

    with raises(ValueError, "^key"):
        complain("key")
    for name in ("value", None):
        with pytest.raises(AssertionError), raises(ValueError, "^key"):
            complain(name)


def test_what_waits_for_the_device_is_seen() -> None:
    x = torch.ones(3)
    for call in (lambda: x.sum().item(), x.nonzero, lambda: torch.ones(2, device="meta")):
        with pytest.raises(AssertionError), NoWaiting("cpu"):
            call()


def broken_after(calls: int, trained: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Results that are off by an ulp from a call on."""
    count = 0

    def call(*arguments: Any) -> list[Tensor]:
        nonlocal count
        count += 1
        found = trained(*arguments)
        return [torch.nextafter(y, y + 1) if count > calls else y for y in found]

    return call


def test_a_bit_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    running.same_bits_again(HERE)
    monkeypatch.setattr(running, "trained", broken_after(1, running.trained))
    with pytest.raises(AssertionError):
        running.same_bits_again(HERE)


def test_memory_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [torch.ones(2).to_sparse()]  # a tensor without storage
    running.memory_that_does_not_grow(HERE)
    others.clear()
    kept: list[Tensor] = []
    trained = running.trained
    monkeypatch.setattr(running, "trained", lambda *x: kept.append(torch.ones(9)) or trained(*x))
    with pytest.raises(AssertionError):
        running.memory_that_does_not_grow(HERE)
