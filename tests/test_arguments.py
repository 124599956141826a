"""Every wrong argument is refused before a kernel runs, and the message names it, what it takes and what it got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnext
from attnext import reference
from attnext.ops import Operators, operators

BATCH, QUERIES, KEYS, SIZE, VALUES = 2, 3, 5, 8, 6
NAMES = ("query", "key", "value", "score_weight")
FLOATS = "float32, float64, float16 or bfloat16"


def good() -> dict[str, Tensor]:
    shapes = ((BATCH, QUERIES, SIZE), (BATCH, KEYS, SIZE), (BATCH, KEYS, VALUES), (SIZE,))
    return {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.fixture
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed."""

    def reached(*args: object, **options: object) -> NoReturn:
        pytest.fail("a kernel was reached")  # no Exception: `raises` does not take it for the error it waits for

    monkeypatch.setitem(operators, "cpu", Operators(*[reached] * len(fields(Operators))))
    for name in ("additive_attention", "additive_scores", "additive_step", "dot_attention"):
        monkeypatch.setattr(reference, name, reached)


# name, value, error, what it takes, what it got
Wrong = tuple[str, object, type[Exception], str, str]

TENSORS: list[Wrong] = [
    (name, value, TypeError, "a torch.Tensor", got)
    for name in (*NAMES, "lengths", "mask")
    for value, got in (([2, 3], "list"), (1.5, "float"))
]
TENSORS += [(name, None, TypeError, "a torch.Tensor", "NoneType") for name in NAMES]
TENSORS += [
    (name, x.to(dtype), TypeError, FLOATS, str(dtype))
    for name, x in good().items()
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)
]
TENSORS += [
    wrong
    for name, x in good().items()
    if name != "query"  # by which the others are judged
    for wrong in (
        (name, x.double(), TypeError, "query's dtype torch.float32", "torch.float64"),
        (name, x.bfloat16(), TypeError, "query's dtype torch.float32", "torch.bfloat16"),
        (name, x.to("meta"), ValueError, "query's device cpu", "meta"),
    )
]
# The kernels take strides, and no other layout.
TENSORS += [(name, x.to_sparse(), ValueError, "dense", "layout torch.sparse_coo") for name, x in good().items()]

SHAPES: list[Wrong] = [
    ("query", zeros(8), ValueError, "2 or 3 dimensions", "1: shape (8,)"),
    ("query", zeros(1, 2, 3, 8), ValueError, "2 or 3 dimensions", "4: shape (1, 2, 3, 8)"),
    ("query", zeros(2, 3, 0), ValueError, "an attention size (last dimension) of at least 1", "(2, 3, 0)"),
    ("key", zeros(5, 8), ValueError, "3 dimensions", "2: shape (5, 8)"),
    ("key", zeros(2, 3, 5, 8), ValueError, "3 dimensions", "4: shape (2, 3, 5, 8)"),
    ("key", zeros(1, 5, 8), ValueError, "size 2 in dimension 0, as query's batch", "shape (1, 5, 8)"),
    ("key", zeros(2, 5, 7), ValueError, "size 8 in dimension 2, as query's last", "shape (2, 5, 7)"),
    ("value", zeros(5, 6), ValueError, "3 dimensions", "2: shape (5, 6)"),
    ("value", zeros(3, 5, 6), ValueError, "size 2 in dimension 0, as key", "shape (3, 5, 6)"),
    ("value", zeros(2, 1, 6), ValueError, "size 5 in dimension 1, as key", "shape (2, 1, 6)"),
    ("score_weight", zeros(1, 1, 8), ValueError, "1 or 2 dimensions", "3: shape (1, 1, 8)"),
    ("score_weight", zeros(1), ValueError, "size 8 in dimension 0, as query's last dimension", "shape (1,)"),
    ("score_weight", zeros(3, 8), ValueError, "heads of which the batch, 2, is a multiple", "shape (3, 8)"),
    ("score_weight", zeros(0, 8), ValueError, "heads of which the batch, 2, is a multiple", "shape (0, 8)"),
]

