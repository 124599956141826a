"""``attnext verify``: every backend available here against the float64 reference."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from attnext._support import InputError, writable_file, write_atomically
from attnext.backends import backends, kernel_devices, serves
from attnext.backends.triton import INTERPRETED
from attnext.cases import CASES, DTYPES, PAST_INPUTS, Case, compare, random_cases
from attnext.cli import non_negative, path_argument, positive
from attnext.recurrent import cases as recurrent
from attnext.recurrent.cases import RECURRENT_CASES, RecurrentCase

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Call = tuple[str, Case | RecurrentCase, int]
"""A backend, a case and the seed of its inputs."""
ATTENTION = {
    "scores": ["scores"],
    "context": ["context"],
    "weights": ["weights"],
    "grad\nquery": ["grad query"],
    "grad\nkey": ["grad key"],
    "grad\nvalue": ["grad value"],
    "grad\nv": ["grad score_weight"],
    "grad\npast": [f"grad {name}" for name in PAST_INPUTS],
}
"""The columns of a table, each with the results whose worst it shows."""
RECURRENT = {
    "outputs": ["outputs"],
    "contexts": ["contexts"],
    "last\nstates": ["last states"],
    "grad\ninputs": ["grad inputs"],
    "grad\nstates": ["grad states"],
    "grad\nmemory": ["grad memory"],
    "grad\nparameters": ["grad parameters"],
}
"""Those of layers and decoders."""
_LEAST_WIDTH = 80
_SHARE = 4
"""For so many random calls of attention one of a layer or decoder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext verify``."""
    parser.add_argument("--seed", type=non_negative, default=0, help="of inputs and random cases (default %(default)s)")
    parser.add_argument(
        "--cases",
        type=non_negative,
        default=200,
        help="random calls of attention beside the table; of layers and decoders a quarter (default %(default)s)",
    )
    parser.add_argument(
        "--at-most", type=positive(int), metavar="N", help="of a backend only so many calls, of all kinds"
    )
    parser.add_argument(
        "--backend", action="append", choices=list(kernel_devices()), help="only this backend; repeatable"
    )
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", action="append", choices=names, help="only this dtype; repeatable")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="instead, compile the Triton kernels for every target, which takes no GPU: nothing may spill",
    )
    parser.add_argument("--target", action="append", help="with --compile: only this target, say sm_90; repeatable")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the errors and what failed")


@dataclass
class Report:
    """Worst errors by kind of case, backend and dtype, and every call that was off."""

    cases: dict[tuple[type, str, str], int] = field(default_factory=dict)
    worst: dict[tuple[type, str, str], dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, call: Call, outcome: dict[str, float] | str) -> None:
        """Counts in the errors of a call, or why it failed."""
        backend, case, seed = call
        if isinstance(outcome, str):
            self.failures.append(f"{backend}: {case}, seed {seed}: {outcome}")
            return
        key = (type(case), backend, str(case.dtype).removeprefix("torch."))
        self.cases[key] = self.cases.get(key, 0) + 1
        row = self.worst.setdefault(key, {})
        for name, error in outcome.items():
            row[name] = max(row.get(name, 0.0), error)
        off = ", ".join(f"{name} {error:.3g}" for name, error in outcome.items() if error > 1.0)
        if off:
            self.failures.append(f"{backend}: {case}, seed {seed}: {off}")

    def as_json(self) -> str:
        """The errors in units of their tolerances, and the failures."""
        rows = [
            {"kind": "attention" if kind is Case else "recurrent", "backend": backend, "dtype": dtype}
            | {"cases": self.cases[kind, backend, dtype], "worst": errors}
            for (kind, backend, dtype), errors in self.worst.items()
        ]
        return json.dumps({"errors": rows, "failures": self.failures}, indent=1)

    def tables(self) -> Iterator[Table]:
        """The worst error of each result, a row for each backend and dtype; one table for each kind of case."""
        if any(kind is Case for kind, *_ in self.worst):
            yield self._table("Worst error against the float64 reference, in units of the tolerance", Case, ATTENTION)
        if any(kind is RecurrentCase for kind, *_ in self.worst):
            yield self._table("Recurrent layers and decoders, likewise", RecurrentCase, RECURRENT)

    def _table(self, title: str, kind: type, columns: Mapping[str, list[str]]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE, padding=0)
        for name in ("backend", "dtype"):
            table.add_column(name, no_wrap=True)
        for name in ("cases", *columns):
            table.add_column(name, justify="right")
        for key, row in self.worst.items():
            if key[0] is kind:
                found = ([row[name] for name in names if name in row] for names in columns.values())
                cells = (_cell(max(errors)) if errors else "-" for errors in found)
                table.add_row(*key[1:], str(self.cases[key]), *cells)
        return table


def _cell(error: float) -> str:
    return f"[bold red]{error:.2f}[/]" if error > 1.0 else f"{error:.2f}"


def _work(backend: str, seed: int, count: int, dtypes: list[str]) -> Iterator[Call]:
    wanted = [dtype for dtype in ([getattr(torch, name) for name in dtypes] or DTYPES) if serves(backend, dtype)]
    for number, case in enumerate(CASES):
        for dtype in wanted:
            yield backend, replace(case, dtype=dtype), seed + number
    for number, case in enumerate(random_cases(count if wanted else 0, seed)):
        dtype = case.dtype if case.dtype in wanted else wanted[number % len(wanted)]
        yield backend, replace(case, dtype=dtype), seed + len(CASES) + number


def _recurrent_work(backend: str, seed: int, count: int, dtypes: list[str]) -> Iterator[Call]:
    """Layers where they have kernels, which is the CPU; decoders on each backend."""
    asked = [getattr(torch, name) for name in dtypes] or recurrent.DTYPES
    wanted = [dtype for dtype in recurrent.DTYPES if dtype in asked and serves(backend, dtype)]
    table = [replace(case, dtype=dtype) for case in RECURRENT_CASES for dtype in wanted]
    drawn = [case for case in recurrent.random_cases(count, seed) if case.dtype in wanted]
    for number, case in enumerate((*table, *drawn)):
        if case.attention or backend == "cpu":
            yield backend, case, seed + number


def _outcome(call: Call) -> dict[str, float] | str:
    """The errors of a call, or why it failed."""
    backend, case, seed = call
    try:
        device = kernel_devices()[backend]
        if isinstance(case, Case):
            return compare(case, backend, seed, device)
        return recurrent.compare(case, backend, seed, device)
    except Exception as raised:  # whatever a kernel may raise: the rest is verified all the same
        return f"{type(raised).__name__}: {raised}"


def _interpretable(backend: str) -> bool:
    """Whether the Triton kernels can't run here as they are, but can in Triton's interpreter, in other processes."""
    can = importlib.util.find_spec("triton") is not None and not INTERPRETED
    return backend == "triton" and can and not backends()[backend].available


@contextmanager
def _interpreters() -> Iterator[ProcessPoolExecutor]:
    """Processes in which Triton interprets its kernels: the variable counts when a process starts."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        processes = min(8, os.cpu_count() or 1)
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_be_an_interpreter) as pool:
            yield pool
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _be_an_interpreter() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NumPy's, of infinities that are meant


