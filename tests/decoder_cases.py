"""Decoders that attend, written out: the formulas that AttentiveGRU and AttentiveLSTM are held to, and their cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnext
from attnext import AttentiveGRU, AttentiveLSTM, DecoderState, Past
from attnext.recurrent import _operators

Decoder = AttentiveGRU | AttentiveLSTM
KINDS: tuple[type[Decoder], ...] = (AttentiveGRU, AttentiveLSTM)
DTYPES = (torch.float32, torch.float64)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
"""Of float64: sums of up to some hundred terms of about 1, over some steps."""
LOCATION: dict[str, Any] = {"filters": 4, "kernel_size": 5}

ATTENTIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "additive": lambda *sizes: attnext.BahdanauAttention(*sizes, bias=True),
    "normalised": lambda *sizes: attnext.BahdanauAttention(*sizes, normalize=True, temperature=0.7),
    "concat": lambda q, h, d: attnext.LuongAttention(q, h, score="concat", attention_size=d),
    "general": lambda q, h, d: attnext.LuongAttention(q, h),
    "dot": lambda q, h, d: attnext.LuongAttention(q, h, score="dot"),
    "scaled_dot": lambda q, h, d: attnext.LuongAttention(q, h, score="scaled_dot"),
    "location": lambda *sizes: attnext.LocationSensitiveAttention(*sizes, bias=True, **LOCATION),
    "previous": lambda *sizes: attnext.LocationSensitiveAttention(
        *sizes, features="previous", normalizer="sigmoid", **LOCATION
    ),
    "cumulative": lambda *sizes: attnext.LocationSensitiveAttention(
        *sizes, features="cumulative", temperature=1.5, **LOCATION
    ),
    "coverage": attnext.CoverageAttention,
    "coverage, sigmoid": lambda *sizes: attnext.CoverageAttention(*sizes, bias=True, normalizer="sigmoid"),
}
"""What the operator takes, of a query size, a memory size and an attention size."""
VECTORS: dict[str, dict[str, Any]] = {
    "": {},
    "vector": {"vector_size": 7},
    "fed": {"vector_size": 7, "input_feeding": True},
}


# What is compared.


def tensors(result: Any) -> list[Tensor]:
    """Those of results and of states, without the brackets and without what is not there."""
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    return [x for one in result for x in tensors(one)]


def gradients(results: Sequence[Tensor], wanted: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Of a sum of the results with random factors, which are the same for the same sizes; 0 where there is none."""
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in results]
    options = {"allow_unused": True, "materialize_grads": True} | options
    return list(torch.autograd.grad(results, wanted, factors, **options))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: Any) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or EXACT))


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_equal(found, expected, rtol=0, atol=0)


def recorded(monkeypatch: pytest.MonkeyPatch, name: str = "forward") -> list[tuple[Any, ...]]:
    """The arguments of each call of an operator from now on."""
    calls, operator = [], getattr(_operators, name)

    def call(*given: Any) -> Any:
        calls.append(given)
        return operator(*given)

    monkeypatch.setattr(_operators, name, call)
    return calls


# The formulas.

Attend = Callable[[Tensor, Any], tuple[Tensor, Tensor, Any]]
"""Context, weights and the next past, of a query and a past."""


