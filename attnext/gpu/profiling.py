"""The kernels that take the most time in the benchmark's calls, by PyTorch's profiler.

python -m attnext.gpu.profiling triton --device cuda --json kernels.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from attnext.bench.cases import CASES, Case
from attnext.bench.peers import ours

__all__ = ["main"]

NAMES = ("forward", "training", "step-large", "dot-step", "dot-training")
CALLS = 10
LARGEST = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the largest kernels of each case."""
    parser = argparse.ArgumentParser(description="Show the kernels that take the most time.")
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default=",".join(NAMES), metavar="NAMES")
    parser.add_argument("--only-run", action="store_true", help="make the calls, for another profiler")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    cases = [case for case in CASES if case.name in args.cases.split(",")]
    if args.only_run:
        for case in cases:
            _run(case, args.backend, args.device)()
        return 0
    rows = [row for case in cases for row in largest(case, args.backend, args.device)]
    if not any(row["us"] for row in rows):
        print("the profiler has seen nothing: it may not be permitted here")
        return 1
    for row in rows:
        print(f"{row['case']:14} {row['share']:5.0%} {row['us']:10.1f} us {row['calls']:4}  {row['kernel']}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


def largest(case: Case, backend: str, device: str) -> list[dict[str, Any]]:
    """The kernels of a case that take the most time: share of all, microseconds and launches a call."""
    run = _run(case, backend, device)
    on_gpu = device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(CALLS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    averages: list[Any] = list(recorded.key_averages())
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in averages}
    counts, total = {event.key: event.count for event in averages}, sum(times.values()) or 1.0
    return [
        {"case": case.name, "kernel": key, "share": times[key] / total, "us": times[key] / CALLS}
        | {"calls": counts[key] // CALLS}
        for key in sorted(times, key=times.__getitem__, reverse=True)[:LARGEST]
    ]


def _run(case: Case, backend: str, device: str) -> Callable[[], object]:
    """A warm call of a family's."""
    peer = next(peer for peer in ours(device) if peer.name == f"attnext {backend}")
    with torch.set_grad_enabled(case.differentiated):
        run = peer.build(case, case.inputs(device))
        for _ in range(3):
            run()

    def call() -> object:
        with torch.set_grad_enabled(case.differentiated):
            return run()

    return call


if __name__ == "__main__":
    sys.exit(main())
