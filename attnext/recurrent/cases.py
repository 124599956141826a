"""Holds layers and decoders to float64: layers to torch's own, decoders to their steps one by one by the reference.

As :mod:`attnext.cases` does for attention, for the tests and ``attnext verify``.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from attnext.attention.family import STEPPED
from attnext.attention.past import Past
from attnext.backends import use_backend
from attnext.recurrent.decoders import AttentiveGRU, AttentiveLSTM
from attnext.recurrent.modules import GRU, LSTM

__all__ = ["DTYPES", "RECURRENT_CASES", "RecurrentCase", "compare", "random_cases"]

DTYPES = (torch.float32, torch.float64)
ATTENTIONS = (
    "additive", "additive-normalised", "dot", "scaled-dot", "general", "concat", "location-last-step",
    "location-all-steps", "coverage", "several-heads",
)  # fmt: skip
"""Those that have an operator for all steps, and one that goes step by step."""


@dataclass(frozen=True)
class RecurrentCase:
    """A layer, or a decoder where it attends."""

    cell: Literal["GRU", "LSTM"] = "GRU"
    batch: int = 3
    steps: int = 6
    inputs: int = 5
    size: int = 17
    layers: int = 1
    dtype: torch.dtype = torch.float32
    lengths: bool = False
    """Of a layer: its input is packed; of a decoder: of the memory."""
    both_ways: bool = False
    """Of a layer: a second direction."""
    attention: str = ""
    """Of a decoder, as all below; by its name in a configuration."""
    after: bool = False
    """It attends after the step."""
    vector: int = 0
    """Size of an output vector, 0 for none."""
    feeds: bool = False
    """That enters the next step."""
    keys: int = 9
    memory: int = 11
    space: int = 10

    def __str__(self) -> str:
        kind = f"{self.cell} that attends" if self.attention else f"{self.cell} layers"
        sizes = [self.batch, self.steps, self.inputs, self.size, self.layers]
        sizes += [self.vector, self.keys, self.memory, self.space] if self.attention else []
        flags = [name for name in ("lengths", "both_ways", "after", "feeds") if getattr(self, name)]
        named = [str(self.dtype).removeprefix("torch."), *([self.attention] if self.attention else [])]
        return " ".join([kind, f"({', '.join(map(str, sizes))})", *named, *flags])

    @property
    def memory_size(self) -> int:
        """Of dot products without a projection, that of the query."""
        return self.size if self.attention in ("dot", "scaled-dot") else self.memory

    @property
    def tolerance(self) -> float:
        """In parts of the larger of 1 and a result.

        Roundings add up like the steps of a drunkard: of the terms of a gate, of a score and of a context, and of the
        T B, or T B Tk, terms of a parameter's gradient; each layer adds its own. The constant is for the roundings of a
        step's other operations.
        """
        terms = self.inputs + 2 * self.size + self.steps * self.batch
        if self.attention:
            terms += self.memory_size + self.space + self.vector + self.steps * self.batch * self.keys
        return 3 * (self.layers + bool(self.attention)) * math.sqrt(terms) * torch.finfo(self.dtype).eps

    def module(self) -> Any:
        """With parameters by torch's generator, in float64."""
        if not self.attention:
            layer = GRU if self.cell == "GRU" else LSTM
            return layer(self.inputs, self.size, self.layers, bidirectional=self.both_ways, dtype=torch.float64)
        decoder = AttentiveGRU if self.cell == "GRU" else AttentiveLSTM
        attention = STEPPED[self.attention].make(self.size, self.memory_size, self.space)
        return decoder(
            self.inputs, self.size, attention, self.layers, attend="after" if self.after else "before",
            vector_size=self.vector or None, input_feeding=self.feeds,
        ).double()  # fmt: skip


RECURRENT_CASES: tuple[RecurrentCase, ...] = (
    RecurrentCase(),
    RecurrentCase("LSTM", batch=1, steps=1, inputs=1, size=1),
    RecurrentCase("LSTM", batch=5, steps=7, size=33, layers=2, lengths=True, both_ways=True),
    RecurrentCase(batch=17, steps=3, inputs=20, size=65, lengths=True, both_ways=True),
    RecurrentCase("LSTM", batch=33, steps=2, size=16),
    RecurrentCase(steps=150, size=3, layers=3),
    RecurrentCase(attention="additive"),
    RecurrentCase("LSTM", attention="additive", layers=2, lengths=True, vector=7, feeds=True, keys=67, size=31),
    RecurrentCase(attention="general", after=True, vector=7, feeds=True, batch=1, steps=1),
    RecurrentCase("LSTM", attention="dot", after=True, lengths=True),
    RecurrentCase(attention="concat", vector=16, keys=1),
    RecurrentCase("LSTM", attention="location-all-steps", after=True, layers=2, lengths=True, keys=33),
    RecurrentCase(attention="coverage", lengths=True, vector=5),
    RecurrentCase("LSTM", attention="several-heads", size=16),
)
"""The fixed table."""


