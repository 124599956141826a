"""Every kernel family and instruction set against the float64 reference."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnext
from attnext import _extension, reference
from attnext.cases import CASES, DTYPES, Case, compare, random_cases

EXTENSION = _extension.load()
assert EXTENSION is not None, _extension.status().reason
INSTRUCTION_SETS = EXTENSION.instruction_sets()
_READS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


def check(case: Case, seed: int) -> None:
    errors = compare(case, "cpu", seed)
    off = {name: error for name, error in errors.items() if not error <= 1.0}
    assert not off, f"in units of the tolerance, seed {seed}: {off}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_table(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), secrets.randbits(32))


@pytest.mark.usefixtures("instruction_set")
def test_random_cases() -> None:
    seed = secrets.randbits(32)
    for number, case in enumerate(random_cases(150, seed)):
        check(case, seed + number)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-6, 1e-9, 1e-30, 0.0])
@pytest.mark.parametrize("size", [1, *range(7, 26), 60, 100])
def test_weights_of_every_size(size: float, least: float, dtype: torch.dtype) -> None:
    """The kernels divide by the weights: small ones share the range of an exponent with the largest |q| + |k|."""
    query, key = (size / 2 * (2 * torch.rand(1, n, 75) - 1) for n in (21, 67))
    v = torch.rand(75) + 0.5
    small = torch.rand(75) < 0.8
    v[small] *= -least
    large = small & (torch.rand(75) < 0.9)  # so that many a division is shared by three of these and one that counts
    query[:, :, large], key[:, :, large] = size / 2, size / 2
    x = [t.to(dtype, copy=True).requires_grad_() for t in (query, key, v)]
    exact = [t.detach().double().requires_grad_() for t in x]
    scores, expected = attnext.additive_scores(*x, backend="cpu"), reference.additive_scores(*exact)
    # Each weight's term is off by a few roundings, and so is the reference's where it is no more exact.
    rounding = (4 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps * float(v.abs().sum())
    torch.testing.assert_close(scores.double(), expected, rtol=0.0, atol=rounding)
    incoming = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(scores, x, incoming.to(dtype))
    for grad, right in zip(grads, torch.autograd.grad(expected, exact, incoming), strict=True):
        largest = float(right.abs().max())
        torch.testing.assert_close(grad.double(), right, rtol=0.0, atol=32 * torch.finfo(dtype).eps * largest)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, -42.9, 43.9), (torch.float64, -353.0, 354.4)])
def test_exponentials_to_an_ulp(dtype: torch.dtype, least: float, most: float) -> None:
    """From one end of the range to the other. The series ends where its next term is below a rounding."""
    key = torch.linspace(least, most, 200 * 500, dtype=dtype).view(1, 200, 500)
    found, _ = torch.ops.attnext.additive_prepare_cpu(key, None, None)
    exact = np.exp(2 * key.numpy().astype(np.longdouble))
    error = float(np.abs(found[..., :500].numpy() / exact - 1).max())
    # Half an ulp of the last sum; those before it together less than another half.
    assert error < torch.finfo(dtype).eps


def test_an_instruction_set_that_was_chosen_is_the_one_that_runs(instruction_set: str) -> None:
    assert EXTENSION is not None
    assert EXTENSION.instruction_set() == instruction_set


def test_an_unknown_instruction_set_is_refused() -> None:
    assert EXTENSION is not None
    with pytest.raises(ValueError, match="one that this machine has"):
        EXTENSION.set_instruction_set("x86-64-v9")


def run_both_ways(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    x = [torch.randn(s, requires_grad=True) for s in ((3, 40, 70), (3, 150, 70), (3, 150, 65), (70,))]
    context, weights = attnext.additive_attention(*x, need_weights=True, dropout_p=0.2, backend="cpu")
    assert weights is not None
    return [context, weights, *torch.autograd.grad((context.sin().sum() + weights.cos().sum()), x)]


@pytest.mark.usefixtures("instruction_set")
def test_same_inputs_give_the_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        runs = [run_both_ways(threads) for threads in (1, 2, 2, 5)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_one_query_may_not_see_reaches_only_the_others(bad: float) -> None:
    query, key, value, v = (torch.randn(s) for s in ((1, 20, 33), (1, 70, 33), (1, 70, 17), (33,)))
    key[0, 66], value[0, 66] = bad, bad
    mask = torch.ones(1, 20, 70, dtype=torch.bool)
    mask[0, ::2, 66] = False
    x = [t.requires_grad_() for t in (query, key, value, v)]
    context, weights = attnext.additive_attention(*x, mask=mask, need_weights=True, backend="cpu")
    assert weights is not None
    assert context[0, ::2].isfinite().all()
    assert weights[0, ::2].isfinite().all()
    assert not context[0, 1::2].isfinite().any()
    grad_query = torch.autograd.grad(context.sum() + weights.square().sum(), x)[0]
    assert grad_query[0, ::2].isfinite().all()
    assert not grad_query[0, 1::2].isfinite().any()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", ["query", "key", "value", "score_weight"])
def test_nan_in_a_visible_slot_is_not_hidden(name: str) -> None:
    x = {"query": (1, 3, 40), "key": (1, 9, 40), "value": (1, 9, 5), "score_weight": (40,)}
    tensors = {key: torch.randn(shape) for key, shape in x.items()}
    tensors[name].view(-1)[0] = torch.nan
    context, _ = attnext.additive_attention(**tensors, backend="cpu")
    assert context[0, 0].isnan().any()


def test_a_row_with_nothing_to_attend_is_zero_and_so_are_its_gradients() -> None:
    x = [torch.randn(s, requires_grad=True) for s in ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,))]
    lengths = torch.tensor([0, 5])
    context, weights = attnext.additive_attention(*x, lengths=lengths, need_weights=True, backend="cpu")
    assert weights is not None
    assert (context[0] == 0).all()
    assert (weights[0] == 0).all()
    query, key, value, _ = torch.autograd.grad(context.sum() + weights.square().sum(), x)
    for grad in (query, key, value):
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).any()


def test_offsets_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # 8 GB must stay untouched
    stride = 2**30 + 8
    huge = torch.empty(2 * stride + 64, dtype=torch.float16)
    key = huge.as_strided((1, 3, 40), (0, stride, 1))
    key.copy_(torch.randn(1, 3, 40))
    value = huge.as_strided((1, 3, 16), (0, stride, 1), 40)
    value.copy_(torch.randn(1, 3, 16))
    query, v = torch.randn(1, 2, 40).half(), torch.randn(40).half()
    context, _ = attnext.additive_attention(query, key, value, v, backend="cpu")
    expected, _ = attnext.additive_attention(query, key.clone(), value.clone(), v, backend="cpu")
    assert torch.equal(context, expected)


LIMITS = {torch.float32: (5.2, 10.39, 43.0, 44.3, 88.0, 1e4), torch.float64: (43.3, 86.6, 350.0, 354.0, 710.0, 1e6)}
"""Where the arithmetic changes its form, and beyond, where exponentials overflow."""


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_inputs_that_cancel(dtype: torch.dtype, sign: int) -> None:
    """q of either sign with k about -q: the sum is small, so that an exponential which was cut short shows in full."""
    for limit in LIMITS[dtype]:
        for size in (limit * 0.999, limit * 1.001):
            query = torch.full((1, 3, 70), sign * size, dtype=dtype)
            key = -sign * (
                size - torch.linspace(0, 2, 9 * 70, dtype=dtype).view(1, 9, 70)
            )  # none larger than the query
            x = [query, key, torch.randn(1, 9, 5, dtype=dtype), torch.randn(70, dtype=dtype)]
            results = []
            for backend, as_dtype in (("cpu", dtype), ("reference", torch.float64)):
                y = [t.to(as_dtype).requires_grad_() for t in x]
                scores = attnext.additive_scores(y[0], y[1], y[3], backend=backend)
                context, _ = attnext.additive_attention(*y, backend=backend)
                results.append([scores, context, *torch.autograd.grad(context.sin().sum() + scores.cos().sum(), y)])
            # 70 terms of about 1 with errors of a few roundings each; the sum q + k itself may round by u |q|.
            error = 200 * torch.finfo(dtype).eps
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual.double(), expected, rtol=error, atol=10 * error)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("size", [1e9, 1e20, 1e36])
def test_large_score_weights(size: float) -> None:
    query, key = torch.full((1, 2, 64), 5.0), torch.full((1, 3, 64), 5.3) + torch.randn(1, 3, 64) * 1e-3
    v = torch.full((64,), size)
    scores = attnext.additive_scores(query, key, v, backend="cpu")
    expected = attnext.additive_scores(query.double(), key.double(), v.double(), backend="reference")
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)
    context, _ = attnext.additive_attention(query, key, torch.randn(1, 3, 4), v, backend="cpu")
    assert context.isfinite().all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e6, 1e8])
def test_weights_of_backward_are_those_of_forward(scale: float) -> None:
    """Recomputed from the log-sum-exp, they add up to 1 however much a score may be off."""
    query, key, value = 0.3 * torch.randn(1, 37, 70), 0.3 * torch.randn(1, 130, 70), torch.randn(1, 130, 9)
    value.requires_grad_()
    context, weights = attnext.additive_attention(
        query, key, value, torch.randn(70), scale=scale, need_weights=True, backend="cpu"
    )
    assert weights is not None
    (grad,) = torch.autograd.grad(context[..., 0].sum(), value)
    # The log-sum-exp itself is rounded: by half an ulp of a score of up to 40 times the scale.
    rounding = 1e-5 + torch.finfo(torch.float32).eps * 20 * scale
    assert float(weights.detach().max()) <= 1.0
    torch.testing.assert_close(grad[..., 0].sum(), torch.tensor(37.0), rtol=min(rounding, 0.1), atol=0.0)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_no_weight_of_backward_is_above_one(scale: float) -> None:
    """Some queries of a backward tile need a cap that those of their forward block did not: scores round otherwise."""
    query, key, value = 0.3 * torch.randn(1, 32, 70), 0.3 * torch.randn(1, 32, 70), torch.randn(1, 32, 9)
    query[:, 16:] *= 100
    value.requires_grad_()
    context, _ = attnext.additive_attention(query, key, value, torch.randn(70), scale=scale, backend="cpu")
    (grad,) = torch.autograd.grad(context[0, :16, 0].sum(), value)
    assert float(grad[..., 0].min()) >= 0.0
    assert float(grad[..., 0].max()) <= 16.0


@pytest.mark.usefixtures("instruction_set", "one_thread")
@pytest.mark.parametrize("size", [40.0, 100.0, 300.0])
def test_gradients_of_large_weights_are_as_near_as_plain_ones(size: float) -> None:
    """Beside the same formulas in float32, whose scores have as many roundings: no tolerance grows with the size."""
    off = torch.zeros(4)
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        shapes = ((2, 9, 64), (2, 50, 64), (2, 50, 16), (64,), (2, 9, 16))
        *x, grad = (torch.randn(shape, generator=rng) for shape in shapes)
        x[3] *= size / x[3].abs().sum()

        def gradients(call: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = [y.to(dtype).requires_grad_() for y in x]  # noqa: B023  called here
            return torch.autograd.grad(call(*leaves)[0], leaves, grad.to(dtype))  # noqa: B023

        found = gradients(partial(attnext.additive_attention, backend="cpu"), torch.float32)
        exact, plain = (gradients(reference.additive_attention, dtype) for dtype in (torch.float64, torch.float32))
        errors = [[float((y - right).norm()) for y, right in zip(one, exact, strict=True)] for one in (found, plain)]
        off = off.maximum(torch.tensor(errors[0]) / torch.tensor(errors[1]))
    assert off.max() < 4.0


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("mask", ["keys", "slots"])
def test_a_nan_query_reaches_no_hidden_slot(mask: str) -> None:
    query, key, value, v = (torch.randn(s, requires_grad=True) for s in ((1, 3, 20), (1, 40, 20), (1, 40, 5), (20,)))
    with torch.no_grad():
        query[0, 1] = torch.nan
    visible = torch.rand(1, 3, 40) < 0.5
    visible[..., ::4] = False
    visible = visible[:, 1] if mask == "keys" else visible
    context, weights = attnext.additive_attention(query, key, value, v, mask=visible, need_weights=True, backend="cpu")
    assert weights is not None
    hidden = ~visible.expand(1, 3, 40)
    assert torch.equal(weights[hidden], torch.zeros(int(hidden.sum())))
    assert torch.isnan(context[0, 1]).all()
    # Of squares, so that what comes in for a context that is NaN is NaN too.
    grads = torch.autograd.grad(context.square().sum() + weights.square().sum(), (key, value))
    for grad in grads:
        assert torch.equal(grad[:, ::4], torch.zeros_like(grad[:, ::4]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.usefixtures("instruction_set")
def test_a_weight_beyond_range_is_not_taken_for_a_hidden_row(bad: float) -> None:
    v = torch.randn(20)
    v[3] = bad
    context, _ = attnext.additive_attention(
        torch.randn(1, 2, 20), torch.randn(1, 5, 20), torch.randn(1, 5, 4), v, scale=8.0, backend="cpu"
    )
    assert torch.isnan(context).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["lengths", "keys", "slots"])
def test_what_comes_in_for_an_empty_row_reaches_nothing(kind: str, backend: str) -> None:
    """The norm has a gradient of NaN at a context of 0."""
    x = [torch.randn(s, requires_grad=True) for s in ((2, 3, 8), (2, 5, 8), (2, 5, 4), (8,))]
    options: dict[str, torch.Tensor] = {}
    if kind == "lengths":
        options["lengths"] = torch.tensor([0, 5])
    else:
        options["mask"] = torch.ones((2, 5) if kind == "keys" else (2, 3, 5), dtype=torch.bool)
        options["mask"][0, ... if kind == "keys" else 1] = False
    context, _ = attnext.additive_attention(*x, **options, backend=backend)
    grads = torch.autograd.grad(context.square().sum(-1).sqrt().sum(), x)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2][1] != 0).any()


@_READS_PROC
def test_few_rows_with_many_queries_keep_few_partial_sums() -> None:
    """One batch row is split between tasks; what they keep must stay small beside the gradients."""
    # Of getrusage the largest size would be that of pytest's own process, until this one is larger.
    peak = """
