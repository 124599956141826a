"""Draws calls of every function and module, and holds them to formulas of their own.

    python tests/fuzz.py [--cases 20000] [--seed SEED] [--family kernels] [--backend cpu] [--library CUDA_ON_CPU]

Hypothesis draws a case, which is a line to read, and shrinks one that is off. The tensors come from the case's seed.
What is right is in ``formulas.py``; how far a result may lie from it says ``attnext.cases``, by the arithmetic.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import formulas
import torch
from fuzz_modules import FAMILIES as OF_MODULES
from fuzz_modules import Shortly
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import attnext
from attnext import _extension, reference
from attnext.cases import INPUTS, PAST_INPUTS, Case, Inputs, draw, tolerances
from attnext.memory import Memory

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EDGES = (1, 2, 3, 5, 8, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 63, 64, 65, 67)
"""Around the tiles of the kernels, and primes."""
LAYOUTS = ("as it is", "transposed", "sliced", "shifted", "expanded")
LEAST = {torch.float32: 2.0**-103, torch.float64: 2.0**-970}
"""Up to which a key counts as out of the reach of forward attention."""
_EXTENSION = _extension.load()
INSTRUCTION_SETS = tuple(_EXTENSION.instruction_sets()) if _EXTENSION else ("",)


@contextmanager
def as_drawn(instruction_set: str, threads: int) -> Iterator[None]:
    """By these instructions, if any, on so many threads."""
    before = torch.get_num_threads(), _EXTENSION.instruction_set() if _EXTENSION else ""
    torch.set_num_threads(threads)
    if _EXTENSION and instruction_set:
        _EXTENSION.set_instruction_set(instruction_set)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if _EXTENSION:
            _EXTENSION.set_instruction_set(before[1])


# A call of a kernel.


@dataclass(frozen=True, repr=False)
class Drawn(Shortly):
    """A case of ``attnext.cases``, and what it has not got."""

    case: Case
    seed: int = 0
    instruction_set: str = INSTRUCTION_SETS[0]
    threads: int = 1
    layouts: tuple[str, ...] = ("as it is",) * 3
    """Of inputs in turn, and of incoming gradients."""
    asked: int = 2**10 - 1
    """Bits: the inputs whose gradients are asked for."""
    incoming: str = "both"
    """``both``, or ``context`` or ``weights`` alone."""
    memory: str = ""
    """``prepared``, then perhaps ``with_mask`` or ``with_lengths``: hidden after that."""
    steps: bool = False
    """A memory's queries one by one, so that their gradients are gathered."""
    exponents: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Powers of ten of query, key, value and incoming gradients."""
    hidden: float = 0.0
    """What stands in hidden slots, or 0 for numbers."""
    bad: tuple[tuple[str, float], ...] = ()
    """Inputs with one number replaced."""


def _case(pick: Callable[[Any], Any], dtypes: tuple[torch.dtype, ...]) -> Case:
    """Its sizes and flags; ``pick`` draws of a strategy."""

    def one_of(*x: Any) -> Any:
        return pick(st.sampled_from(x))

    def flag() -> bool:
        return bool(pick(st.booleans()))

    op = one_of("attention", "scores", "dot", "past")
    sizes = {name: one_of(*EDGES) for name in ("keys", "features", "values")}
    if pick(st.integers(0, 19)) == 19:
        sizes[one_of(*sizes)] = 0
    if op in ("dot", "attention", "scores") and sizes["features"] == 0:
        sizes["features"] = 1  # a product of nothing is refused
    case = Case(
        op, batch=one_of(1, 2, 3, 0), queries=one_of(1, 1, 2, 5, 16, 17, 33), **sizes, dtype=one_of(*dtypes),
        lengths=flag(), mask=one_of("", "keys", "slots"), scale=one_of(1.0, 0.3, -2.0, 8.0),
        weights=op != "scores" and flag(), dropout_p=one_of(0.0, 0.0, 0.1, 0.9, 1.0) if op != "scores" else 0.0,
    )  # fmt: skip
    if op == "past":
        return _with_past(replace(case, queries=min(case.queries, 5)), one_of, flag)
    if op == "dot" and flag():
        case = replace(case, shared=True, values=case.features)
    if op != "dot" and pick(st.integers(0, 3)) == 3:
        case = replace(case, heads=2, batch=case.batch // 2 * 2)
    return replace(case, flat=case.queries == 1 and case.mask != "slots" and flag())


def _with_past(case: Case, one_of: Any, flag: Any) -> Case:
    rule = one_of("softmax", "sigmoid", "forward")
    return replace(
        case, features=max(case.features, 1), mask="keys" if case.mask else "", channels=one_of(0, 1, 2),
        filters=one_of(0, 1, 3, 10, 17), width=one_of(1, 3, 5, 17, 31), rule=rule,
        agent=rule == "forward" and flag(), window=flag(), flat=case.queries == 1 and flag(),
    )  # fmt: skip


@st.composite
def calls(pick: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Drawn:
    case = _case(pick, dtypes)
    ways = ("", "prepared", "with_mask", "with_lengths")  # the last two take a row for a sentence, not for a head
    memory = pick(st.sampled_from(ways[:2] if case.heads else ways)) if case.mask != "slots" else ""
    if case.op == "past" and not memory:
        memory = "prepared"
    asked = pick(st.one_of(st.just(2**10 - 1), st.integers(1, 2**10 - 1)))
    # What is not gathered is rounded to a half type at each step.
    gathered = case.dtype in LEAST or (case.op in ("attention", "dot") and asked >> 1 & 1)
    several = memory and 1 < case.queries <= 5 and case.dropout_p == 0.0
    steps = bool(several and gathered and pick(st.booleans()))
    most, exponent = (3 if case.dtype == torch.float16 else 30), st.integers
    query, key = (pick(st.one_of(st.just(0), exponent(-most, most))) for _ in range(2))
    value, grads = pick(st.one_of(st.just(0), exponent(-most, most))), pick(st.sampled_from((0, 0, 0, -3, 3)))
    if case.op == "dot":  # with a scale that leaves weights of several keys, or of one alone
        query, key, value = (max(-10, min(10, x)) for x in (query, key, value))
        value = key if case.shared else value
        sharp = pick(st.sampled_from((0.1, 1.0, 10.0)))
        case = replace(case, scale=sharp * 10.0 ** -(query + key) / max(case.features, 1) ** 0.5)
    elif case.op == "past":
        key = query  # whose sum's roundings the tolerances know
    names = ("query", "key", "value", "score_weight", "past", "previous")
    bad = st.lists(st.tuples(st.sampled_from(names), st.sampled_from((NAN, INF, -INF))), min_size=1, max_size=2)
    return Drawn(
        case, pick(st.integers(0, 2**20)), pick(st.sampled_from(INSTRUCTION_SETS)), pick(st.integers(1, 3)),
        tuple(pick(st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3))),
        asked,
        pick(st.sampled_from(("both", "context", "weights"))) if case.weights else "both",
        memory, steps, (query, key, value, grads), pick(st.sampled_from((0.0, NAN, INF, -INF))),
        tuple(pick(st.one_of(st.just([]), st.just([]), bad))),
    )  # fmt: skip


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers otherwise in memory; expanded, those of the first row for all."""
    if x.numel() == 0 or layout == "as it is":
        return x
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.dim() > 1 else x[:1].expand(len(x))
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # every second number of a larger row
        return torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2]
    shifted = torch.full((x.numel() + 1,), NAN, dtype=x.dtype)  # off what a vector is aligned to
    shifted[1:] = x.flatten()
    return shifted[1:].view(x.shape)


