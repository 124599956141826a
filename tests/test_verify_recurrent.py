"""What `attnext verify` compares layers and decoders with notices a kernel that is a little off."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnext import verify
from attnext.recurrent import _layer, _operators
from attnext.recurrent.cases import DTYPES, RECURRENT_CASES, RecurrentCase, compare, random_cases

Captured = pytest.CaptureFixture[str]
Operator = Callable[..., Any]
LAYER = RecurrentCase("LSTM", lengths=True, both_ways=True)
DECODER = RecurrentCase("LSTM", attention="coverage", lengths=True, vector=7, feeds=True)
FEW = (LAYER, DECODER)
KEPT, FOUND = _operators.Kept._fields, _operators.Found._fields
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CASES", ())
    monkeypatch.setattr(verify, "RECURRENT_CASES", FEW)
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args(["--cases", "0", "--backend", "cpu", *arguments]))


def output(captured: Captured) -> str:
    return " ".join(captured.readouterr().out.split())


def with_result(number: int, change: Callable[[Tensor], Tensor]) -> Callable[[Operator], Operator]:
    """An operator that changes one of its results."""

    def make(operator: Operator) -> Operator:
        def changed(*given: Any) -> Any:
            results = list(operator(*given))
            results[number] = change(results[number])
            return results

        return changed

    return make


def scaled(x: Tensor) -> Tensor:
    return x * (1 + 1e-4)


BROKEN: dict[str, tuple[Any, str, int, RecurrentCase, str]] = {
    "states": (_layer, "_forward", 0, LAYER, "outputs"),
    "last states": (_layer, "_forward", 2, LAYER, "last states"),
    "gradient of inputs": (_layer, "_backward", 0, LAYER, "grad inputs"),
    "gradient of first states": (_layer, "_backward", 2, LAYER, "grad states"),
    "gradient of a parameter": (_layer, "_backward", 9, LAYER, "grad parameters"),
    "decoder's states": (_operators, "forward", KEPT.index("hidden"), DECODER, "last states"),
    "decoder's contexts": (_operators, "forward", KEPT.index("contexts"), DECODER, "contexts"),
    "decoder's gradient of first states": (_operators, "backward", FOUND.index("cell"), DECODER, "grad states"),
    "decoder's gradient of a parameter": (_operators, "backward", FOUND.index("biases"), DECODER, "grad parameters"),
}


@pytest.mark.parametrize(("where", "name", "number", "case", "result"), BROKEN.values(), ids=BROKEN)
def test_a_kernel_that_is_off(
    where: Any, name: str, number: int, case: RecurrentCase, result: str, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    assert max(compare(case, "cpu", 1).values()) < 1.0
    monkeypatch.setattr(where, name, with_result(number, scaled)(getattr(where, name)))
    assert compare(case, "cpu", 1)[result] > 1.0
    assert run() == 1
    failed = re.search(rf"FAILED cpu: {re.escape(str(case))}, seed (\d+): ([^:]*)", output(capsys))
    assert failed
    assert result in failed[2]
    # What was printed is enough to see it again.
    assert f"{result} {compare(case, 'cpu', int(failed[1]))[result]:.3g}" in failed[2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_right(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = with_result(0, lambda x: torch.where(x == x.max(), bad, x))
    monkeypatch.setattr(_layer, "_forward", spoilt(_layer._forward))
    assert compare(LAYER, "cpu", 0)["outputs"] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RECURRENT_CASES, ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_the_table(case: RecurrentCase, dtype: torch.dtype) -> None:
    errors = compare(replace(case, dtype=dtype), "cpu", 1)
    assert max(errors.values()) <= 1.0
    assert min(errors["outputs"], errors["grad parameters"]) > 0.0  # not the reference held to itself


def test_the_command(capsys: Captured) -> None:
    assert run("--cases", "40") == 0
    text = output(capsys)
    counts = [int(count) for count in re.findall(r"cpu\W+float\d+\W+(\d+)", text)]
    drawn = list(random_cases(10, 0))
    assert sum(counts[-2:]) == len(FEW) * len(DTYPES) + len(drawn)
    assert "Recurrent layers and decoders" in text
    assert run("--dtype", "float64") == 0
    assert f"OK: {len(FEW)} calls within tolerance on cpu" in output(capsys)
    assert run("--dtype", "bfloat16") == 0  # which layers have no kernels for
    assert "Recurrent" not in capsys.readouterr().out


def test_random_cases_are_those_of_the_seed() -> None:
    some = list(random_cases(60, 5))
    assert len(some) == 60
    assert some == list(random_cases(60, 5))
    assert some != list(random_cases(60, 6))
    assert {bool(case.attention) for case in some} == {True, False}
    for case in some:
        assert max(compare(case, "cpu", 2).values()) <= 1.0


def test_a_case_tells_everything_about_it() -> None:
    """A failure on another machine is known by this text alone."""
    one = RecurrentCase(attention="additive")
    other: dict[str, Any] = {"cell": "LSTM", "dtype": torch.float64, "attention": "dot"}
    texts = {str(one), str(RecurrentCase())}
    for field in fields(RecurrentCase):
        value = getattr(one, field.name)
        changed = other.get(field.name, not value if isinstance(value, bool) else None)
        texts.add(str(replace(one, **{field.name: value + 1 if changed is None else changed})))
    assert len(texts) == 2 + len(fields(RecurrentCase))
