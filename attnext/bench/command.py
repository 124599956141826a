"""The command: what is asked for, measured, shown and kept."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

import attnext
from attnext import info
from attnext._support import InputError, writable_file, writable_picture
from attnext.bench import machine, plots, report
from attnext.bench.cases import CASES, Case
from attnext.bench.peers import OTHERS, Wrong, ours
from attnext.bench.studies import STUDIES
from attnext.bench.timing import Plan, measure, threads
from attnext.cli import path_argument, positive, require_backend

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_arguments", "run"]

_QUICK_SECONDS, _QUICK_SAMPLES = 0.5, 3
_QUICK_COMPILED = ("forward", "step")
_SECONDS, _SAMPLES = 8.0, 5
_STUDY_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext bench``."""
    names = [*(case.name for case in CASES), *STUDIES]
    add = parser.add_argument
    add("--cases", type=_names(names), action="extend", metavar="NAMES", help="only these, with commas between")
    add(
        "--peers",
        type=_names(["attnext", *OTHERS]),
        action="extend",
        metavar="NAMES",
        help=f"only these beside attnext: {', '.join(OTHERS)}; or attnext alone",
    )
    add("--threads", type=positive(int), metavar="N", help="of torch (default: its own choice)")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--quick", action="store_true", help="few samples, no studies unless named, not every case compiled")
    add("--json", type=path_argument, metavar="FILE", help="also write all samples, and what they were measured on")
    add("--plot", type=path_argument, metavar="FILE", help="also draw a picture: .png, .svg or .pdf")
    add(
        "--compare",
        type=path_argument,
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing: what changed from A.json to B.json",
    )
    add(
        "--markdown",
        type=path_argument,
        nargs="+",
        metavar="FILE",
        help="measure nothing: what --json wrote as Markdown, a section for each file",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = [f"  {case.name:<20}{case.kind}, {case}" for case in CASES]
    studies = [f"  {name:<20}{(study.__doc__ or '').partition('.')[0]}" for name, study in STUDIES.items()]
    parser.epilog = "\n".join(["cases:", *listed, "studies, named like cases:", *studies])


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that is a list of names with commas between."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if not names:
            raise argparse.ArgumentTypeError("must name at least one")
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                raise argparse.ArgumentTypeError(f"unknown name {name!r}: did you mean {near!r}?")
        return names

    return parse


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def run(args: argparse.Namespace) -> int:
    """Measures and reports; 0, or 1 where a peer was wrong.

    Raises:
        InputError: a file can't be read or written, or the backend asked for can't serve.
    """
    from rich.console import Console

    console = Console()
    if args.compare:
        report.compare(console, *args.compare)
        return 0
    if args.markdown:
        from attnext.bench import markdown

        print(markdown.sections(args.markdown), end="")
        return 0
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    require_backend(None, args.device)
    if args.json is not None:
        writable_file("--json", args.json)
    if args.plot is not None:
        import matplotlib  # noqa: F401  find out now, not after the measurements

        writable_picture("--plot", args.plot)
    try:
        with threads(args.threads):
            document = _measure(args, console)
    except Wrong as error:
        console.print(f"FAILED: {error}; no time was taken of it", markup=False, highlight=False)
        return 1
    report.show(console, document)
    if args.json is not None:
        report.save(args.json, document)
    if args.plot is not None:
        plots.draw(args.plot, document)
    return 0


def _measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything asked for, under a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    cases, studies = _asked(args)
    kernels = ours(args.device)
    others = [name for name in OTHERS if args.peers is None or name in args.peers]
    count, peaks = torch.get_num_threads(), machine.Peaks()
    results, tables = [], {}
    notes: list[str] = []
    columns = (MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn when it has news: a thread that draws ten times a second would be timed too.
    drawing: Any = {"console": console, "transient": True, "disable": not console.is_terminal, "auto_refresh": False}
    with Progress(*columns, **drawing) as bar:
        task = bar.add_task("", total=len(cases) + len(studies))
        plan = Plan(
            args.device,
            _QUICK_SECONDS if args.quick else _SECONDS,
            _QUICK_SAMPLES if args.quick else _SAMPLES,
            lambda text: bar.update(task, description=text, refresh=True),
            notes.append,
        )
        for case in cases:
            if args.device == "cpu":
                peaks.update(count)
            peers = kernels + [OTHERS[name] for name in others if name != "compile" or _compiles(case, args.quick)]
            samples = measure(case, peers, plan)
            results += [_result(case, peer, seconds) for peer, seconds in samples.items()]
            bar.advance(task)
        short = Plan(args.device, _STUDY_SECONDS, _QUICK_SAMPLES, plan.show, plan.note)
        for name in studies:
            tables[name] = STUDIES[name](kernels[0], others, short, args.quick)
            if args.device == "cpu":
                peaks.update(count)
            bar.advance(task)
    if args.quick and "compile" in others and not all(_compiles(case, True) for case in cases):
        notes.append(f"compile was left out of other cases than {', '.join(_QUICK_COMPILED)}: see --quick")
    return {
        "schema": report.SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["attnext", *sys.argv[1:]],
        "machine": info.collect() | {"attnext": attnext.__version__},  # without its folder, as results are shared
        "capabilities": machine.capabilities(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "device": args.device,
        "threads": count,
        "peaks": vars(peaks) | {"last_level_cache": machine.last_level_cache()},
        "results": results,
        "studies": tables,
        "notes": list(dict.fromkeys(notes)),
    }


def _asked(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    cases = [case for case in CASES if args.cases is None or case.name in args.cases]
    studies = [name for name in STUDIES if (not args.quick if args.cases is None else name in args.cases)]
    if args.plot is not None and "memory" not in studies:
        studies.append("memory")  # two of the three pictures are of it
    return cases, studies


def _compiles(case: Case, quick: bool) -> bool:
    """Compiling all cases takes longer than a quick run may."""
    return not quick or case.name in _QUICK_COMPILED


def _result(case: Case, peer: str, seconds: list[float]) -> dict[str, Any]:
    work: dict[str, Any] = {"score": case.score}
    work |= {"elements": case.elements, "multiply_adds": case.multiply_adds, "memory_bytes": case.memory_bytes}
    names = {"case": case.name, "kind": case.kind, "sizes": str(case), "dtype": _dtype(case), "peer": peer}
    return names | work | {"seconds": seconds}
