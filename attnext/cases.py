"""Holds a backend to the float64 reference: the cases, their inputs and the tolerances.

The tests and ``attnext verify`` draw their inputs and judge their results here. An error is given in units of a
tolerance that follows the arithmetic: the unit roundoff of the computation, the sizes of the terms in each sum, their
number, and the rounding of the result to its dtype. Sums of independent roundings are taken to grow as their square
root, which the inputs must allow: terms that are all alike may round alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnext import _checks, functional, reference
from attnext.memory import Memory, prepare
from attnext.steps import gathered

__all__ = ["CASES", "DTYPES", "Case", "Inputs", "compare", "draw", "random_cases", "results"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INPUTS = ("query", "key", "value", "score_weight")
PAST_INPUTS = ("filters", "projection", "past", "second_past", "previous", "transition")
"""What a step that sees its past takes beside them, where it has it; the last four are in the arithmetic's dtype."""


@dataclass(frozen=True)
class Case:
    """One call to verify: its sizes and what is special about its inputs."""

    op: Literal["attention", "step", "scores", "dot", "past"] = "attention"
    """``step`` attends a prepared memory; ``dot`` is attention by dot products, the others are additive; ``past`` is a
    step that sees its past, whose queries are the hypotheses of a beam."""
    batch: int = 2
    queries: int = 3
    keys: int = 7
    features: int = 12
    values: int = 10
    dtype: torch.dtype = torch.float32
    lengths: bool = False
    mask: Literal["", "keys", "slots"] = ""
    """``keys`` is (B, Tk), ``slots`` (B, Tq, Tk)."""
    scale: float = 1.0
    dropout_p: float = 0.0
    weights: bool = False
    magnitude: float = 1.0
    """Standard deviation of queries and keys."""
    strided: bool = False
    """Inputs with a last stride that is not 1, and incoming gradients expanded from those of one query."""
    poison: bool = False
    """NaN in keys and values that no query may attend."""
    flat: bool = False
    """A query of (B, D), where ``queries`` is 1; what follows from it is without Tq too."""
    heads: int = 0
    """Of additive scores: rows of the score weight, or 0 for one without that dimension."""
    shared: bool = False
    """Of ``dot``: the keys are the values; ``values`` has the number of features."""
    summed: bool = False
    """Of ``step``, ``dot`` and ``past``: the gradients of keys and values are added to the sums of a memory's steps."""
    held: torch.dtype | None = None
    """Of float32, but for ``attention``: the half type of keys and values, and of what is prepared of them; other
    dtypes take no notice."""
    channels: int = 0
    """Of ``past``, as all below: how many pasts the filters see, 0 for none."""
    filters: int = 0
    """How many, or 0 for one a feature, without a projection."""
    width: int = 1
    rule: Literal["softmax", "sigmoid", "forward"] = "softmax"
    agent: bool = False
    """Forward attention with a transition for each query."""
    window: bool = False
    """Only keys near a place may be attended, another one for each query."""

    def __str__(self) -> str:
        sizes = f"({self.batch}, {self.queries}, {self.keys}, {self.features}, {self.values})"
        names = ("lengths", "weights", "strided", "poison", "flat", "shared", "summed", "agent", "window")
        flags = [name for name in names if getattr(self, name)]
        if self.held:
            flags.append(f"held={str(self.held).removeprefix('torch.')}")
        if self.mask:
            flags.append(f"mask={self.mask}")
        if self.rule != "softmax":
            flags.append(self.rule)
        numbers = (
            f"{name}={getattr(self, name):g}"
            for name in ("scale", "dropout_p", "magnitude", "heads", "channels", "filters", "width")
            if getattr(self, name) != getattr(Case, name)
        )
        return " ".join([self.op, sizes, str(self.dtype).removeprefix("torch."), *flags, *numbers])


