"""Of the fuzzer: rules of weights, attention modules, recurrent layers and decoders, each with its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import decoder_cases as of_decoders
import formulas
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import attnext
from attnext import _extension
from attnext.alignments import NORMALIZERS
from attnext.attention.family import FAMILY

NAN, INF = float("nan"), float("inf")
_EXTENSION = _extension.load()
INSTRUCTION_SETS = tuple(_EXTENSION.instruction_sets()) if _EXTENSION else ("",)
FLOATS = (torch.float32, torch.float64)


def shortly(x: Any) -> str:
    """A dataclass, or one in it, without what is as by default."""
    if not is_dataclass(x):
        return repr(x)
    given = [(f.name, getattr(x, f.name)) for f in fields(x) if getattr(x, f.name) != f.default]
    return f"{type(x).__name__}({', '.join(f'{name}={shortly(value)}' for name, value in given)})"


class Shortly:
    """A dataclass that is written without what is as by default."""

    def __repr__(self) -> str:
        return shortly(self)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))  # which Hypothesis asks for


def apart(
    found: Sequence[Tensor], right: Sequence[Tensor], names: Sequence[str], error: float, strict: int = 0
) -> list[str]:
    """What is further from what is right than ``error`` times the larger of 1 and the largest number; the first
    ``strict`` may be NaN or infinite where those are, and others where those are not finite."""
    lines = []
    for number, name in enumerate(names):
        a, b = found[number].detach().double(), right[number].detach().double()
        if a.shape != b.shape:
            lines.append(f"{name}: {tuple(a.shape)}, not {tuple(b.shape)}")
            continue
        kind = kinds if number < strict else Tensor.isfinite
        both = a.isfinite() & b.isfinite()
        size = max(1.0, float(torch.where(b.isfinite(), b.abs(), 0.0).max())) if b.numel() else 1.0
        off = float(torch.where(both, (a - b).abs(), 0.0).max()) / (error * size) if b.numel() else 0.0
        if not torch.equal(kind(a), kind(b)) or off > 1:
            lines.append(f"{name}: {off:.3g} tolerances, {a.flatten()[:8].tolist()} for {b.flatten()[:8].tolist()}")
    return lines


def kinds(x: Tensor) -> Tensor:
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def gradients(results: Sequence[Tensor], leaves: Sequence[Tensor], number: int) -> list[Tensor]:
    """Of a sum of the results with random factors, the same for the same sizes; 0 where nothing depends on one."""
    rng = torch.Generator().manual_seed(number)
    factors = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in results]
    there = [(y, w.to(y.dtype)) for y, w in zip(results, factors, strict=True) if y.requires_grad]
    if not there:
        return [torch.zeros_like(x) for x in leaves]
    outputs, grads = zip(*there, strict=True)
    return list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True))


# Rules of weights.

RULES = (*NORMALIZERS, "parallel", "recursive", "hard", "forward", "coverage_loss")


@dataclass(frozen=True, repr=False)
class Rule(Shortly):
    """A row's scores by a rule."""

    name: str = "softmax"
    rows: int = 1
    keys: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0
    exponent: int = 0
    """Of ten: the size of the scores."""
    hidden: float = 0.0
    """How many."""
    bad: float = 0.0
    """One score, where it is not 0."""
    agent: bool = False
    ties: bool = False
    """Scores of few values."""


@st.composite
def rules(pick: Any) -> Rule:
    return Rule(
        pick(st.sampled_from(RULES)), pick(st.integers(1, 3)), pick(st.sampled_from((1, 2, 3, 7, 16, 17, 64, 65, 0))),
        pick(st.sampled_from((*FLOATS, torch.float16, torch.bfloat16))), pick(st.integers(0, 2**20)),
        pick(st.one_of(st.just(0), st.integers(-30, 30))), pick(st.sampled_from((0.0, 0.3, 1.0))),
        pick(st.sampled_from((0.0, 0.0, NAN, INF, -INF))), pick(st.booleans()), pick(st.booleans()),
    )  # fmt: skip


def _by_rule(rule: Rule, x: Tensor, previous: Tensor, move: Tensor | None) -> Tensor:
    if rule.name in NORMALIZERS:
        return attnext.normalize(x, rule.name)
    if rule.name == "forward":
        return attnext.forward_weights(x, previous, move)
    if rule.name == "coverage_loss":
        return attnext.coverage_loss(x, previous)
    return attnext.monotonic_weights(x, previous, rule.name)