SLOTS: list[Wrong] = [
    ("lengths", torch.tensor([-1, 5]), ValueError, "between 0 and the number of keys, 5", "-1"),
    ("lengths", torch.tensor([0, 6]), ValueError, "between 0 and the number of keys, 5", "6"),
    ("lengths", torch.tensor([200, 1], dtype=torch.uint8), ValueError, "the number of keys, 5", "200"),
    ("lengths", torch.tensor([1.0, 2.0]), TypeError, "integers", "torch.float32"),
    ("lengths", torch.tensor([True, False]), TypeError, "integers", "torch.bool"),
    ("lengths", torch.tensor([1]), ValueError, "size 2 in dimension 0, as the batch", "shape (1,)"),
    ("lengths", torch.tensor([[1, 2]]), ValueError, "1 dimension", "2: shape (1, 2)"),
    ("lengths", torch.tensor(1), ValueError, "1 dimension", "0: shape ()"),
    ("lengths", torch.tensor([1, 2], device="meta"), ValueError, "the device of the keys, cpu", "meta"),
    ("mask", zeros(2, 5), TypeError, "a bool tensor", "torch.float32"),
    ("mask", zeros(2, 5, dtype=torch.uint8), TypeError, "a bool tensor", "torch.uint8"),
    ("mask", ones(5), ValueError, "2 or 3 dimensions", "1: shape (5,)"),
    ("mask", ones(2, 1, 3, 5), ValueError, "2 or 3 dimensions", "4: shape (2, 1, 3, 5)"),
    ("mask", ones(1, 5), ValueError, "size 2 in dimension 0, as the batch", "shape (1, 5)"),
    ("mask", ones(2, 4), ValueError, "as the number of keys", "shape (2, 4)"),
    ("mask", ones(2, 3, 1), ValueError, "as the number of keys", "shape (2, 3, 1)"),
    ("mask", ones(2, 1, 5), ValueError, "size 3 in dimension 1, as the number of queries", "shape (2, 1, 5)"),
    ("mask", ones(2, 5).to("meta"), ValueError, "the device of the keys, cpu", "meta"),
    ("mask", ones(2, 5).to_sparse(), ValueError, "dense", "layout torch.sparse_coo"),
]

NUMBERS: list[Wrong] = [
    ("scale", torch.nan, ValueError, "finite", "nan"),
    ("scale", -torch.inf, ValueError, "finite", "-inf"),
    ("scale", 10**400, ValueError, "finite", "1000"),  # an int that no float holds
    ("scale", 1e39, ValueError, "finite in float32", "1e+39"),
    ("scale", "2", TypeError, "a number", "str"),
    ("scale", True, TypeError, "a number", "bool"),
    ("scale", torch.tensor(2.0), TypeError, "a number", "Tensor"),
    ("scale", None, TypeError, "a number", "NoneType"),
    ("dropout_p", -0.1, ValueError, "between 0 and 1", "-0.1"),
    ("dropout_p", 1.5, ValueError, "between 0 and 1", "1.5"),
    ("dropout_p", torch.nan, ValueError, "between 0 and 1", "nan"),
    ("dropout_p", "0.1", TypeError, "a number", "str"),
    ("dropout_p", False, TypeError, "a number", "bool"),
    ("dropout_p", torch.tensor(0.1), TypeError, "a number", "Tensor"),
    ("need_weights", "no", TypeError, "bool", "str"),
    ("need_weights", None, TypeError, "bool", "NoneType"),
]

BACKENDS = "None or one of 'reference', 'cpu', 'triton', 'cuda'"
NUMBERS += [
    ("backend", "gpu", ValueError, BACKENDS, "'gpu'"),
    ("backend", "", ValueError, BACKENDS, "''"),
    ("backend", 3, (ValueError, TypeError), BACKENDS, "3"),  # type: ignore[list-item]
    ("backend", ["cpu"], (ValueError, TypeError), BACKENDS, "['cpu']"),  # type: ignore[list-item]
]


def refuses(call: Callable[..., object], arguments: dict[str, Any], wrong: Wrong) -> None:
    name, value, error, takes, got = wrong
    with pytest.raises(error) as caught:
        call(**arguments | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} ")
    assert "must" in message
    assert takes in message
    assert f"got {got}" in message


def ids(wrongs: list[Wrong]) -> list[str]:
    return [f"{name} {got}" for name, _, _, _, got in wrongs]


ALL = TENSORS + SHAPES + SLOTS + NUMBERS
OF_SCORES = [wrong for wrong in ALL if wrong[0] not in ("value", "dropout_p", "need_weights")]
# Without a value the keys are the values.
OF_DOT = [wrong for wrong in ALL if wrong[0] != "score_weight" and not (wrong[0] == "value" and wrong[1] is None)]


