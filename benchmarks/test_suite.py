"""The cases of ``attnext bench`` under pytest-benchmark, which keeps runs and compares them (``--benchmark-autosave``).

``pytest benchmarks`` times every peer of every case, in groups; ``-k "step and not compile"`` chooses, and
``--benchmark-disable`` only checks that the results are right. ``pip install 'attnext[bench]'`` has what it needs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnext.bench.cases import CASES, Case
from attnext.bench.peers import OTHERS, Peer, Unavailable, checked, ours

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORK = [(case, peer) for case in CASES for peer in [*ours(DEVICE), *OTHERS.values()] if peer.serves(case)]


@pytest.mark.parametrize(("case", "peer"), WORK, ids=[f"{case.name}-{peer.name}" for case, peer in WORK])
def test_time(case: Case, peer: Peer, benchmark: Any) -> None:
    benchmark.group = f"{case.name}: {case.kind}, {case}"
    with torch.set_grad_enabled(case.differentiated):
        try:
            run = checked(case, peer, case.inputs(DEVICE))
        except Unavailable as reason:
            pytest.skip(str(reason))

        def wait() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(wait if DEVICE == "cuda" else run)