def _by_formula(rule: Rule, x: Tensor, previous: Tensor, move: Tensor | None) -> Tensor:
    found = []
    for k in range(rule.rows):
        if rule.name in NORMALIZERS:
            found.append(formulas.normalized(x[k], rule.name))
        elif rule.name == "forward":
            mix = formulas.mixture(previous[k], None if move is None else move[k])
            least = 2.0**-970 if rule.dtype == torch.float64 else 2.0**-103
            found.append(formulas.forward(x[k], mix, previous[k], least))
        elif rule.name == "coverage_loss":
            found.append(torch.minimum(x[k], previous[k]).sum().view(1))
        else:
            found.append((formulas.hard if rule.name == "hard" else formulas.monotonic)(x[k], previous[k]))
    return torch.stack(found).squeeze(-1) if rule.name == "coverage_loss" else torch.stack(found)


def off_of_rule(rule: Rule) -> list[str]:
    rng = torch.Generator().manual_seed(rule.seed)
    x = torch.randn(rule.rows, rule.keys, generator=rng, dtype=torch.float64)
    x = ((x * 2).round() / 2 if rule.ties else x) * 10.0**rule.exponent
    x = x.clamp(-6e4 / (rule.keys + 1), 6e4) if rule.dtype == torch.float16 else x  # and so is the sum of a row
    previous = torch.rand(rule.rows, rule.keys, generator=rng, dtype=torch.float64)
    previous = previous * (torch.rand(rule.rows, rule.keys, generator=rng) < 0.6)
    move = torch.rand(rule.rows, 1, generator=rng, dtype=torch.float64) if rule.agent else None
    if rule.name != "coverage_loss":
        x[torch.rand(x.shape, generator=rng) < rule.hidden] = -INF
    if rule.bad and rule.keys and rule.name != "hard" and rule.name != "coverage_loss":
        x[0, int(torch.randint(rule.keys, (), generator=rng))] = rule.bad
    given = [y if y is None else y.to(rule.dtype).requires_grad_() for y in (x, previous, move)]
    exact = [y if y is None else y.detach().double().requires_grad_() for y in given]
    assert given[0] is not None
    assert exact[0] is not None
    found = _by_rule(rule, given[0], given[1], given[2])  # type: ignore[arg-type]
    right = _by_formula(rule, exact[0], exact[1], exact[2])  # type: ignore[arg-type]
    wide = torch.promote_types(rule.dtype, torch.float32)
    # A few roundings of each of the terms; an error in the scores is one in the logarithm of the weights.
    error = 64 * max(rule.keys, 1) ** 0.5 * torch.finfo(wide).eps + torch.finfo(rule.dtype).eps
    lines = [] if found.dtype == rule.dtype else [f"dtype {found.dtype}"]
    lines += apart([found], [right], ["weights"], error, 1)
    return lines + (_gradients_of_rule(rule, found, right, given, exact, error) if not rule.bad else [])


def _gradients_of_rule(
    rule: Rule, found: Tensor, right: Tensor, given: Sequence[Any], exact: Sequence[Any], error: float
) -> list[str]:
    """Of forward attention with respect to the scores: that of the mixture divides by numbers as small as may be."""
    if rule.name == "hard" or (rule.ties and rule.name == "coverage_loss"):
        return []
    a, b = (gradients([y], leaves[:1], rule.seed) for y, leaves in ((found, given), (right, exact)))
    return apart(a, b, ["grad scores"], 4 * error)


# Attention modules.


@dataclass(frozen=True, repr=False)
class Attended(Shortly):
    """Steps of one of the family over encoder states."""

    member: str = "additive"
    batch: int = 1
    steps: int = 1
    keys: int = 1
    query: int = 1
    memory: int = 1
    space: int = 2
    dtype: torch.dtype = torch.float64
    seed: int = 0
    instruction_set: str = INSTRUCTION_SETS[0]
    threads: int = 1
    lengths: bool = False
    mask: bool = False
    hidden: float = 0.0
    """What stands in hidden states, or 0 for numbers."""
    forward: bool = False
    """All steps in one call, without a prepared memory."""
    training: bool = True
    bias: bool = False
    temperature: float = 1.0


