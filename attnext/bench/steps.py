"""The study of decoder steps: attnext beside plain PyTorch, loop by loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnext.bench import kept
from attnext.bench.calls import Call, ModuleStep, OperatorStep, StepsOfCall
from attnext.bench.cases import Kind
from attnext.bench.loops import Decoder, Loop, Side
from attnext.bench.peers import Peer, Run, Unavailable, Wrong, off
from attnext.bench.timing import Plan, interleaved

__all__ = ["LOOPS", "study"]

Row = dict[str, Any]

_TACOTRON: dict[str, Any] = {"batch": 16, "keys": 100, "features": 128, "values": 512, "query": 1024}
_TACOTRON |= {"channels": 2, "filters": 32, "width": 31}
_SPEECH: dict[str, Any] = {"batch": 10, "keys": 200, "features": 320, "values": 320, "query": 320, "steps": 100}
_FILTERS: dict[str, Any] = {"channels": 1, "filters": 10, "width": 201}

LOOPS: tuple[Loop, ...] = (
    Decoder(name="location, two channels", score="location", steps=200, **_TACOTRON),
    Decoder(name="location, one channel", score="location", cell=True, **_SPEECH, **_FILTERS),
    Decoder(name="coverage", score="coverage", cell=True, **_SPEECH),
    Decoder(name="additive", score="additive", cell=True, **_SPEECH),
    Decoder(name="forward attention", score="forward", steps=50, **_TACOTRON),
    Decoder(name="forward with agent", score="forward, agent", steps=50, **_TACOTRON),
    Decoder(name="location, beam", score="location", beam=5, kinds=("forward",),
            **_SPEECH | _FILTERS | {"batch": 4, "steps": 20}),
    Call(name="one query, 16 x 100", batch=16, keys=100, features=128, values=512),
    Call(name="one query, 10 x 200", batch=10, keys=200, features=320, values=320),
    Call(name="one query, 64 x 64", batch=64, keys=64, features=256, values=512),
    ModuleStep(name="module step", batch=1, keys=30, features=256, values=256, query=256),
    ModuleStep(name="module step, small", batch=1, keys=20, features=128, values=128, query=128),
    OperatorStep(name="step-small", batch=1, keys=20, features=128, values=128),
    StepsOfCall(name="steps, 256 x 30", batch=64, keys=30, features=256, values=256, steps=50),
    StepsOfCall(name="steps, 512 x 200", batch=32, keys=200, features=512, values=512, steps=40),
    StepsOfCall(name="steps, 256 x 800", batch=16, keys=800, features=256, values=256, steps=30),
)  # fmt: skip
"""What is timed. The memory of the first is measured too."""

_ROUNDS, _QUICK_STEPS = 7, 8
# Float32 in another order is off by 3e-5 in the gradients of 200 steps; features of the past that are wrong, by 5e-3.
_TOLERANCE = 1e-3


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """Decoder loops against plain PyTorch, forward and training, and the memory that training keeps."""
    loops = [loop.shortened(_QUICK_STEPS) for loop in LOOPS] if quick else list(LOOPS)
    plan = plan if quick else replace(plan, least=max(plan.least, _ROUNDS))
    rows = []
    for loop in loops:
        compiles = not quick or loop is loops[0]
        names = [name for name in others if compiles or name != "compile"]
        rows += [_timed(loop, kind, names, plan) for kind in loop.kinds]
    if quick and "compile" in others:
        plan.note(f"compile was left out of other loops than {loops[0].name}: see --quick")
    return rows + _memory(loops[0], others, plan)


def _timed(loop: Loop, kind: Kind, others: Sequence[str], plan: Plan) -> Row:
    """Seconds by peer, in rounds, of sides that were found to agree."""
    torch._dynamo.reset()
    plan.show(f"{loop.name}: {kind}, warming up")
    with torch.set_grad_enabled(kind != "forward"):
        sides = loop.sides(plan.device, others)
        runs = _agreeing(loop, {peer: _run(side, kind) for peer, side in sides.items()}, plan)
        asked = {peer: run for peer, run in runs.items() if peer not in ("eager", "compile") or peer in others}
        seconds = interleaved(asked, plan, f"{loop.name}, {kind}")
    work = {part: count for part, count in loop.work(kind).items() if count}
    bound = {"multiply_adds": sum(work.values()), "memory_bytes": loop.memory_bytes, "reads": loop.reads(kind)}
    return {"loop": loop.name, "kind": kind, "sizes": str(loop), "seconds": seconds, "work": work} | bound


def _run(side: Side, kind: Kind) -> Callable[[], list[Tensor]]:
    """What is timed: the contexts, or with them their gradients."""
    if kind == "forward":
        return lambda: [side.call()]

    def train() -> list[Tensor]:
        contexts = side.call()
        # The gradient of half the sum of their squares: as large as they are, and nowhere constant.
        return [contexts, *torch.autograd.grad(contexts, side.leaves, contexts.detach(), materialize_grads=True)]

    return train


def _agreeing(loop: Loop, runs: Mapping[str, Run], plan: Plan) -> dict[str, Run]:
    """The runs whose results are those of attnext; without one that does not compile.

    Raises:
        Wrong: another differs.
    """
    found: dict[str, Run] = {}
    right: list[Tensor] = []
    for peer, run in runs.items():
        try:
            results = run()
        except Exception as failure:  # of a compiler: more kinds than can be named
            if peer != "compile":
                raise
            reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
            plan.note(f"compile was left out of the loop {loop.name}: {reason}")
            continue
        right = right or results
        for one, other in zip(results, right, strict=True):
            if not (error := off(one, other)) <= _TOLERANCE:  # NaN is not
                raise Wrong(f"{peer} and attnext differ on the loop {loop.name}: off by {error:.2g}")
        found[peer] = run
    return found


def _memory(loop: Loop, others: Sequence[str], plan: Plan) -> list[Row]:
    """What training through a decoder's steps keeps for backward, and its peak, in bytes by peer."""
    row: Row = {"loop": loop.name, "kind": "memory", "sizes": str(loop), "kept": {}, "peak": {}}
    for peer in ("attnext", *(name for name in ("eager",) if name in others)):
        plan.show(f"{loop.name}: {peer}, memory")
        try:
            row["kept"][peer], row["peak"][peer] = kept.measured(loop, peer, plan.device, torch.get_num_threads())
        except Unavailable as reason:
            plan.note(f"{peer}: {reason}")
    return [row] if row["kept"] else []
