"""What the machine can do at most, and what was measured on it: peaks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import attnext
from attnext import _extension

__all__ = ["Peaks", "capabilities", "commit", "last_level_cache", "multiply_add_rate", "read_bandwidth", "versions"]

_READ_BYTES = 256 << 20


@dataclass
class Peaks:
    """The best seen of what bounds the CPU kernels; 0 stands for not measured.

    Attributes:
        multiply_adds: float32 multiply-adds a second on all threads.
        read_bandwidth: bytes a second from memory.
    """

    multiply_adds: float = 0.0
    read_bandwidth: float = 0.0

    def update(self, threads: int) -> None:
        """Measures again and keeps the better: on a shared machine the peak is not there at every moment."""
        self.multiply_adds = max(self.multiply_adds, multiply_add_rate(threads))
        self.read_bandwidth = max(self.read_bandwidth, read_bandwidth(threads))


def multiply_add_rate(threads: int, seconds: float = 0.05) -> float:
    """float32 multiply-adds a second of as many threads at once; 0 without the C++ extension."""
    module = _extension.load()
    if module is None:
        return 0.0
    rounds, took = 1024, 0.0
    while took < seconds / 4:  # doubled until the clock can tell
        rounds *= 2
        started = time.perf_counter()
        module.multiply_adds(rounds)
        took = time.perf_counter() - started
    rounds = int(rounds * seconds / took)
    done: list[tuple[float, int, float]] = []
    barrier = threading.Barrier(threads)

    def work() -> None:
        barrier.wait()
        started = time.perf_counter()
        done.append((started, module.multiply_adds(rounds), time.perf_counter()))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    starts, counts, ends = zip(*done, strict=True)
    return float(sum(counts) / (max(ends) - min(starts)))


def read_bandwidth(threads: int) -> float:
    """Bytes a second that torch reads on as many threads, of a tensor that no cache holds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(max(_READ_BYTES, 4 * last_level_cache()) // 4)
        best = float("inf")
        for _ in range(3):
            for read in (partial(torch.sum, data), partial(torch.dot, data, data)):
                started = time.perf_counter()
                read()
                best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return data.nbytes / best


def last_level_cache() -> int:
    """Bytes of the largest cache that a processor sees; 32 MiB where the system doesn't tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def capabilities() -> list[str]:
    """The instructions that torch knows of and the processor has."""
    return sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that were timed; None for one that isn't installed."""
    found = {package: _installed(package) for package in ("jax", "numpy")}
    of_torch = str(torch.__version__)  # which tells CPU builds from others
    return {"python": platform.python_version(), "attnext": attnext.__version__, "torch": of_torch, **found}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, str | bool] | None:
    """The commit of the checkout this runs from, and whether files differ from it; None where it runs from none."""
    folder = Path(attnext.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        return {"id": _git(folder, "rev-parse", "HEAD"), "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