SETS_OF_ONE_DTYPE = ("local-p", "window", "monotonic")
"""A rounding could put these at another key: float64 alone."""


@st.composite
def attended(pick: Any) -> Attended:
    size = st.sampled_from((1, 2, 3, 5, 8, 16, 17, 33))
    member = pick(st.sampled_from([member.name for member in FAMILY]))
    query, memory = pick(size), pick(size)
    return Attended(
        member, pick(st.integers(1, 3)), pick(st.integers(1, 3)), pick(st.sampled_from((1, 2, 3, 7, 15, 24, 25, 65))),
        memory if member in ("dot", "scaled dot") else query, memory, 2 * pick(size),
        torch.float64 if member in SETS_OF_ONE_DTYPE else pick(st.sampled_from(FLOATS)), pick(st.integers(0, 2**20)),
        pick(st.sampled_from(INSTRUCTION_SETS)), pick(st.integers(1, 3)), pick(st.booleans()), pick(st.booleans()),
        pick(st.sampled_from((0.0, NAN, INF))), pick(st.booleans()), pick(st.booleans()),
    )  # fmt: skip


def off_of_module(case: Attended) -> list[str]:
    torch.manual_seed(case.seed)
    member = next(one for one in FAMILY if one.name == case.member)
    module = member.make(case.query, case.memory, case.space).double()
    for parameter in module.parameters():  # biases begin as zeros
        bound = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        nn.init.uniform_(parameter, -bound, bound)
    module = module.to(case.dtype).train(case.training)
    states = torch.randn(case.batch, case.keys, case.memory, dtype=torch.float64)
    queries = torch.randn(case.batch, case.steps, case.query, dtype=torch.float64)
    lengths = torch.randint(0, case.keys + 1, (case.batch,)) if case.lengths else None
    mask = torch.rand(case.batch, case.keys) < 0.7 if case.mask else None
    visible = formulas.shown(case.batch, 1, case.keys, lengths, mask)[:, 0]
    if case.hidden:
        states[~visible] = case.hidden
    x = [y.to(case.dtype).requires_grad_() for y in (queries, states)]
    exact = [y.detach().double().requires_grad_() for y in x]
    p = {name: y.detach().double().requires_grad_() for name, y in module.named_parameters()}
    found = _by_module(case, module, x, lengths, mask)
    right = _by_hand(case, module, p, exact, visible, lengths, mask)
    a = [*found, *gradients(found, [*x, *module.parameters()], case.seed)]
    b = [*right, *gradients(right, [*exact, *p.values()], case.seed)]
    terms = case.query + case.memory + case.space + case.steps * case.batch * case.keys + 64
    error = 32 * math.sqrt(terms) * torch.finfo(case.dtype).eps * case.steps
    return apart(a, b, ["contexts", "weights", "grad query", "grad states", *p], error)


def _by_module(case: Attended, module: Any, x: Sequence[Tensor], lengths: Any, mask: Any) -> list[Tensor]:
    queries, states = x
    if isinstance(module, attnext.AttentionPooling):
        pooled, weights = module(states, lengths=lengths, mask=mask, need_weights=True)
        return [pooled, weights]
    if case.forward:
        return list(module(queries, states, lengths=lengths, mask=mask, need_weights=True))
    memory, state, found = module.prepare(states, lengths, mask), None, []
    for query in queries.unbind(1):
        context, weights, state = module.step(query, memory, state, need_weights=True)
        found.append((context, weights))
    return [torch.stack(parts, 1) for parts in zip(*found, strict=True)]


def _by_hand(
    case: Attended, module: Any, p: Mapping[str, Tensor], x: Sequence[Tensor], visible: Tensor, lengths: Any, mask: Any
) -> list[Tensor]:
    """Sentence by sentence and step by step."""
    contexts, weights = [], []
    for b in range(case.batch):
        there = torch.nonzero(visible[b]).squeeze(1)
        states = x[1][b, there]
        past = _Past(case, module, there, int(lengths[b]) if lengths is not None else case.keys, mask is not None)
        for query in x[0][b][:1] if isinstance(module, attnext.AttentionPooling) else x[0][b]:
            context, w = _attend(module, p, query, states, past)
            contexts.append(context)
            weights.append(formulas.spread(w, there, case.keys))
    one = isinstance(module, attnext.AttentionPooling)
    sizes = (case.batch,) if one else (case.batch, case.steps)
    return [torch.stack(contexts).view(*sizes, -1), torch.stack(weights).view(*sizes, case.keys)]