_BFLOAT16, _FLOAT16 = torch.bfloat16, torch.float16
CASES: tuple[Case, ...] = (
    Case(),
    Case(batch=1, queries=1, keys=1, features=1, values=1, weights=True),
    Case(batch=3, queries=17, keys=67, features=31, values=65, lengths=True, weights=True),
    Case(batch=2, queries=33, keys=131, features=128, values=48, mask="keys", scale=0.5),
    Case(batch=2, queries=19, keys=97, features=100, values=16, mask="slots", weights=True, poison=True),
    Case(batch=1, queries=5, keys=200, features=257, values=37, lengths=True, mask="slots", scale=2.0),
    Case(batch=2, queries=16, keys=64, features=64, values=64, dropout_p=0.3, weights=True),
    Case(batch=2, queries=18, keys=66, features=96, values=33, dropout_p=0.9, mask="keys", lengths=True),
    Case(batch=2, queries=7, keys=40, features=40, values=24, strided=True, weights=True),
    Case(
        batch=2,
        queries=7,
        keys=70,
        features=40,
        values=16,
        lengths=True,
        mask="keys",
        poison=True,
        strided=True,
    ),
    Case(batch=2, queries=9, keys=50, features=70, values=20, magnitude=8.0, weights=True),
    Case(batch=2, queries=9, keys=50, features=70, values=20, magnitude=100.0, mask="slots", poison=True),
    Case(batch=1, queries=4, keys=20, features=16, values=8, magnitude=1e4, weights=True),
    Case(batch=2, queries=140, keys=40, features=3, values=2, lengths=True, weights=True),
    Case(batch=0),
    Case(queries=0),
    Case(keys=0, weights=True),
    Case(values=0, weights=True),
    Case("step", batch=5, queries=1, keys=131, features=96, values=80, lengths=True),
    Case(
        "step", batch=2, queries=1, keys=30, features=33, values=70, mask="keys", poison=True, weights=True, summed=True
    ),
    Case("step", batch=3, queries=4, keys=20, features=64, values=32, magnitude=20.0, dropout_p=0.2, summed=True),
    Case("step", batch=3, queries=1, keys=9, features=20, values=6, lengths=True, weights=True, flat=True),
    # Longer than a few tiles, than what is kept of the pairs at a time, and both for scores and for dropped weights.
    Case(batch=4, queries=40, keys=600, features=8, values=5),
    Case(queries=150, keys=40, features=3, values=2, dropout_p=0.3, weights=True),
    Case("scores", queries=150, keys=20, features=3),
    Case("scores", batch=3, queries=17, keys=67, features=31, lengths=True),
    Case("scores", batch=3, queries=1, keys=10, features=31, flat=True),
    Case("scores", batch=2, queries=5, keys=130, features=65, mask="slots", scale=-1.5, strided=True),
    Case("scores", batch=2, queries=6, keys=20, features=40, mask="keys", poison=True, magnitude=50.0),
    Case("scores", keys=0),
    Case(batch=6, queries=5, keys=70, features=18, values=6, heads=3, weights=True, lengths=True),
    Case("step", batch=4, queries=1, keys=40, features=33, values=8, heads=2, mask="keys", flat=True, summed=True),
    Case("scores", batch=4, queries=3, keys=20, features=9, heads=4, magnitude=30.0),
    Case(batch=0, heads=2),
    Case("dot", queries=150, keys=20, features=5, values=3, mask="keys", weights=True),
    Case("dot", batch=1, queries=1, keys=1, features=1, values=1, weights=True, shared=True),
    Case("dot", batch=3, queries=17, keys=67, features=31, values=65, lengths=True, weights=True, scale=0.2),
    Case(
        "dot",
        batch=2,
        queries=19,
        keys=97,
        features=40,
        values=40,
        mask="slots",
        weights=True,
        poison=True,
        shared=True,
    ),
    Case("dot", batch=2, queries=9, keys=50, features=33, values=16, mask="slots", poison=True, strided=True),
    Case("dot", batch=2, queries=33, keys=131, features=128, values=48, mask="keys", scale=0.1, poison=True),
    Case("dot", batch=2, queries=18, keys=66, features=24, values=24, dropout_p=0.3, weights=True, shared=True),
    Case("dot", queries=7, keys=40, features=20, values=20, strided=True, weights=True, shared=True, lengths=True),
    Case("dot", batch=2, queries=9, keys=50, features=70, values=20, magnitude=8.0, weights=True),
    Case(
        "dot",
        batch=1,
        queries=5,
        keys=200,
        features=257,
        values=257,
        scale=0.1,
        lengths=True,
        mask="slots",
        shared=True,
    ),
    Case("dot", batch=5, queries=1, keys=131, features=96, values=96, lengths=True, scale=0.1, shared=True),
    Case("dot", batch=3, queries=1, keys=150, features=20, values=6, lengths=True, weights=True, flat=True),
    Case("dot", batch=9, queries=1, keys=9, features=20, values=20, mask="keys", flat=True, shared=True, poison=True),
    Case("dot", batch=3, queries=5, keys=140, features=20, values=6, lengths=True, poison=True, summed=True),
    Case("dot", batch=3, queries=1, keys=9, features=12, values=12, lengths=True, shared=True, flat=True, summed=True),
    Case("dot", batch=1, queries=40, keys=200, features=4, values=3),
    Case("dot", batch=0),
    Case("dot", queries=0),
    Case("dot", keys=0, weights=True),
    Case("dot", keys=0, features=12, values=12, shared=True),
    Case("dot", values=0, weights=True),
    # One query without a past; then with one, of the sizes of Tacotron 2 and of the recognisers in small.
    Case("past", queries=1, flat=True, weights=True),
    Case("past", batch=1, queries=1, keys=1, features=1, values=1, channels=1, filters=1, flat=True, weights=True),
    Case("past", queries=1, keys=70, features=33, values=17, channels=2, filters=32, width=31, flat=True, weights=True,
         lengths=True),
    Case("past", queries=1, keys=67, features=48, values=40, channels=1, filters=10, width=101, flat=True, weights=True,
         mask="keys", poison=True, summed=True),  # filters wider than the row
    Case("past", batch=2, queries=1, keys=50, features=40, values=24, channels=1, flat=True, lengths=True, weights=True,
         strided=True, scale=0.5),
    Case("past", batch=2, queries=5, keys=41, features=20, values=9, channels=2, filters=3, width=5, lengths=True,
         mask="keys", poison=True, weights=True, window=True, summed=True),
    Case("past", batch=2, queries=3, keys=30, features=70, values=20, channels=1, filters=5, width=7, magnitude=8.0,
         dropout_p=0.3, weights=True),
    Case("past", batch=2, queries=2, keys=20, features=16, values=8, channels=1, width=3, magnitude=1e3),
    Case("past", batch=2, queries=3, keys=33, features=12, values=10, channels=2, filters=4, width=3, rule="sigmoid",
         lengths=True, weights=True),
    Case("past", batch=3, queries=1, keys=37, features=12, values=10, channels=2, filters=4, width=9, rule="forward",
         flat=True, lengths=True, weights=True, summed=True),
    Case("past", batch=2, queries=4, keys=21, features=12, values=10, rule="forward", agent=True, mask="keys",
         poison=True, weights=True, window=True, strided=True),
    # A memory in a half type; one of them beyond what its exponentials can say.
    Case("step", batch=2, queries=1, keys=131, features=70, values=33, lengths=True, weights=True, held=_BFLOAT16),
    Case("step", batch=2, queries=18, keys=70, features=40, values=20, mask="keys", poison=True, held=_FLOAT16),
    Case("step", batch=4, queries=1, keys=67, features=33, values=9, heads=2, flat=True, summed=True, held=_BFLOAT16),
    Case("step", batch=2, queries=1, keys=20, features=12, values=7, magnitude=6.0, flat=True, held=_FLOAT16),
    Case("scores", queries=3, keys=20, features=9, lengths=True, held=_FLOAT16),
    Case("dot", batch=2, queries=3, keys=70, features=20, values=9, scale=0.2, summed=True, held=_BFLOAT16),
    Case("dot", batch=3, queries=1, keys=67, features=40, values=40, scale=0.2, shared=True, flat=True, held=_FLOAT16),
    Case("past", batch=2, queries=1, keys=50, features=33, values=20, channels=2, filters=5, width=7, flat=True,
         lengths=True, weights=True, summed=True, held=_BFLOAT16),
    Case("past", batch=2, queries=2, keys=30, features=12, values=6, channels=1, width=3, held=_FLOAT16),
    Case("past", batch=0, channels=1, filters=2, width=3, weights=True),
    Case("past", queries=0, channels=1, width=3),
    Case("past", keys=0, channels=2, filters=2, width=3, weights=True),
    Case("past", values=0, channels=1, filters=2, width=3, weights=True),
)  # fmt: skip
"""The fixed table; every backend runs it in every dtype."""


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """``count`` cases with sizes, dtypes and options drawn from ``seed``."""
    draw_from = random.Random(seed)
    sizes = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 129)
    for _ in range(count):
        case = Case(
            op=draw_from.choice(("attention", "attention", "step", "scores", "dot", "dot", "past", "past")),
            batch=draw_from.choice((1, 1, 2, 3, 5)),
            queries=draw_from.choice(sizes[:11]),
            keys=draw_from.choice((*sizes, 200)),
            features=draw_from.choice((*sizes, 257)),
            values=draw_from.choice(sizes),
            dtype=draw_from.choice(DTYPES),
            lengths=draw_from.random() < 0.5,
            mask=draw_from.choice(("", "keys", "slots")),
            scale=draw_from.choice((1.0, 1.0, 0.3, 3.0)),
            dropout_p=draw_from.choice((0.0, 0.0, 0.0, 0.1, 0.5)),
            weights=draw_from.random() < 0.5,
            magnitude=draw_from.choice((1.0, 1.0, 0.01, 6.0, 30.0, 1e3)),
            strided=draw_from.random() < 0.3,
            poison=draw_from.random() < 0.3,
        )
        if case.op == "dot":  # scores that leave weights of several keys, or of one alone
            scale = draw_from.choice((1.0, 1.0, 0.1, 10.0)) / (case.magnitude**2 * case.features**0.5)
            shared = draw_from.random() < 0.5
            case = replace(case, scale=scale, shared=shared, values=case.features if shared else case.values)
        elif case.op == "past":
            case = _with_past(case, draw_from)
        elif heads := draw_from.choice((0, 0, 0, 3)):
            case = replace(case, heads=heads, batch=heads * draw_from.choice((1, 2)))
        if case.op in ("step", "dot", "past"):
            held: Any = draw_from.choice((None, None, *_checks.HALVES))
            case = replace(case, summed=draw_from.random() < 0.5, held=held)
        yield case


