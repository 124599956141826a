"""A fixed budget of the fuzzer, the same cases each time (``make fuzz`` draws others), and what it is made of."""

from __future__ import annotations

from dataclasses import replace

import fuzz
import pytest
import torch

import attnext
from attnext import alignments
from attnext.cases import Case

CASES = {"kernels": 320, "rules": 500, "modules": 300, "layers": 120, "decoders": 80}


@pytest.mark.parametrize("name", CASES)
def test_drawn_cases(name: str) -> None:
    fuzz.run(fuzz.families()[name], CASES[name], None)


def test_what_is_drawn_is_written_shortly() -> None:
    case = Case("dot", queries=5, scale=0.5)
    drawn = fuzz.Drawn(case, memory="prepared")
    assert str(drawn) == "Drawn(case=Case(op='dot', queries=5, scale=0.5), memory='prepared')"
    assert str(replace(drawn, memory="", threads=2)) == "Drawn(case=Case(op='dot', queries=5, scale=0.5), threads=2)"


def test_a_case_that_is_off_is_shown_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a fault: weights that are those of the next row."""
    right = alignments._softmax
    monkeypatch.setattr(alignments, "_softmax", lambda scores: right(scores).roll(1, 0))
    with pytest.raises(AssertionError, match=r"Rule\(.*rows=2, ") as raised:
        fuzz.run(fuzz.families()["rules"], 100, None)
    assert "tolerances" in str(raised.value)


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
def test_layouts_keep_the_numbers(layout: str) -> None:
    x = torch.randn(1, 3, 4).expand(2, 3, 4).contiguous()
    y = fuzz.laid_out(x, layout)
    assert torch.equal(x, y)
    assert (layout == "as it is") == (y.is_contiguous() and y.data_ptr() == x.data_ptr())


def test_settings_are_as_before() -> None:
    before = torch.get_num_threads(), attnext.backends()["cpu"]
    with fuzz.as_drawn(fuzz.INSTRUCTION_SETS[-1], 3):
        assert torch.get_num_threads() == 3
        assert fuzz.INSTRUCTION_SETS[-1] in attnext.backends()["cpu"].reason
    assert (torch.get_num_threads(), attnext.backends()["cpu"]) == before