class _Past:
    """What a sentence's steps remember, of its visible keys."""

    def __init__(self, case: Attended, module: Any, there: Tensor, length: int, masked: bool) -> None:
        self.there, self.length, self.keys, self.steps = there, length, case.keys, 0
        n = len(there)
        self.first = int(there[0]) if masked and n else 0
        self.weights = torch.zeros(n, dtype=torch.float64)
        if isinstance(module, attnext.MonotonicAttention | attnext.ForwardAttention):
            self.weights = (there == self.first).double()
        self.total = torch.zeros(n, dtype=torch.float64)
        self.move = torch.full((1,), 0.5, dtype=torch.float64)

    def whole(self, x: Tensor) -> Tensor:
        return formulas.spread(x, self.there, self.keys)


def _attend(module: Any, p: Mapping[str, Tensor], query: Tensor, states: Tensor, past: _Past) -> tuple[Tensor, Tensor]:
    """Context and weights of a step."""
    if isinstance(module, attnext.MultiHeadAttention):
        return _heads(module, p, query, states)
    if isinstance(module, attnext.LuongAttention):
        weights = formulas.softmax(_luong(module, p, query, states))
    elif isinstance(module, attnext.AttentionPooling):
        inner = (states @ p["memory_projection.weight"].T + p["bias"]).tanh()
        if module.gate_projection is not None:
            inner = inner * (states @ p["gate_projection.weight"].T + p["gate_projection.bias"]).sigmoid()
        weights = formulas.softmax(inner @ p["score_weight"])
    else:
        weights = _additive(module, p, query, states, past)
    return weights @ states, weights


def _luong(module: Any, p: Mapping[str, Tensor], query: Tensor, states: Tensor) -> Tensor:
    if module.score == "concat":
        both = torch.cat([query.expand(len(states), -1), states], 1)
        return (both @ p["joint_projection.weight"].T).tanh() @ p["score_weight"]
    if module.score == "general":
        query = p["query_projection.weight"] @ query
    return states @ query / (math.sqrt(states.shape[1]) if module.score == "scaled_dot" else 1.0)