@pytest.mark.usefixtures("_no_kernel")
class TestErrors:
    @pytest.mark.parametrize("wrong", ALL, ids=ids(ALL))
    def test_of_attention(self, wrong: Wrong) -> None:
        refuses(attnext.additive_attention, good(), wrong)

    @pytest.mark.parametrize("wrong", OF_SCORES, ids=ids(OF_SCORES))
    def test_of_scores(self, wrong: Wrong) -> None:
        arguments = {name: x for name, x in good().items() if name != "value"}
        refuses(attnext.additive_scores, arguments, wrong)

    @pytest.mark.parametrize("wrong", OF_DOT, ids=ids(OF_DOT))
    def test_of_dot_attention(self, wrong: Wrong) -> None:
        arguments = {name: x for name, x in good().items() if name != "score_weight"}
        refuses(attnext.dot_attention, arguments, wrong)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_whatever_the_backend(self, backend: str) -> None:
        refuses(attnext.additive_attention, good() | {"backend": backend}, SLOTS[1])

    def test_a_mask_by_slots_of_more_than_the_one_query(self) -> None:
        arguments = good() | {"query": zeros(2, 8)}
        wrong = (
            "mask",
            ones(2, 3, 5),
            ValueError,
            "size 1 in dimension 1, as the number of queries",
            "shape (2, 3, 5)",
        )
        refuses(attnext.additive_attention, arguments, wrong)

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_float64_beside_other_dtypes_under_autocast(self, name: str) -> None:
        wrong = (name, good()[name].double(), TypeError, "query's dtype torch.float32", "torch.float64")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            refuses(attnext.additive_attention, good(), wrong)

    def test_mixed_dtypes_on_a_device_that_has_no_autocast(self) -> None:
        arguments = {name: x.to("meta") for name, x in good().items()}
        wrong = ("key", arguments["key"].half(), TypeError, "query's dtype torch.float32", "torch.float16")
        refuses(attnext.additive_attention, arguments, wrong)


OF_QUERY = [wrong for wrong in ALL if wrong[0] == "query"]
BESIDE_MEMORY = [*OF_QUERY, *NUMBERS]
BESIDE_MEMORY += [
    (name, value, ValueError, "None with a prepared memory", type(value).__name__)
    for name, value in (
        ("value", zeros(2, 5, 6)),
        ("value", [1.0]),
        ("score_weight", zeros(8)),
        ("lengths", torch.tensor([1, 2])),
        ("mask", ones(2, 5)),
    )
]


@pytest.mark.usefixtures("additive", "of_dot", "_no_kernel")
class TestErrorsBesideAMemory:
    """What it holds was checked when it was made; the query is checked at each call."""

    @pytest.fixture
    def additive(self) -> attnext.Memory:
        return attnext.prepare(zeros(2, 5, 8), zeros(2, 5, 6), zeros(8))

    @pytest.fixture
    def of_dot(self) -> attnext.Memory:
        return attnext.prepare(zeros(2, 5, 8), zeros(2, 5, 6))

    @pytest.mark.parametrize("wrong", BESIDE_MEMORY, ids=ids(BESIDE_MEMORY))
    def test_whatever_the_function(self, additive: attnext.Memory, of_dot: attnext.Memory, wrong: Wrong) -> None:
        for call, memory, unknown in (
            (attnext.additive_attention, additive, ()),
            (attnext.additive_scores, additive, ("value", "dropout_p", "need_weights")),
            (attnext.dot_attention, of_dot, ("score_weight",)),
        ):
            if wrong[0] not in unknown:
                refuses(call, {"query": zeros(2, 3, 8), "key": memory}, wrong)

    @pytest.mark.parametrize("query", [zeros(3, 8), zeros(2, 7), zeros(2, 8).double(), zeros(2, 8).half()])
    def test_of_another_query(self, additive: attnext.Memory, of_dot: attnext.Memory, query: Tensor) -> None:
        with pytest.raises((ValueError, TypeError)) as of_key:
            attnext.dot_attention(query, of_dot.key)
        assert str(of_key.value).startswith("key must have ")
        for call in (attnext.additive_attention, attnext.additive_scores):
            with pytest.raises(type(of_key.value)) as caught:
                call(query, additive)
            assert str(caught.value) == str(of_key.value)
        with pytest.raises(type(of_key.value)) as caught:
            attnext.dot_attention(query, of_dot)
        assert str(caught.value) == str(of_key.value)


def prepared_parts() -> dict[str, Any]:
    return {name: x for name, x in good().items() if name != "query"}


