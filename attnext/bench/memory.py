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
from typing import Any

import torch

from attnext.bench.cases import Case
from attnext.bench.peers import OTHERS, Peer, Unavailable, ours
from attnext.bench.timing import threads

__all__ = ["fits", "in_new_process", "peak", "peak_of", "resident"]

_STATUS = Path("/proc/self/status")
_TENSORS = 5  # of (B, Tq, Tk, D), forward and backward in eager: sum, tanh, and three gradients on the way


def peak(case: Case, peer: str, device: str, count: int) -> int:
    """Bytes at the peak of a call, beside what was there before it, measured in a new process of ``count`` threads.

    Raises:
        Unavailable: the process failed; the message has its last words.
    """
    sizes = {key: value for key, value in asdict(case).items() if key != "dtype"}
    request = {"case": sizes, "peer": peer, "device": device, "threads": count}
    return int(in_new_process("attnext.bench.memory", request, f"Tk {case.keys}"))


def in_new_process(module: str, request: dict[str, Any], where: str) -> Any:
    """What a module prints of a request, both JSON.

    Raises:
        Unavailable: the process failed; the message has ``where`` and its last words.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    package = Path(__file__).resolve().parents[2]  # so that it is this one that the process finds
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=package)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise Unavailable(f"its memory at {where} could not be measured: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


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
        return peak_of(run, device)


def peak_of(run: Callable[[], object], device: str) -> int:
    """Bytes at the peak of a call, beside what was there before it."""
    gc.collect()
    return _cuda_peak(run) if device == "cuda" else _cpu_peak(run)


def resident(device: str) -> int:
    """Bytes that tensors and whatever else take now.

    Raises:
        Unavailable: the system doesn't tell.
    """
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    if not _STATUS.is_file():
        raise Unavailable("what is kept can't be measured on this system")
    _trim()
    return _kilobytes(_STATUS, "VmRSS")


def _trim() -> None:
    """Gives freed memory back, which is still the process's and would hide as much of a call's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cpu_peak(run: Callable[[], object]) -> int:
    if not _STATUS.is_file():
        import resource

        unit = 1 if sys.platform == "darwin" else 1 << 10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    _trim()
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
