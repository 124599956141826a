"""The yardstick measures: what `attnext verify` and the tests compare with notices a kernel that is a little off."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnext import cases, functional, verify
from attnext.backends import backends
from attnext.cases import CASES, DTYPES, Case, compare, draw, random_cases
from attnext.ops import operators

Kernel = Callable[..., Any]
Captured = pytest.CaptureFixture[str]

INTERPRETED = [name for name in backends() if verify._interpretable(name)]
ATTENTION = Case(queries=4, keys=9, weights=True, lengths=True)
PAST = Case("past", queries=2, keys=9, channels=2, filters=3, width=3, rule="forward", agent=True, weights=True)
SCORES = Case("scores", queries=4, keys=9, mask="keys")
FEW = (ATTENTION, replace(ATTENTION, op="step", dropout_p=0.3), SCORES, PAST)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CASES", FEW)
    monkeypatch.setattr(verify, "_recurrent_work", lambda *_: [])
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args(["--cases", "0", *arguments]))


def output(captured: Captured) -> str:
    return " ".join(captured.readouterr().out.split())


def replace_kernel(monkeypatch: pytest.MonkeyPatch, **kernels: Callable[[Kernel], Kernel]) -> None:
    cpu = operators["cpu"]
    broken = replace(cpu, **{name: make(getattr(cpu, name)) for name, make in kernels.items()})
    monkeypatch.setitem(functional.operators, "cpu", broken)


def with_context(change: Callable[[Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    def make(kernel: Kernel) -> Kernel:
        def attention(*args: Any) -> Any:
            context, *rest = kernel(*args)
            return change(context), *rest

        return attention

    return make


class WrongGradient(torch.autograd.Function):
    """The input itself, and a gradient that is off by 0.1 %."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def with_wrong_gradient(argument: int) -> Callable[[Kernel], Kernel]:
    def make(kernel: Kernel) -> Kernel:
        def wrong(*args: Any) -> Any:
            changed = list(args)
            changed[argument] = WrongGradient.apply(args[argument])
            return kernel(*changed)

        return wrong

    return make


