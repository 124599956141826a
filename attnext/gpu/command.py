"""The command: stage after stage in processes of their own, then the report."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attnext._support import InputError, make_writable, only_writer
from attnext.backends.triton import INTERPRETED
from attnext.cli import path_argument, positive
from attnext.gpu.stages import Stage, stages

__all__ = ["Done", "add_arguments", "run"]


@dataclass(frozen=True)
class Done:
    """A stage and what came of it: "held", "FAILED", "failed" of one that may, "out of time", or "not run" and why."""

    stage: Stage
    state: str
    seconds: float = 0.0
    said: str = ""

    @property
    def wrong(self) -> bool:
        return self.state in ("FAILED", "out of time") and not self.stage.optional


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext gpu-check``."""
    parser.add_argument(
        "--out", type=path_argument, default=Path("gpu-check"), metavar="DIR",
        help="folder of the report, pictures and logs (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes",
        type=positive(float),
        default=25.0,
        metavar="N",
        help="after which no stage begins (default %(default)g)",
    )
    parser.add_argument("--stages", metavar="NAMES", help="only these, with commas between; --list names them")
    parser.add_argument("--list", action="store_true", help="show the stages, and run none")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, in small, with Triton's interpreter: checks the command"
    )
    parser.epilog = "Exit code 1 if anything was wrong."


def run(args: argparse.Namespace) -> int:
    """Runs the stages, each also after one that failed; 0, or 1 where something was wrong.

    Raises:
        InputError: there is no GPU, no such stage, or the folder can't be written to.
    """
    there = torch.cuda.is_available()
    chosen = _chosen(list(stages(args.out, dry=not there)), args.stages)
    if args.list:
        width = max(len(stage.name) for stage in chosen)
        print("\n".join(f"{stage.name:{width}}  {stage.title}" for stage in chosen))
        return 0
    if not args.dry_run and not there:
        raise InputError("there is no GPU that torch can use; --dry-run takes the CPU")
    if there and INTERPRETED:
        raise InputError("unset TRITON_INTERPRET, with which Triton takes no GPU")
    if args.dry_run and there:
        raise InputError("--dry-run is for machines without a GPU; CUDA_VISIBLE_DEVICES= hides those of this one")
    make_writable(args.out)
    from attnext.gpu import report

    done: list[Done] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what follows: no stage runs on
    end = time.monotonic() + 60 * args.minutes
    with only_writer(args.out):
        try:
            for number, stage in enumerate(chosen, 1):
                print(f"[{number}/{len(chosen)}] {stage.name}: {stage.title} ...", flush=True)
                done.append(_run(stage, args.out, end - time.monotonic()))
                last = done[-1]
                print(f"        {last.state} ({last.seconds:.0f} s) {last.said}".rstrip(), flush=True)
        finally:  # also of what was done before an interruption
            report.write(args.out, done, args.dry_run)
            signal.signal(signal.SIGTERM, before)
    print(f"\nreport: {args.out / 'report.md'}")
    return _verdict(done, whole=not args.stages)


def _verdict(done: Sequence[Done], whole: bool) -> int:
    wrong = [entry.stage.name for entry in done if entry.wrong]
    if whole and not any(entry.state == "held" and entry.stage.name.startswith("verify") for entry in done):
        wrong.append("no family of kernels was verified")
    if wrong:
        print(f"FAILED: {', '.join(wrong)}")
        return 1
    missing = [entry.stage.name for entry in done if entry.state == "not run"]
    print("OK: nothing was wrong" + (f"; not run: {', '.join(missing)}" if missing else ""))
    return 0


def _chosen(every: list[Stage], names: str | None) -> list[Stage]:
    if names is None:
        return every
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in {stage.name for stage in every}]
    if unknown or not wanted:
        known = ", ".join(stage.name for stage in every)
        raise InputError(f"--stages must name some of {known}, got {', '.join(unknown) or 'none'}")
    return [stage for stage in every if stage.name in wanted]


def _run(stage: Stage, out: Path, left: float) -> Done:
    if stage.missing or left <= 0:
        return Done(stage, "not run", said=stage.missing or "the time was over: --minutes")
    for path in stage.writes:
        _remove(path)
    # Assertions are what the checks consist of.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"} | stage.environment
    started = time.perf_counter()
    log = out / f"{stage.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(stage.limit)
        except subprocess.TimeoutExpired:
            _end(process)
            return Done(stage, "out of time", stage.limit, f"after {stage.limit:.0f} s: see {log}")
        except BaseException:
            _end(process)
            raise
    seconds = time.perf_counter() - started
    if code == 0:
        return Done(stage, "held", seconds)
    return Done(stage, "failed" if stage.optional else "FAILED", seconds, f"exit code {code}: see {log}")


def _remove(path: Path) -> None:
    """What an earlier run left: nothing of it may be taken for this one's."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