def visible_slots(states: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, Tk)."""
    visible = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    return visible if lengths is None else visible & (torch.arange(states.shape[1]) < lengths.unsqueeze(1))


def logits(attention: Any, p: dict[str, Tensor], query: Tensor, states: Tensor, past: Past) -> Tensor:
    """(B, Tk), of parameters by their names."""
    if isinstance(attention, attnext.LuongAttention):
        if attention.score == "concat":
            both = torch.cat((query.unsqueeze(1).expand(-1, states.shape[1], -1), states), -1)
            return (both @ p["joint_projection.weight"].T).tanh() @ p["score_weight"]
        if attention.score == "general":
            query = query @ p["query_projection.weight"].T
        scores = torch.einsum("bh,bkh->bk", query, states)
        return scores / math.sqrt(states.shape[2]) if attention.score == "scaled_dot" else scores
    projected = query @ p["query_projection.weight"].T + p.get("query_projection.bias", 0.0)
    inner = projected.unsqueeze(1) + states @ p["memory_projection.weight"].T
    if isinstance(attention, attnext.LocationSensitiveAttention):
        channels = {
            "previous": [past.weights],
            "cumulative": [past.cumulative],
            "both": [past.weights, past.cumulative],
        }
        filters = p["location_convolution.weight"]
        features = F.conv1d(torch.stack(channels[attention.features], 1), filters, padding=filters.shape[2] // 2)
        inner = inner + features.transpose(1, 2) @ p["location_projection.weight"].T
    elif isinstance(attention, attnext.CoverageAttention):
        inner = inner + past.cumulative.unsqueeze(-1) * p["coverage_weight"]
    v = p["score_weight"]
    v = p["gain"] * v / v.square().sum().sqrt() if "gain" in p else v
    temperature: float = attention.temperature
    return inner.tanh() @ v / temperature


def written_out(attention: Any, p: dict[str, Tensor], states: Tensor, visible: Tensor) -> Attend:
    def attend(query: Tensor, past: Past | None) -> tuple[Tensor, Tensor, Past]:
        if past is None:
            past = Past(*[states.new_zeros(states.shape[:2])] * 2)
        scores = logits(attention, p, query, states, Past(*(y * visible for y in past[:2])))  # no hidden slot is read
        if getattr(attention, "normalizer", "softmax") == "sigmoid":
            terms = scores.sigmoid() * visible
        else:
            largest = scores.detach().masked_fill(~visible, -1e300).amax(1, keepdim=True)
            terms = (scores - largest).masked_fill(~visible, 0.0).exp() * visible
        weights = terms / terms.sum(1, keepdim=True).clamp_min(1e-300)  # 0 where nothing is visible
        return torch.einsum("bk,bkh->bh", weights, states), weights, Past(weights, past.cumulative + weights)

    return attend


def units(k: int, p: dict[str, Tensor], x: Tensor, hidden: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weights: list[Any] = [p[f"weight_ih_l{k}"], p[f"weight_hh_l{k}"], p.get(f"bias_ih_l{k}"), p.get(f"bias_hh_l{k}")]
    if cell is None:
        return torch.gru_cell(x, hidden, *weights), None
    found = torch.lstm_cell(x, (hidden, cell), *weights)
    return found[0], found[1]


def formula(
    decoder: Any, p: dict[str, Tensor], x: Tensor, state: DecoderState, attend: Attend, keeps_past: bool
) -> list[Tensor]:
    """Outputs, contexts, weights and the parts of the last state, of parameters by their names."""
    after, fed, past = decoder.attend == "after", decoder.input_feeding, state.attention
    context: Any = state.context
    vector: Any = state.vector
    hidden = list(state.hidden)
    cells: list[Any] = [None] * decoder.num_layers if state.cell is None else list(state.cell)
    found: list[tuple[Tensor, ...]] = []
    for y in x.unbind(1):
        if not after:
            context, weights, past = attend(hidden[-1], past)
        below = torch.cat([y, *([] if after and fed else [context]), *([vector] if fed else [])], 1)
        for k in range(decoder.num_layers):
            hidden[k], cells[k] = units(k, p, below, hidden[k], cells[k])
            below = hidden[k]
        if after:
            context, weights, past = attend(hidden[-1], past)
        output = hidden[-1]
        if decoder.vector_size is not None:
            joined = torch.cat((y, hidden[-1], context), 1)
            output = vector = (joined @ p["readout.weight"].T + p["readout.bias"]).tanh()
        found.append((output, context, weights))
    stacked = [torch.stack(one, 1) for one in zip(*found, strict=True)]
    last = [
        torch.stack(hidden),
        None if cells[0] is None else torch.stack(cells),
        context if after and not fed else None,
    ]
    return [*stacked, *tensors([*last, vector if fed else None, past if keeps_past else None])]


def outcome_of_formula(decoder: Any, given: Given) -> list[Tensor]:
    """Results and gradients, all in float64 and by autograd."""
    x, states, *parts = (y.detach().double().requires_grad_() for y in given.leaves)
    parameters = {name: y.detach().double().requires_grad_() for name, y in decoder.named_parameters()}
    of_attention = {name[10:]: y for name, y in parameters.items() if name.startswith("attention.")}
    first = given.state or decoder.double().first_state(len(x))
    if given.state is not None:
        first = with_parts(first, parts)
    attend = written_out(decoder.attention, of_attention, states, visible_slots(states, given.lengths, given.mask))
    found = formula(decoder, parameters, x, first, attend, isinstance(decoder.attention, PASTS))
    return [*found, *gradients(found, [x, states, *parts, *parameters.values()])]


PASTS = (attnext.LocationSensitiveAttention, attnext.CoverageAttention)


def with_parts(state: DecoderState, parts: Sequence[Tensor]) -> DecoderState:
    """A state with other tensors in their order."""
    left = iter(parts)
    fields: list[Any] = [None if x is None else next(left) for x in state[:4]]
    past = None if state.attention is None else Past(next(left), next(left))
    return DecoderState._make([*fields, past])


# The cases.


class Given(NamedTuple):
    """What a decoder is called with."""

    x: Tensor
    states: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    state: DecoderState | None

    @property
    def leaves(self) -> list[Tensor]:
        """What may have a gradient."""
        return [self.x, self.states, *tensors(self.state)]


class Case(NamedTuple):
    """Sizes and options of a decoder and of a call."""

    attention: str = "additive"
    attend: str = "before"
    vector: str = ""
    layers: int = 1
    batch: int = 3
    steps: int = 4
    keys: int = 9
    inputs: int = 5
    size: int = 13
    memory: int = 11
    space: int = 10
    hidden: str = "lengths"
    """What hides slots: lengths, a mask, both, or nothing."""
    state: bool = True
    bias: bool = True

    @property
    def memory_size(self) -> int:
        return self.size if self.attention in ("dot", "scaled_dot") else self.memory

    def decoder(self, kind: type[Decoder], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        attention = ATTENTIONS[self.attention](self.size, self.memory_size, self.space)
        options = {"bias": self.bias, "attend": self.attend} | VECTORS[self.vector] | options
        make: Any = kind
        decoder = make(self.inputs, self.size, attention, self.layers, **options)
        for name, x in decoder.named_parameters():
            if name.endswith("query_projection.bias"):  # begins as zeros
                nn.init.uniform_(x, -0.5, 0.5)
        return decoder.to(dtype)

    def given(self, decoder: Any, dtype: torch.dtype = torch.float64) -> Given:
        x, states = (torch.randn(self.batch, n, m, dtype=dtype).requires_grad_()
                     for n, m in ((self.steps, self.inputs), (self.keys, self.memory_size)))  # fmt: skip
        lengths = mask = None
        if self.hidden in ("lengths", "both"):
            lengths = torch.randint(1, self.keys + 1, (self.batch,))
        if self.hidden in ("mask", "both"):
            mask = torch.rand(self.batch, self.keys) < 0.7
            mask[:, 0] = True
        return Given(x, states, lengths, mask, self.first_state(decoder) if self.state else None)

    def first_state(self, decoder: Any) -> DecoderState:
        """A random one, that has gradients."""
        zeros = decoder.first_state(self.batch)
        if isinstance(decoder.attention, PASTS):
            past = [zeros.hidden.new_empty(self.batch, self.keys) for _ in range(2)]
            zeros = zeros._replace(attention=Past(*past))
        parts = [torch.rand_like(y).requires_grad_() for y in tensors(zeros)]
        return with_parts(zeros, parts)

    def tolerance(self, dtype: torch.dtype) -> float:
        """In parts of the larger of 1 and a result.

        Rounding errors add up like the steps of a drunkard: of the terms of a gate, of an output vector, of a score and
        of a context, of the T B terms of a parameter's gradient, or the T B Tk of a key's projection; each layer adds
        its own. The constant is for the roundings of a step's other operations.
        """
        terms = self.inputs + self.size + self.memory_size + self.space + self.steps * self.batch * self.keys
        return 3 * (self.layers + 1) * math.sqrt(terms) * torch.finfo(dtype).eps


def made(kind: type[Decoder], case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Given]:
    decoder = case.decoder(kind, dtype, **options)
    return decoder, case.given(decoder, dtype)


def call(decoder: Any, given: Given) -> list[Tensor]:
    """Outputs, contexts, weights and the parts of the last state."""
    memory = decoder.prepare(given.states, given.lengths, given.mask)
    output, contexts, state, weights = decoder(given.x, memory, given.state, need_weights=True)
    return [output, contexts, weights, *tensors(state)]


def outcome(decoder: Any, given: Given) -> list[Tensor]:
    """Outputs, contexts, weights, parts of the last state, and the gradients of all that has one."""
    results = call(decoder, given)
    return [*results, *gradients(results, leaves_of(decoder, given))]


def leaves_of(decoder: Any, given: Given) -> tuple[Tensor, ...]:
    """What may have a gradient, parameters last."""
    return (*given.leaves, *decoder.parameters())


def check(case: Case, kind: type[Decoder], dtype: torch.dtype) -> None:
    """Results and all gradients against the formulas in float64."""
    decoder = case.decoder(kind, dtype)
    given = case.given(decoder, dtype)
    found, expected = outcome(decoder, given), outcome_of_formula(decoder, given)
    assert len(found) == len(expected)
    error = case.tolerance(dtype)
    for number, (y, right) in enumerate(zip(found, expected, strict=True)):
        assert y.dtype == dtype
        within = error * max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(
            y.double(), right, rtol=0, atol=within, msg=partial("{}: {}\n{}".format, number, case)
        )


FORMS = (
    Case(),
    Case("general", "after", "fed", layers=2),
    Case("location", "after", "vector", layers=2),
    Case("coverage, sigmoid", "before", "fed"),
)
"""Those that between them go each way through the operator."""

SERVED = {
    "additive", "additive-normalised", "dot", "scaled-dot", "general", "concat", "location-last-step",
    "location-all-steps", "coverage",
}  # fmt: skip
"""Of the family, what the operator takes."""
