"""A training step of the reference model against the same model as one writes it with torch's own parts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from attnext.backends.cpu import multiplies_bfloat16
from attnext.bench.eager import EagerModel
from attnext.bench.memory import in_new_process, peak_of
from attnext.bench.peers import Peer, Unavailable, Wrong
from attnext.bench.timing import Plan, interleaved, threads
from attnext.seq2seq.config import Config
from attnext.seq2seq.data import END, Batch
from attnext.seq2seq.model import Seq2Seq
from attnext.seq2seq.training import loss

__all__ = ["study"]

_SYMBOLS = 100
_LONG = {"embedding_size": 512, "encoder_size": 256, "decoder_size": 512, "attention_size": 512}
_MODELS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "long": ((64, 50, 50), _LONG),
    "long, amp": ((64, 50, 50), _LONG | {"amp": True}),
    "g2p": ((128, 8, 8), {"embedding_size": 128, "encoder_size": 256, "encoder_layers": 2, "decoder_size": 512,
                          "attention_size": 256, "tied_embeddings": True}),
    "speech": ((16, 800, 100), {"embedding_size": 256, "encoder_size": 128, "decoder_size": 256,
                                "attention_size": 128, "attention": "location-all-steps"}),
}  # fmt: skip
"""Batch, source and target length; the sizes of an LSTM model. Those of g2p are of ``benchmarks/g2p.toml``."""

_PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("attnext::additive",),
    "encoder": ("attnext::recurrent", "mkldnn_rnn"),
    "decoder": ("attnext::attentive",),
}


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[dict[str, Any]]:
    """A training step of the reference model, fused and not, and where its time goes."""
    if plan.device != "cpu":
        plan.note("the study of the model was left out: it is of a CPU")
        return []
    names = list(_MODELS)
    if not multiplies_bfloat16():
        names.remove("long, amp")
        plan.note("the model with --amp was left out: this processor does not multiply bfloat16")
    return [_of(name, others, plan) for name in names]


def _runs(name: str, peers: Sequence[str]) -> dict[str, Callable[[], list[Tensor]]]:
    """The training step of each peer, of the same parameters and data: loss and gradients."""
    (batch_size, source_length, target_length), sizes = _MODELS[name]
    config = Config(cell="lstm", epochs=1, **sizes)
    model = Seq2Seq(config, _SYMBOLS, _SYMBOLS)
    source = torch.randint(END + 1, _SYMBOLS, (batch_size, source_length))
    target = torch.randint(END + 1, _SYMBOLS, (batch_size, target_length))
    batch = Batch(source, torch.full((batch_size,), source_length), target, target)
    models: dict[str, nn.Module] = {"attnext": model}
    if "eager" in peers:
        models["eager"] = EagerModel(model)
    if "compile" in peers:
        torch._dynamo.reset()
        models["compile"] = EagerModel(model, compiled=True)

    def step(one: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.amp):
            total = loss(one, batch)
        return [total, *torch.autograd.grad(total, list(model.parameters()))]

    return {peer: partial(step, one) for peer, one in models.items()}


def _of(name: str, others: Sequence[str], plan: Plan) -> dict[str, Any]:
    (batch_size, source_length, target_length), sizes = _MODELS[name]
    runs, amp = _runs(name, others), bool(sizes.get("amp"))
    right = runs["attnext"]()
    for peer, run in list(runs.items()):
        plan.show(f"model: {peer}, warming up")
        try:
            found = run()
        except Exception as error:  # of a compiler: more kinds than can be named
            if peer != "compile":
                raise
            plan.note(f"compile was left out of the model: {str(error).strip().partition(chr(10))[0]}")
            del runs[peer]
            continue
        if not _agree(found, right, amp):
            raise Wrong(f"{peer} and attnext differ on the model {name}")
    seconds = {peer: median(samples) for peer, samples in interleaved(runs, plan, f"model {name}").items()}
    shares = {peer: _shares(runs[peer]) for peer in runs if peer != "compile"}
    row: dict[str, Any] = {"model": name, "batch": batch_size, "source": source_length, "target": target_length}
    return row | {"sizes": sizes, "seconds": seconds, "shares": shares, "peaks": _peaks(name, list(shares), plan)}


def _peaks(name: str, peers: Sequence[str], plan: Plan) -> dict[str, int]:
    """Bytes at the peak of a step, beside the model and its data; in a process of its own each."""
    found = {}
    for peer in peers:
        plan.show(f"model {name}: {peer}, memory")
        request = {"model": name, "peer": peer, "threads": torch.get_num_threads()}
        try:
            found[peer] = int(in_new_process("attnext.bench.model", request, name))
        except Unavailable as reason:
            plan.note(f"memory of {peer} was left out of the model: {reason}")
    return found


def _peak(name: str, peer: str) -> int:
    run = _runs(name, [peer])[peer]
    run()  # what libraries take once
    return peak_of(run, "cpu")


def _agree(found: Sequence[Tensor], right: Sequence[Tensor], amp: bool) -> bool:
    """Whether loss and gradients are the same: each of them, or with the roundings of bfloat16, where a small one is a
    difference of large ones, all of them together."""
    if amp:
        found, right = ([torch.cat([x.detach().flatten() for x in some])] for some in (found, right))
    for a, b in zip(found, right, strict=True):
        off = (a - b).detach().square().sum() / b.detach().square().sum().clamp(min=1e-6)
        if not float(off.sqrt()) <= (0.02 if amp else 1e-3):
            return False
    return True


def _shares(run: Callable[[], object]) -> dict[str, float]:
    """The shares of a step's time that each part of it takes."""
    profiler: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler as profile:
        run()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    found = {
        part: sum(event.self_cpu_time_total for event in events if any(name in event.key for name in names)) / total
        for part, names in _PARTS.items()
    }
    return found | {"rest": 1.0 - sum(found.values())}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with threads(asked["threads"]):
        print(_peak(asked["model"], asked["peer"]))