import re, torch, attnext

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

x = [torch.randn(s, requires_grad=True) for s in ((1, 4096, 256), (1, 1024, 256), (1, 1024, 16), (256,))]
context, _ = attnext.additive_attention(*x, backend="cpu")
before = peak()
torch.autograd.grad(context.sum(), x)
print(peak() - before)
"""
    # Filled with garbage, as the tests may ask, memory counts that no kernel would touch.
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_PERTURB_"}
    command = [sys.executable, "-c", peak]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # Queries are 4 MiB: with their gradient, exponentials and five partial sums, 34 MiB were measured, and 139 with as
    # many partial sums as there are tasks.
    assert float(done.stdout) < 40


@_READS_PROC
def test_a_large_call_leaves_little_scratch_memory() -> None:
    """Exponentials of 200 MiB are gone when it is done, and many small calls after it take no more."""
    resident = """
import torch, attnext

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

key = torch.randn(1, 1, 256).half().expand(1, 200 * 1024, 256)
small = [torch.randn(shape) for shape in ((2, 3, 64), (2, 70, 64), (2, 70, 64), (64,))]

def attend(query, key, value, v):
    attnext.additive_attention(query, key, value, v, backend="cpu")

attend(*small)
before = megabytes()
for _ in range(2):  # a second one would use what the first has left
    attend(torch.randn(1, 2, 256).half(), key, key[..., :8], torch.randn(256).half())
