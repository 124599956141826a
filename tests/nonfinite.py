"""NaN and infinity on a backend: what they give in slots that are seen, and that they give nothing in hidden ones.

    python tests/nonfinite.py triton
    python tests/nonfinite.py cuda LIBRARY

The rule is in the documentation of :func:`attnext.additive_attention`. Each sentence of a batch has other numbers put
in another place, so that a call of an operator shows many at once, and that none reaches another sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnext
from attnext import reference

NAN, INF = float("nan"), float("inf")
KEYS, FEATURES, VALUES = 9, 6, 5
SEEN, LENGTH, MASKED = 3, 7, 5
"""A key that is always seen; how many there are; one of these that a mask hides."""

Place = tuple[str, Any, float]
"""The name of an input, where in a sentence of it, and what is put there."""


def _sentences() -> dict[str, list[Place]]:
    """What is put into each sentence, by what it is called."""
    found: dict[str, list[Place]] = {"nothing": []}
    for bad in (NAN, INF, -INF):
        found |= {
            f"{bad} in a query": [("query", (0, 2), bad)],
            f"{bad} in a key": [("key", (SEEN, 2), bad)],
            f"{bad} in all of a key": [("key", SEEN, bad)],
            f"{bad} in keys": [("key", slice(0, LENGTH), bad)],
            f"{bad} in a value": [("value", (SEEN, 1), bad)],
            f"{bad} in hidden slots": [
                (name, slot, bad) for name in ("key", "value") for slot in (slice(LENGTH, KEYS), MASKED)
            ],
            f"{bad} in a past": [("past", (..., SEEN), bad)],
            f"{bad} in the last weights": [("previous", (..., SEEN), bad)],
            f"{bad} in the hidden past": [
                (name, (..., slot), bad) for name in ("past", "previous") for slot in (slice(LENGTH, KEYS), MASKED)
            ],
            f"{bad} in a transition": [("transition", ..., bad)],
        }
    found["inf in a query and -inf in a key"] = [("query", (0, 2), INF), ("key", (SEEN, 2), -INF)]
    found["infinities of both signs in a query"] = [("query", (0, 2), INF), ("query", (0, 3), -INF)]
    found["infinities of both signs in values"] = [("value", (SEEN, 1), INF), ("value", (0, 1), -INF)]
    return found


SENTENCES = _sentences()
HIDDEN = [number for number, name in enumerate(SENTENCES) if "hidden" in name]


@dataclass(frozen=True)
class Call:
    """An op and how it is called."""

    op: str
    queries: int = 2
    hides: str = ""
    """``lengths``, ``keys`` (a mask of them), or ``slots`` (of each query's own)."""
    rule: str = "softmax"
    prepared: bool = False
    weight: float = 1.0
    """In place of a number of the score weight."""

    def __str__(self) -> str:
        rest = [self.hides, self.rule * (self.rule != "softmax"), "prepared" * self.prepared]
        rest.append(f"v={self.weight}" if self.weight != 1.0 else "")
        return " ".join([self.op, str(self.queries), *filter(None, rest)])


def _calls() -> list[Call]:
    found = []
    for op in ("attention", "scores", "dot", "shared"):
        for queries in (1, 2):
            found += [Call(op, queries, hides) for hides in ("", "lengths", "keys")]
        found.append(Call(op, 2, "slots"))
        found += [Call(op, 1, hides, prepared=True) for hides in ("", "lengths", "keys")]
    for rule in ("softmax", "sigmoid", "forward"):
        found += [Call("past", 1, hides, rule) for hides in ("", "lengths", "keys")]
    found += [Call(op, n, weight=bad) for bad in (NAN, INF, -INF)
              for op, n in (("attention", 1), ("attention", 2), ("scores", 2), ("past", 1))]  # fmt: skip
    return found


CALLS = _calls()
INPUTS = {
    "attention": ("query", "key", "value", "v"),
    "scores": ("query", "key", "v"),
    "dot": ("query", "key", "value"),
    "shared": ("query", "key"),
    "past": ("query", "key", "value", "v", "filters", "projection", "past", "previous", "transition"),
}


def inputs(call: Call, clean: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a call, with what belongs into each sentence if they are not to be clean."""
    rng = torch.Generator().manual_seed(1)
    rows = len(SENTENCES)
    sizes = {"query": (rows, call.queries, FEATURES), "key": (rows, KEYS, FEATURES), "value": (rows, KEYS, VALUES),
             "v": (FEATURES,), "filters": (3, 1, 3), "projection": (FEATURES, 3)}  # fmt: skip
    x = {name: torch.randn(size, generator=rng) / 2 for name, size in sizes.items()}
    of_past = {"past": (rows, call.queries, KEYS), "previous": (rows, call.queries, KEYS)}
    x |= {name: torch.rand(size, generator=rng) for name, size in of_past.items()}
    x["transition"] = torch.rand(rows, call.queries, 1, generator=rng)
    if call.weight != 1.0:
        x["v"][2] = call.weight
    for number, places in enumerate(SENTENCES.values()):
        for name, where, bad in places if not clean else ():
            x[name][number][where] = bad
    of_weights, of_rule = ("past", "previous", "transition"), ("previous", "transition") * (call.rule != "forward")
    return {
        name: (y.squeeze(1) if call.queries == 1 and name in ("query", *of_weights) else y).to(
            torch.float32 if name in of_weights and dtype != torch.float64 else dtype
        )
        for name, y in x.items()
        if name in INPUTS[call.op] and name not in of_rule
    }


def slots(call: Call) -> dict[str, Tensor]:
    rows = len(SENTENCES)
    if call.hides == "lengths":
        return {"lengths": torch.full((rows,), LENGTH)}
    if not call.hides:
        return {}
    shown = torch.arange(KEYS) < LENGTH
    shown[MASKED] = False
    if call.hides == "keys":
        return {"mask": shown.expand(rows, -1)}
    by_query = shown.expand(rows, call.queries, -1).clone()
    by_query[:, 1, SEEN] = False  # seen by the first query alone
    return {"mask": by_query}


def results(call: Call, x: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """What a backend gives, and the gradients of its inputs."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    with attnext.use_backend(backend):
        found = called(call, leaves, slots(call))
    rng = torch.Generator().manual_seed(2)
    grads = [torch.randn(y.shape, generator=rng).to(y.dtype) for y in found.values()]
    of_inputs = torch.autograd.grad(list(found.values()), list(leaves.values()), grads, materialize_grads=True)
    named = {f"grad {name}": y for name, y in zip(leaves, of_inputs, strict=True)}
    return {name: y.detach() for name, y in found.items()} | named


def called(call: Call, x: dict[str, Tensor], hidden: dict[str, Any]) -> dict[str, Tensor]:
    key: Any = x["key"]
    others = [x[name] for name in ("value", "v") if name in x and call.op != "past"]
    if call.prepared or call.op == "past":
        key, hidden, others = attnext.prepare(key, x.get("value"), x.get("v"), **hidden), {}, []
    if call.op == "past":
        more: dict[str, Any] = {name: x.get(name) for name in ("previous", "transition")}
        past = (x["filters"], x["projection"], x["past"])
        return dict(zip(("context", "weights"), attnext.additive_step(x["query"], key, *past, rule=call.rule, **more),
                        strict=True))  # fmt: skip
    if call.op == "scores":
        return {"scores": attnext.additive_scores(x["query"], key, *others, **hidden)}
    attend: Callable[..., Any] = attnext.additive_attention if call.op == "attention" else attnext.dot_attention
    return dict(zip(("context", "weights"), attend(x["query"], key, *others, **hidden, need_weights=True), strict=True))


def kinds(x: Tensor) -> Tensor:
    """1 for NaN, 2 for infinity, 3 for minus infinity, and 0 for numbers."""
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def _open(call: Call, name: str, sentence: str) -> bool:
    """Whether the rule leaves a gradient open: of infinite numbers in dot products, and of infinite last weights."""
    if "grad" not in name or "inf" not in sentence:
        return False
    if call.op in ("dot", "shared"):
        return "hidden" not in sentence
    return call.rule == "forward" and (
        "last weights" in sentence or ("hidden past" in sentence and call.hides != "keys")
    )


def _uncertain(call: Call, x: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Numbers of the context that a visible value which is not finite reaches by a weight of 0, or does not."""
    value = x["value"] if "value" in x else x["key"]
    hides = slots(call)
    shown = reference.valid_slots(x["key"], x["key"], hides.get("lengths"), hides.get("mask"))
    zero = (weights.view(*value.shape[:1], -1, KEYS) == 0) & shown
    return ((zero.double() @ (~value.isfinite()).double()) > 0).view(*weights.shape[:-1], -1)


def departures(call: Call, backend: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Where a backend departs from the rule."""
    given = inputs(call, False, dtype)
    found = results(call, given, backend)
    wide = {name: y.to(torch.promote_types(dtype, torch.float32)) for name, y in given.items()}
    expected = results(call, wide, "reference")
    off = []
    for name, y in expected.items():
        a, b = kinds(found[name]), kinds(y)
        if "grad" in name:
            a, b = a.bool(), b.bool()
        if name == "context":
            uncertain = _uncertain(call, wide, expected["weights"])
            a, b = a.masked_fill(uncertain, 0), b.masked_fill(uncertain, 0)
        if name.removeprefix("grad ") in ("v", "filters", "projection"):  # of all sentences
            off += [f"{call}: {name}"] * (not torch.equal(a, b))
            continue
        off += [f"{call}: {name} with {sentence}" for k, sentence in enumerate(SENTENCES)
                if not torch.equal(a[k], b[k]) and not _open(call, name, sentence)]  # fmt: skip
    return off + what_hidden_slots_gave(call, given, found, backend)


def what_hidden_slots_gave(
    call: Call, given: Mapping[str, Tensor], found: Mapping[str, Tensor], backend: str
) -> list[str]:
    """Where a result differs by one bit from that of numbers in the hidden slots, or these have a gradient.

    By a mask of each query's own it may differ by roundings: a tile with a key that is not finite takes exp of sums.
    """
    if call.hides not in ("keys", "slots"):
        return []
    clean, off = results(call, inputs(call, True, given["key"].dtype), backend), []
    hidden = ~torch.arange(KEYS).lt(LENGTH)
    hidden[MASKED] = True
    for name, y in found.items():
        if name.removeprefix("grad ") in ("v", "filters", "projection"):
            continue
        error = 1e-5 if call.hides == "slots" else 0.0
        off += [f"{call}: {name} tells {list(SENTENCES)[k]}" for k in HIDDEN
                if not torch.allclose(y[k], clean[name][k], rtol=error, atol=error)]  # fmt: skip
        if name in ("grad key", "grad value"):
            off += [f"{call}: {name} of hidden slots"] * bool((y[:, hidden] != 0).any())
    return off


FEW = tuple(
    call for call in CALLS
    if (call.hides == "keys" and (call.queries == 1 or call.op == "scores") and call.op not in ("dot", "shared"))
    or call.hides == "slots"
    or (call.weight == -INF and call.op != "attention")
)  # fmt: skip
"""Those for an interpreter."""


def main(backend: str, *library: str) -> None:
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    if library:
        from cuda_cases import serve_cuda_on_cpu

        serve_cuda_on_cpu(*library)
    off = [where for call in (CALLS if library else FEW) for where in departures(call, backend)]
    print("\n".join(off) or "held")


if __name__ == "__main__":
    main(*sys.argv[1:])
