"""Modules of other code bases, swapped and not: their real files, the same numbers."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnext
import attnext.compat
from attnext.acceleration import class_name, label
from attnext.bench import accelerated
from attnext.bench.code_bases import PROGRAMS
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import SIZES, Program, Sizes
from attnext.compat import recipes
from attnext_command import main

SMALL = SIZES[0]


def each(**wanted: Any) -> Any:
    chosen = [p for p in PROGRAMS if all(getattr(p, name) == value for name, value in wanted.items())]
    return pytest.mark.parametrize("program", chosen, ids=lambda p: p.name)


def made(program: Program, sizes: Sizes = SMALL, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A module as its code base has it, and a swapped one with the same parameters."""
    module = program.make(sizes)
    ours = copy.deepcopy(module)
    report = attnext.accelerate(ours, only=[program.recipe, f"{program.recipe}.*"])
    assert report.swapped, str(report)
    assert {one.recipe for one in report.swapped} >= {program.recipe}
    return module.to(dtype), ours.to(dtype)


def difference(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    scale = 1.0 + float(right.abs().max()) if right.numel() else 1.0
    return float((found.double() - right.double()).abs().max()) / scale if right.numel() else 0.0


def tolerance(program: Program) -> float:
    """Some dozens of roundings of sums of the sizes here."""
    return 1e-11 if program.exact == torch.float64 else 2e-5


@each()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_outputs_and_gradients(program: Program, sizes: Sizes, training: bool) -> None:
    dtype, most = program.exact, tolerance(program)
    original, ours = (module.train(training) for module in made(program, sizes, dtype))
    inputs = program.drawn(sizes, dtype)
    (expected, expected_grads), (found, grads) = (program.results(m, sizes, inputs) for m in (original, ours))
    assert len(found) == len(expected)
    for one, right in zip(found, expected, strict=True):
        assert one.dtype == right.dtype
        assert difference(one, right) <= most
    for name, right in expected_grads.items():  # a parameter has a gradient where the original has one
        assert difference(grads[name], right) <= most, name
    assert all(not grad.any() for name, grad in grads.items() if name not in expected_grads)
    for name in program.inert:
        assert not grads[name].any()


@each()
def test_kernels_serve(program: Program) -> None:
    """Whether any do, as the original's own code would pass every other test."""
    _, ours = made(program, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        program.run(ours.eval(), SMALL, *program.drawn(SMALL, torch.float32))
    called = {event.key for event in recorded.key_averages() if event.key.startswith("attnext::")}
    assert bool(called - {"attnext::additive_prepare_cpu"}) == program.served


@each(takes_half=True, within_twice=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_the_original(program: Program, dtype: torch.dtype) -> None:
    """Errors to the original in float64, of the same parameters and inputs."""
    sizes = SIZES[2]
    original, ours = made(program, sizes, dtype)
    inputs = program.drawn(sizes, dtype)
    exact = copy.deepcopy(original).to(torch.float64)
    truth, _ = program.results(exact, sizes, [x.detach().double().requires_grad_() for x in inputs])
    plain, _ = program.results(original, sizes, inputs)
    found, _ = program.results(ours, sizes, inputs)
    eps = torch.finfo(dtype).eps
    for one, right, other in zip(found, truth, plain, strict=True):
        assert one.dtype == other.dtype
        assert difference(one, right) <= 2 * difference(other, right) + eps


@each()
def test_state_dict_pickle_copy_and_back(program: Program) -> None:
    original, ours = made(program, dtype=program.exact)
    state = ours.state_dict()
    assert list(state) == list(original.state_dict())
    original.load_state_dict(state)
    assert isinstance(ours, type(original))
    inputs = program.drawn(SMALL, program.exact)
    before, _ = program.results(original.eval(), SMALL, inputs)
    found, _ = program.results(ours.eval(), SMALL, inputs)
    with torch.no_grad():
        for module in (ours, original):  # a copy has no graph
            program.run(module, SMALL, *inputs)
    assert {type(m) for m in copy.deepcopy(ours).modules()} == {type(m) for m in ours.modules()}
    again, _ = program.results(copy.deepcopy(ours), SMALL, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    if program.pickles:
        read = pickle.loads(pickle.dumps(ours))
        assert {type(m) for m in read.modules()} == {type(m) for m in original.modules()}
        torch.save(ours, io.BytesIO())
    attnext.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in original.modules()]
    after, _ = program.results(ours, SMALL, inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@each()
def test_where_no_kernel_serves_the_original_does(program: Program) -> None:
    original, ours = made(program, dtype=torch.float32)
    inputs = program.drawn(SMALL, torch.float32)

    def same_bits() -> None:
        for one, right in zip(program.run(ours, SMALL, *inputs), program.run(original, SMALL, *inputs), strict=True):
            assert one.dtype == right.dtype
            assert torch.equal(one, right)

    with attnext.use_backend("reference"):
        same_bits()
    with torch.autocast("cpu", torch.bfloat16):
        try:
            program.run(original, SMALL, *inputs)
        except (RuntimeError, TypeError):  # which can't be helped
            return
        same_bits()


@each()
def test_weights_change_between_passes(program: Program) -> None:
    """An optimizer's step, or a change that leaves no trace, is seen at the next sequence."""
    original, ours = made(program, dtype=program.exact)
    inputs = program.drawn(SMALL, program.exact)
    for module in (original, ours):
        program.results(module, SMALL, inputs)
        for parameter in module.parameters():
            parameter.data.mul_(0.9)
    expected, found = (program.results(module, SMALL, inputs)[0] for module in (original, ours))
    assert all(difference(a, b) <= tolerance(program) for a, b in zip(found, expected, strict=True))


@each()
def test_training_and_going_on_with_the_original(program: Program) -> None:
    """Some steps of an optimizer, then the parameters in a module of the original's class, and another step."""
    modules = made(program, dtype=program.exact)
    inputs = [x.detach() for x in program.drawn(SMALL, program.exact)]
    found = []
    for module in modules:
        for one in (module, program.make(SMALL).to(program.exact)):
            if one is not module:
                # Keras's names are those of each layer.
                one.load_state_dict(dict(zip(one.state_dict(), module.state_dict().values(), strict=True)))
            if not list(one.parameters()):
                pytest.skip("it has nothing to train")
            optimizer = torch.optim.SGD(one.parameters(), lr=1e-2)
            for _ in range(2):
                outputs = [x for x in program.run(one.eval(), SMALL, *inputs) if x.requires_grad]
                optimizer.zero_grad()
                sum(x.square().mean() for x in outputs).backward()
                optimizer.step()
        found.append(list(one.state_dict().values()))
    for after, right in zip(*reversed(found), strict=True):
        assert difference(after, right) <= tolerance(program)


def test_a_new_model_is_made_by_name() -> None:
    load("espnet", "espnet.nets.pytorch_backend.rnn.attentions")
    module = attnext.compat.espnet.AttLoc(6, 5, 4, aconv_chans=3, aconv_filts=2)
    (one,) = attnext.accelerate(module)
    assert one.recipe == "espnet.AttLoc"
    assert one.swapped
    attnext.restore(module)
    assert type(module).__module__ == "espnet.nets.pytorch_backend.rnn.attentions"


def test_every_recipe_has_a_program() -> None:
    assert {label(recipe) for recipe in recipes()} == {program.recipe for program in PROGRAMS}


def test_every_recipe_is_timed_and_in_the_readme() -> None:
    assert {name.partition(" ")[0] for name in accelerated.TIMED} == {label(recipe) for recipe in recipes()}
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = readme.partition("<!-- the code bases")[2].partition("<!-- end of the code bases -->")[0].splitlines()
    shown = {tuple(cell.strip() for cell in row.split("|")[1:5]) for row in rows if row.startswith("| ")}
    for recipe in recipes():
        served = recipe.serves + ("" if recipe.pays else "; where asked for by name")
        name = f"`{class_name(recipe)}`"
        assert any(
            (base, version, text) == (recipe.code_base, recipe.version, served) and kind.startswith(name)
            for base, kind, version, text in shown
        ), label(recipe)


def test_the_study_of_code_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerated, "TIMED", ("espnet.AttLoc", "gnmt.BahdanauAttention normalised"))
    kept = tmp_path / "peers.json"
    assert main(["bench", "--cases", "peers", "--quick", "--threads", "1", "--json", str(kept)]) == 0
    shown = capsys.readouterr().out
    assert "espnet.AttLoc" in shown
    assert "speech" in shown
    rows = json.loads(kept.read_text())["studies"]["peers"]
    assert [row["kind"] for row in rows] == ["forward", "forward + backward"] * 2
    assert all(min(times) > 0 for row in rows for times in row["seconds"].values())
    lines = accelerated.markdown(rows).splitlines()
    assert lines[2].startswith("| ESPnet | `AttLoc` | espnet==202511 | all but han_mode | ")
    assert lines[3].startswith("| GNMT | `BahdanauAttention` normalised | NVIDIA DeepLearningExamples | all options | ")
    monkeypatch.setattr(accelerated, "FOLDER", tmp_path / "nothing")
    assert main(["bench", "--cases", "peers", "--quick"]) == 0
    assert "run `make peers`" in " ".join(capsys.readouterr().out.split())
