"""Holds the CUDA kernels, compiled for the CPU, to the cases that every backend is held to.

    python tests/cuda_cases.py LIBRARY table|random|tiny|digest|memory|slabs

A program of its own: the library registers the CUDA operators for CPU tensors, and a sanitizer's runtime has to be
there before Python. Prints what is beyond its tolerance, and "held" if nothing is; or a digest of all results' bits.
"memory" holds the steps that see their past to what they may allocate.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from attnext.backends._base import Backend, Family
from attnext.cases import CASES, INPUTS, PAST_INPUTS, Case, compare, draw, random_cases, results
from attnext.ops import RULES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TINY = (
    Case(batch=1, queries=5, keys=9, features=4, values=3, lengths=True, weights=True),
    Case(batch=1, queries=5, keys=130, features=18, values=4, mask="slots", dropout_p=0.3, weights=True),
    Case(batch=1, queries=18, keys=9, features=3, values=2, magnitude=30.0, mask="keys"),
    Case("step", batch=2, queries=1, keys=70, features=5, values=3, lengths=True, weights=True),
    Case("step", batch=1, queries=3, keys=10, features=5, values=8),
    Case("step", batch=9, queries=1, keys=70, features=2, values=1),  # two tiles a warp
    Case("scores", batch=1, queries=5, keys=9, features=5, mask="slots"),
    Case(batch=4, queries=5, keys=9, features=4, values=3, heads=2),
    Case("dot", batch=2, queries=1, keys=30, features=8, values=8, lengths=True, weights=True, shared=True),
    Case("dot", batch=1, queries=3, keys=9, features=36, values=5, mask="slots", dropout_p=0.3),  # two warps
    Case("dot", batch=1, queries=18, keys=130, features=3, values=3, lengths=True, shared=True),
    Case("past", batch=2, queries=2, keys=40, features=70, values=3, channels=2, filters=3, width=5, window=True),
    Case("past", batch=1, queries=1, keys=70, features=5, values=3, channels=1, width=67, rule="forward", mask="keys"),
    Case("past", batch=1, queries=1, keys=33, features=70, values=70, rule="sigmoid", dropout_p=0.3, weights=True),
)
"""Few threads: a race detector takes its time."""
MANY_FILTERS = (
    Case("past", queries=2, keys=70, features=70, values=3, channels=2, filters=150, width=3, weights=True),
    Case("past", batch=5, queries=1, keys=70, features=130, values=3, channels=1, filters=33, width=67, lengths=True),
    Case("past", queries=3, keys=40, features=130, values=3, channels=2, width=3, rule="forward", mask="keys"),
)
"""More filters than a block keeps the features of, than a warp has lanes, and one for each of many features."""
LONG = (
    Case("past", batch=1, queries=1, keys=500, features=64, values=8, channels=2, filters=10, width=31, weights=True),
    Case("past", batch=3, queries=2, keys=300, features=40, values=8, channels=1, width=1, weights=True),
)
"""A number for each slot and feature, or filter, would show."""


MANY_QUERIES = (
    Case(batch=1, queries=1280, keys=9, features=2, values=2),
    Case("dot", batch=1, queries=1280, keys=9, features=2, values=2),
)
"""Several slabs of them, with so few features."""


def cases(which: str) -> Iterator[Case]:
    if which == "tiny":
        yield from TINY
    if which == "slabs":
        yield from MANY_QUERIES
    for case in (*CASES, *MANY_FILTERS) if which == "table" else random_cases(60, 7) if which == "random" else ():
        for dtype in DTYPES:
            yield replace(case, dtype=dtype)


def allocated(work: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes that a call allocates, those that it gives back included, and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    events = recorded.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]"), result


def wrong_memory(case: Case) -> list[str]:
    """Beside the results, a step may have a number for each slot; its gradients three, and parts of their sums."""

    def size(*tensors: torch.Tensor) -> int:
        return sum(4 * x.numel() for x in tensors)

    x = draw(case, 1)
    others = (x.lengths, x.mask, x.window, x.seed, case.scale, case.dropout_p, RULES.index(case.rule))
    inputs = (*(getattr(x, name) for name in (*INPUTS, *PAST_INPUTS)), *others)
    new, (context, weights) = allocated(lambda: torch.ops.attnext.additive_step_cuda(*inputs))
    right = size(context, weights) < new <= size(context, weights, weights)
    found = [] if right else [f"forward allocates {new} bytes"]
    grads = (x.grads["context"], x.grads["weights"])
    new, results = allocated(lambda: torch.ops.attnext.additive_step_backward_cuda(*grads, *inputs, weights))
    right = size(*results) < new <= size(weights, weights, weights) + 5 * size(*results)
    return found if right else [*found, f"backward allocates {new} bytes"]


def serve_cuda_on_cpu(library: str) -> None:
    """Makes "cuda" the name of the library's kernels."""
    torch.ops.load_library(library)
    families = sys.modules["attnext.backends"]._FAMILIES
    families["cuda"] = Family(("cpu",), lambda _: Backend(True, "CUDA kernels on the CPU"), DTYPES)


def main(library: str, which: str) -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    serve_cuda_on_cpu(library)
    if which == "digest":
        digest = hashlib.sha256()
        for case in TINY:
            for _, x in sorted(results(case, draw(case, 1), "cuda").items()):
                digest.update(x.contiguous().numpy().tobytes())
        print(digest.hexdigest())
        return 0
    if which == "memory":
        found = [f"{case}: {what}" for case in LONG for what in wrong_memory(case)]
        print("\n".join(found) or "held")
        return 1 if found else 0
    off = 0
    for seed, case in enumerate(cases(which)):
        errors = {name: error for name, error in compare(case, "cuda", seed).items() if not error <= 1}
        if errors:
            off += 1
            print(case, "seed", seed, errors)
    print(f"{off} beyond tolerance" if off else "held")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