def _with_past(case: Case, draw_from: random.Random) -> Case:
    """Small ones: an interpreter goes through the places of the filters for each query one by one."""
    rule: Any = draw_from.choice(("softmax", "softmax", "sigmoid", "forward"))
    return replace(
        case,
        batch=min(case.batch, 2),
        queries=draw_from.choice((1, 1, 2, 3)),
        keys=min(case.keys, 65),
        mask="keys" if case.mask else "",
        channels=draw_from.choice((0, 1, 1, 2)),
        filters=draw_from.choice((0, 1, 3, 10, 32)),
        width=draw_from.choice((1, 3, 5, 9, 15)),
        rule=rule,
        agent=rule == "forward" and draw_from.random() < 0.5,
        window=draw_from.random() < 0.3,
    )


@dataclass
class Inputs:
    """The tensors of a case: in its dtype, gradients of the results included."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    seed: Tensor
    grads: dict[str, Tensor]
    filters: Tensor | None = None
    projection: Tensor | None = None
    past: Tensor | None = None
    second_past: Tensor | None = None
    previous: Tensor | None = None
    transition: Tensor | None = None
    window: Tensor | None = None

    @property
    def pasts(self) -> list[Tensor]:
        return [x for x in (self.past, self.second_past) if x is not None]


def draw(case: Case, seed: int, device: str = "cpu") -> Inputs:
    """Fresh random inputs of a case."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    batch, queries, keys = case.batch, case.queries, case.keys
    lengths = torch.randint(0, keys + 1, (batch,), generator=rng) if case.lengths else None
    mask = _draw_mask(case, rng)
    key = normal(batch, keys, case.features) * case.magnitude
    value = key if case.shared else normal(batch, keys, case.values)
    query = normal(batch, queries, case.features) * case.magnitude
    if case.poison:
        hidden = ~reference.valid_slots(query, key, lengths, mask).any(1)
        key[hidden], value[hidden] = torch.nan, torch.nan
    grads = {"context": normal(batch, queries, case.values), "weights": normal(batch, queries, keys)}
    if case.op == "scores":
        grads = {"scores": grads["weights"]}
    elif not case.weights:
        del grads["weights"]
    place = _placed_strided if case.strided else _placed
    return Inputs(
        place(query, case.dtype, device),
        place(key, _dtype_of(case, "key"), device),
        place(value, _dtype_of(case, "value"), device),
        (normal(*(case.heads,) * (case.heads > 0), case.features) / case.features**0.5).to(case.dtype).to(device),
        None if lengths is None else lengths.to(device),
        None if mask is None else mask.to(device),
        torch.randint(2**62, (), generator=rng).to(device),
        {
            name: (grad[:1, :1].expand(grad.shape) if case.strided else grad)
            for name, grad in ((name, grad.to(_dtype_of(case, name)).to(device)) for name, grad in grads.items())
        },
        **{name: x.to(_dtype_of(case, name)).to(device) for name, x in _draw_past(case, rng).items()},
    )


