"""Dot products over a grid of sizes: whether the way that is chosen is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attnext import dot, dot_attention
from attnext.bench.peers import Peer, Wrong, off
from attnext.bench.timing import Plan, interleaved
from attnext.memory import Memory

__all__ = ["study"]

_ELEMENTS = 2**25
"""Multiply-adds of a product, or fewer where the batch would be beyond the most."""
_MOST_ROWS = 64
_TOLERANCE = 1e-3


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[dict[str, Any]]:
    """Dot products over a grid of sizes: the chosen way beside each of them and eager mode."""
    if plan.device != "cpu":
        plan.note("the grid of dot products was left out: it takes a CPU")
        return []
    rows = []
    for batch, queries, keys, features in _sizes(quick):
        inputs = torch.randn(batch, queries, features) * features**-0.5, torch.randn(batch, keys, features)
        sizes = f"{batch}, {queries}, {keys}, {features}"
        for kind in ("forward", "both"):
            query, key = (x.detach().requires_grad_(kind != "forward") for x in inputs)
            chosen = dot.way(query, Memory(key, key, None, None, None, None), 0.0, need_weights=False)
            runs = {name: partial(_run, call, inputs, kind != "forward") for name, call in _calls().items()}
            right, *found = (run() for run in runs.values())
            if not all(off(x, right) <= _TOLERANCE for x in found):
                raise Wrong(f"the ways to dot products differ at {sizes}")
            # One number each, as there are many sizes.
            seconds = {name: [median(samples)] for name, samples in interleaved(runs, plan, sizes).items()}
            rows.append({"sizes": sizes, "kind": kind, "chosen": chosen, "seconds": seconds})
    return rows


def _sizes(quick: bool) -> Iterator[tuple[int, int, int, int]]:
    """B, Tq, Tk, D."""
    for queries in (4, 64) if quick else (2, 8, 16, 32, 64, 128, 256, 512):
        for keys in (64,) if quick else (16, 64, 256, 1024):
            for features in (64, 512) if quick else (64, 256, 512):
                yield max(1, min(_MOST_ROWS, _ELEMENTS // (queries * keys * features))), queries, keys, features


def _calls() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def eager(query: Tensor, key: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), key)

    def by(name: str, query: Tensor, key: Tensor) -> Tensor:
        return dot.WAYS[name](query, key, key, 1.0)[0]

    return {
        "attnext": lambda query, key: dot_attention(query, key)[0],
        "kernel": lambda query, key: dot_attention(query, key, backend="cpu")[0],
        **{name: partial(by, name) for name in dot.WAYS},
        "eager": eager,
    }


def _run(call: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], differentiated: bool) -> Tensor:
    if not differentiated:
        with torch.no_grad():
            return call(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    context = call(*leaves)
    # Of the size of the queries; any numbers will do.
    gradients = torch.autograd.grad(context, leaves, inputs[0])
    return torch.cat([x.flatten() for x in (context, *gradients)])