def tensors(drawn: Drawn) -> Inputs:
    """Those of a case, scaled, with what is bad put in, and laid out."""
    case, x = drawn.case, draw(drawn.case, drawn.seed)
    rng = torch.Generator().manual_seed(drawn.seed)
    for name, power in zip(("query", "key", "value"), drawn.exponents, strict=False):
        setattr(x, name, (getattr(x, name).double() * 10.0**power).to(case.dtype))
    x.grads = {name: (y.double() * 10.0 ** drawn.exponents[3]).to(y.dtype) for name, y in x.grads.items()}
    if drawn.incoming == "weights":
        x.grads["context"] = torch.zeros_like(x.grads["context"])
    elif drawn.incoming == "context":
        x.grads["weights"] = torch.zeros_like(x.grads["weights"])
    if x.previous is not None:  # some keys out of the reader's reach
        x.previous *= torch.rand(x.previous.shape, generator=rng) < 0.7
    names = [name for name in (*INPUTS, *PAST_INPUTS[:2]) if isinstance(getattr(x, name), Tensor)]
    for number, name in enumerate(names):
        layout = drawn.layouts[number % 2]
        if layout == "expanded" and name in INPUTS[:3]:
            setattr(x, name, laid_out(getattr(x, name), layout).contiguous())  # the numbers; laid out below
    visible = formulas.shown(case.batch, case.queries, case.keys, x.lengths, x.mask)
    _put(drawn, x, visible, rng)
    for number, name in enumerate(names):
        layout = drawn.layouts[number % 2]
        apart = layout == "expanded" and (drawn.hidden or drawn.bad or name not in INPUTS[:3])
        setattr(x, name, laid_out(getattr(x, name), "as it is" if apart else layout))
    if case.shared:
        x.value = x.key
    x.grads = {name: laid_out(y, drawn.layouts[2]) for name, y in x.grads.items()}
    return x