class TestCommand:
    def test_all_is_well(self, capsys: Captured) -> None:
        assert run("--backend", "cpu", "--cases", "7") == 0
        text = output(capsys)
        calls = len(FEW) * len(DTYPES) + 7
        assert f"OK: {calls} calls within tolerance on cpu" in text
        # The table can be read in 80 columns, and its rows count all calls.
        counts = re.findall(r"cpu\W+(float32|float64|float16|bfloat16)\W+(\d+)", text)
        assert {dtype for dtype, _ in counts} == {"float32", "float64", "float16", "bfloat16"}
        assert sum(int(count) for _, count in counts) == calls
        for word in ("scores", "context", "weights", "query", "key", "value", "past"):
            assert word in text

    def test_a_narrow_terminal_shows_the_numbers(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = []
        for columns in ("80", "30"):
            monkeypatch.setenv("COLUMNS", columns)
            assert run("--backend", "cpu") == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]

    def test_every_backend_that_is_here(self, capsys: Captured) -> None:
        assert run() == 0
        text = output(capsys)
        for name, backend in backends().items():
            if not backend.available:
                how = "verified in its interpreter" if name in INTERPRETED else "not verified"
                assert f"{name}: {how}: {backend.reason}" in text
        for name in INTERPRETED:
            assert text.count(f" {name} float") == 3  # each dtype of floats but bfloat16

    def test_a_kernel_that_fails_in_its_interpreter(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error there is a failed call here."""
        monkeypatch.setattr(verify, "CASES", (replace(ATTENTION, batch=-1),))
        if "triton" in INTERPRETED:
            assert run("--backend", "triton", "--dtype", "float32") == 1
            assert "RuntimeError: Trying to create tensor with negative dimension" in output(capsys)

    @pytest.mark.parametrize("name", [n for n, b in backends().items() if not b.available and n not in INTERPRETED])
    def test_one_that_was_asked_for_and_is_not_here(self, name: str, capsys: Captured) -> None:
        assert run("--backend", name) == 1
        text = output(capsys)
        assert f"{name}: not verified: {backends()[name].reason}" in text
        assert text.endswith(f"FAILED: {name} can't be verified here")
        assert run("--backend", name, "--backend", "cpu") == 1  # also beside one that is right

    @pytest.mark.parametrize("arguments", [["--cases", "-1"], ["--cases", "x"], ["--backend", "reference"]])
    def test_bad_usage(self, arguments: list[str], capsys: Captured) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(*arguments)
        assert arguments[0] in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("kernels", "result", "op"),
        [
            ({"attention": with_context(lambda x: x * (1 + 1e-4))}, "context", "attention"),
            ({"attention": with_context(lambda x: x * torch.nan)}, "context", "attention"),
            ({"attention": with_context(lambda x: x[..., :-1])}, "context", "attention"),
            ({"attention": with_context(lambda x: x.double() if x.dtype == torch.float32 else x)}, "context", "step"),
            ({"attention": with_wrong_gradient(0)}, "grad query", "step"),
            ({"attention": with_wrong_gradient(1)}, "grad key", "attention"),
            ({"attention": with_wrong_gradient(2)}, "grad value", "attention"),
            ({"attention": with_wrong_gradient(3)}, "grad score_weight", "attention"),
            ({"scores": lambda kernel: lambda *args: kernel(*args) + 1e-4}, "scores", "scores"),
            ({"scores": with_wrong_gradient(2)}, "grad score_weight", "scores"),
            ({"step": with_context(lambda x: x * (1 + 1e-4))}, "context", "past"),
            *(
                ({"step": with_wrong_gradient(k)}, f"grad {name}", "past")
                for k, name in enumerate(cases.PAST_INPUTS, 4)
            ),
        ],
        ids=[
            "scaled",
            "nan",
            "shape",
            "dtype",
            "query",
            "key",
            "value",
            "score_weight",
            "scores",
            "of scores",
            "step",
            *cases.PAST_INPUTS,
        ],
    )
    def test_a_kernel_that_is_off(
        self,
        kernels: dict[str, Callable[[Kernel], Kernel]],
        result: str,
        op: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Captured,
    ) -> None:
        replace_kernel(monkeypatch, **kernels)
        assert run("--backend", "cpu") == 1
        text = output(capsys)
        case = next(case for case in FEW if case.op == op)
        failure = re.search(rf"FAILED cpu: {re.escape(str(case))}, seed (\d+): [^:]*?\b{result} ([\d.e+-]+|inf)", text)
        assert failure, text
        # What was printed is enough to see it again.
        assert f"{compare(case, 'cpu', int(failure[1]))[result]:.3g}" == failure[2]

    def test_a_kernel_that_raises(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        def fail(*args: Any) -> Any:
            raise RuntimeError("out of resources")

        replace_kernel(monkeypatch, scores=lambda kernel: fail)
        assert run("--backend", "cpu") == 1
        text = output(capsys)
        assert f"FAILED cpu: {SCORES}, seed 2: " in text
        assert "out of resources" in text
        assert "FAILED: 4 of 16 calls" in text  # the rest was still verified

    def test_many_failures_are_counted(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        off = with_context(lambda x: x * 2 + 1)
        replace_kernel(monkeypatch, attention=off, dot_attention=off, step=off, scores=lambda k: lambda *a: k(*a) + 1)
        assert run("--backend", "cpu", "--cases", "20") == 1
        text = output(capsys)
        assert text.count("FAILED cpu:") == 20
        failed = re.search(r"FAILED: (\d+) of 36 calls", text)  # one with all slots hidden is right
        assert failed
        assert int(failed[1]) > 28
        assert f"... and {int(failed[1]) - 20} more" in text


class TestSeeds:
    @pytest.mark.parametrize("case", FEW, ids=str)
    def test_the_same_seed_gives_the_same_errors(self, case: Case) -> None:
        assert compare(case, "cpu", 3) == compare(case, "cpu", 3)
        assert compare(case, "cpu", 3) != compare(case, "cpu", 4)

    def test_inputs_are_those_of_the_seed(self) -> None:
        a, b, *others = (draw(ATTENTION, seed) for seed in (1, 1, 0, 2, 3, 1 + 2**31))
        for name in ("query", "key", "value", "score_weight", "seed"):
            assert torch.equal(getattr(a, name), getattr(b, name))
            assert not any(torch.equal(getattr(a, name), getattr(c, name)) for c in others)
        for name in a.grads:
            assert torch.equal(a.grads[name], b.grads[name])
            assert not any(torch.equal(a.grads[name], c.grads[name]) for c in others)

    def test_every_dtype_has_the_same_numbers(self) -> None:
        exact = draw(replace(ATTENTION, dtype=torch.float64), 1)
        for dtype in DTYPES:
            inputs = draw(replace(ATTENTION, dtype=dtype), 1)
            assert inputs.query.dtype == inputs.grads["context"].dtype == dtype
            assert torch.equal(inputs.query, exact.query.to(dtype))

    def test_random_cases_are_those_of_the_seed(self) -> None:
        some = list(random_cases(40, 5))
        assert len(some) == 40
        assert some == list(random_cases(40, 5))
        assert some[:10] == list(random_cases(10, 5))
        assert some != list(random_cases(40, 6))
        assert {case.op for case in some} == {"attention", "step", "scores", "dot", "past"}
        assert {case.dtype for case in some} == set(DTYPES)

    def test_the_command_takes_its_seed(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        seen: list[tuple[Case, int]] = []

        def spy(case: Case, backend: str, seed: int, device: str) -> dict[str, float]:
            seen.append((case, seed))
            return {"context": 0.0}

        monkeypatch.setattr(verify, "compare", spy)
        runs = []
        for seed in ("0", "0", "9"):
            seen.clear()
            assert run("--backend", "cpu", "--cases", "5", "--seed", seed) == 0
            runs.append(list(seen))
        assert runs[0] == runs[1]
        assert all(a[1] != b[1] for a, b in zip(runs[0], runs[2], strict=True))
        assert [case for case, _ in runs[0][-5:]] != [case for case, _ in runs[2][-5:]]


def off_by(monkeypatch: pytest.MonkeyPatch, result: str, factor: float) -> None:
    """Makes one result too large, of backends only."""
    measured = cases._run

    def run(case: Case, inputs: cases.Inputs, dtype: torch.dtype, call: Any) -> dict[str, Tensor]:
        found = measured(case, inputs, dtype, call)
        if call.__qualname__.startswith("_backend"):
            found[result] = found[result] * factor
        return found

    monkeypatch.setattr(cases, "_run", run)


RESULTS = {
    "attention": ("context", "weights", "grad query", "grad key", "grad value", "grad score_weight"),
    "scores": ("scores", "grad query", "grad key", "grad score_weight"),
}
RESULTS["past"] = (*RESULTS["attention"], *(f"grad {name}" for name in cases.PAST_INPUTS))
SUMS = ("grad query", "grad key", "grad score_weight")
"""Of attention: sums that nearly cancel, of terms that were made with results in their dtype."""


def noticed(case: Case, result: str) -> float:
    """A relative error that no rounding explains."""
    if case.op == "past":  # whose tolerances carry errors from sum to sum by their absolute values
        eps = torch.finfo(cases._dtype_of(case, result)).eps
        return 16 * eps if eps > 1e-4 else 5e-4 * eps / torch.finfo(torch.float32).eps
    sums = case.op != "scores" and result in SUMS
    of_all_rows = sums and result == "grad score_weight"
    if case.dtype in (torch.float16, torch.bfloat16):
        return (8 if sums else 2) * torch.finfo(case.dtype).eps
    return (5e-4 if of_all_rows else 1e-4) * torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps


TIGHT = [
    (replace(case, dtype=dtype), result)
    for case in (
        ATTENTION,
        SCORES,
        Case("step", batch=3, queries=1, keys=60, features=64, values=48, lengths=True, weights=True),
        Case(queries=17, keys=33, features=64, values=31, mask="slots", weights=True, scale=0.5),
        PAST,
    )
    for result in RESULTS[case.op if case.op in RESULTS else "attention"]
    for dtype in DTYPES
]


class TestTolerances:
    @pytest.mark.parametrize(("case", "result"), TIGHT, ids=str)
    def test_notice_a_small_error(self, case: Case, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert max(compare(case, "cpu", 1).values()) <= 1.0
        off_by(monkeypatch, result, 1 + noticed(case, result))
        assert {name for name, error in compare(case, "cpu", 1).items() if error > 1.0} == {result}

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_hold_for_the_reference_itself(self, dtype: torch.dtype) -> None:
        """In float64 the plain computation is as good as any kernel; the half types it computes in half."""
        errors = compare(replace(ATTENTION, dtype=dtype), "reference", 1)
        assert (max(errors.values()) <= 1.0) == (dtype in (torch.float32, torch.float64))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_are_finite(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """An infinite one would let everything pass, and one of zero nothing."""
        bounds: list[Tensor] = []
        tolerances = cases.tolerances

        def spy(*args: Any) -> dict[str, Tensor]:
            found = tolerances(*args)
            bounds.extend(found.values())
            return found

        monkeypatch.setattr(cases, "tolerances", spy)
        for dtype in DTYPES:
            compare(replace(case, dtype=dtype), "cpu", 0)
        assert len(bounds) >= 12  # a result and the gradients of two inputs or more, in four dtypes
        assert all(bound.isfinite().all() and (bound > 0).all() for bound in bounds)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_nan_and_infinity_are_never_right(self, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
        replace_kernel(monkeypatch, attention=with_context(lambda x: torch.where(x == x.max(), bad, x)))
        assert compare(ATTENTION, "cpu", 0)["context"] == torch.inf

    @pytest.mark.parametrize("wrong", [0.0, -1e30, torch.inf, torch.nan])
    def test_masked_scores_are_minus_infinity(self, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
        replace_kernel(
            monkeypatch,
            scores=lambda kernel: lambda *args: (s := kernel(*args)).masked_fill(s.detach() == -torch.inf, wrong),
        )
        assert compare(SCORES, "cpu", 0)["scores"] == torch.inf

    def test_weights_that_were_not_masked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key beyond the lengths has a weight of exactly 0: its tolerance is next to nothing."""

        def make(kernel: Kernel) -> Kernel:
            def attention(*args: Any) -> Any:
                context, weights, *rest = kernel(*args)
                return context, weights + 1e-30, *rest

            return attention

        replace_kernel(monkeypatch, attention=make)
        assert compare(ATTENTION, "cpu", 0)["weights"] > 1.0


class TestCase:
    def test_reads_as_the_call_that_it_is(self) -> None:
        assert str(Case()) == "attention (2, 3, 7, 12, 10) float32"
        case = Case("step", 1, 2, 3, 4, 5, torch.bfloat16, lengths=True, scale=0.5, magnitude=1e4, poison=True)
        assert str(case) == "step (1, 2, 3, 4, 5) bfloat16 lengths poison scale=0.5 magnitude=10000"

    def test_tells_everything_about_it(self) -> None:
        """A failure on another machine is known by this text alone."""
        other: dict[str, list[Any]] = {"op": ["step", "scores"], "dtype": [torch.float16], "mask": ["keys", "slots"]}
        other |= {"rule": ["sigmoid", "forward"], "held": [torch.bfloat16, torch.float16]}
        changes = []
        for field in fields(Case):
            value = getattr(Case(), field.name)
            values = other[field.name] if field.name in other else [not value if value is False else value + 1]
            changes += [{field.name: x} for x in values]
        texts = {str(replace(Case(), **change)) for change in ({}, *changes)}
        assert len(texts) == 1 + len(changes)