OF_PREPARE: list[Wrong] = [
    (name, value, error, takes.replace("query's", "the key's"), got)
    for name, value, error, takes, got in [*TENSORS, *SHAPES, *SLOTS]
    if name != "query" and not (name == "key" and "query's" in takes)
    if not (value is None and name in ("value", "score_weight"))
    if "2 or 3" not in takes and not (isinstance(value, Tensor) and name == "mask" and value.dim() == 3)
]
OF_PREPARE += [
    ("key", zeros(2, 5, 0), ValueError, "an attention size (last dimension) of at least 1", "(2, 5, 0)"),
    ("mask", ones(2, 3, 5), ValueError, "2 dimensions", "3: shape (2, 3, 5)"),
    ("dtype", torch.int64, TypeError, FLOATS, "torch.int64"),
    ("dtype", "half", TypeError, FLOATS, "half"),
]


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("wrong", OF_PREPARE, ids=ids(OF_PREPARE))
def test_errors_of_prepare(wrong: Wrong) -> None:
    refuses(attnext.prepare, prepared_parts(), wrong)


FILTERS, WIDTH = 4, 3


def step_parts(rule: str = "softmax") -> dict[str, Any]:
    x: dict[str, Any] = {
        "query": zeros(2, 8), "filters": zeros(FILTERS, 2, WIDTH), "projection": zeros(8, FILTERS),
        "past": (zeros(2, 5), zeros(2, 5)), "bias": zeros(FILTERS), "rule": rule,
    }  # fmt: skip
    return x | ({"previous": zeros(2, 5), "transition": zeros(2, 1)} if rule == "forward" else {})


OF_STEP = [*OF_QUERY, *(wrong for wrong in NUMBERS if wrong[0] != "need_weights")]
OF_STEP += [
    ("memory", zeros(2, 5, 8), TypeError, "what prepare() returned", "Tensor"),
    ("memory", None, TypeError, "what prepare() returned", "NoneType"),
    ("filters", [1.0], TypeError, "a torch.Tensor", "list"),
    ("filters", zeros(4, 3), ValueError, "3 dimensions", "2: shape (4, 3)"),
    ("filters", zeros(4, 1, 3), ValueError, "size 2 in dimension 1, as the number of pasts", "shape (4, 1, 3)"),
    ("filters", zeros(4, 2, 4), ValueError, "the width odd", "shape (4, 2, 4)"),
    ("filters", zeros(4, 2, 0), ValueError, "the width odd", "shape (4, 2, 0)"),
    ("filters", zeros(0, 2, 3), ValueError, "F at least 1", "shape (0, 2, 3)"),
    ("filters", zeros(4, 2, 3).double(), TypeError, "query's dtype torch.float32", "torch.float64"),
    ("filters", zeros(4, 2, 3).to("meta"), ValueError, "query's device cpu", "meta"),
    ("projection", 2.0, TypeError, "a torch.Tensor", "float"),
    ("projection", zeros(8), ValueError, "2 dimensions", "1: shape (8,)"),
    ("projection", zeros(7, 4), ValueError, "size 8 in dimension 0, as query's last", "shape (7, 4)"),
    ("projection", zeros(8, 3), ValueError, "size 4 in dimension 1, as the number of filters", "shape (8, 3)"),
    ("projection", zeros(8, 4).half(), TypeError, "query's dtype torch.float32", "torch.float16"),
    ("bias", "b", TypeError, "a torch.Tensor", "str"),
    ("bias", zeros(4, 1), ValueError, "1 dimension", "2: shape (4, 1)"),
    ("bias", zeros(8), ValueError, "size 4 in dimension 0, as the number of filters", "shape (8,)"),
    ("bias", zeros(4).int(), TypeError, FLOATS, "torch.int32"),
    ("past", 1.0, TypeError, "a torch.Tensor or up to two of them", "float"),
    ("past", None, TypeError, "a torch.Tensor or up to two of them", "NoneType"),
    ("past", (zeros(2, 5),) * 3, ValueError, "a torch.Tensor or up to two of them", "3"),
    ("past", (), ValueError, "with filters", "none"),
    ("past", (zeros(2, 5), [0.0]), TypeError, "a torch.Tensor", "list"),
    ("past", zeros(2, 1, 5), ValueError, "2 dimensions", "3: shape (2, 1, 5)"),
    ("past", zeros(2, 4), ValueError, "size 5 in dimension 1, as the number of keys", "shape (2, 4)"),
    ("past", zeros(1, 5), ValueError, "size 2 in dimension 0, as query", "shape (1, 5)"),
    ("past", zeros(2, 5).int(), TypeError, FLOATS, "torch.int32"),
    ("past", zeros(2, 5).to("meta"), ValueError, "query's device cpu", "meta"),
    ("past", zeros(2, 5).to_sparse(), ValueError, "dense", "layout torch.sparse_coo"),
    ("rule", "sparsemax", ValueError, "'softmax', 'sigmoid', 'forward'", "'sparsemax'"),
    ("rule", None, ValueError, "'softmax', 'sigmoid', 'forward'", "None"),
    ("previous", zeros(2, 5), ValueError, "None for rule='softmax'", "Tensor"),
    ("transition", zeros(2, 1), ValueError, "None for rule='softmax'", "Tensor"),
    ("window", [0, 5], TypeError, "a torch.Tensor", "list"),
    ("window", zeros(2, 2), TypeError, "integers", "torch.float32"),
    ("window", zeros(2, 2, dtype=torch.bool), TypeError, "integers", "torch.bool"),
    ("window", zeros(2, dtype=torch.int64), ValueError, "2 dimensions", "1: shape (2,)"),
    ("window", zeros(2, 1, dtype=torch.int64), ValueError, "size 2 in dimension 1, as the first key", "shape (2, 1)"),
    ("window", zeros(3, 2, dtype=torch.int64), ValueError, "size 2 in dimension 0, as query", "shape (3, 2)"),
    ("window", zeros(2, 2, dtype=torch.int64).to("meta"), ValueError, "query's device cpu", "meta"),
    ("follow_past", 1, TypeError, "bool", "int"),
    ("follow_past", None, TypeError, "bool", "NoneType"),
]
OF_FORWARD: list[Wrong] = [
    ("previous", None, TypeError, "a torch.Tensor", "NoneType"),
    ("previous", zeros(2, 6), ValueError, "size 5 in dimension 1, as the number of keys", "shape (2, 6)"),
    ("previous", zeros(2, 5).bool(), TypeError, FLOATS, "torch.bool"),
    ("transition", 0.5, TypeError, "a torch.Tensor", "float"),
    ("transition", zeros(2, 5), ValueError, "size 1 in dimension 1, as one for each query", "shape (2, 5)"),
    ("transition", zeros(2), ValueError, "2 dimensions", "1: shape (2,)"),
]
WITHOUT_FILTERS: list[Wrong] = [
    ("past", zeros(2, 5), ValueError, "left out without filters", "1"),
    ("projection", zeros(8, 4), ValueError, "None without filters", "Tensor"),
    ("bias", zeros(4), ValueError, "None without filters", "Tensor"),
]


