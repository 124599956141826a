"""Holds the CUDA kernels, compiled for the CPU, to the cases that every backend is held to.

    python tests/cuda_cases.py LIBRARY table|random|tiny|digest

A program of its own: the library registers the CUDA operators for CPU tensors, and a sanitizer's runtime has to be
there before Python. Prints what is beyond its tolerance, and "held" if nothing is; or a digest of all results' bits.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from attnext.backends._base import Backend, Family
from attnext.cases import CASES, Case, compare, draw, random_cases, results

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
)
"""Few threads: a race detector takes its time."""


def cases(which: str) -> Iterator[Case]:
    if which == "tiny":
        yield from TINY
    for case in CASES if which == "table" else random_cases(60, 7) if which == "random" else ():
        for dtype in DTYPES:
            yield replace(case, dtype=dtype)


def serve_cuda_on_cpu(library: str) -> None:
    """Makes "cuda" the name of the library's kernels."""
    torch.ops.load_library(library)
    families = sys.modules["attnext.backends"]._FAMILIES
    families["cuda"] = Family(("cpu",), lambda: Backend(True, "CUDA kernels on the CPU"), DTYPES)


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