def _draw_past(case: Case, rng: torch.Generator) -> dict[str, Tensor]:
    """The inputs of a step that sees its past; in hidden slots it is NaN where keys are."""
    if case.op != "past":
        return {}
    rows = (case.batch, case.queries, case.keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    found = {}
    if case.channels:
        count = case.filters or case.features
        found["filters"] = normal(count, case.channels, case.width)
        if case.filters:
            found["projection"] = normal(case.features, count) / count**0.5
        for name in ("past", "second_past")[: case.channels]:
            found[name] = torch.rand(rows, generator=rng, dtype=torch.float64)
    if case.rule == "forward":
        found["previous"] = torch.rand(rows, generator=rng, dtype=torch.float64)
    if case.agent:
        found["transition"] = torch.rand(*rows[:2], 1, generator=rng, dtype=torch.float64)
    if case.window:
        first = torch.randint(-2, case.keys + 1, (*rows[:2], 1), generator=rng)
        found["window"] = torch.cat(
            [first, first + torch.randint(0, 2 + case.keys // 2, first.shape, generator=rng)], -1
        )
    return found


def _dtype_of(case: Case, name: str) -> torch.dtype:
    """That of a tensor of a case: of a step that sees its past, weights and what becomes of them are not rounded."""
    if name == "window":
        return torch.int64
    name = name.removeprefix("grad ")
    if case.held is not None and case.dtype == torch.float32 and name in ("key", "value"):
        return case.held
    return _arithmetic(case) if case.op == "past" and name in ("weights", *PAST_INPUTS[2:]) else case.dtype


def _draw_mask(case: Case, rng: torch.Generator) -> Tensor | None:
    if not case.mask:
        return None
    shape = (case.batch, case.keys) if case.mask == "keys" else (case.batch, case.queries, case.keys)
    mask = torch.rand(shape, generator=rng) < 0.7
    mask[..., :1] = False  # so that there is a key nobody attends,
    mask[:1, :1] = False  # and, with a mask by slots, a query that attends nobody
    return mask


def _placed(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return x.to(dtype).to(device)


def _placed_strided(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The same numbers with the last two dimensions swapped in memory."""
    return x.to(dtype).to(device).transpose(1, 2).contiguous().transpose(1, 2)


def compare(case: Case, backend: str, seed: int, device: str = "cpu") -> dict[str, float]:
    """The worst error of each result and gradient of a case on a backend, in units of its tolerance.

    Infinity stands for a result of another shape or dtype (then also for all gradients), or one that is NaN or infinite
    where the reference's is not.
    """
    inputs = draw(case, seed, device)
    expected = _run(case, inputs, torch.float64, _reference(case))
    actual = results(case, inputs, backend)
    bounds = tolerances(case, inputs, expected)
    return {name: _worst(actual.get(name), expected[name], bounds[name], _dtype_of(case, name)) for name in expected}


def _worst(actual: Tensor | None, expected: Tensor, bound: Tensor, dtype: torch.dtype) -> float:
    if actual is None or actual.shape != expected.shape or actual.dtype != dtype:
        return torch.inf
    if actual.numel() == 0:
        return 0.0
    error = (actual.double() - expected).abs() / bound
    error = torch.where(actual == expected, 0.0, error)  # infinities of scores
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


Call = Callable[[Inputs, list[Any]], Mapping[str, Tensor | None]]


def _reference(case: Case) -> Call:
    def call(inputs: Inputs, x: list[Any]) -> Mapping[str, Tensor | None]:
        options: dict[str, Any] = {"lengths": inputs.lengths, "mask": inputs.mask, "scale": case.scale}
        if case.op == "scores":
            return {"scores": reference.additive_scores(x[0], x[1], x[3], **options)}
        options |= {"dropout_p": case.dropout_p, "seed": inputs.seed}
        if case.op == "past":
            options |= {"rule": case.rule, "previous": x[8], "transition": x[9], "window": inputs.window}
            past = [y for y in x[6:8] if y is not None]
            context, weights = reference.additive_step(x[0], x[1], x[2], x[3], x[4], x[5], past, **options)
            return {"context": context, "weights": weights}
        options["need_weights"] = case.weights
        if case.op == "dot":
            results = reference.dot_attention(x[0], x[1], None if case.shared else x[2], **options)
        else:
            results = reference.additive_attention(x[0], x[1], x[2], x[3], **options)
        return dict(zip(("context", "weights"), results, strict=True))

    return call


def _backend(case: Case, backend: str) -> Call:
    def call(inputs: Inputs, x: list[Any]) -> Mapping[str, Tensor | None]:
        query = x[0].squeeze(1) if case.flat else x[0]
        if case.op == "scores":
            memory = Memory(x[1], x[1], inputs.lengths, inputs.mask, x[3], None)
            scores = functional.scores_of(query, memory, case.scale, backend)
            return {"scores": scores.unsqueeze(1) if case.flat else scores}
        by_key = case.op == "step" and case.mask != "slots"
        holding = None if x[1].dtype == query.dtype else x[1].dtype
        prepared = prepare(x[1], inputs.lengths, inputs.mask, backend, holding) if by_key else None
        value = x[1] if case.shared else x[2]
        steps = gathered(x[1], value, None if case.op == "dot" else x[3]) if case.summed else None
        memory = Memory(x[1], value, inputs.lengths, inputs.mask, x[3], prepared, steps=steps)
        if case.op == "past":
            return _step(case, inputs, query, memory, x, backend)
        attend = functional.attend_by_dot if case.op == "dot" else functional.attend
        context, weights = attend(query, memory, case.scale, case.dropout_p, case.weights, backend, inputs.seed)
        if case.flat:
            context, weights = context.unsqueeze(1), None if weights is None else weights.unsqueeze(1)
        return {"context": context, "weights": weights}

    return call


def _step(
    case: Case, inputs: Inputs, query: Tensor, memory: Memory, x: list[Any], backend: str
) -> Mapping[str, Tensor | None]:
    past, second_past, previous, transition, window = (
        None if y is None else y.squeeze(1) if case.flat else y for y in (*x[6:], inputs.window)
    )
    context, weights = functional.attend_step(
        query, memory, x[4], x[5], [y for y in (past, second_past) if y is not None], rule=case.rule,
        previous=previous, transition=transition, window=window, scale=case.scale, dropout_p=case.dropout_p,
        seed=inputs.seed, backend=backend,
    )  # fmt: skip
    return {name: y.unsqueeze(1) if case.flat else y for name, y in (("context", context), ("weights", weights))}


def results(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """A backend's results and the gradients of its inputs, by name."""
    return _run(case, inputs, None, _backend(case, backend))


def _run(case: Case, inputs: Inputs, dtype: torch.dtype | None, call: Call) -> dict[str, Tensor]:
    """Results of a call in ``dtype``, or in the dtypes of the case, and the gradients of its inputs, by name."""
    names = _differentiable(case, inputs)
    x: dict[str, Any] = dict.fromkeys((*INPUTS, *PAST_INPUTS)) | {
        name: tensor.to(dtype or _dtype_of(case, name)).detach().requires_grad_()
        for name in (*INPUTS, *PAST_INPUTS)
        if (tensor := getattr(inputs, name)) is not None
    }
    results = {name: y for name, y in call(inputs, list(x.values())).items() if y is not None}
    found = {name: y.detach() for name, y in results.items()}
    outputs = {name: y for name, y in results.items() if name in inputs.grads}
    if any(y.shape != inputs.grads[name].shape for name, y in outputs.items()):
        return found
    grads = torch.autograd.grad(
        list(outputs.values()),
        [x[name] for name in names],
        [inputs.grads[name].to(y.dtype) for name, y in outputs.items()],
        materialize_grads=True,
    )
    return found | {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}


def _differentiable(case: Case, inputs: Inputs) -> list[str]:
    """The inputs that the case's op reads."""
    unread = {"scores": ["value"], "dot": ["score_weight"] + ["value"] * case.shared}.get(case.op, [])
    return [name for name in (*INPUTS, *PAST_INPUTS) if getattr(inputs, name) is not None and name not in unread]


def tolerances(case: Case, inputs: Inputs, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far each result may lie from the exact one: the error of the arithmetic, and the rounding to its dtype."""
    bounds = _step_tolerances(case, inputs, exact) if case.op == "past" else _arithmetic_tolerances(case, inputs)

    def rounded(name: str, x: Tensor) -> Tensor:
        info = torch.finfo(_dtype_of(case, name))
        return bounds[name] + x.nan_to_num(neginf=0.0).abs() * info.eps / 2 + info.smallest_normal * info.eps

    return {name: rounded(name, x) for name, x in exact.items()}


def _arithmetic_tolerances(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The error of each result before it is rounded to its dtype, element by element.

    ``u`` is the unit roundoff of the arithmetic (float32 for the half types). A sum of n rounded terms of size m may be
    off by about sqrt(n) u m, and each term by a few u: the constants count the roundings of the formula, rounded up.
    """
    return (_dot_tolerances if case.op == "dot" else _additive_tolerances)(case, inputs)


def _additive_tolerances(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Errors of r = 1 / (1 + exp(2q) exp(2k)) are below 6 u, so those of tanh below 12 u and of tanh' = 4 r (1 - r)
    below 24 u.
    """
    u = _roundoff(case)
    query, key, _, v = (getattr(inputs, name).double().nan_to_num() for name in INPUTS)
    heads = max(case.heads, 1)
    v = v.view(heads, 1, 1, -1).repeat(case.batch // heads, 1, 1, 1)  # that of each row
    tanh = (query.unsqueeze(2) + key.unsqueeze(1)).tanh()
    slope = 1 - tanh.square()
    # What exponentials in a half type are off by, as of keys that are.
    of_key = torch.finfo(inputs.key.dtype).eps / 4 if case.op == "step" and inputs.key.dtype != case.dtype else 0.0
    # Three times what independent errors of the terms add up to, and the rounding of the running sum.
    score_error = (u * abs(case.scale) * (36 * v.norm(dim=-1) + 4 * v.abs().sum(-1))).expand(tanh.shape[:-1])
    score_error = score_error + abs(case.scale) * of_key * (slope * v.abs()).sum(-1)
    if case.op == "scores":
        visible = reference.valid_slots(query, key, inputs.lengths, inputs.mask)
        ds = inputs.grads["scores"].double().abs() * visible
        ds_error, result = 4 * u * ds, {"scores": score_error}
    else:
        scores = case.scale * (tanh * v).sum(-1)
        ds, ds_error, result = _softmax_tolerances(case, inputs, scores, score_error)
    ds, ds_error = ds * abs(case.scale), ds_error * abs(case.scale)
    root_queries, root_keys = case.queries**0.5, case.keys**0.5

    def through_slope(equation: str, root: float) -> Tensor:
        total = torch.einsum(equation, slope, ds_error + (4 + root) * u * ds)
        total = total + 2 * of_key * torch.einsum(equation, slope * tanh.abs(), ds + ds_error)
        bound: Tensor = v.abs()[:, 0] * (total + 24 * u * torch.einsum(equation, torch.ones_like(slope), ds + ds_error))
        return bound

    # Rows of queries are independent; within one, an error of delta is common to all keys.
    by_row = torch.einsum("bijd,bij->bid", tanh.abs(), ds_error).square().sum(1)
    terms = (case.batch // heads * case.queries * case.keys) ** 0.5

    def of_head(x: Tensor) -> Tensor:
        return x.view(case.batch // heads, heads, *x.shape[1:]).sum(0)

    by_slot = torch.einsum("bijd,bij->bd", slope, ds + ds_error) * of_key
    of_weight = 3 * of_head(by_row).sqrt() + of_head(by_slot) + (12 + terms) * u * of_head(ds.sum((1, 2)).unsqueeze(-1))
    return result | {
        "grad query": through_slope("bijd,bij->bid", root_keys),
        "grad key": through_slope("bijd,bij->bjd", root_queries),
        "grad score_weight": of_weight if case.heads else of_weight[0],
    }


def _step_tolerances(case: Case, inputs: Inputs, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the additive score, and what the roundings of features and of the sum inside the tanh add.

    An error is carried from sum to sum by absolute values. The backward pass of the linear features does so for those
    of their gradients, taken of the absolute values of what they are made of.
    """
    u = _roundoff(case)
    query, key, value, v = (getattr(inputs, name).double().nan_to_num() for name in INPUTS)
    visible = reference.valid_slots(query, key, inputs.lengths, inputs.mask)
    pasts = [x.double().masked_fill(~visible, 0.0) for x in inputs.pasts]
    linear = [x.double() for x in (inputs.filters, inputs.projection) if x is not None]
    roots = 16 + sum(n**0.5 for n in (case.keys, case.features, case.values, case.filters, case.width))

    def features(seen: list[Tensor], weights: list[Tensor]) -> Tensor | float:
        if not weights:
            return 0.0
        return reference._filtered(torch.stack(seen, 2), weights[0], weights[1] if len(weights) > 1 else None)

    sizes = [[x.abs().requires_grad_() for x in of] for of in (pasts, linear)]
    feature_sizes = features(*sizes)
    size = feature_sizes.detach() if isinstance(feature_sizes, Tensor) else 0.0
    total = query.unsqueeze(2) + key.unsqueeze(1) + features(pasts, linear)
    inner = u * (2 * (query.abs().unsqueeze(2) + key.abs().unsqueeze(1)) + roots * size)  # error of the sum
    tanh = total.tanh()
    slope = 1 - tanh.square()
    score_error = abs(case.scale) * (u * (36 * v.norm() + 4 * v.abs().sum()) + (slope * inner) @ v.abs())
    score_error = score_error.masked_fill(~visible, 0.0)

    # The weights: the logarithm of each, by any of the rules, moves no more than the scores do.
    weights = exact["weights"]
    p_error = score_error + (weights * score_error).sum(-1, keepdim=True) + roots * u
    dropped = reference.dropout_keep(inputs.seed, weights.shape, case.dropout_p).double() / (1 - case.dropout_p)
    vanishing = 8 * torch.finfo(_arithmetic(case)).smallest_normal
    error = weights * p_error + vanishing
    grad = inputs.grads["context"].double()
    incoming, product = dropped * (grad @ value.mT), dropped * (grad.abs() @ value.abs().mT)
    if case.weights:
        incoming, product = (
            incoming + inputs.grads["weights"].double(),
            product + inputs.grads["weights"].double().abs(),
        )
    delta = (weights * incoming).sum(-1, keepdim=True)
    delta_error = ((error + roots * u * weights) * product).sum(-1, keepdim=True)
    ds = (weights * (incoming - delta)).abs()
    ds_error = p_error * ds + vanishing * product + weights * (roots * u * product + delta_error)
    results = {
        "context": (dropped * (error + roots * u * weights)) @ value.abs(),
        "weights": error,
        "grad value": (dropped * (error + roots * u * weights)).mT @ grad.abs(),
    }
    if case.rule == "forward":
        results |= _forward_tolerances(inputs, exact, ds_error + 8 * u * ds)
    if case.rule == "sigmoid":  # times 1 - sigmoid, whose error is at most a quarter of the score's
        ds_error = ds_error + ds * (score_error + 4 * u)
    ds, ds_error = ds * abs(case.scale), ds_error * abs(case.scale)
    of_sum = v.abs() * (  # the gradient of the sum inside the tanh
        slope * (ds_error + roots * u * ds).unsqueeze(-1) + ds.unsqueeze(-1) * (24 * u + 2 * slope * inner)
    )
    of_tanh = ds_error.unsqueeze(-1) * tanh.abs() + ds.unsqueeze(-1) * ((12 + roots) * u + slope * inner)
    results |= {
        "grad query": of_sum.sum(2),
        "grad key": of_sum.sum(1),
        "grad score_weight": of_tanh.sum((0, 1, 2)),
    }
    if isinstance(feature_sizes, Tensor):
        terms = case.batch * case.queries * case.keys
        of_features = of_sum + (roots + terms**0.5) * u * v.abs() * slope * ds.unsqueeze(-1)
        leaves = [*sizes[1], *sizes[0]]
        found = torch.autograd.grad(feature_sizes, leaves, of_features, materialize_grads=True)
        names = ["filters", "projection"][: len(linear)] + ["past", "second_past"][: len(pasts)]
        results |= {f"grad {name}": x for name, x in zip(names, found, strict=True)}
    return results


def _forward_tolerances(inputs: Inputs, exact: Mapping[str, Tensor], ds_error: Tensor) -> dict[str, Tensor]:
    """Of the gradients of the last weights and the transition: ds over what the rule multiplies y by."""
    visible = reference.valid_slots(inputs.query, inputs.key, inputs.lengths, inputs.mask)
    assert inputs.previous is not None
    before = inputs.previous.double().masked_fill(~visible, 0.0)
    move = torch.ones_like(before[..., :1]) if inputs.transition is None else inputs.transition.double()
    stay = 1 - move if inputs.transition is not None else move
    moved = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], -1) if before.numel() else before
    of_mix = torch.where(exact["weights"] > 0, ds_error / (stay * before + move * moved), 0.0)
    of_next = torch.cat([of_mix[..., 1:], torch.zeros_like(of_mix[..., :1])], -1)
    return {
        "grad previous": stay * of_mix + move * of_next,
        "grad transition": (of_mix * (before + moved)).sum(-1, keepdim=True),
    }


def _dot_tolerances(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """A running sum of the terms of a score is about as large as their norm, or as the score where they agree."""
    u = _roundoff(case)
    query, key = (getattr(inputs, name).double().nan_to_num() for name in ("query", "key"))
    scores = case.scale * (query @ key.transpose(1, 2))
    norm = abs(case.scale) * (query.square() @ key.square().transpose(1, 2)).sqrt()
    visible = reference.valid_slots(query, key, inputs.lengths, inputs.mask)
    # The largest score of a row is its shift, and the size of its log-sum-exp.
    largest = scores.abs().masked_fill(~visible, 0.0).amax(-1, keepdim=True) if case.keys else 0.0
    score_error = u * ((4 + case.features**0.5) * (3 * norm + scores.abs()) + 4 * largest)
    ds, ds_error, result = _softmax_tolerances(case, inputs, scores, score_error)
    ds, ds_error = ds * abs(case.scale), ds_error * abs(case.scale)
    of_query = (ds_error + (4 + case.keys**0.5) * u * ds) @ key.abs()
    of_key = (ds_error + (4 + case.queries**0.5) * u * ds).transpose(1, 2) @ query.abs()
    of_value = result["grad value"]
    return result | {"grad query": of_query, "grad key": of_key + of_value if case.shared else of_key}


def _arithmetic(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == torch.float64 else torch.float32


def _roundoff(case: Case) -> float:
    return torch.finfo(_arithmetic(case)).eps / 2


def _softmax_tolerances(
    case: Case, inputs: Inputs, scores: Tensor, score_error: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of attention: |ds|, its error, and the tolerances of context, weights and the value's gradient."""
    u, info = _roundoff(case), torch.finfo(case.dtype)
    out, least = info.eps / 2, info.smallest_normal * info.eps  # of a result's rounding, relative and absolute
    value = inputs.value.double().nan_to_num()
    root_queries, root_keys, root_values = case.queries**0.5, case.keys**0.5, case.values**0.5
    visible = reference.valid_slots(inputs.query, inputs.key, inputs.lengths, inputs.mask)
    empty = ~visible.any(-1, keepdim=True)
    p = scores.masked_fill(~visible & ~empty, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
    # A score's own error, and those of all that it is weighed against.
    p_error = score_error + (p * score_error).sum(-1, keepdim=True) + (8 + root_keys) * u
    dropped = reference.dropout_keep(inputs.seed, p.shape, case.dropout_p).double() / (1 - case.dropout_p)
    kept = p * dropped
    grad = inputs.grads["context"].double()
    incoming, product = grad @ value.transpose(1, 2), grad.abs() @ value.abs().transpose(1, 2)
    context = kept @ value
    size = kept @ value.abs()
    # delta = dC . C + dA . A, from results that were rounded to their dtype.
    rounding = ((grad * (out * context.abs() + least + (4 + root_keys) * u * size)) ** 2).sum(-1, keepdim=True)
    if case.weights:
        grad_weights = inputs.grads["weights"].double()
        incoming, product = incoming + grad_weights, product + grad_weights.abs()
        rounding = rounding + ((grad_weights * (out * kept + least)) ** 2).sum(-1, keepdim=True)
    vanishing = 8 * torch.finfo(_arithmetic(case)).smallest_normal * dropped  # a weight as small as that may be 0
    kept_error = kept * p_error + vanishing
    of_sums = (product * (kept_error + (4 + root_values) * u * kept)).sum(-1, keepdim=True)
    delta_error = 3 * rounding.sqrt() + of_sums
    ds = (p * (dropped * incoming - (kept * incoming).sum(-1, keepdim=True))).abs()
    ds_error = p_error * ds + vanishing * product + p * (dropped * (4 + root_values) * u * product + delta_error)
    return ds, ds_error, {
        "context": (kept_error + (4 + root_keys) * u * kept) @ value.abs(),
        "weights": kept_error,
        "grad value": (kept_error + (4 + root_queries) * u * kept).transpose(1, 2) @ grad.abs(),
    }  # fmt: skip