def _heads(module: Any, p: Mapping[str, Tensor], query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    of = {"query": query, "memory": states, "value": states}
    q, k, h = (y @ p[f"{name}_projection.weight"].T for name, y in of.items())
    size, found, weights = module.head_size, [], []
    for head in range(module.heads):
        own = slice(head * size, (head + 1) * size)
        if module.score == "additive":
            scores = (q[own] + k[:, own]).tanh() @ p["score_weight"].view(-1, size)[head]
        else:
            scores = k[:, own] @ q[own] / (math.sqrt(size) if module.score == "scaled_dot" else 1.0)
        weights.append(formulas.softmax(scores))
        found.append(weights[-1] @ h[:, own])
    return p["output_projection.weight"] @ torch.cat(found), torch.stack(weights).mean(0)


def _additive(module: Any, p: Mapping[str, Tensor], query: Tensor, states: Tensor, past: _Past) -> Tensor:
    """Weights of a step, which the past remembers."""
    q = p["query_projection.weight"] @ query + p.get("query_projection.bias", torch.zeros(1, dtype=torch.float64))
    v = p["score_weight"]
    v = p["gain"] * v / v.square().sum().sqrt() if "gain" in p else v
    inner = states @ p["memory_projection.weight"].T + q
    if isinstance(module, attnext.LocationSensitiveAttention):
        seen = {"previous": [past.weights], "cumulative": [past.total], "both": [past.weights, past.total]}
        rows = [past.whole(x) for x in seen[module.features]]
        of_past = formulas.features(rows, p["location_convolution.weight"], p["location_projection.weight"])
        assert isinstance(of_past, Tensor)
        inner = inner + of_past[past.there]
    elif isinstance(module, attnext.CoverageAttention):
        inner = inner + past.total[:, None] * p["coverage_weight"]
    scores = inner.tanh() @ v / module.temperature
    if isinstance(module, attnext.LocalAttention):
        weights = _local(module, p, q, scores, past)
    elif isinstance(module, attnext.MonotonicAttention):
        reads = formulas.hard if module.hard and not module.training else formulas.monotonic
        weights = reads(scores + p["score_bias"], past.weights) if len(scores) else scores
    elif isinstance(module, attnext.ForwardAttention):
        weights = _forward(module, p, q, states, scores, past)
    else:
        weights = formulas.normalized(scores, module.normalizer)
    past.weights, past.total, past.steps = weights, past.total + weights, past.steps + 1
    return weights


def _forward(
    module: Any, p: Mapping[str, Tensor], q: Tensor, states: Tensor, scores: Tensor, past: _Past
) -> Tensor:  # fmt: skip
    move = past.move if module.transition_agent is not None else None
    mix = formulas.mixture(past.whole(past.weights), move)[past.there]
    least = 2.0**-103 if module.score_weight.dtype == torch.float32 else 2.0**-970
    weights = formulas.forward(scores, mix, past.weights, least)
    if move is not None:
        both = torch.cat([weights @ states, q])
        past.move = (p["transition_agent.weight"] @ both + p["transition_agent.bias"]).sigmoid()
    return weights


def _local(module: Any, p: Mapping[str, Tensor], q: Tensor, scores: Tensor, past: _Past) -> Tensor:
    """Weights within a window."""
    centre: Any = min(past.steps, past.length - 1)
    if module.position == "last":
        somewhere = bool((past.weights > 0).any())
        centre = int(past.there[past.weights.argmax()]) if somewhere else past.first
    elif module.position == "predicted":
        guess = p["position_predictor.2.weight"] @ (p["position_predictor.0.weight"] @ q).tanh()
        centre = past.length * guess.sigmoid()
    inside = (past.there - centre).detach().abs() <= module.window
    weights = formulas.normalized(scores.masked_fill(~inside, -INF), module.normalizer)
    if module.position == "predicted":
        weights = weights * (-2 * ((past.there - centre) / module.window) ** 2).exp()
    return weights


# Recurrent layers.


@dataclass(frozen=True, repr=False)
class Layered(Shortly):
    """Recurrent layers over some sentences."""

    lstm: bool = False
    batch: int = 1
    steps: int = 1
    inputs: int = 1
    size: int = 1
    layers: int = 1
    both_ways: bool = False
    packed: bool = False
    bias: bool = True
    state: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    instruction_set: str = INSTRUCTION_SETS[0]
    threads: int = 1
    exponent: int = 0
    """Of ten: the size of the inputs."""
    bad: float = 0.0


@st.composite
def layered(pick: Any) -> Layered:
    size, flag = st.sampled_from((1, 2, 5, 8, 15, 16, 17, 33)), st.booleans()
    return Layered(
        pick(flag), pick(st.sampled_from((1, 2, 3, 7))), pick(st.integers(1, 5)), pick(size), pick(size),
        pick(st.integers(1, 2)), pick(flag), pick(flag), pick(flag), pick(flag), pick(st.sampled_from(FLOATS)),
        pick(st.integers(0, 2**20)), pick(st.sampled_from(INSTRUCTION_SETS)), pick(st.integers(1, 3)),
        pick(st.one_of(st.just(0), st.integers(-30, 30))), pick(st.sampled_from((0.0, 0.0, NAN, INF, -INF))),
    )  # fmt: skip


def off_of_layers(case: Layered) -> list[str]:
    torch.manual_seed(case.seed)
    tensors, directions = (2 if case.lstm else 1), (2 if case.both_ways else 1)
    of: Any = attnext.LSTM if case.lstm else attnext.GRU
    module = of(case.inputs, case.size, case.layers, bias=case.bias, bidirectional=case.both_ways).to(case.dtype)
    x = torch.randn(case.batch, case.steps, case.inputs, dtype=torch.float64) * 10.0**case.exponent
    lengths = torch.randint(1, case.steps + 1, (case.batch,)) if case.packed else torch.full((case.batch,), case.steps)
    if case.bad:
        x[0, 0, 0] = case.bad
    sizes = (case.layers * directions, case.batch, case.size)
    state = [torch.randn(sizes, dtype=torch.float64) * case.state for _ in range(tensors)]
    given = [y.to(case.dtype).requires_grad_() for y in (x, *state)]
    exact = [y.detach().double().requires_grad_() for y in given]
    p = {name: y.detach().double().requires_grad_() for name, y in module.named_parameters()}
    found, right = _by_layers(case, module, given, lengths), _by_cells(case, p, exact, lengths, directions)
    counted = slice(None) if case.state else slice(1)
    a = [*found, *gradients(found, [*given[counted], *module.parameters()], case.seed)]
    b = [*right, *gradients(right, [*exact[counted], *p.values()], case.seed)]
    names = ["outputs", *["last state"] * tensors, "grad inputs", *["grad state"] * (tensors * case.state), *p]
    terms = case.inputs + case.size + case.steps * case.batch + 16
    error = 16 * case.layers * case.steps * math.sqrt(terms) * torch.finfo(case.dtype).eps
    return apart(a, b, names, error * max(1.0, 10.0**case.exponent), 1 + tensors)


def _by_layers(case: Layered, module: Any, x: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
    given: Any = x[0].transpose(0, 1)
    if case.packed:
        given = pack_padded_sequence(given, lengths, enforce_sorted=False)
    state = (x[1] if len(x) == 2 else tuple(x[1:])) if case.state else None
    output, last = module(given, state)
    if isinstance(output, PackedSequence):
        output, _ = nn.utils.rnn.pad_packed_sequence(output, total_length=case.steps)
    return [output.transpose(0, 1), *([last] if isinstance(last, Tensor) else last)]


def _by_cells(
    case: Layered, p: Mapping[str, Tensor], x: Sequence[Tensor], lengths: Tensor, directions: int
) -> list[Tensor]:
    none = torch.zeros((4 if case.lstm else 3) * case.size, dtype=torch.float64)
    ends = [f"_l{k}{way}" for k in range(case.layers) for way in ("", "_reverse")[:directions]]
    weights = [[p.get(name + end, none) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] for end in ends]
    outputs, last = formulas.layers(x[0], lengths.tolist(), x[1:], weights, directions)
    padded = [torch.cat([y, y.new_zeros(case.steps - len(y), y.shape[1])]) for y in outputs]
    return [torch.stack(padded), *last]


# Decoders, whose formulas are those of their tests.


@dataclass(frozen=True, repr=False)
class Decoded(Shortly):
    """A decoder that attends."""

    lstm: bool
    case: of_decoders.Case
    dtype: torch.dtype
    seed: int
    instruction_set: str
    threads: int


@st.composite
def decoded(pick: Any) -> Decoded:
    size = st.sampled_from((1, 2, 5, 8, 15, 16, 17, 33))
    case = of_decoders.Case(
        pick(st.sampled_from(list(of_decoders.ATTENTIONS))), pick(st.sampled_from(("before", "after"))),
        pick(st.sampled_from(list(of_decoders.VECTORS))), pick(st.integers(1, 2)), pick(st.integers(1, 4)),
        pick(st.integers(1, 4)), pick(st.sampled_from((1, 2, 9, 24, 25, 65))), pick(size), pick(size), pick(size),
        pick(size), pick(st.sampled_from(("lengths", "mask", "both", ""))), pick(st.booleans()), pick(st.booleans()),
    )  # fmt: skip
    return Decoded(
        pick(st.booleans()), case, pick(st.sampled_from(FLOATS)), pick(st.integers(0, 2**20)),
        pick(st.sampled_from(INSTRUCTION_SETS)), pick(st.integers(1, 3)),
    )  # fmt: skip


def off_of_decoder(drawn: Decoded) -> list[str]:
    torch.manual_seed(drawn.seed)
    decoder, given = of_decoders.made(of_decoders.KINDS[drawn.lstm], drawn.case, drawn.dtype)
    found, right = of_decoders.outcome(decoder, given), of_decoders.outcome_of_formula(decoder, given)
    error = 2 * drawn.case.tolerance(drawn.dtype)
    return apart(found, right, [str(k) for k in range(len(found))], error)


FAMILIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], list[str]], float]] = {
    "rules": (rules(), off_of_rule, 0.15),
    "modules": (attended(), off_of_module, 0.2),
    "layers": (layered(), off_of_layers, 0.1),
    "decoders": (decoded(), off_of_decoder, 0.05),
}
"""Cases, what is off with one, and the share of all cases."""