for _ in range(500):
    attend(*small)
print(megabytes() - before)
"""
    command = [sys.executable, "-c", resident]
    left = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert left < 70  # 64 MiB is what a thread may keep


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_halfway_between_two_numbers_are_rounded_to_even(dtype: torch.dtype) -> None:
    """The mean of two values that are neighbours, by two weights of a half."""
    lower = torch.arange(64, dtype=torch.int16).add(torch.ones((), dtype=dtype).view(torch.int16)).view(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    values = torch.stack((lower, upper)).unsqueeze(0)
    values = torch.cat((values, -values), 2)
    query, key, v = torch.zeros(1, 3, 8, dtype=dtype), torch.zeros(1, 2, 8, dtype=dtype), torch.zeros(8, dtype=dtype)
    exact = values.double().mean(1)
    for context in (
        attnext.additive_attention(query, key, values, v, backend="cpu")[0],
        attnext.dot_attention(query, key, values, backend="cpu")[0],
    ):
        assert torch.equal(context, exact.to(dtype).expand(1, 3, -1))
        assert not torch.equal(context.double(), exact.expand(1, 3, -1))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("queries", [0, 1, 5])
@pytest.mark.parametrize("hidden", ["lengths", "mask"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_comes_in_for_weights_of_hidden_slots_reaches_nothing(bad: float, hidden: str, queries: int) -> None:
    """Those weights are constants: by steps of one query, and by calls of several."""
    query = torch.randn(2, *[queries] * (queries > 0), 8, requires_grad=True)
    key, value, v = (torch.randn(size, requires_grad=True) for size in ((2, 9, 8), (2, 9, 5), (8,)))
    visible = torch.arange(9) < torch.tensor([[4], [7]])
    slots: dict[str, Any] = {"lengths": torch.tensor([4, 7])} if hidden == "lengths" else {"mask": visible}
    for call, inputs in (
        (attnext.additive_attention, (query, key, value, v)),
        (attnext.dot_attention, (query, key, value)),
    ):
        _, weights = call(*inputs, **slots, need_weights=True, backend="cpu")
        shown = visible if queries == 0 else visible.unsqueeze(1)
        grads = torch.randn(weights.shape).masked_fill(~shown, bad)
        found = torch.autograd.grad(weights, inputs, grads, retain_graph=True, materialize_grads=True)
        expected = torch.autograd.grad(weights, inputs, grads.masked_fill(~shown, 0.0), materialize_grads=True)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