def _put(drawn: Drawn, x: Inputs, visible: Tensor, rng: torch.Generator) -> None:
    """What is not finite: in slots that are hidden from all, and one number of each input that is bad."""
    if drawn.hidden:
        nobody = ~visible.any(1)
        for name in ("key", "value"):
            getattr(x, name)[nobody] = drawn.hidden
        for y in (x.past, x.second_past, x.previous):
            if y is not None:
                y[nobody[:, None].expand(y.shape)] = drawn.hidden
    for name, bad in drawn.bad:
        y = getattr(x, name)
        if y is not None and y.numel():  # infinite weights may count as NaN
            put = NAN if name in PAST_INPUTS else bad
            y.view(-1)[int(torch.randint(y.numel(), (), generator=rng))] = put


# What is right, and what is found.


def leaves_of(drawn: Drawn, x: Inputs, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The inputs that the op reads, those whose gradients are asked for as leaves."""
    case = drawn.case
    unread = {"scores": ["value"], "dot": ["score_weight"] + ["value"] * case.shared}.get(case.op, [])
    found = {name: getattr(x, name) for name in (*INPUTS, *PAST_INPUTS) if name not in unread}
    return {
        name: (y if dtype is None else y.to(dtype)).detach().requires_grad_(bool(drawn.asked >> bit & 1))
        for bit, (name, y) in enumerate(found.items())
        if y is not None
    }


def with_gradients(
    drawn: Drawn, x: Inputs, outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The outputs, and the gradients that are asked for, of the incoming ones."""
    wanted = {name: y for name, y in leaves.items() if y.requires_grad}
    comes = {
        name: y
        for name, y in outputs.items()
        if name in x.grads and drawn.incoming in ("both", name) and y.requires_grad
    }
    found = {name: y.detach() for name, y in outputs.items()}
    if not wanted or not comes:
        return found
    grads = torch.autograd.grad(
        list(comes.values()), list(wanted.values()), [x.grads[name].to(y.dtype) for name, y in comes.items()],
        materialize_grads=True,
    )  # fmt: skip
    return found | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def exact(drawn: Drawn, x: Inputs) -> dict[str, Tensor]:
    """By the formulas."""
    case, leaves = drawn.case, leaves_of(drawn, x, torch.float64)
    visible = formulas.shown(case.batch, case.queries, case.keys, x.lengths, x.mask)
    keep = torch.ones(visible.shape, dtype=torch.float64)
    if case.dropout_p > 0.0:
        kept = reference.dropout_keep(x.seed, visible.shape, case.dropout_p).double()
        keep = kept / (1 - case.dropout_p) if case.dropout_p < 1.0 else kept * 0.0
    query, key = leaves["query"], leaves["key"]
    value, v = leaves.get("value", key), leaves.get("score_weight")
    if case.op == "past":
        past = [leaves[name] for name in ("past", "second_past") if name in leaves]
        slots = torch.arange(case.keys)
        attended = visible
        if x.window is not None:
            attended = visible & (slots >= x.window[..., :1]) & (slots < x.window[..., 1:])
        assert v is not None
        context, weights = formulas.step(
            query, key, value, v, leaves.get("filters"), leaves.get("projection"), past, visible, attended,
            case.scale, case.rule, leaves.get("previous"), leaves.get("transition"), keep,
            LEAST[torch.promote_types(case.dtype, torch.float32)],
        )  # fmt: skip
        return with_gradients(drawn, x, {"context": context, "weights": weights}, leaves)
    context, weights, scores = formulas.attention(query, key, value, v, visible, case.scale, keep)
    outputs = {"scores": scores} if case.op == "scores" else {"context": context, "weights": weights}
    if case.op != "scores" and not case.weights:
        del outputs["weights"]
    return with_gradients(drawn, x, outputs, leaves)


def found_by(drawn: Drawn, x: Inputs, backend: str | None) -> dict[str, Tensor]:
    """By the backend, through the public functions."""
    case, leaves = drawn.case, leaves_of(drawn, x, None)
    key, others = _attended(drawn, x, leaves)

    def one(i: int | None) -> dict[str, Tensor]:
        def of(y: Tensor | None) -> Any:
            return y if y is None or i is None else y[:, i]

        return _call(drawn, x, {name: of(y) if name in OF_QUERY else y for name, y in leaves.items()}, key, others,
                     of(x.window), backend)  # fmt: skip

    if drawn.steps:
        parts = [one(i) for i in range(case.queries)]
        outputs = {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}
    else:
        outputs = one(0 if case.flat else None)
        outputs = {name: y.unsqueeze(1) if case.flat else y for name, y in outputs.items()}
    return with_gradients(drawn, x, outputs, leaves)


OF_QUERY = ("query", "past", "second_past", "previous", "transition")


def _attended(drawn: Drawn, x: Inputs, leaves: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What stands in the place of the keys, and the arguments beside it."""
    hides: dict[str, Any] = {"lengths": x.lengths, "mask": x.mask}
    others = {name: leaves.get(name) for name in ("value", "score_weight")}
    if not drawn.memory:
        return leaves["key"], {**others, **hides}
    after = drawn.memory.removeprefix("with_")
    late = hides.pop(after, None)
    memory = attnext.prepare(leaves["key"], _or_key(drawn, leaves), others["score_weight"], **hides)
    if late is not None:
        memory = memory.with_mask(late) if after == "mask" else memory.with_lengths(late)
    return memory, {}


def _or_key(drawn: Drawn, leaves: Mapping[str, Tensor]) -> Tensor | None:
    """The value; of scores, which have none, the keys."""
    return leaves.get("value", leaves["key"] if drawn.case.op == "scores" else None)


def _call(
    drawn: Drawn, x: Inputs, leaves: Mapping[str, Any], key: Any, others: dict[str, Any], window: Tensor | None,
    backend: str | None,
) -> dict[str, Tensor]:  # fmt: skip
    case, query = drawn.case, leaves["query"]
    options: dict[str, Any] = {"scale": case.scale, "backend": backend}
    if case.op == "scores":
        others = {name: y for name, y in others.items() if name != "value"}
        return {"scores": attnext.additive_scores(query, key, **others, **options)}
    options["dropout_p"] = case.dropout_p
    torch.manual_seed(drawn.seed)  # by which dropout draws the seed of its hash
    if case.op == "past":
        assert isinstance(key, Memory)
        past = [leaves[name] for name in ("past", "second_past") if name in leaves]
        context, weights = attnext.additive_step(
            query, key, leaves.get("filters"), leaves.get("projection"), past, rule=case.rule, window=window,
            previous=leaves.get("previous"), transition=leaves.get("transition"), **options,
        )  # fmt: skip
        return {"context": context, "weights": weights}
    attend: Any = attnext.dot_attention if case.op == "dot" else attnext.additive_attention
    if case.op == "dot":
        others.pop("score_weight", None)
    found, of_slots = attend(query, key, **others, **options, need_weights=case.weights)
    return {"context": found} | ({"weights": of_slots} if case.weights else {})


# How far apart they may be.


def bounds(drawn: Drawn, x: Inputs, right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tolerances of ``attnext.cases``, and what is lost below the smallest normal number.

    A product below it is off by its last place, or 0: by so much each of the terms of a sum, times what follows.
    """
    case = drawn.case
    within = tolerances(case, x, dict(right))
    info = torch.finfo(torch.promote_types(case.dtype, torch.float32))
    terms = case.batch * max(case.queries, 1) * (case.keys + case.features + case.values + 1)
    lost = 16 * terms * info.smallest_normal
    grad, value = max(map(largest, x.grads.values())), largest(x.value)
    inner = abs(case.scale) * (largest(x.query) * largest(x.key) if case.op == "dot" else largest(x.score_weight))
    factors = {"weights": 1.0, "scores": inner, "context": value, "grad value": grad}
    within = {
        name: y + lost * max(factors.get(name, grad * value * max(inner, 1.0)), 1.0) for name, y in within.items()
    }
    if "grad previous" in within:  # where the reader stays, that of the weights
        of_weights = x.grads["context"].double().abs() @ x.value.double().abs().nan_to_num().mT
        within["grad previous"] = within["grad previous"] + 256 * info.eps * (
            of_weights + largest(x.grads.get("weights"))
        )
    return {name: y.nan_to_num(INF, INF) for name, y in within.items()}


def largest(x: Tensor | None) -> float:
    """Of the finite numbers."""
    return 0.0 if x is None or not x.numel() else float(x.double().abs().nan_to_num(0.0, 0.0).max())


def kinds(x: Tensor) -> Tensor:
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def off(drawn: Drawn, backend: str | None = None) -> list[str]:
    """What a backend gives that is not right; a line each."""
    x = tensors(drawn)
    if drawn.case.dropout_p > 0.0:  # what a call draws after its seed was set
        torch.manual_seed(drawn.seed)
        x.seed = torch.randint(2**62, ())
    right, found = exact(drawn, x), found_by(drawn, x, backend)
    within = bounds(drawn, x, right)
    wide = torch.promote_types(drawn.case.dtype, torch.float32)
    lines = []
    for name, y in right.items():
        a = found.get(name)
        of_arithmetic = drawn.case.op == "past" and name.removeprefix("grad ") in ("weights", *PAST_INPUTS[2:])
        if a is None or a.shape != y.shape or a.dtype != (wide if of_arithmetic else drawn.case.dtype):
            lines.append(f"{name}: {None if a is None else (a.dtype, tuple(a.shape))}, not {tuple(y.shape)}")
        elif a.numel() and (what := _apart(drawn, x, name, a, y, within[name], right)):
            lines.append(f"{name}: {what}")
    return lines


def _apart(
    drawn: Drawn, x: Inputs, name: str, found: Tensor, right: Tensor, within: Tensor, all_right: Mapping[str, Tensor]
) -> str:
    rounded = right.to(found.dtype)  # beyond the largest half it is infinite
    a, b = (kinds(y) for y in (found, rounded))
    largest_right = right.abs().nan_to_num(0.0, 0.0) + torch.where(within < INF, within, 0.0)
    sure = ~(largest_right > torch.finfo(found.dtype).max) | ~right.isfinite()  # whether it is infinite
    if name == "context":
        sure &= ~_uncertain(drawn, x, right)
    elif "grad" in name:
        if any(_leaves_open(drawn.case, *bad) for bad in drawn.bad) or (
            "context" in all_right and _uncertain(drawn, x, all_right["context"]).any()
        ):
            return ""
        a, b = a.bool(), b.bool()
    other = (a != b) & sure
    if other.any():
        return f"{int(other.sum())} of {b.numel()} are not of the same kind, as {_first(found, rounded, other)}"
    both = sure & found.isfinite() & rounded.isfinite()
    error = torch.where(both, (found.double() - right).abs() / within, 0.0)
    worst = float(error.max())
    return "" if worst <= 1 else f"{worst:.3g} tolerances, {_first(found, right, error > 1)}"


def _leaves_open(case: Case, name: str, bad: float) -> bool:
    """Whether what gradients are beside it is left open; of forward attention by weights of 0, out of reach."""
    return name == "score_weight" or case.rule == "forward" or (abs(bad) == INF and case.op == "dot")


def _first(found: Tensor, right: Tensor, where: Tensor) -> str:
    at = torch.nonzero(where)[0].tolist()
    return f"{float(found[tuple(at)]):.9g} for {float(right[tuple(at)]):.9g} at {at}"


def _uncertain(drawn: Drawn, x: Inputs, context: Tensor) -> Tensor:
    """Where the context has a value that is not finite by a weight that may be 0: dropped, or too small."""
    bad = ~(x.key if drawn.case.shared else x.value).isfinite()
    if not drawn.bad and not drawn.hidden:
        return torch.zeros_like(context, dtype=torch.bool)
    case = drawn.case
    visible = formulas.shown(case.batch, case.queries, case.keys, x.lengths, x.mask)
    weights = exact(replace(drawn, asked=0, case=replace(case, weights=True)), x)["weights"]
    dropped = ~reference.dropout_keep(x.seed, visible.shape, case.dropout_p)
    small = visible & (dropped | ~(weights.abs() > 1e-30))
    return (small.double() @ bad.double()) > 0


# A family is how its cases are drawn, and what is off with one.

KERNELS = "kernels"


class Family(NamedTuple):
    """Attributes:
    share: of all cases.
    """

    cases: st.SearchStrategy[Any]
    off: Callable[[Any], list[str]]
    share: float


def families(backend: str | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, Family]:
    found = {KERNELS: Family(calls(dtypes), lambda drawn: off(drawn, backend), 0.5)}
    if backend is None:
        found |= {name: Family(cases, of, share) for name, (cases, of, share) in OF_MODULES.items()}
    return found


def run(family: Family, cases: int, number: int | None) -> None:
    """Raises for a case that is off, as small as it may be. Without a seed the cases are the same each time."""

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=number is None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), print_blob=False,
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(drawn=family.cases)
    def hold(drawn: Any) -> None:
        with as_drawn(getattr(drawn, "instruction_set", ""), getattr(drawn, "threads", 1)):
            lines = family.off(drawn)
        assert not lines, "\n".join([str(drawn), *lines])

    (hold if number is None else seed(number)(hold))()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--family", default="", help=f"one of {', '.join(families())}")
    parser.add_argument("--backend", default=None, help="of the kernels' family")
    parser.add_argument("--library", default="", help="the CUDA kernels for the CPU")
    options = parser.parse_args()
    if options.library:
        from cuda_cases import serve_cuda_on_cpu

        serve_cuda_on_cpu(options.library)
    number = secrets.randbits(32) if options.seed is None else options.seed
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    if _EXTENSION is not None:
        _EXTENSION.set_poison(True)
    of_backend = families(
        options.backend, DTYPES if options.backend in (None, "cpu", "triton") else (*DTYPES[:1], *DTYPES[2:])
    )
    chosen = {name: one for name, one in of_backend.items() if options.family in ("", name)}
    whole = sum(one.share for one in chosen.values())
    print(f"seed {number}", flush=True)
    for name, one in chosen.items():
        count, start = round(options.cases * one.share / whole), time.perf_counter()
        run(one, count, number)
        print(f"{name}: {count} cases held, {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