def random_cases(count: int, seed: int) -> Iterator[RecurrentCase]:
    """``count`` cases with sizes, dtypes and options drawn from ``seed``."""
    rng = random.Random(seed)
    sizes = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33)
    for number in range(count):
        attention = rng.choice(ATTENTIONS) if number % 2 else ""
        vector = rng.choice((0, 0, 1, 7, 16)) if attention else 0
        yield RecurrentCase(
            rng.choice(("GRU", "LSTM")), rng.choice((1, 2, 3, 5, 17)), rng.choice((1, 2, 5, 8)), rng.choice(sizes),
            2 * rng.choice(sizes) if attention == "several-heads" else rng.choice((*sizes, 65)),
            rng.choice((1, 1, 2, 3)), rng.choice(DTYPES), rng.random() < 0.5, not attention and rng.random() < 0.5,
            attention, bool(attention) and rng.random() < 0.5, vector, vector > 0 and rng.random() < 0.5,
            rng.choice((*sizes, 65)), rng.choice(sizes), 2 * rng.choice(sizes),
        )  # fmt: skip


def compare(case: RecurrentCase, backend: str, seed: int, device: str = "cpu") -> dict[str, float]:
    """The worst error of each result and gradient of a case on a backend, in units of its tolerance.

    Infinity stands for a result of another shape or dtype, or one that is not finite.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = case.module().to(case.dtype)
        given = [x.to(case.dtype) for x in _draw(case)]
        longest = case.keys if case.attention else case.steps
        lengths = torch.randint(1, longest + 1, (case.batch,)) if case.lengths else None
    expected = _run(case, copy.deepcopy(module).double(), [x.double() for x in given], lengths, "reference")
    found = _run(case, module.to(device), [x.to(device) for x in given], lengths, backend)
    return {
        name: max((_error(x, y, case) for x, y in zip(found[name], of_name, strict=True)), default=0.0)
        for name, of_name in expected.items()
    }


def _error(x: Tensor, exact: Tensor, case: RecurrentCase) -> float:
    if x.shape != exact.shape or x.dtype != case.dtype:
        return torch.inf
    if not x.numel():
        return 0.0
    off = (x.cpu().double() - exact).abs().max() / (case.tolerance * exact.abs().max().clamp_min(1.0))
    return float(off.nan_to_num(nan=torch.inf, posinf=torch.inf))


def _draw(case: RecurrentCase) -> list[Tensor]:
    """Inputs, first states, and the memory of a decoder."""
    directions = 2 if case.both_ways else 1
    hidden = (case.layers * directions, case.batch, case.size)
    sizes = [(case.batch, case.steps, case.inputs), *[hidden] * (1 if case.cell == "GRU" else 2)]
    if case.attention:
        sizes.append((case.batch, case.keys, case.memory_size))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def _run(
    case: RecurrentCase, module: Any, given: Sequence[Tensor], lengths: Tensor | None, backend: str
) -> Mapping[str, Sequence[Tensor]]:
    """Results, and the gradients of a sum of them with factors that are alike for results of the same sizes."""
    leaves = [x.detach().requires_grad_() for x in given]
    with use_backend(backend):
        results = (_decoded if case.attention else _layered)(case, module, leaves, lengths)
        outputs = [y for of_name in results.values() for y in of_name]
        rng = torch.Generator().manual_seed(3)
        factors = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in outputs]
        parameters = list(module.parameters())
        grads = torch.autograd.grad(outputs, [*leaves, *parameters], factors, materialize_grads=True)
    states = 1 if case.cell == "GRU" else 2
    return {name: [y.detach() for y in of_name] for name, of_name in results.items()} | {
        "grad inputs": grads[:1],
        "grad states": grads[1 : 1 + states],
        "grad memory": grads[1 + states : len(leaves)],
        "grad parameters": grads[len(leaves) :],
    }


def _layered(case: RecurrentCase, layer: Any, x: Sequence[Tensor], lengths: Tensor | None) -> dict[str, list[Tensor]]:
    rows = x[0].transpose(0, 1)
    given = rows if lengths is None else pack_padded_sequence(rows, lengths, enforce_sorted=False)
    output, state = layer(given, x[1] if case.cell == "GRU" else (x[1], x[2]))
    outputs = output.data if isinstance(output, PackedSequence) else output
    return {"outputs": [outputs], "last states": [state] if isinstance(state, Tensor) else list(state)}


def _decoded(case: RecurrentCase, decoder: Any, x: Sequence[Tensor], lengths: Tensor | None) -> dict[str, list[Tensor]]:
    memory = decoder.prepare(x[-1], None if lengths is None else lengths.to(x[-1].device))
    first = decoder.first_state(case.batch)._replace(hidden=x[1], cell=None if case.cell == "GRU" else x[2])
    outputs, contexts, state, weights = decoder(x[0], memory, first, need_weights=True)
    past = state.attention if isinstance(state.attention, Past) else ()
    last = [y for y in (*state[:4], *past) if y is not None]
    return {"outputs": [outputs], "contexts": [contexts, weights], "last states": last}
