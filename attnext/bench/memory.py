"""How much memory a call takes beside its inputs, at its peak.

The peak is the whole process's, so each measurement has a process of its own: ``python -m attnext.bench.memory``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from attnext.bench.cases import Case
from attnext.bench.peers import OTHERS, Peer, Unavailable, ours
from attnext.bench.timing import threads

__all__ = ["fits", "peak"]

_STATUS = Path("/proc/self/status")
_TENSORS = 5  # of (B, Tq, Tk, D), forward and backward in eager: sum, tanh, and three gradients on the way


def peak(case: Case, peer: str, device: str, count: int) -> int:
    """Bytes at the peak of a call, beside what was there before it, measured in a new process of ``count`` threads.

    Raises:
        Unavailable: the process failed; the message has its last words.
    """
    sizes = {key: value for key, value in asdict(case).items() if key != "dtype"}
    request = json.dumps({"case": sizes, "peer": peer, "device": device, "threads": count})
    command = [sys.executable, "-m", "attnext.bench.memory", request]
    package = Path(__file__).resolve().parents[2]  # so that it is this one that the process finds
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=package)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise Unavailable(f"its memory at Tk {case.keys} could not be measured: {lines[-1]}")
    return int(done.stdout.splitlines()[-1])


def fits(case: Case) -> bool:
    """Whether a peer that keeps the (B, Tq, Tk, D) tensors can run without driving the machine out of memory."""
    return _TENSORS * case.elements * case.dtype.itemsize < _available()


def _available() -> int:
    """Bytes of memory that can be had; no limit where the system doesn't tell."""
    facts = Path("/proc/meminfo")
    return _kilobytes(facts, "MemAvailable") if facts.is_file() else sys.maxsize


def _kilobytes(path: Path, name: str) -> int:
    """A line of /proc like ``VmRSS:  123 kB``, in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def _measure(case: Case, peer: Peer, device: str) -> int:
    with torch.set_grad_enabled(case.differentiated):
        tiny = replace(case, batch=1, queries=2, keys=8)
        peer.build(tiny, tiny.inputs(device))()
        run = peer.build(case, case.inputs(device))
        if peer.name == "compile":  # its builder has run it, and left more behind than a call does
            run()
        gc.collect()
        return _cuda_peak(run) if device == "cuda" else _cpu_peak(run)


def _cpu_peak(run: Callable[[], object]) -> int:
    if not _STATUS.is_file():
        import resource

        unit = 1 if sys.platform == "darwin" else 1 << 10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # freed memory that is still the process's would hide as much of the call's
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _kilobytes(_STATUS, "VmRSS")
    run()
    return _kilobytes(_STATUS, "VmHWM") - before


def _cuda_peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    everyone = {peer.name: peer for peer in ours(asked["device"])} | OTHERS
    with threads(asked["threads"]):
        print(_measure(Case(**asked["case"]), everyone[asked["peer"]], asked["device"]))
