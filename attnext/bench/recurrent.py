"""The study of recurrent layers: ``attnext.GRU`` and ``LSTM`` beside torch's own, both directions at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import attnext
from attnext.bench.memory import in_new_process, peak_of
from attnext.bench.peers import Peer, Unavailable, Wrong
from attnext.bench.timing import Plan, interleaved, threads

__all__ = ["study"]

Row = dict[str, Any]


@dataclass(frozen=True)
class _Sizes:
    batch: int
    steps: int
    units: int
    ragged: bool = False
    """Lengths from a quarter of the steps to all, packed."""

    @property
    def lengths(self) -> Tensor:
        longest, shortest = self.steps, max(1, self.steps // 4) if self.ragged else self.steps
        return torch.linspace(longest, shortest, self.batch).long()

    def multiply_adds(self, gates: int, kind: str) -> int:
        """Of both directions: a matrix for the input and one for the state, and twice that in the backward pass."""
        forward = 2 * int(self.lengths.sum()) * gates * self.units * 2 * self.units
        return forward if kind == "forward" else 3 * forward

    def __str__(self) -> str:
        lengths = f"{self.lengths[-1]} to {self.steps}" if self.ragged else str(self.steps)
        return f"B {self.batch}, T {lengths}, {self.units} units"


_SIZES = (
    _Sizes(64, 50, 512),
    _Sizes(64, 50, 512, ragged=True),
    _Sizes(16, 800, 256),
    _Sizes(1, 50, 512),
    _Sizes(32, 20, 64),
)
_QUICK = (_Sizes(3, 5, 24), _Sizes(3, 6, 24, ragged=True))
_LAYERS: dict[str, tuple[int, dict[str, Callable[..., nn.RNNBase]]]] = {
    "GRU": (3, {"attnext": attnext.GRU, "torch": nn.GRU}),
    "LSTM": (4, {"attnext": attnext.LSTM, "torch": nn.LSTM}),
}
_TOLERANCE = 1e-3


def study(ours: Peer, others: Sequence[str], plan: Plan, quick: bool) -> list[Row]:
    """Recurrent layers of both directions beside torch's own, forward and training."""
    if plan.device != "cpu":
        plan.note("the study of recurrent layers was left out: it takes a CPU")
        return []
    sizes = _QUICK if quick else _SIZES
    return [row for name in _LAYERS for one in sizes for row in _of(name, one, plan)] + _peaks(sizes[0], plan)


def _of(name: str, sizes: _Sizes, plan: Plan) -> list[Row]:
    gates, kinds = _LAYERS[name]
    torch.manual_seed(0)
    first = kinds["torch"](sizes.units, sizes.units, bidirectional=True)
    layers = {peer: kind(sizes.units, sizes.units, bidirectional=True) for peer, kind in kinds.items()}
    for one in layers.values():
        one.load_state_dict(first.state_dict())
    x = torch.randn(sizes.steps, sizes.batch, sizes.units)
    rows = []
    for kind in ("forward", "forward + backward"):
        runs = {peer: _run(one, x, sizes, kind) for peer, one in layers.items()}
        for found, right in zip(runs["attnext"](), runs["torch"](), strict=True):
            if not float((found - right).abs().max()) <= _TOLERANCE * (1 + float(right.abs().max())):
                raise Wrong(f"attnext's {name} and torch's differ at {sizes}")
        seconds = interleaved(runs, plan, f"{name}, {sizes.batch} x {sizes.steps}, {kind}")
        # What is read lies in caches, if not in a core's own.
        work = {"multiply_adds": sizes.multiply_adds(gates, kind), "memory_bytes": 0}
        rows.append({"layer": name, "sizes": str(sizes), "kind": kind, "seconds": seconds} | work)
    return rows


def _peaks(sizes: _Sizes, plan: Plan) -> list[Row]:
    """Bytes at the peak of a training step, beside the layer and its input; in a process of its own each."""
    rows = []
    for name, (_, kinds) in _LAYERS.items():
        plan.show(f"{name}: memory")
        request = {"layer": name, "sizes": asdict(sizes), "threads": torch.get_num_threads()}
        try:
            peaks = {
                peer: in_new_process("attnext.bench.recurrent", request | {"peer": peer}, str(sizes)) for peer in kinds
            }
        except Unavailable as reason:
            plan.note(f"memory of {name} was left out: {reason}")
            continue
        rows.append({"layer": name, "sizes": str(sizes), "peak": peaks})
    return rows


def _peak(layer: str, sizes: _Sizes, peer: str) -> int:
    kind = _LAYERS[layer][1][peer]
    made = kind(sizes.units, sizes.units, bidirectional=True)
    _run(made, torch.randn(1, 1, sizes.units), replace(sizes, batch=1, steps=1), "forward + backward")()
    return peak_of(_run(made, torch.randn(sizes.steps, sizes.batch, sizes.units), sizes, "forward + backward"), "cpu")


def _run(layer: nn.RNNBase, x: Tensor, sizes: _Sizes, kind: str) -> Callable[[], list[Tensor]]:
    def forward(x: Tensor) -> Tensor:
        if not sizes.ragged:
            dense: Tensor = layer(x)[0]
            return dense
        packed: Tensor = layer(pack_padded_sequence(x, sizes.lengths))[0].data
        return packed

    def evaluate() -> list[Tensor]:
        with torch.no_grad():
            return [forward(x)]

    def train() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        output = forward(leaf)
        return [output.detach(), *torch.autograd.grad(output, [leaf, *layer.parameters()], torch.ones_like(output))]

    return evaluate if kind == "forward" else train


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with threads(asked["threads"]):
        print(json.dumps(_peak(asked["layer"], _Sizes(**asked["sizes"]), asked["peer"])))