@pytest.mark.usefixtures("memory", "_no_kernel")
class TestErrorsOfAStep:
    @pytest.fixture
    def memory(self) -> attnext.Memory:
        return attnext.prepare(zeros(2, 5, 8), zeros(2, 5, 6), zeros(8))

    @pytest.mark.parametrize("wrong", OF_STEP, ids=ids(OF_STEP))
    def test_of_any_rule(self, memory: attnext.Memory, wrong: Wrong) -> None:
        refuses(attnext.additive_step, step_parts() | {"memory": memory}, wrong)

    @pytest.mark.parametrize("wrong", OF_FORWARD, ids=ids(OF_FORWARD))
    def test_of_forward_attention(self, memory: attnext.Memory, wrong: Wrong) -> None:
        refuses(attnext.additive_step, step_parts("forward") | {"memory": memory}, wrong)

    @pytest.mark.parametrize("wrong", WITHOUT_FILTERS, ids=ids(WITHOUT_FILTERS))
    def test_without_filters(self, memory: attnext.Memory, wrong: Wrong) -> None:
        refuses(attnext.additive_step, {"query": zeros(2, 8), "memory": memory}, wrong)

    def test_without_a_projection(self, memory: attnext.Memory) -> None:
        wrong = ("filters", zeros(4, 2, 3), ValueError, "size 8 in dimension 0, as query's last", "shape (4, 2, 3)")
        parts = step_parts() | {"memory": memory, "projection": None, "bias": None}
        refuses(attnext.additive_step, parts, wrong)

    @pytest.mark.parametrize("name", ["past", "window"])
    def test_of_a_beam(self, memory: attnext.Memory, name: str) -> None:
        beams = {"query": zeros(2, 3, 8), "past": (zeros(2, 3, 5),) * 2, "memory": memory}
        dtype = torch.int64 if name == "window" else torch.float32
        last = 2 if name == "window" else 5
        for shape, takes in (((2, 2, last), "size 3 in dimension 1, as query"), ((2, last), "3 dimensions")):
            got = f"{len(shape)}: shape {shape}" if len(shape) == 2 else f"shape {shape}"
            wrong = (name, zeros(*shape, dtype=dtype), ValueError, takes, got)
            refuses(attnext.additive_step, step_parts() | beams, wrong)


