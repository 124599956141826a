"""A memory of projected keys: what the functions make of it is what they make of its parts, and modules take it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnext
from attnext import (
    BahdanauAttention,
    LocationSensitiveAttention,
    LuongAttention,
    Memory,
    MonotonicAttention,
    MultiHeadAttention,
    use_backend,
)

BATCH, KEYS, QUERY, STATES, SIZE = 4, 6, 5, 7, 8
LENGTHS = torch.tensor([KEYS, 3, 0, 5])
MASK = torch.tensor([True, True, False, True, True, True]).expand(BATCH, KEYS)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    with use_backend(name):
        yield name


def projected(heads: int = 1, dtype: torch.dtype = torch.float64, queries: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Query, key, value and score weight, of so many rows for each head."""
    v = (SIZE,) if heads == 1 else (heads, SIZE)
    shapes = {"query": (BATCH, *queries, SIZE), "key": (BATCH, KEYS, SIZE), "value": (BATCH, KEYS, STATES)}
    x = {name: torch.randn(shape, dtype=dtype) for name, shape in (shapes | {"score_weight": v}).items()}
    return {name: y.requires_grad_() for name, y in x.items()}


def attention(x: dict[str, Tensor], **slots: Any) -> Any:
    return attnext.additive_attention(**x, **slots, need_weights=True)


def scores(x: dict[str, Tensor], **slots: Any) -> Any:
    found = attnext.additive_scores(**{name: y for name, y in x.items() if name != "value"}, **slots)
    return found.masked_fill(found == -torch.inf, 0.0)


def dot(x: dict[str, Tensor], **slots: Any) -> Any:
    return attnext.dot_attention(**{n: y for n, y in x.items() if n != "score_weight"}, **slots, need_weights=True)


def beside_memory(name: str, query: Tensor, memory: Memory) -> Any:
    """The same function of a memory."""
    if name == "scores":
        found = attnext.additive_scores(query, memory)
        return found.masked_fill(found == -torch.inf, 0.0)
    call = attnext.additive_attention if name == "attention" else attnext.dot_attention
    return call(query, memory, need_weights=True)


DIRECTLY: dict[str, Callable[..., Any]] = {"attention": attention, "scores": scores, "dot": dot}
CALLS = pytest.mark.parametrize("name", DIRECTLY)


def prepared(name: str, x: dict[str, Tensor], **options: Any) -> Memory:
    return attnext.prepare(x["key"], x["value"], None if name == "dot" else x["score_weight"], **options)


def gradients(found: Any, leaves: Any) -> tuple[Tensor, ...]:
    results = (found,) if isinstance(found, Tensor) else found
    total = torch.stack([(y.double().cos() * (k + 1)).sum() for k, y in enumerate(results)]).sum()
    return torch.autograd.grad(total, [*leaves], retain_graph=True, materialize_grads=True)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@CALLS
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("queries", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("slots", [{}, {"lengths": LENGTHS, "mask": MASK}], ids=["", "hidden"])
def test_projected_keys_are_attended_as_without_a_memory(
    name: str, heads: int, queries: tuple[int, ...], slots: dict[str, Tensor]
) -> None:
    x = projected(heads, queries=queries)
    expected = DIRECTLY[name](x, **slots)
    memory = prepared(name, x, **slots)
    assert memory.heads == (1 if name == "dot" else heads)
    found = beside_memory(name, x["query"], memory)
    close(found, expected)
    close(gradients(found, x.values()), gradients(expected, x.values()))


@CALLS
@pytest.mark.usefixtures("backend")
def test_many_steps_of_projected_keys(name: str) -> None:
    x = projected()
    memory = prepared(name, x, lengths=LENGTHS)
    assert memory.steps is not None  # which sum the gradients
    queries = [x["query"] * (k + 1) for k in range(5)]
    found = [beside_memory(name, query, memory) for query in queries]
    expected = [DIRECTLY[name](x | {"query": query}, lengths=LENGTHS) for query in queries]
    flat = [
        [y for one in all_steps for y in ((one,) if isinstance(one, Tensor) else one)]
        for all_steps in (found, expected)
    ]
    close(*flat)
    close(*(gradients(steps, x.values()) for steps in flat))


@pytest.mark.usefixtures("backend")
def test_without_a_value_the_keys_are_the_values() -> None:
    x = projected()
    key, v = x["key"], x["score_weight"]
    leaves = (x["query"], key)
    for memory, found, expected in (
        (
            m := attnext.prepare(key, None),
            attnext.dot_attention(x["query"], m)[0],
            attnext.dot_attention(x["query"], key)[0],
        ),
        (
            m := attnext.prepare(key, None, v),
            attnext.additive_attention(x["query"], m)[0],
            attnext.additive_attention(x["query"], key, key, v)[0],
        ),
    ):
        assert memory.shared
        close(found, expected)
        close(gradients(found, leaves), gradients(expected, leaves))
        assert memory.select(torch.tensor([1])).shared
        assert memory.to(dtype=torch.float32).shared


@CALLS
def test_rows_and_dtypes_of_projected_keys(name: str) -> None:
    x = projected()
    memory, rows = prepared(name, x, lengths=LENGTHS, mask=MASK), torch.tensor([3, 1, 1])
    found = beside_memory(name, x["query"][rows], memory.select(rows))
    whole = beside_memory(name, x["query"], memory)
    close(found, whole[rows] if isinstance(whole, Tensor) else tuple(y[rows] for y in whole))
    (grad,) = gradients(found, [x["key"]])
    assert (grad[[0, 2]] == 0).all()
    assert grad[[1, 3]].abs().amax((1, 2)).min() > 0
    moved = memory.to(dtype=torch.float32)
    found = beside_memory(name, x["query"].float(), moved)
    for one, other in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, whole)), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_rows_of_heads_are_taken_by_sentence() -> None:
    x = projected(2)
    memory = prepared("attention", x)
    found, _ = attnext.additive_attention(x["query"][2:], memory.select(torch.tensor([1])))
    close(found, attention(x)[0][2:])
    with pytest.raises(ValueError, match="indices must lie between 0 and 1, got 2"):
        memory.select(torch.tensor([2]))


