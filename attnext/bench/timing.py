"""How time is taken: the peers of a case in turn, so that a machine that gets slower does so to all of them."""

from __future__ import annotations

import gc
import math
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from attnext.bench.cases import Case
from attnext.bench.peers import Function, Peer, Run, Unavailable, checked, exact

__all__ = ["Plan", "interleaved", "measure", "threads"]

# A block this long is far above the resolution of the clock and the cost of reading it.
_BLOCK_SECONDS = 2e-3
_MOST_ROUNDS = 50
# A call this long hardly notices what was done just before it.
_SHORT_SECONDS = 5e-2


@dataclass(frozen=True)
class Plan:
    """How much to measure, and where.

    Attributes:
        device: "cpu" or "cuda".
        seconds: for the timing of a case, all its peers together.
        least: samples of every peer, also where they take longer than that.
        show: is told the case and peer at work.
        note: takes a line on what was left out.
    """

    device: str
    seconds: float
    least: int
    show: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None


def measure(case: Case, peers: Sequence[Peer], plan: Plan, *, check: bool = True) -> dict[str, list[float]]:
    """Seconds of a call, many times, of each of the peers that can serve; all were checked before the first is timed.

    Raises:
        Wrong: a peer computes something else.
    """
    inputs = case.inputs(plan.device)
    runs: dict[str, Run] = {}
    with torch.set_grad_enabled(case.differentiated):

        @cache
        def expected(formula: Function) -> list[torch.Tensor]:
            return exact(case, inputs, formula)

        for peer in (peer for peer in peers if peer.serves(case)):
            plan.show(f"{case.name}: {peer.name}, warming up")
            try:
                if check:
                    runs[peer.name] = checked(case, peer, inputs, expected(peer.formula_of(case)))
                else:
                    runs[peer.name] = peer.build(case, inputs)
                    runs[peer.name]()
            except Unavailable as reason:
                plan.note(f"{peer.name} was left out: {reason}")
        return interleaved(runs, plan, case.name)


def interleaved(runs: Mapping[str, Run], plan: Plan, name: str = "") -> dict[str, list[float]]:
    """Seconds of a call of each run, sampled round by round; the runs are warm.

    A sample is the mean of a block of calls that lasts two milliseconds, or of one call that is longer. On CUDA it is
    one call between two events, after what the second-level cache held was written over. Four digits are kept.
    """
    timed = _on_cuda() if plan.device == "cuda" else _on_cpu

    def take(run: Run, calls: int) -> float:
        return float(f"{timed(run, calls):.4g}")

    with _no_collection():
        once = {peer: take(run, 1) for peer, run in runs.items()}
        calls = {peer: 1 if plan.device == "cuda" else math.ceil(_BLOCK_SECONDS / t) for peer, t in once.items()}
        round_seconds = sum(once[peer] * calls[peer] for peer in runs)
        rounds = max(plan.least, min(_MOST_ROUNDS, int(plan.seconds / round_seconds))) if runs else 0
        # Where a block is one call, that was the first sample.
        samples = {peer: [t] if calls[peer] == 1 else [] for peer, t in once.items()}
        for number in range(1, rounds + 1):
            for peer, run in runs.items():
                plan.show(f"{name}: {peer}")
                # One that is much faster than the rest may take several samples of a round.
                block = once[peer] * calls[peer]
                repeats = max(1, min(20, int(plan.seconds / (rounds * len(runs)) / block)))
                if block < _SHORT_SECONDS:
                    # Finds the caches as the peer before it left them, and the cores: its threads may be waiting there.
                    run()
                while len(samples[peer]) < number * repeats:
                    samples[peer].append(take(run, calls[peer]))
    return samples


def _on_cpu(run: Run, calls: int) -> float:
    return timeit.Timer(run).timeit(calls) / calls


def _on_cuda() -> Callable[[Run, int], float]:
    properties: Any = torch.cuda.get_device_properties("cuda")
    return partial(_between_events, torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda"))


def _between_events(cache_filler: torch.Tensor, run: Run, _: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache_filler.zero_()  # also keeps the device busy while the call is being queued behind it
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs torch on so many threads, or on as many as it does anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
