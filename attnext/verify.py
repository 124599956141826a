"""``attnext verify``: every backend available here against the float64 reference."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from attnext.backends import backends, kernel_devices
from attnext.cases import CASES, DTYPES, Case, compare, random_cases
from attnext.cli import non_negative

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = ("scores", "context", "weights", "grad query", "grad key", "grad value", "grad score_weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext verify``."""
    parser.add_argument("--seed", type=non_negative, default=0, help="of inputs and random cases (default %(default)s)")
    parser.add_argument(
        "--cases", type=non_negative, default=200, help="random ones beside the table (default %(default)s)"
    )
    parser.add_argument(
        "--backend", action="append", choices=list(kernel_devices()), help="only this backend; repeatable"
    )


@dataclass
class Report:
    """Worst errors by backend and dtype, and every call that was off."""

    cases: dict[tuple[str, str], int] = field(default_factory=dict)
    worst: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def verify(self, backend: str, case: Case, seed: int) -> None:
        """Compares one case and counts it in."""
        try:
            errors = compare(case, backend, seed, kernel_devices()[backend])
        except Exception as raised:  # whatever a kernel may raise: the rest is verified all the same
            self.failures.append(f"{backend}: {case}, seed {seed}: {type(raised).__name__}: {raised}")
            return
        key = (backend, str(case.dtype).removeprefix("torch."))
        self.cases[key] = self.cases.get(key, 0) + 1
        row = self.worst.setdefault(key, {})
        for name, error in errors.items():
            row[name] = max(row.get(name, 0.0), error)
        off = ", ".join(f"{name} {error:.3g}" for name, error in errors.items() if error > 1.0)
        if off:
            self.failures.append(f"{backend}: {case}, seed {seed}: {off}")

    def table(self) -> Table:
        """The worst error of each result, a row for each backend and dtype."""
        from rich import box
        from rich.table import Table

        table = Table(
            title="Worst error against the float64 reference, in units of the tolerance",
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for name in ("backend", "dtype"):
            table.add_column(name, no_wrap=True)
        for name in ("cases", *RESULTS):
            table.add_column(name.replace("grad ", "grad\n").replace("score_weight", "v"), justify="right")
        for key, row in self.worst.items():
            cells = (_cell(row[name]) if name in row else "-" for name in RESULTS)
            table.add_row(*key, str(self.cases[key]), *cells)
        return table


def _cell(error: float) -> str:
    return f"[bold red]{error:.2f}[/]" if error > 1.0 else f"{error:.2f}"


def _work(seed: int, count: int) -> Iterator[tuple[Case, int]]:
    for number, case in enumerate(CASES):
        for dtype in DTYPES:
            yield replace(case, dtype=dtype), seed + number
    for number, case in enumerate(random_cases(count, seed)):
        yield case, seed + len(CASES) + number


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the table; 0 if every error is within its tolerance, 1 otherwise or if nothing could be."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    status = backends()
    asked = args.backend or list(kernel_devices())
    ready = [name for name in asked if status[name].available]
    report = Report()
    work = [(backend, *item) for backend in ready for item in _work(args.seed, args.cases)]
    for item in track(work, "Verifying", console=console, transient=True):
        report.verify(*item)
    if work:
        console.print(report.table())
    for name in asked:
        if name not in ready:
            console.print(f"{name}: not verified: {status[name].reason}", markup=False, highlight=False)
    for failure in report.failures[:20]:
        console.print(f"FAILED {failure}", markup=False, highlight=False)
    if len(report.failures) > 20:
        console.print(f"... and {len(report.failures) - 20} more")
    missing = [name for name in args.backend or [] if name not in ready]
    if report.failures or missing or not ready:
        console.print(f"[bold red]FAILED[/]: {len(report.failures)} of {len(work)} calls beyond tolerance")
        return 1
    console.print(f"[bold green]OK[/]: {len(work)} calls within tolerance on {', '.join(ready)}")
    return 0
