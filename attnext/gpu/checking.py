"""Checks of a backend on a device, one after the other, also after one that failed."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnext.backends import backends

__all__ = ["Check", "NotHere", "On", "Outcome", "close", "main", "operators", "raises", "run"]


class NotHere(Exception):
    """A check that this machine has no use for, and why."""


@dataclass(frozen=True)
class On:
    """A backend, and the device of the tensors that it is given."""

    backend: str
    device: str

    def randn(self, *shape: Any, **options: Any) -> Tensor:
        return torch.randn(*shape, device=self.device, **options)

    def rand(self, *shape: Any, **options: Any) -> Tensor:
        return torch.rand(*shape, device=self.device, **options)

    def ones(self, *shape: Any, **options: Any) -> Tensor:
        return torch.ones(*shape, device=self.device, **options)

    def tensor(self, numbers: Any, **options: Any) -> Tensor:
        return torch.tensor(numbers, device=self.device, **options)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


Check = Callable[[On], None]
"""Raises where something is wrong, :class:`NotHere` where it can't be known."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: "held", "FAILED" or "not run", and what it said."""

    name: str
    state: str
    said: str
    seconds: float


def run(checks: Sequence[Check], on: On) -> Iterator[Outcome]:
    """Every check from the same seed."""
    for check in checks:
        torch.manual_seed(0)
        started, state, said = time.perf_counter(), "held", ""
        try:
            check(on)
            if on.on_gpu:
                torch.cuda.synchronize()  # what went wrong there shows when it is waited for
        except NotHere as why:
            state, said = "not run", str(why)
        except Exception as error:  # whatever a kernel may raise: the rest is checked all the same
            traceback.print_exc()
            state, said = "FAILED", f"{type(error).__name__}: {str(error).strip()}"
        yield Outcome(check.__name__, state, said, time.perf_counter() - started)


def main(
    description: str,
    checks_of: Callable[[str], Sequence[Check]],
    arguments: Sequence[str] | None = None,
    *,
    deterministic: bool = False,
) -> int:
    """A program of checks; 0 if none failed. With ``--json`` the outcomes are written there after each check.

    ``deterministic`` is what torch is asked to be: then new tensors are filled with NaN, so that a number which isn't
    written shows, and no tiles are tuned.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("backend", choices=["cpu", "triton", "cuda"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if not __debug__:
        parser.error("checks are assertions: run Python without -O")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reference's products, the same bits again
    if deterministic:  # some of torch's own operations on a GPU can't be, and warn
        torch.use_deterministic_algorithms(True, warn_only=torch.device(args.device).type == "cuda")
    status = backends()[args.backend]
    if not status.available:
        parser.error(f"{args.backend} is not available: {status.reason}")
    outcomes: list[Outcome] = []
    for outcome in run(checks_of(args.backend), On(args.backend, args.device)):
        outcomes.append(outcome)
        print(f"{outcome.state:8}{outcome.name} ({outcome.seconds:.1f} s) {outcome.said[:2000]}".rstrip(), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    failed = sum(outcome.state == "FAILED" for outcome in outcomes)
    print(f"{failed} of {len(outcomes)} failed" if failed else "held")
    return 1 if failed else 0


@contextmanager
def raises(kind: type[BaseException], match: str) -> Iterator[None]:
    """Around what must raise an error of a kind, whose message has a match."""
    said = None
    try:
        yield
    except kind as error:
        said = str(error)
    assert said is not None, f"no {kind.__name__}"
    assert re.search(match, said), f"the message is {said}"


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each of the same numbers up to some roundings of float32."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def operators(backend: str) -> Callable[[str], Any]:
    """A family's operators by name."""

    def operator(name: str) -> Any:
        return getattr(torch.ops.attnext, f"{name}_{backend}").default

    return operator
