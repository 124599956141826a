"""The function of a step that sees its past, against its formula with PyTorch's own convolution, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnext
from attnext import use_backend

BATCH, KEYS, SIZE, STATES, FILTERS, WIDTH = 3, 9, 8, 6, 4, 5
LENGTHS = torch.tensor([KEYS, 0, 5])
MASK = torch.tensor([True, True, False, True, True, True, True, False, True]).expand(BATCH, KEYS)
VISIBLE = (torch.arange(KEYS) < LENGTHS[:, None]) & MASK
OF_MEMORY = ("key", "value", "score_weight")
BEAMS = pytest.mark.parametrize("beam", [(), (2,)], ids=["", "beam"])
RULES = pytest.mark.parametrize("rule", ["softmax", "sigmoid", "forward", "agent"])


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with use_backend(name):
        yield name


def inputs(rule: str = "softmax", beam: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All that has a gradient, by the names of the arguments; the second past is ``total``."""
    rows = (BATCH, *beam)
    shapes = {
        "query": (*rows, SIZE), "key": (BATCH, KEYS, SIZE), "value": (BATCH, KEYS, STATES), "score_weight": (SIZE,),
        "filters": (FILTERS, 2, WIDTH), "projection": (SIZE, FILTERS), "bias": (FILTERS,),
    }  # fmt: skip
    x = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    x |= {name: torch.rand(*rows, KEYS, dtype=dtype) for name in ("past", "total")}
    if rule in ("forward", "agent"):
        x["previous"] = torch.rand(*rows, KEYS, dtype=dtype)
    if rule == "agent":
        x["transition"] = torch.rand(*rows, 1, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def step(x: dict[str, Tensor], rule: str = "softmax", **options: Any) -> tuple[Tensor, Tensor]:
    memory = attnext.prepare(*(x[name] for name in OF_MEMORY), lengths=LENGTHS, mask=MASK)
    given = {name: y for name, y in x.items() if name not in (*OF_MEMORY, "past", "total")}
    past = [x[name] for name in ("past", "total") if name in x]
    return attnext.additive_step(
        memory=memory, past=past, rule="forward" if rule == "agent" else rule, **given, **options
    )


def formula(
    x: dict[str, Tensor], rule: str = "softmax", inside: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As it is usually written, for one query of each row or for a beam."""
    beam = x["query"].shape[1:-1]
    visible = VISIBLE[(slice(None), *(None,) * len(beam))]
    total = x["query"].unsqueeze(-2) + x["key"][(slice(None), *(None,) * len(beam))]
    pasts = [x[name].masked_fill(~visible, 0.0) for name in ("past", "total") if name in x]
    if pasts:
        seen = torch.stack(pasts, -2).flatten(0, -3)
        features = F.conv1d(seen, x["filters"], x.get("bias"), padding=x["filters"].shape[2] // 2).mT
        features = features if "projection" not in x else features @ x["projection"].T
        total = total + features.view(*x["query"].shape[:-1], KEYS, -1)
    scores = scale * (total.tanh() * x["score_weight"]).sum(-1)
    hidden = ~visible.expand_as(scores) if inside is None else ~(visible & inside)
    raised = (scores.sigmoid() if rule == "sigmoid" else scores.exp()).masked_fill(hidden, 0.0)
    if "previous" in x:
        before = x["previous"].masked_fill(~visible, 0.0)
        moved = F.pad(before[..., :-1], (1, 0))
        u = x.get("transition", torch.tensor(0.5, dtype=scores.dtype))
        raised = raised * ((1 - u) * before + u * moved)
    some = raised.sum(-1, keepdim=True) > 0
    weights = raised / torch.where(some, raised.sum(-1, keepdim=True), 1.0)
    if "previous" in x:
        weights = torch.where(some, weights, x["previous"].masked_fill(hidden, 0.0))
    value = x["value"] if not beam else x["value"].unsqueeze(1)
    return (weights.unsqueeze(-2) @ value).squeeze(-2), weights


def gradients(results: tuple[Tensor, Tensor], leaves: Any) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=rng, dtype=torch.float64)).sum() for y in results)
    return torch.autograd.grad(loss, [*leaves], materialize_grads=True)  # type: ignore[arg-type]


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@RULES
@BEAMS
def test_results_and_gradients_are_those_of_the_formula(rule: str, beam: tuple[int, ...]) -> None:
    x = inputs(rule, beam)
    found, expected = step(x, rule, scale=1.5), formula(x, rule, scale=1.5)
    close(found, expected)
    assert (found[0][1] == 0).all()
    close(gradients(found, x.values()), gradients(expected, x.values()))


@pytest.mark.parametrize("without", [("projection",), ("projection", "total"), ("past", "total"), ("bias",)], ids=str)
def test_parts_may_be_left_out(without: tuple[str, ...]) -> None:
    x = inputs()
    if "projection" in without:
        x["filters"] = torch.randn(SIZE, 2 - ("total" in without), 3, dtype=torch.float64, requires_grad=True)
        x["bias"] = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    without = without if "past" not in without else (*without, "filters", "projection", "bias")
    x = {name: y for name, y in x.items() if name not in without}
    found, expected = step(x), formula(x)
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))


def test_one_past_needs_no_sequence() -> None:
    x = inputs()
    memory, filters = attnext.prepare(*(x[name] for name in OF_MEMORY)), x["filters"][:, :1]
    alone = attnext.additive_step(x["query"], memory, filters, x["projection"], x["past"])
    close(alone, attnext.additive_step(x["query"], memory, filters, x["projection"], (x["past"],)), 0)


def test_without_a_past_it_is_additive_attention() -> None:
    x = inputs()
    memory = attnext.prepare(*(x[name] for name in OF_MEMORY), lengths=LENGTHS)
    expected = attnext.additive_attention(x["query"], memory, scale=0.7, need_weights=True)
    close(attnext.additive_step(x["query"], memory, scale=0.7), expected)


@RULES
def test_a_beam_in_one_call_is_its_hypotheses_one_by_one(rule: str) -> None:
    x = inputs(rule, (4,))
    of_hypotheses = x.keys() - {*OF_MEMORY, "filters", "projection", "bias"}
    one_by_one = [step({n: y[:, k] if n in of_hypotheses else y for n, y in x.items()}, rule) for k in range(4)]
    expected = tuple(torch.stack(y, 1) for y in zip(*one_by_one, strict=True))
    found = step(x, rule)
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))  # type: ignore[arg-type]


def decoded(x: dict[str, Tensor], call: Any) -> tuple[Tensor, Tensor]:
    """The last of four steps, from the same weight on each key."""
    weights = total = (VISIBLE / VISIBLE.sum(1, keepdim=True).clamp(min=1)).to(x["query"].dtype)
    for k in range(4):
        context, weights = call(x | {"query": x["query"] * (k + 1), "past": weights, "total": total})
        total = total + weights
    return context, total


def test_a_loop_may_start_with_the_same_weight_on_each_key() -> None:
    x = inputs()
    del x["past"], x["total"]
    found, expected = decoded(x, step), decoded(x, formula)
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))


@RULES
def test_the_past_need_not_be_followed(rule: str) -> None:
    x = inputs(rule)
    found = step(x, rule, follow_past=False)
    detached = {name: y.detach() if name in ("past", "total", "previous") else y for name, y in x.items()}
    expected = formula(detached, rule)
    close(found, expected)
    grads = dict(zip(x, gradients(found, x.values()), strict=True))
    close((*grads.values(),), gradients(expected, x.values()))
    assert all((grads[name] == 0).all() for name in ("past", "total", "previous") if name in x)
    if rule == "agent":  # by which an agent learns
        assert grads["transition"].abs().max() > 0


@RULES
@BEAMS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_window_hides_keys_from_this_step_alone(rule: str, beam: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(rule, beam)
    window = torch.tensor([[2, 5], [-7, 3], [1, 99]], dtype=dtype)
    window = window if not beam else torch.stack([window, window.flip(0)], 1)
    slots = torch.arange(KEYS)
    found = step(x, rule, window=window)
    expected = formula(x, rule, (slots >= window[..., :1]) & (slots < window[..., 1:]))
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_an_empty_window_gives_nothing(rule: str) -> None:
    x = inputs(rule)
    found = step(x, rule, window=torch.tensor([[3, 3], [5, 2], [KEYS, KEYS + 4]]))
    assert all((y == 0).all() for y in (*found, *gradients(found, x.values())))


@RULES
def test_what_stands_in_hidden_slots_reaches_nothing(rule: str) -> None:
    x = inputs(rule)
    poisoned = {
        name: y.detach().masked_fill(~VISIBLE if y.dim() == 2 else ~VISIBLE.unsqueeze(-1), torch.nan).requires_grad_()
        if name in ("key", "value", "past", "total", "previous")
        else y
        for name, y in x.items()
    }
    found, expected = step(poisoned, rule), step(x, rule)
    close(found, expected, 0)
    close(gradients(found, poisoned.values()), gradients(expected, x.values()), 0)


@pytest.mark.parametrize("of_past", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_past_may_be_of_any_dtype(dtype: torch.dtype, of_past: torch.dtype) -> None:
    x = inputs("agent", dtype=dtype)
    changed = {name: x[name].detach().to(of_past) for name in ("past", "total", "previous", "transition")}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = step(x | {name: y.to(wide) for name, y in changed.items()}, "agent")
    leaves = {name: y.requires_grad_() for name, y in changed.items()}
    found = step(x | leaves, "agent")
    close(found, expected, 0)
    assert (found[0].dtype, found[1].dtype) == (dtype, wide)
    assert [grad.dtype for grad in gradients(found, leaves.values())] == [of_past] * 4


@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_dropout_is_of_the_context_alone(dropout_p: float) -> None:
    x = inputs()
    _, weights = step(x)
    _, found = step(x, dropout_p=dropout_p)
    close(found, weights)
    dropped = []
    for j in range(KEYS):  # the values tell each weight
        value = torch.zeros(BATCH, KEYS, STATES, dtype=torch.float64)
        value[:, j] = 1.0
        torch.manual_seed(4)
        dropped.append(step(x | {"value": value}, dropout_p=dropout_p)[0][:, 0])
    kept = torch.stack(dropped, -1)
    assert ((kept == 0) | torch.isclose(kept * (1 - dropout_p), weights)).all()
    assert dropout_p == 1.0 or 0 < ((kept == 0) & (weights > 0)).sum() < (weights > 0).sum()
    torch.manual_seed(4)
    close(step(x, dropout_p=dropout_p)[0], (kept.unsqueeze(1) @ x["value"]).squeeze(1))


def test_dropout_is_the_same_on_every_backend() -> None:
    x, found = inputs(), []
    for name in ("cpu", "reference"):
        torch.manual_seed(4)
        with use_backend(name):
            found.append(step(x, dropout_p=0.5)[0])
    close(*found)


def test_under_autocast() -> None:
    """A memory that is prepared there is of its dtype; the arithmetic and the weights are in float32 all the same."""
    x = inputs("agent", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = step(x, "agent")
        grads = gradients((context, weights), x.values())
    assert (context.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    assert all(grad.dtype == torch.float32 for grad in grads)
    rounded = {name: x[name].bfloat16() for name in ("query", *OF_MEMORY, "filters", "projection")}
    # The bias enters with the query, and both are rounded.
    rounded["query"] = (x["query"] + rounded["projection"] @ x.pop("bias").bfloat16()).bfloat16()
    expected = formula({name: rounded.get(name, y).double() for name, y in x.items()}, "agent")
    torch.testing.assert_close(weights.double(), expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(context.double(), expected[0], rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.parametrize("rule", ["softmax", "agent"])
def test_compiled_whole(rule: str, backend: str) -> None:
    x = inputs(rule)
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x, rule)
    expected = step(x, rule)
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))


def test_by_the_name_of_a_backend(backend: str) -> None:
    x = inputs()
    close(step(x, backend="reference"), step(x, backend="cpu"))
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        step(x, backend="cuda")