SIZES: list[Wrong] = [
    (name, value, (ValueError, TypeError), "an integer of at least 1", got)  # type: ignore[misc]
    for name in ("query_size", "memory_size", "attention_size")
    for value, got in ((0, "0"), (-3, "-3"), (4.0, "4.0"), ("4", "'4'"), (True, "True"), (None, "None"))
]
SIZES += [
    ("dropout", 1.1, ValueError, "between 0 and 1", "1.1"),
    ("dropout", torch.nan, ValueError, "between 0 and 1", "nan"),
    ("dropout", "0.5", TypeError, "a number", "str"),
]


@pytest.mark.parametrize("wrong", SIZES, ids=ids(SIZES))
def test_errors_of_a_module_made(wrong: Wrong) -> None:
    refuses(attnext.BahdanauAttention, {"query_size": 4, "memory_size": 6, "attention_size": 8}, wrong)


QUERY: list[Wrong] = [
    ("query", [1.0], TypeError, "a torch.Tensor", "list"),
    ("query", zeros(4), ValueError, "2 or 3 dimensions", "1: shape (4,)"),
    ("query", zeros(2, 5), ValueError, "as query_size", "shape (2, 5)"),
    ("query", zeros(2, 4).double(), TypeError, "dtype torch.float32", "torch.float64"),
    ("query", zeros(2, 4).bfloat16(), TypeError, "dtype torch.float32", "torch.bfloat16"),
    ("query", zeros(2, 4).int(), TypeError, FLOATS, "torch.int32"),
    ("query", zeros(2, 4).to("meta"), ValueError, "device cpu", "meta"),
]
STATES: list[Wrong] = [  # of prepare; a call has the same under the name "memory"
    ("encoder_states", zeros(5, 6), ValueError, "3 dimensions", "2: shape (5, 6)"),
    ("encoder_states", zeros(2, 5, 7), ValueError, "size 6 in dimension 2, as memory_size", "shape (2, 5, 7)"),
    ("encoder_states", zeros(2, 5, 6).double(), TypeError, "dtype torch.float32", "torch.float64"),
    ("encoder_states", zeros(2, 5, 6).int(), TypeError, FLOATS, "torch.int32"),
    ("encoder_states", zeros(2, 5, 6).to("meta"), ValueError, "device cpu", "meta"),
    ("encoder_states", [1.0], TypeError, "torch.Tensor", "list"),
    ("encoder_states", None, TypeError, "torch.Tensor", "NoneType"),
]
CALL = [*QUERY, *(("memory", *wrong[1:]) for wrong in STATES)]
CALL += [("memory", zeros(3, 5, 6), ValueError, "size 2 in dimension 0, as query's batch", "shape (3, 5,")]
CALL += [wrong for wrong in SLOTS if wrong[0] == "lengths" or "quer" not in wrong[3]]
PREPARE = [*STATES, *(wrong for wrong in SLOTS if "2 or 3" not in wrong[3] and wrong[1].dim() < 3)]  # type: ignore[attr-defined]
PREPARE += [("mask", ones(2, 1, 5), ValueError, "2 dimensions", "3: shape (2, 1, 5)")]


