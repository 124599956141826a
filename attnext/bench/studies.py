"""What one case alone can't show: threads, growth with each size, time and memory as the source gets longer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnext import AttentionPooling
from attnext.attention.family import FAMILY, Member
from attnext.backends import use_backend
from attnext.bench import accelerated, decoding, dot_grid, memory, model, recurrent, steps
from attnext.bench.cases import CASES, Case
from attnext.bench.peers import OTHERS, Peer, Unavailable, Wrong, off
from attnext.bench.timing import Plan, interleaved, measure, threads

__all__ = ["STUDIES", "decode", "decoder_inputs", "exponent"]

Row = dict[str, Any]
Study = Callable[[Peer, Sequence[str], Plan, bool], list[Row]]
Size = Literal["batch", "queries", "keys", "features"]

# Sizes at which the least of each sweep is 17 million elements, a millisecond or more: beyond what a call costs anyway.
# Few values, as their product with the weights doesn't grow with D.
_BASE: dict[str, Any] = {"batch": 8, "queries": 128, "keys": 128, "features": 128, "values": 32}
_FACTORS = (1, 2, 4, 8, 16)
# Of a decoder: a few steps, as all are alike.
_DECODER = {"batch": 16, "steps": 4, "keys": 128, "size": 256}


def _threads(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """The first two cases on one thread and on all."""
    count = torch.get_num_threads()
    if count == 1 or plan.device != "cpu":
        plan.note("the study of threads was left out: it takes a CPU and more than one")
        return []
    rows = []
    for case in CASES[:2]:
        seconds = {}
        for number in (1, count):
            with threads(number):
                seconds[number] = median(measure(case, [ours], plan)[ours.name])
        rows.append({"case": case.name, "threads": count, "one": seconds[1], "all": seconds[count]})
    return rows


def _linearity(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """The power of each size that the time grows with, over a factor of 16."""
    rows = []
    sizes: tuple[Size, ...] = ("batch", "queries", "keys", "features")
    for start in (Case("growth", "forward", **_BASE), Case("growth", "forward + backward", **_BASE)):
        for name in sizes:
            values = [getattr(start, name) * factor for factor in _FACTORS]
            seconds = []
            for value in values:
                case = replace(start, **{name: value})
                seconds.append(min(measure(case, [ours], plan, check=value == values[0])[ours.name]))
            fit = exponent(values, seconds)
            rows.append({"kind": start.kind, "size": name, "sizes": values, "seconds": seconds, "exponent": fit})
    return rows


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of a size^b that fits best, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return slope / sum((a - x_mean) ** 2 for a in x)


def _memory(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """Time and peak memory of forward + backward against Tk."""
    rows = []
    count = torch.get_num_threads()
    together, beside = ((32, 64, 128), ["eager"]) if quick else ((64, 128, 256, 512, 1024), ["eager", "compile"])
    for peer in [ours, *(OTHERS[name] for name in beside if name in others)]:
        alone = (2048, 4096) if peer is ours and not quick else ()
        for keys in together + alone:
            case = Case("memory", "forward + backward", 16, 128, keys, 256, 512)
            if peer is not ours and not memory.fits(case):
                plan.note(f"{peer.name} was left out from Tk {keys} on: this machine has too little memory")
                break
            # Every peer was held to the formula at the smallest size.
            samples = measure(case, [peer], plan, check=keys == together[0])
            if peer.name not in samples:
                break
            row: Row = {"peer": peer.name, "keys": keys, "seconds": median(samples[peer.name])}
            plan.show(f"memory: {peer.name}, Tk {keys}")
            try:
                row["bytes"] = memory.peak(case, peer.name, plan.device, count)
            except Unavailable as reason:
                plan.note(f"{peer.name}: {reason}")
            rows.append(row)
    return rows


def _family(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """Every attention against the same module in plain PyTorch, over some steps of a decoder."""
    names = {"attnext": ours.name.removeprefix("attnext "), "reference": "reference"}
    return [_of_member(member, names, plan) for member in FAMILY]


def _of_member(member: Member, names: dict[str, str], plan: Plan) -> Row:
    """Median seconds without gradients and with them, by backend."""
    size = _DECODER["size"]
    attn = member.make(size, size, size // 2).to(plan.device)
    query, states = decoder_inputs(**_DECODER, device=plan.device)
    leaves = [states, *attn.parameters()]

    def run(backend: str, *, train: bool) -> list[Tensor]:
        with use_backend(backend), torch.set_grad_enabled(train):
            contexts = decode(attn, query, states)[::2]
            if not train:
                return contexts
            loss = torch.stack(contexts).square().sum()
            return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    row: Row = {"attention": member.name, **_DECODER}
    for kind in ("decode", "train"):
        attn.train(kind == "train")
        runs = {peer: partial(run, name, train=kind == "train") for peer, name in names.items()}
        for found, right in zip(*(one() for one in runs.values()), strict=True):
            error = off(found, right)
            if not error <= 1e-3:
                raise Wrong(f"attnext {names['attnext']} is wrong on {member.name}: off by {error:.2g}")
        row[kind] = {peer: median(seconds) for peer, seconds in interleaved(runs, plan, member.name).items()}
    return row


def decode(attn: nn.Module, query: Tensor, states: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Contexts (B, H) and weights (B, Tk) of a decoder's steps, one after another: query is (B, Tq, Q).

    A pooling attends by its own query, once.
    """
    if isinstance(attn, AttentionPooling):
        context, weights = attn(states, lengths=lengths, need_weights=True)
        assert weights is not None
        return [context, weights]
    attention: Any = attn
    memory, state = attention.prepare(states, lengths), None
    steps = []
    for one in query.unbind(1):
        context, weights, state = attention.step(one, memory, state, need_weights=True)
        steps += [context, weights]
    return steps


def decoder_inputs(batch: int, steps: int, keys: int, size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Queries and states, of size 1 or so as trained ones are."""
    query, states = (torch.randn(batch, n, size, device=device) for n in (steps, keys))
    return query.requires_grad_(), states.requires_grad_()


STUDIES: dict[str, Study] = {
    "threads": _threads,
    "linearity": _linearity,
    "memory": _memory,
    "family": _family,
    "model": model.study,
    "recurrent": recurrent.study,
    "decoding": decoding.study,
    "dot-grid": dot_grid.study,
    "steps": steps.study,
    "peers": accelerated.study,
}
"""By name; each takes this project's peer, the names of the others, the plan, and whether to be quick."""
