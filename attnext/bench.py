"""``attnext bench``: how long the fused op takes beside the same op in PyTorch eager."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnext import functional
from attnext.backends import choose
from attnext.cli import positive
from attnext.memory import Memory

__all__ = ["CASES", "Case", "add_arguments", "eager", "measure", "run"]

_LEAST_SECONDS = 1.0
_LEAST_CALLS = 5


@dataclass(frozen=True)
class Case:
    """What is timed: ``forward``, ``forward + backward``, or one decoder ``step`` on a prepared memory."""

    kind: str
    batch: int
    queries: int
    keys: int
    features: int
    values: int

    @property
    def elements(self) -> int:
        """Score elements, each a tanh: B Tq Tk D."""
        return self.batch * self.queries * self.keys * self.features


CASES = (
    Case("forward", 16, 64, 256, 256, 512),
    Case("forward + backward", 16, 64, 256, 256, 512),
    Case("step", 64, 1, 64, 256, 512),
)


def eager(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    """The context as one would write it in PyTorch, with the (B, Tq, Tk, D) tensor and nothing that isn't needed."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight
    return scores.softmax(-1) @ value


def calls(case: Case, backend: str) -> dict[str, Callable[[], object]]:
    """The peers of a case, by name, on the same inputs; their results were compared.

    Raises:
        RuntimeError: the peers don't agree, so that there is nothing to time.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (case.batch, case.queries, case.features),
        (case.batch, case.keys, case.features),
        (case.batch, case.keys, case.values),
        (case.features,),
    )
    x = [torch.randn(shape, generator=generator) for shape in shapes]
    x[3] /= case.features**0.5
    backward = case.kind == "forward + backward"
    for tensor in x:
        tensor.requires_grad_(backward)
    prepared = functional.prepare(x[1], None, None, backend) if case.kind == "step" else None
    memory = Memory(x[1], x[2], None, None, x[3], prepared)

    def fused() -> Tensor:
        return functional.attend(x[0], memory, 1.0, 0.0, False, backend)[0]

    peers = {"PyTorch eager": lambda: eager(*x), f"attnext {backend}": fused}
    expected, actual = (peer().detach() for peer in peers.values())
    # Both sum in float32: 1e-4 is a hundred times their rounding, and a thousandth of an error of method.
    if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"attnext {backend} and PyTorch eager disagree on {case}")
    if not backward:
        return dict(peers)
    incoming = torch.randn(expected.shape, generator=generator)
    return {name: partial(_gradients, peer, x, incoming) for name, peer in peers.items()}


def _gradients(peer: Callable[[], Tensor], x: list[Tensor], incoming: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(peer(), x, incoming)


def measure(call: Callable[[], object]) -> list[float]:
    """Seconds of each of at least five calls and of at least a second in all, after two that don't count."""
    call()
    call()
    times: list[float] = []
    while len(times) < _LEAST_CALLS or sum(times) < _LEAST_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext bench``."""
    parser.add_argument("--threads", type=positive(int), metavar="N", help="of PyTorch (default: its own choice)")


def run(args: argparse.Namespace) -> int:
    """Times every case and prints the table; returns 0."""
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    backend = choose(None, "cpu")
    title = "Additive attention in float32: median milliseconds (min, max)"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("case\nB, Tq, Tk, D, H", "PyTorch\neager", f"attnext\n{backend}", "ratio", "G elements/s"):
        table.add_column(name, justify="left" if name.startswith("case") else "right", no_wrap=True)
    with _threads(args.threads):
        for case in track(CASES, "Timing", console=console, transient=True):
            with torch.set_grad_enabled(case.kind == "forward + backward"):
                times = [measure(call) for call in calls(case, backend).values()]
            slow, fast = (statistics.median(t) for t in times)
            sizes = f"{case.batch}, {case.queries}, {case.keys}, {case.features}, {case.values}"
            speed = case.elements / fast / 1e9
            table.add_row(f"{case.kind}\n{sizes}", *map(_spread, times), f"{slow / fast:.1f}x", f"{speed:.2f}")
        console.print(table)
        console.print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    return 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spread(times: list[float]) -> str:
    middle, low, high = (1e3 * time for time in (statistics.median(times), min(times), max(times)))
    return f"{middle:.3g}\n({low:.3g}, {high:.3g})"