class TestErrorsOfACall:
    @pytest.fixture
    def attn(self) -> attnext.BahdanauAttention:
        return attnext.BahdanauAttention(4, 6, 8)

    @pytest.fixture
    def memory(self, attn: attnext.BahdanauAttention) -> attnext.Memory:
        return attn.prepare(torch.randn(2, 5, 6))

    @pytest.mark.usefixtures("_no_kernel")
    @pytest.mark.parametrize("wrong", CALL, ids=ids(CALL))
    def test_all_in_one(self, attn: attnext.BahdanauAttention, wrong: Wrong) -> None:
        refuses(attn, {"query": zeros(2, 4), "memory": zeros(2, 5, 6)}, wrong)

    @pytest.mark.usefixtures("_no_kernel")
    @pytest.mark.parametrize("wrong", PREPARE, ids=ids(PREPARE))
    def test_prepare(self, attn: attnext.BahdanauAttention, wrong: Wrong) -> None:
        refuses(attn.prepare, {"encoder_states": zeros(2, 5, 6)}, wrong)

    @pytest.mark.usefixtures("memory", "_no_kernel")
    @pytest.mark.parametrize("wrong", QUERY, ids=ids(QUERY))
    def test_step(self, attn: attnext.BahdanauAttention, memory: attnext.Memory, wrong: Wrong) -> None:
        refuses(attn, {"query": zeros(2, 4), "memory": memory}, wrong)

    @pytest.mark.usefixtures("memory", "_no_kernel")
    def test_memory_of_another_batch(self, attn: attnext.BahdanauAttention, memory: attnext.Memory) -> None:
        with pytest.raises(ValueError, match=r"^memory must have size 3 in dimension 0, as query's batch, got"):
            attn(zeros(3, 4), memory)

    @pytest.mark.usefixtures("memory", "_no_kernel")
    @pytest.mark.parametrize(("name", "value"), [("lengths", torch.tensor([1, 2])), ("mask", ones(2, 5))])
    def test_a_prepared_memory_has_its_own_slots(
        self, attn: attnext.BahdanauAttention, memory: attnext.Memory, name: str, value: Tensor
    ) -> None:
        with pytest.raises(ValueError, match=rf"^{name} must be None with a prepared memory.*prepare\(\)"):
            attn(zeros(2, 4), memory, **{name: value})

    def test_a_memory_from_before_a_change_of_dtype(
        self, attn: attnext.BahdanauAttention, memory: attnext.Memory
    ) -> None:
        attn.double()
        with pytest.raises(TypeError, match=r"^memory must have .*torch\.float64, got torch\.float32"):
            attn(zeros(2, 4).double(), memory)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Shapes that fit each other, but for up to two of them."""
    size = st.integers(0, 3)
    b, tq, tk, d, h = (draw(size) for _ in range(5))
    query = (b, d) if draw(st.booleans()) else (b, tq, d)
    found = dict(zip(NAMES, (query, (b, tk, d), (b, tk, h), (d,)), strict=True))
    for name in draw(st.sets(st.sampled_from(NAMES), max_size=2)):
        found[name] = tuple(draw(st.lists(size, min_size=1, max_size=4)))
    return found


@given(shapes(), st.sampled_from(["cpu", "reference"]))
@settings(max_examples=300, deadline=None)
def test_any_shapes_give_a_result_or_an_error_that_names_an_argument(
    shapes: dict[str, tuple[int, ...]], backend: str
) -> None:
    q, k, h, v = shapes.values()
    ranks_fit = len(q) in (2, 3) and len(k) == len(h) == 3 and len(v) in (1, 2)
    fit = ranks_fit and q[0] == k[0] == h[0] and k[1] == h[1] and q[-1] == k[2] == v[-1] > 0
    fit = fit and (len(v) == 1 or (v[0] > 0 and q[0] % v[0] == 0))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if not fit:
        with pytest.raises((ValueError, TypeError), match=rf"^({'|'.join(NAMES)}) must .*, got "):
            attnext.additive_attention(**tensors, need_weights=True, backend=backend)
        return
    context, weights = attnext.additive_attention(**tensors, need_weights=True, backend=backend)
    assert weights is not None
    assert (context.shape, weights.shape) == ((*q[:-1], h[2]), (*q[:-1], k[1]))


BOTH = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_any_integers(backend: str, dtype: torch.dtype) -> None:
    x = good()
    lengths = torch.tensor([3, KEYS], dtype=dtype)
    context, weights = attnext.additive_attention(**x, lengths=lengths, need_weights=True, backend=backend)
    mask = torch.arange(KEYS) < torch.tensor([[3], [KEYS]])
    expected = attnext.additive_attention(**x, mask=mask, need_weights=True, backend=backend)
    # Not to the bit: a sum over fewer keys may be taken in another order.
    torch.testing.assert_close((context, weights), expected, rtol=1e-6, atol=1e-7)
    assert weights is not None
    assert torch.equal(weights > 0, mask.unsqueeze(1).expand_as(weights))


KEY_MASK = torch.tensor([True, False, True, True, False])
EXPANDED = {
    "expanded over the batch": KEY_MASK.expand(BATCH, KEYS),
    "expanded over the batch and the queries": KEY_MASK.expand(BATCH, QUERIES, KEYS),
    "expanded over the keys": torch.tensor([[True], [False]]).expand(BATCH, KEYS),
    "keys first in memory": torch.rand(KEYS, BATCH, generator=torch.Generator().manual_seed(0)).t() < 0.5,
    "every other key": KEY_MASK.repeat_interleave(2).repeat(BATCH, QUERIES, 1)[..., ::2],
}


@BOTH
@pytest.mark.parametrize("mask", EXPANDED.values(), ids=EXPANDED.keys())
def test_masks_of_any_strides(backend: str, mask: Tensor) -> None:
    x = {name: t.requires_grad_() for name, t in good().items()}
    found = []
    for m in (mask, mask.contiguous()):
        context, weights = attnext.additive_attention(**x, mask=m, need_weights=True, backend=backend)
        assert weights is not None
        found.append((context, weights, torch.autograd.grad((context.sum() + weights[..., 0].sum()), [*x.values()])))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    visible = (mask if mask.dim() == 3 else mask.unsqueeze(1)).expand(BATCH, QUERIES, KEYS)
    assert torch.equal(found[0][1] > 0, visible)


@BOTH
def test_both_masks_of_a_query_of_two_dimensions(backend: str) -> None:
    x = good()
    x["query"] = x["query"][:, 0]
    mask = torch.stack([KEY_MASK, ~KEY_MASK])
    context, weights = attnext.additive_attention(**x, mask=mask, need_weights=True, backend=backend)
    by_slot = attnext.additive_attention(**x, mask=mask.unsqueeze(1), need_weights=True, backend=backend)
    torch.testing.assert_close((context, weights), by_slot, rtol=0, atol=0)
    assert weights is not None
    assert context.shape == (BATCH, VALUES)
    assert torch.equal(weights > 0, mask)
    scores = attnext.additive_scores(x["query"], x["key"], x["score_weight"], mask=mask.unsqueeze(1), backend=backend)
    assert torch.equal(scores.isfinite(), mask)


@BOTH
@pytest.mark.parametrize(
    ("empty", "single"),
    [("queries", False), *((empty, single) for empty in ("batch", "keys", "values") for single in (False, True))],
)
def test_sizes_of_zero(backend: str, empty: str, single: bool) -> None:
    sizes = {"batch": BATCH, "queries": QUERIES, "keys": KEYS, "values": VALUES} | {empty: 0}
    b, tq, tk, h = sizes.values()
    rows = (b,) if single else (b, tq)
    shapes = ((*rows, SIZE), (b, tk, SIZE), (b, tk, h), (SIZE,))
    x = {name: torch.randn(shape, requires_grad=True) for name, shape in zip(NAMES, shapes, strict=True)}
    lengths, mask = torch.full((b,), tk), torch.ones(b, tk, dtype=torch.bool)
    context, weights = attnext.additive_attention(**x, lengths=lengths, mask=mask, need_weights=True, backend=backend)
    assert weights is not None
    assert (context.shape, weights.shape) == ((*rows, h), (*rows, tk))
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), [*x.values()])
    assert all(grad.isfinite().all() for grad in grads)
    if empty == "keys":
        assert (context == 0).all()
        assert all((grad == 0).all() for grad in grads)
    scores = attnext.additive_scores(x["query"], x["key"], x["score_weight"], lengths=lengths, backend=backend)
    assert scores.shape == (*rows, tk)


@BOTH
def test_any_number_is_a_scale(backend: str) -> None:
    x = good()
    del x["value"]
    plain = attnext.additive_scores(**x, backend=backend)
    for scale in (2, -0.5, 0):
        scaled = attnext.additive_scores(**x, scale=scale, backend=backend)
        torch.testing.assert_close(scaled, scale * plain, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:attnext has no kernels")
def test_the_reference_serves_any_device() -> None:
    x = {name: t.to("meta") for name, t in good().items()}
    context, weights = attnext.additive_attention(**x, need_weights=True)
    assert weights is not None
    assert context.device.type == "meta"
    assert (context.shape, weights.shape) == ((BATCH, QUERIES, VALUES), (BATCH, QUERIES, KEYS))
    assert attnext.additive_scores(x["query"], x["key"], x["score_weight"]).shape == weights.shape


def test_numbers_of_numpy() -> None:
    x, scale = good(), np.float32(0.5)
    found = attnext.additive_attention(**x, scale=scale, dropout_p=np.float64(0.0))[0]
    assert torch.equal(found, attnext.additive_attention(**x, scale=0.5)[0])
    attn = attnext.BahdanauAttention(np.int64(4), np.int32(5), np.uint8(6), dropout=np.float16(0.5))
    assert (type(attn.query_size), type(attn.dropout)) == (int, float)
    attnext.AttentiveGRU(np.int64(3), np.int64(4), attn, vector_size=np.int64(2))
    with pytest.raises(TypeError, match="scale must be a number, got bool"):
        attnext.additive_attention(**x, scale=np.bool_(True))


@pytest.mark.parametrize("name", ["bias", "normalize"])
def test_flags_of_modules(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
        attnext.BahdanauAttention(4, 5, 6, **{name: "sparsemax"})