@CALLS
@pytest.mark.usefixtures("backend")
def test_prepared_under_autocast_it_is_cast_once(name: str) -> None:
    x = projected(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        memory = prepared(name, x, lengths=LENGTHS)
        found = beside_memory(name, x["query"], memory)
        expected = DIRECTLY[name](x, lengths=LENGTHS)
    kept = [y for y in (memory.key, memory.value, memory.score_weight) if y is not None]
    assert {y.dtype for y in kept} == {torch.bfloat16}
    for one, other in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(
            one, other, rtol=0, atol=torch.finfo(torch.bfloat16).eps * float(other.detach().abs().max())
        )
    grads = gradients(found, x.values())
    assert {grad.dtype for grad in grads} == {torch.float32}
    double = {name: y.double() for name, y in x.items()}
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert prepared(name, double).key.dtype == torch.float64


def test_of_another_dtype() -> None:
    x = projected()
    memory = attnext.prepare(x["key"], x["value"], x["score_weight"], dtype=torch.float16)
    assert {memory.key.dtype, memory.value.dtype, memory.score_weight.dtype} == {torch.float16}  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert attnext.prepare(x["key"].float(), None, dtype=torch.float32).key.dtype == torch.float32
    context, _ = attnext.additive_attention(x["query"].half(), memory)
    torch.testing.assert_close(context, attention(x)[0].half(), rtol=0, atol=0.02)
    (grad,) = torch.autograd.grad(context.sum(), x["key"])
    assert grad.dtype == torch.float64


@CALLS
def test_projected_keys_prepared_without_grad_have_none(name: str) -> None:
    x = projected()
    with torch.no_grad():
        memory = prepared(name, x)
    found = beside_memory(name, x["query"], memory)
    close(found, DIRECTLY[name](x))
    of_query, *others = gradients(found, x.values())
    assert of_query.abs().max() > 0
    assert all((grad == 0).all() for grad in others)


def test_the_score_weight_is_kept_as_it_was() -> None:
    x = {name: y.detach() for name, y in projected().items()}
    memory = prepared("attention", x)
    expected = attention(x)[0]
    x["score_weight"].zero_()
    close(attnext.additive_attention(x["query"], memory)[0], expected)


def test_modules_take_a_memory_of_projected_keys() -> None:
    states = torch.randn(BATCH, KEYS, STATES)
    attn = LocationSensitiveAttention(QUERY, STATES, SIZE, filters=2, kernel_size=3)
    memory = attnext.prepare(attn.memory_projection(states), states, attn.score_weight, lengths=LENGTHS)
    expected = attn.prepare(states, LENGTHS)
    query, first, second = torch.randn(2, BATCH, QUERY), None, None
    for one in query:
        context, _, first = attn.step(one, memory, first)
        torch.testing.assert_close(context, attn.step(one, expected, second)[0])
        second = attn.step(one, expected, second)[2]
    heads = MultiHeadAttention(QUERY, STATES, 2 * SIZE, 2, score="additive")
    of_heads = heads.prepare(states, LENGTHS)
    assert heads.score_weight is not None
    same = attnext.prepare(of_heads.key, of_heads.value, heads.score_weight, lengths=of_heads.lengths)
    torch.testing.assert_close(heads(query[0], same), heads(query[0], of_heads))


@pytest.mark.usefixtures("backend")
def test_one_head_is_none() -> None:
    """Its score weight is (D,), which a step takes."""
    x = projected()
    expected = attention(x)
    of_one = attnext.prepare(x["key"], x["value"], x["score_weight"].unsqueeze(0))
    close(attnext.additive_step(x["query"], of_one), expected)
    attn, states = (
        MultiHeadAttention(QUERY, STATES, SIZE, 1, score="additive").double(),
        torch.randn(BATCH, KEYS, STATES),
    )
    memory, query = attn.prepare(states.double()), torch.randn(BATCH, QUERY, dtype=torch.float64)
    context, weights = attnext.additive_step(attn.query_projection(query), memory)
    close((attn.output_projection(context), weights), attn(query, memory, need_weights=True))


@pytest.mark.parametrize("need", ["monotonic", "sparse", "sigmoid", "sparse, past"])
@pytest.mark.parametrize("slots", [{"lengths": LENGTHS}, {"mask": MASK}, {"lengths": LENGTHS, "mask": MASK}])
@pytest.mark.parametrize("select", [False, True])
def test_modules_that_multiply_values_hide_what_the_memory_does_not(
    need: str, slots: dict[str, Tensor], select: bool
) -> None:
    """A NaN in a hidden slot, which a weight of 0 would keep."""
    attn: Any = {
        "monotonic": lambda: MonotonicAttention(QUERY, STATES, SIZE),
        "sparse": lambda: BahdanauAttention(QUERY, STATES, SIZE, normalizer="sparsemax"),
        "sigmoid": lambda: BahdanauAttention(QUERY, STATES, SIZE, normalizer="sigmoid"),
        "sparse, past": lambda: LocationSensitiveAttention(QUERY, STATES, SIZE, filters=2, normalizer="entmax15"),
    }[need]()
    states, query, rows = torch.randn(BATCH, KEYS, STATES), torch.randn(BATCH, QUERY), torch.tensor([3, 0, 2])
    visible = torch.arange(KEYS) < slots.get("lengths", torch.full((BATCH,), KEYS))[:, None]
    hidden = ~(visible & slots.get("mask", visible))
    key, found = attn.memory_projection(states), []
    for filler in (0.0, torch.nan):
        at = [x.masked_fill(hidden.unsqueeze(-1), filler) for x in (key, states)]
        memory = attnext.prepare(*at, attn.score_weight, **slots)
        memory = memory.select(rows) if select else memory
        found.append(attn.step(query[rows] if select else query, memory, need_weights=True)[:2])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_memory_for_something_else_is_refused() -> None:
    key, states, v = torch.randn(BATCH, KEYS, SIZE), torch.randn(BATCH, KEYS, STATES), torch.randn(SIZE)
    query, of_dot, additive = torch.randn(BATCH, SIZE), attnext.prepare(key, states), attnext.prepare(key, states, v)
    of_heads = attnext.prepare(key, states, torch.randn(2, SIZE))
    bahdanau, luong = BahdanauAttention(SIZE, STATES, SIZE), LuongAttention(SIZE, STATES)
    location = LocationSensitiveAttention(SIZE, STATES, SIZE)
    for name, call in (
        ("key must be prepared for an additive score, got one for dot products",
         lambda: attnext.additive_attention(query, of_dot)),
        ("key must be prepared for an additive score, got one for dot products",
         lambda: attnext.additive_scores(query, of_dot)),
        ("key must be prepared for dot products, got one for an additive score",
         lambda: attnext.dot_attention(query, additive)),
        ("memory must be prepared for an additive score, got one for dot products",
         lambda: attnext.additive_step(query, of_dot)),
        ("memory must be prepared with a score_weight of .D,., got one for heads=2",
         lambda: attnext.additive_step(query, of_heads)),
        ("memory must be prepared for an additive score, got one for dot products", lambda: bahdanau(query, of_dot)),
        ("memory must be prepared for dot products, got one for an additive score", lambda: luong(query, additive)),
        ("memory must be prepared for heads=1, got one for heads=2", lambda: bahdanau(query[:2], of_heads)),
        ("memory must be prepared for heads=1, got one for heads=2", lambda: location.step(query[:2], of_heads)),
        ("memory must have values of size 7, got 8", lambda: bahdanau(query, attnext.prepare(key, key, v))),
        ("memory must have size 8 in dimension 2, as attention_size",
         lambda: bahdanau(query, attnext.prepare(key[..., 1:], states, v[1:]))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