def _outcomes(work: list[Call]) -> Iterator[dict[str, float] | str]:
    """Those of the calls, which stand in order of their backend."""
    for backend, calls in groupby(work, key=lambda call: call[0]):
        if _interpretable(backend):
            with _interpreters() as pool:
                yield from pool.map(_outcome, calls)
        else:
            yield from map(_outcome, calls)


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the table; 0 if every error is within its tolerance, 1 otherwise or if nothing could be."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    if console.width < _LEAST_WIDTH:  # the numbers would be cut
        console = Console(width=_LEAST_WIDTH)
    if args.compile:
        return _compile(console, args.target, args.dtype)
    if args.target:
        raise InputError("--target goes with --compile")
    if args.json is not None:
        writable_file("--json", args.json)
    status = backends()
    asked = args.backend or list(kernel_devices())
    interpreted = [name for name in asked if _interpretable(name)]
    ready = [name for name in asked if status[name].available or name in interpreted]
    report = Report()
    work: list[Call] = []
    for name in ready:
        # Interpreted kernels take a hundred times as long: all the random cases are for whoever asks for them by name.
        share = 10 if name in interpreted and not args.backend else 1
        calls = list(_work(name, args.seed, args.cases // share, args.dtype or []))
        if name not in interpreted:
            calls += _recurrent_work(name, args.seed, args.cases // _SHARE, args.dtype or [])
        work += calls[:: 1 if args.at_most is None else max(1, math.ceil(len(calls) / args.at_most))]
    for call, outcome in zip(
        work, track(_outcomes(work), "Verifying", total=len(work), console=console, transient=True), strict=True
    ):
        report.add(call, outcome)
    if args.json is not None:
        write_atomically(args.json, report.as_json().encode())
    for table in report.tables():
        console.print(table)
    for name in interpreted:
        console.print(f"{name}: verified in its interpreter: {status[name].reason}", markup=False, highlight=False)
    for name in asked:
        if name not in ready:
            console.print(f"{name}: not verified: {status[name].reason}", markup=False, highlight=False)
    for failure in report.failures[:20]:
        console.print(f"FAILED {failure}", markup=False, highlight=False)
    if len(report.failures) > 20:
        console.print(f"... and {len(report.failures) - 20} more")
    missing = [name for name in args.backend or [] if name not in ready]
    if report.failures:
        console.print(f"[bold red]FAILED[/]: {len(report.failures)} of {len(work)} calls beyond tolerance")
        return 1
    if missing or not ready:
        console.print(f"[bold red]FAILED[/]: {', '.join(missing or asked)} can't be verified here")
        return 1
    console.print(f"[bold green]OK[/]: {len(work)} calls within tolerance on {', '.join(ready)}")
    return 0


def _compile(console: Console, targets: list[str] | None, dtypes: list[str] | None) -> int:
    """Compiles the Triton kernels ahead of time; 0 if all fit their targets without a spilled register."""
    from rich import box
    from rich.progress import Progress
    from rich.table import Table

    if importlib.util.find_spec("triton") is None:
        raise InputError("--compile needs Triton: pip install triton")
    if INTERPRETED:
        raise InputError("--compile can't compile where Triton interprets: unset TRITON_INTERPRET")
    from attnext.kernels import ahead

    unknown = sorted(set(targets or ()) - set(ahead.TARGETS))
    if unknown:
        raise InputError(f"--target must be one of {', '.join(ahead.TARGETS)}, got {unknown[0]!r}")
    jobs = [what for target in targets or ahead.TARGETS for what in ahead.builds(target, tuple(dtypes or ahead.DTYPES))]
    table = Table("target", "kernels", "registers", "shared memory", "spilled", box=box.SIMPLE)
    most: dict[str, list[int]] = {}
    failures = []
    # Processes, since the compiler holds the interpreter's lock; new ones, since this one's threads can't be forked.
    with (
        ProcessPoolExecutor(mp_context=get_context("spawn")) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        running = progress.add_task("Compiling", total=len(jobs))
        for what, found in zip(jobs, pool.map(ahead.try_usage, jobs), strict=True):
            progress.advance(running)
            row = most.setdefault(what.target, [0, 0, 0, 0])
            row[0] += 1
            if isinstance(found, str):
                failures.append(f"{what}: {found}")
                continue
            for k, number in enumerate((found.registers, found.shared, found.spilled), 1):
                row[k] = max(row[k], number)
            if found.spilled or found.shared > ahead.SHARED_MEMORY[what.target]:
                failures.append(f"{what}: {found}")
    for target, (count, registers, shared, spilled) in most.items():
        table.add_row(target, str(count), str(registers), f"{shared} B", f"{spilled} B")
    console.print(table)
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False, highlight=False)
    if failures:
        console.print(f"[bold red]FAILED[/]: {len(failures)} of {len(jobs)} kernels")
        return 1
    console.print(f"[bold green]OK[/]: {len(jobs)} kernels fit their targets and spill nothing")
    return 0
