"""``attnext bench``: right before timed, what is chosen, what is kept, what has changed. No test judges a time."""

from __future__ import annotations

import copy
import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from attnext import dot
from attnext._support import InputError
from attnext.attention.family import FAMILY
from attnext.bench import (
    calls,
    command,
    decoding,
    dot_grid,
    eager,
    kept,
    loops,
    machine,
    memory,
    model,
    plain,
    plots,
    recurrent,
    report,
    steps,
    steps_table,
    studies,
    timing,
)
from attnext.bench.cases import CASES, Case
from attnext.bench.peers import OTHERS, Peer, Unavailable, Wrong, checked, cores, ours
from attnext.bench.timing import Plan, measure
from attnext_command import main

ROOT = Path(__file__).resolve().parents[1]
in_the_repository = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(),
    reason="the benchmarks are in the repository only",
)
Captured = pytest.CaptureFixture[str]

TINY = {case.name: replace(case, batch=2, queries=min(case.queries, 18), keys=21, features=24) for case in CASES}
PEERS = {"attnext": ours("cpu")[0], **OTHERS}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that take no time, and as few samples as there may be; a thread that leaves jax all the cores it finds."""
    monkeypatch.setattr(command, "CASES", tuple(TINY.values()))
    monkeypatch.setattr(studies, "CASES", tuple(TINY.values()))
    for name in ("_QUICK_SECONDS", "_SECONDS", "_STUDY_SECONDS"):
        monkeypatch.setattr(command, name, 0.0)
    monkeypatch.setattr(timing, "_BLOCK_SECONDS", 1e-9)
    monkeypatch.setattr(importlib.import_module("attnext.bench.peers"), "cores", lambda: 1)
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 18)


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


@pytest.fixture(scope="module")
def _compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def serving() -> list[tuple[str, str]]:
    """Each peer with each kind and dtype it serves: cases of one kind differ in sizes alone."""
    chosen = ("forward", "training", "step", "scores", "scores-backward", "forward-float16", "forward-bfloat16")
    chosen += ("dot-step", "dot-step-weights", "dot-training")
    return [(name, case) for name, peer in PEERS.items() for case in chosen if peer.serves(TINY[case])]


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("name", "case"), serving())
def test_every_peer_is_right(name: str, case: str) -> None:
    if name == "jax":
        pytest.importorskip("jax")
        torch.set_num_threads(cores())
    tiny = TINY[case]
    with torch.set_grad_enabled(tiny.differentiated):
        try:
            checked(tiny, PEERS[name], tiny.inputs("cpu"))
        except Unavailable as reason:
            assert name == "compile"  # which needs a compiler
            pytest.skip(str(reason))


@pytest.mark.parametrize("case", ["forward", "training", "step", "scores", "scores-backward", "forward-bfloat16"])
@pytest.mark.parametrize("fault", [1.05, float("nan")])
def test_wrong_peer_is_refused_before_anything_is_timed(
    case: str, fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))

    def build(case: Case, inputs: Any) -> Any:
        run = OTHERS["eager"].build(case, inputs)

        def wrong() -> list[torch.Tensor]:
            found = run()
            results = [x.detach().clone() for x in (found if isinstance(found, tuple) else (found,))]
            results[-1].view(-1)[results[-1].abs().argmax()] *= fault
            return results

        return wrong

    faulty = Peer("faulty", build, OTHERS["eager"].formula)
    with pytest.raises(Wrong, match=rf"faulty is wrong on the case {case}: off by"):
        measure(TINY[case], [OTHERS["eager"], faulty], Plan("cpu", 0.0, 1))


@pytest.mark.usefixtures("_tiny")
def test_a_wrong_peer_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    broken = replace(OTHERS["eager"], build=lambda case, inputs: lambda: torch.zeros(case.batch, case.queries, 512))
    monkeypatch.setitem(OTHERS, "eager", broken)
    assert bench("--quick", "--cases", "forward", "--peers", "eager") == 1
    shown = capsys.readouterr().out
    assert "FAILED: eager is wrong on the case forward" in " ".join(shown.split())
    assert "faster" not in shown


class TestWork:
    def test_of_a_case(self) -> None:
        pairs, elements = 2 * 3 * 5, 2 * 3 * 5 * 7
        sizes = (2, 3, 5, 7, 11)
        assert Case("", "forward", *sizes).elements == elements
        assert Case("", "forward", *sizes).multiply_adds == 3 * elements + 11 * pairs
        assert Case("", "forward + backward", *sizes).multiply_adds == 10.5 * elements + 33 * pairs
        assert Case("", "scores", *sizes[:4]).multiply_adds == 3 * elements
        assert Case("", "backward of the scores", *sizes[:4]).multiply_adds == 4.5 * elements
        assert Case("", "forward", *sizes).memory_bytes == 0
        assert Case("", "step", 2, 1, 5, 7, 11).memory_bytes == 2 * 5 * 18 * 4

    def test_bound_is_the_slower_of_arithmetic_and_reading(self) -> None:
        peaks = {"multiply_adds": 100.0, "read_bandwidth": 10.0, "last_level_cache": 50}
        result = {"multiply_adds": 200.0, "memory_bytes": 0}
        assert report.bound(result, peaks) == 2.0
        assert report.bound(result | {"memory_bytes": 60}, peaks) == 6.0
        assert report.bound(result | {"memory_bytes": 40}, peaks) == 2.0  # from the cache
        assert report.bound(result, peaks | {"multiply_adds": 0.0}) is None

    def test_exponent(self) -> None:
        sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
        assert studies.exponent(sizes, [3e-3 * size**2 for size in sizes]) == pytest.approx(2.0)
        assert studies.exponent(sizes, [5e-3 * size for size in sizes]) == pytest.approx(1.0)
        assert 0.3 < studies.exponent(sizes, [1.0 + 0.2 * size for size in sizes]) < 0.9


def test_peers_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "_on_cpu", lambda run, calls: run() or 1.0)
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.interleaved(runs, Plan("cpu", 0.0, 4))
    assert "".join(order) == "abc" * 4
    assert samples == {name: [1.0] * 4 for name in "abc"}


@pytest.mark.usefixtures("_tiny")
class TestCommand:
    def test_table_and_json(self, tmp_path: Path, capsys: Captured) -> None:
        path = tmp_path / "new" / "run.json"
        assert bench("--quick", "--cases", "forward,step", "--cases", "scores", "--peers", "eager,sdpa",
                     "--json", str(path)) == 0  # fmt: skip
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert max(map(len, shown.out.splitlines())) <= 80
        document = report.load(path)
        found = [(result["case"], result["peer"]) for result in document["results"]]
        kernel = PEERS["attnext"].name
        assert found == [
            ("forward", kernel), ("forward", "eager"), ("forward", "sdpa"),
            ("step", kernel), ("step", "eager"), ("step", "sdpa"), ("scores", kernel), ("scores", "eager"),
        ]  # fmt: skip
        for result in document["results"]:
            assert len(result["seconds"]) >= 3
            assert result["seconds"] == [float(f"{x:.4g}") for x in result["seconds"]]
        assert len(re.findall(r'"seconds": \[[-\d.e]+(, [-\d.e]+)+\]$', path.read_text(), re.MULTILINE)) == len(found)
        assert document["versions"]["torch"] == torch.__version__
        assert document["threads"] == 1
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT.*", document["date"])
        assert str(ROOT) not in json.dumps(document["machine"])
        assert ("avx2" in document["capabilities"]) == bool(torch.cpu.get_capabilities().get("avx2"))
        assert document["machine"]["cpu"] in shown.out
        assert document["device"] == "cpu"
        assert document["peaks"]["read_bandwidth"] > 0
        assert document["studies"] == {}
        if (ROOT / ".git").exists():
            assert len(document["commit"]["id"]) == 40
        assert f"forward: forward, {TINY['forward']}, float32" in shown.out
        eager = next(result for result in document["results"] if result["peer"] == "eager")
        times = report.ratio(eager, document["results"])
        assert times == median(eager["seconds"]) / median(document["results"][0]["seconds"])
        text = f"{times:.3g}x faster" if times >= 1 else f"{1 / times:.3g}x slower"
        assert text in next(line for line in shown.out.splitlines() if line.startswith("eager"))

    def test_all_but_studies_with_quick(self) -> None:
        parser = command.argparse.ArgumentParser()
        command.add_arguments(parser)
        asked = command._asked(parser.parse_args(["--quick"]))
        assert asked == (list(TINY.values()), [])
        assert command._asked(parser.parse_args([]))[1] == list(studies.STUDIES)
        assert command._asked(parser.parse_args(["--cases", "linearity"])) == ([], ["linearity"])
        assert command._asked(parser.parse_args(["--quick", "--plot", "x.png"]))[1] == ["memory"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--cases", "froward"], "argument --cases: unknown name 'froward': did you mean 'forward'?"),
            (["--cases", "step,linear"], "argument --cases: unknown name 'linear': did you mean 'linearity'?"),
            (["--peers", "jacks"], "argument --peers: unknown name 'jacks': did you mean 'jax'?"),
            (["--cases", ","], "argument --cases: must name at least one"),
            (["--threads", "0"], "argument --threads: must be an integer above 0, got '0'"),
        ],
    )
    def test_bad_usage(self, arguments: list[str], message: str, capsys: Captured) -> None:
        with pytest.raises(SystemExit, match=r"^2$"):
            bench(*arguments)
        assert message in capsys.readouterr().err

    def test_files_are_tried_before_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("too late"))
        (tmp_path / "file").write_text("")
        for option, path, message in (
            ("--json", tmp_path, "--json must be a file, got the folder"),
            ("--json", tmp_path / "file" / "a.json", "can't write to the folder"),
            ("--plot", tmp_path / "file" / "a.png", "can't write to the folder"),
            ("--plot", tmp_path / "a.gif", "--plot must end in .png, .svg or .pdf"),
        ):
            assert bench(option, str(path)) == 2
            assert message in capsys.readouterr().err

    def test_help_lists_cases_and_studies(self, capsys: Captured) -> None:
        with pytest.raises(SystemExit, match=r"^0$"):
            bench("--help")
        shown = capsys.readouterr().out
        for name in (*TINY, *studies.STUDIES):
            assert f"\n  {name} " in shown

    def test_threads_are_put_back(self, capsys: Captured) -> None:
        torch.set_num_threads(2)
        assert bench("--threads", "1", "--quick", "--cases", "step", "--peers", "attnext") == 0
        assert torch.get_num_threads() == 2
        assert "1 threads" in capsys.readouterr().out

    def test_without_jax(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setitem(sys.modules, "jax", None)
        assert bench("--quick", "--cases", "step", "--peers", "jax,eager") == 0
        shown = capsys.readouterr()
        notes = " ".join(shown.out.split())
        assert "note: jax was left out: jax is not installed: pip install 'attnext[bench]'" in notes
        assert "\neager" in shown.out
        assert "\njax" not in shown.out
        assert shown.err == ""

    def test_jax_on_fewer_threads_than_it_takes(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setattr(importlib.import_module("attnext.bench.peers"), "cores", lambda: 2)
        assert bench("--threads", "1", "--quick", "--cases", "step", "--peers", "jax") == 0
        assert "note: jax was left out: it would take all cores" in " ".join(capsys.readouterr().out.split())

    def test_compile_that_fails(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        def fail(*args: object, **options: object) -> None:
            raise RuntimeError("no compiler\nand a long story")

        monkeypatch.setattr(torch, "compile", fail)
        assert bench("--quick", "--cases", "step", "--peers", "compile") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "note: compile was left out: torch.compile failed: no compiler" in shown
        assert "long story" not in shown

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setitem(sys.modules, "rich.console", None)
        assert bench("--quick") == 2
        error = capsys.readouterr().err
        assert error.startswith("attnext: error: this needs the package 'rich'")
        assert "pip install 'attnext[bench]'" in error
        assert error.count("\n") == 1

    def test_a_backend_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        for name, reason in (("cuda", "is not available"), ("cdua", "must be None or one of")):
            with monkeypatch.context() as patch:
                patch.setattr(importlib.import_module("attnext.backends")._setting, "forced", name)
                assert bench() == 2
            error = capsys.readouterr().err
            assert error.startswith("attnext: error: ")
            assert reason in error
            assert error.count("\n") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_device_that_is_not_there(self, capsys: Captured) -> None:
        assert bench("--device", "cuda") == 2
        assert "torch sees no GPU" in capsys.readouterr().err

    def test_studies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setattr(studies, "_BASE", {"batch": 1, "queries": 2, "keys": 3, "features": 4, "values": 2})
        path = tmp_path / "run.json"
        monkeypatch.setattr(studies, "_DECODER", {"batch": 2, "steps": 2, "keys": 5, "size": 4})
        monkeypatch.setattr(
            studies, "FAMILY", [member for member in FAMILY if member.name in ("dot", "several heads, additive")]
        )
        assert bench("--cases", "threads,linearity,family", "--threads", "2", "--json", str(path)) == 0
        document = json.loads(path.read_text())
        assert [row["case"] for row in document["studies"]["threads"]] == ["forward", "training"]
        growth = document["studies"]["linearity"]
        assert [(row["kind"], row["size"]) for row in growth[3:5]] == [
            ("forward", "features"),
            ("forward + backward", "batch"),
        ]
        assert growth[3]["sizes"] == [4, 8, 16, 32, 64]
        assert growth[0]["exponent"] == pytest.approx(studies.exponent(growth[0]["sizes"], growth[0]["seconds"]))
        assert [row["attention"] for row in document["studies"]["family"]] == ["dot", "several heads, additive"]
        shown = capsys.readouterr().out
        assert "family: B 2, Tk 5, Q and H 4, D 2; preparation and 2 steps of a decoder" in shown
        assert max(map(len, shown.splitlines())) <= 80
        assert "threads: one against 2" in shown
        assert f"{growth[0]['exponent']:.2f}" in shown
        assert bench("--markdown", str(path)) == 0
        shown = capsys.readouterr().out
        assert "\n\n**linearity**: time grows as a size to the power of\n\n| kind " in shown
        assert "\n| several heads, additive | " in shown
        assert bench("--cases", "threads", "--threads", "1") == 0
        assert "the study of threads was left out" in capsys.readouterr().out


class TestDotGrid:
    @pytest.fixture(autouse=True)
    def _few_sizes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dot_grid, "_sizes", lambda quick: iter([(2, 3, 100, 100), (1, 130, 140, 4)]))

    def test_study(self, tmp_path: Path, capsys: Captured) -> None:
        path = tmp_path / "run.json"
        assert bench("--cases", "dot-grid", "--threads", "1", "--json", str(path)) == 0
        rows = json.loads(path.read_text())["studies"]["dot-grid"]
        assert [(row["sizes"], row["kind"]) for row in rows] == [
            (sizes, kind) for sizes in ("2, 3, 100, 100", "1, 130, 140, 4") for kind in ("forward", "both")
        ]
        for row in rows:
            assert list(row["seconds"]) == ["attnext", "kernel", "products", "attention", "eager"]
            assert {len(samples) for samples in row["seconds"].values()} == {1}
        assert [row["chosen"] for row in rows] == ["products", "kernel", "products", "products"]
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert " of 4; slower than eager by more: " in shown

    def test_a_way_that_gives_something_else(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setitem(dot.WAYS, "products", lambda query, key, value, scale: (1.01 * query, None))
        assert bench("--cases", "dot-grid", "--threads", "1") == 1
        assert "the ways to dot products differ at 2, 3, 100, 100" in capsys.readouterr().out


class TestRecurrent:
    def test_study(self, tmp_path: Path, capsys: Captured) -> None:
        path = tmp_path / "run.json"
        assert bench("--cases", "recurrent", "--quick", "--json", str(path)) == 0
        rows = json.loads(path.read_text())["studies"]["recurrent"]
        assert [(row["layer"], row["kind"]) for row in rows[:2]] == [("GRU", "forward"), ("GRU", "forward + backward")]
        # Three sequences of 5 steps: two directions of three gates, with a matrix of 24 x 24 for input and state.
        assert rows[0]["multiply_adds"] == 3 * 5 * 2 * 3 * 2 * 24 * 24
        assert rows[1]["multiply_adds"] == 3 * rows[0]["multiply_adds"]
        assert rows[2]["multiply_adds"] == (1 + 3 + 6) * 2 * 3 * 2 * 24 * 24
        assert all(set(row["peak"]) == {"attnext", "torch"} for row in rows[-2:])
        shown = capsys.readouterr().out
        assert "LSTM, B 3, T 1 to 6, 24 units" in shown
        assert "peak of forward + backward" in shown
        assert max(map(len, shown.splitlines())) <= 80

    def test_a_wrong_layer_is_not_timed(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        class Off(torch.nn.GRU):
            def forward(self, input: Any, hx: Any = None) -> Any:
                output, last = super().forward(input, hx)
                return output + 0.1, last

        monkeypatch.setitem(recurrent._LAYERS, "GRU", (3, {"attnext": Off, "torch": torch.nn.GRU}))
        assert bench("--cases", "recurrent", "--quick") == 1
        assert "attnext's GRU and torch's differ" in capsys.readouterr().out


class TestModel:
    """A training step of the reference model."""

    @pytest.fixture(autouse=True)
    def _small(self, _tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = {"embedding_size": 6, "encoder_size": 5, "decoder_size": 8, "attention_size": 7}
        models = {"small": ((3, 4, 5), sizes), "long, amp": ((2, 5, 4), sizes | {"amp": True})}
        monkeypatch.setattr(model, "_MODELS", models)
        monkeypatch.setattr(model, "_peaks", lambda name, peers, plan: dict.fromkeys(peers, 3 << 20))

    @pytest.mark.parametrize("bfloat16", [True, False])
    def test_study(self, bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bfloat16})
        kept = tmp_path / "model.json"
        assert bench("--cases", "model", "--peers", "eager", "--quick", "--json", str(kept)) == 0
        rows = json.loads(kept.read_text())["studies"]["model"]
        assert [row["model"] for row in rows] == ["small", "long, amp"][: 1 + bfloat16]
        for row in rows:
            assert row["seconds"].keys() == row["shares"].keys() == {"attnext", "eager"}
            for shares in row["shares"].values():
                assert sum(shares.values()) == pytest.approx(1.0)
        output = " ".join(capsys.readouterr().out.split())
        assert "a training step, and where its time goes" in output
        assert "small: peak of memory: attnext 3 MiB, eager 3 MiB" in output
        assert ("this processor does not multiply bfloat16" in output) != bfloat16

    def test_a_peer_that_computes_something_else(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        right = eager._cell

        def wrong(*arguments: Any) -> tuple[Tensor, Tensor | None]:
            hidden, cell = right(*arguments)
            return hidden * 1.01, cell

        monkeypatch.setattr(eager, "_cell", wrong)
        assert bench("--cases", "model", "--peers", "eager", "--quick") == 1
        assert "eager and attnext differ on the model small" in capsys.readouterr().out


def test_memory_of_a_training_step() -> None:
    """In a process of its own, the real thing at the size of the demo's kind of model."""
    peaks = model._peaks("g2p", ["attnext"], Plan("cpu", 0.1, 1))
    assert 20 << 20 < peaks["attnext"] < 400 << 20


class TestDecoding:
    """Whole searches of the reference model."""

    @pytest.fixture(autouse=True)
    def _small(self, _tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "_QUICK", (decoding._Sizes(1, 1, 6), decoding._Sizes(3, 2, 6)))

    def test_study(self, tmp_path: Path, capsys: Captured) -> None:
        kept = tmp_path / "decoding.json"
        assert bench("--cases", "decoding", "--quick", "--json", str(kept)) == 0
        rows = json.loads(kept.read_text())["studies"]["decoding"]
        assert [(row["cell"], row["sizes"]) for row in rows] == [
            (cell, f"B {batch}, beam {beam}, 6 units") for cell in ("gru", "lstm") for batch, beam in ((1, 1), (3, 2))
        ]
        assert all(row["seconds"].keys() == {"attnext", "eager"} for row in rows)
        assert "decoding: searches of 20 steps" in capsys.readouterr().out

    def test_a_search_that_finds_something_else(self, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        right = eager._attend

        def wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            context, weights, total = right(*arguments)
            return -context, weights, total

        monkeypatch.setattr(eager, "_attend", wrong)
        assert bench("--cases", "decoding", "--quick") == 1
        assert "attnext and eager find other outputs at gru" in capsys.readouterr().out


def tiny(loop: loops.Loop) -> loops.Loop:
    sizes: dict[str, Any] = {"batch": 2, "keys": 9, "features": 12, "values": 10, "steps": min(loop.steps, 4)}
    sizes |= {"query": 6} if hasattr(loop, "query") else {}
    return replace(loop, **sizes | ({"filters": 3, "width": 5} if getattr(loop, "filters", 0) else {}))


LOOPS = steps.LOOPS
TINY_LOOPS = {loop.name: tiny(loop) for loop in LOOPS}


class TestSteps:
    """Loops of decoders beside plain PyTorch."""

    @pytest.fixture(autouse=True)
    def _small(self, _tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "LOOPS", tuple(TINY_LOOPS.values()))
        monkeypatch.setattr(steps, "_QUICK_STEPS", 3)
        monkeypatch.setattr(kept, "measured", lambda loop, peer, *_: (3 << 20, 5 << 20))

    def run(self, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "steps.json"
        assert bench("--cases", "steps", *arguments, "--json", str(path)) == 0
        rows: list[dict[str, Any]] = report.load(path)["studies"]["steps"]
        return rows

    def test_study(self, tmp_path: Path, capsys: Captured) -> None:
        *rows, memory_row = self.run(tmp_path, "--peers", "eager", "--quick")
        expected = [(loop.shortened(3), kind) for loop in TINY_LOOPS.values() for kind in loop.kinds]
        assert [(row["loop"], row["kind"], row["sizes"]) for row in rows] == [
            (loop.name, kind, str(loop)) for loop, kind in expected
        ]
        for row, (loop, kind) in zip(rows, expected, strict=True):
            other = "one call" if isinstance(loop, calls.StepsOfCall) else "eager"
            assert list(row["seconds"]) == ["attnext", other]
            assert min(map(len, row["seconds"].values())) >= 3
            assert row["multiply_adds"] == sum(row["work"].values()) == sum(loop.work(kind).values()) > 0
            assert (row["memory_bytes"], row["reads"]) == (loop.memory_bytes, loop.reads(kind))
        assert memory_row["kept"] == {"attnext": 3 << 20, "eager": 3 << 20}
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        for name in TINY_LOOPS:
            assert f"\n{name}" in shown
        text = " ".join(shown.split())
        assert "location, two channels: B 2, Tk 9, D 12, H 10, Q 6, 3 filters of 2 x 5, 3 steps; of the bound," in text
        assert "bound: share of this machine's peak" in text or machine._extension.load() is None

    def test_tables(self, capsys: Captured) -> None:
        work = {"work": {"scores": 3e9, "cell": 1e9}, "multiply_adds": 4e9, "memory_bytes": 0, "reads": 1}
        rows: list[dict[str, Any]] = [
            {"loop": "a loop", "kind": "forward", "sizes": "B 1", "seconds": {"attnext": [8.0, 9.0, 8.0]}},
            {"loop": "a loop", "kind": "forward + backward", "sizes": "B 1",
             "seconds": {"attnext": [16.0] * 3, "eager": [32.0, 40.0, 64.0], "compile": [1600.0] * 3}},
            {"loop": "queries", "kind": "forward + backward", "sizes": "B 2",
             "seconds": {"attnext": [3.0] * 3, "one call": [2.0] * 3}},
        ]  # fmt: skip
        rows = [row | work for row in rows]
        sizes = {"kept": {"attnext": 3 << 20, "eager": 30 << 20}, "peak": {"attnext": 4 << 20, "eager": 10 << 20}}
        rows.append({"loop": "a loop", "kind": "memory", "sizes": "B 1"} | sizes)
        report.show(Console(width=80), document() | {"studies": {"steps": rows}})
        shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in (
            "forward 8.00 s 50% - -",
            "forward + backward 16.0 s 25% 2.50x (2.25 - 3.25) 100x (100 - 100)",
            "a loop: B 1; of the bound, forward: scores 75%, cell 25%",
            "queries 3.00 s 133% 1.50x (1.50 - 1.50) 2.00 s",
            "attnext 3.0 MiB 4.0 MiB",
            "eager 30.0 MiB 10x 10.0 MiB 2.5x",
        ):
            assert line in shown
        assert shown.count("a loop") == 1

    def test_all_rounds_and_steps_without_quick(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "LOOPS", (TINY_LOOPS["location, one channel"],))
        rows = self.run(tmp_path, "--peers", "attnext")
        assert [row["kind"] for row in rows] == ["forward", "forward + backward", "memory"]
        for row in rows[:2]:
            assert list(row["seconds"]) == ["attnext"]
            assert len(row["seconds"]["attnext"]) >= steps._ROUNDS
            assert row["sizes"].endswith(", LSTM, 4 steps")

    # Each is a way in which a plain module could be another function than attnext's, with the loop that has it.
    WRONG = (
        ("location, two channels", plain.PlainLocation, "remember", lambda self, c, q, w, past: (w, w)),
        ("location, one channel", plain.PlainLocation, "total", lambda self, query, keys, past: query + keys),
        ("location, one channel", plain.PlainLocation, "remember", lambda self, c, q, w, past: (w.detach(),)),
        ("coverage", plain.PlainCoverage, "remember", lambda self, c, q, w, past: (w,)),
        ("additive", plain.PlainAdditive, "align", lambda self, energies, past: energies.sigmoid()),
        ("forward attention", plain.PlainForward, "align", lambda self, energies, past: energies.softmax(-1)),
        ("forward with agent", plain.PlainForward, "remember", lambda self, c, q, w, past: (w, past[1] + w, past[2])),
        ("location, beam", plain.PlainLocation, "beginning", lambda self, keys: (keys.new_ones(keys.shape[:2]),)),
        ("one query, 16 x 100", plain, "additive", lambda query, key, value, v: value.mean(1)),
        ("module step", plain.PlainAdditive, "total", lambda self, query, keys, past: keys),
        ("step-small", plain, "additive", lambda query, key, value, v: value.mean(1) * float("nan")),
        ("steps, 256 x 30", calls, "_by_step", lambda query, *rest: calls._attended(query.detach(), *rest)),
    )

    @pytest.mark.parametrize(("name", "owner", "attribute", "fault"), WRONG, ids=[f"{x[0]}, {x[2]}" for x in WRONG])
    def test_another_function_is_refused_before_anything_is_timed(
        self, name: str, owner: Any, attribute: str, fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        monkeypatch.setattr(steps, "LOOPS", (replace(TINY_LOOPS[name], kinds=TINY_LOOPS[name].kinds[-1:]),))
        monkeypatch.setattr(owner, attribute, fault)
        monkeypatch.setattr(steps, "interleaved", lambda *_: pytest.fail("timed"))
        assert bench("--cases", "steps", "--peers", "attnext") == 1
        assert f"attnext differ on the loop {name}: off by" in " ".join(capsys.readouterr().out.split())

    def test_the_past_is_felt_without_gradients_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At the sizes that are timed: a filter read backwards is seen in the contexts alone."""
        full = next(loop for loop in LOOPS if loop.name == "location, beam")
        right = plain.PlainLocation.total

        def mirrored(self: Any, query: Any, keys: Any, past: Any) -> Any:
            return right(self, query, keys, tuple(x.flip(-1) for x in past))

        monkeypatch.setattr(plain.PlainLocation, "total", mirrored)
        with pytest.raises(Wrong, match="location, beam"):
            steps._timed(full.shortened(4), "forward", [], Plan("cpu", 0.0, 3))

    @pytest.mark.usefixtures("_compiled")
    def test_a_compiled_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = replace(TINY_LOOPS["coverage"], kinds=("forward",))
        monkeypatch.setattr(steps, "LOOPS", (loop, TINY_LOOPS["one query, 16 x 100"]))
        compile_it, made = torch.compile, []
        monkeypatch.setattr(torch, "compile", lambda *x, **options: made.append(options) or compile_it(*x, **options))
        path = tmp_path / "steps.json"
        assert bench("--cases", "steps", "--peers", "eager,compile", "--quick", "--json", str(path)) == 0
        assert made == [{"fullgraph": True, "dynamic": False}]  # once, not for each step
        document = report.load(path)
        if not any("compile was left out of the loop" in note for note in document["notes"]):  # for want of a compiler
            assert list(document["studies"]["steps"][0]["seconds"]) == ["attnext", "eager", "compile"]
        assert "compile was left out of other loops than coverage: see --quick" in document["notes"]

    def test_compile_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        def fail(*args: object, **options: object) -> None:
            raise RuntimeError("no compiler\nand a long story")

        monkeypatch.setattr(torch, "compile", fail)
        chosen = ("location, beam", "one query, 16 x 100", "module step")
        monkeypatch.setattr(steps, "LOOPS", tuple(TINY_LOOPS[name] for name in chosen))
        rows = self.run(tmp_path, "--peers", "eager,compile")
        assert [list(row["seconds"]) for row in rows[:-1]] == [["attnext", "eager"]] * 4
        shown = " ".join(capsys.readouterr().out.split())
        for name in chosen:
            assert f"note: compile was left out of the loop {name}: no compiler" in shown
        assert "long story" not in shown

    def test_memory_that_can_not_be_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        def unavailable(loop: Any, peer: str, *_: object) -> tuple[int, int]:
            if peer == "eager":
                raise Unavailable("its memory at 3 steps could not be measured: out of it")
            return 1 << 20, 2 << 20

        monkeypatch.setattr(steps, "LOOPS", (TINY_LOOPS["additive"],))
        monkeypatch.setattr(kept, "measured", unavailable)
        assert self.run(tmp_path, "--peers", "eager", "--quick")[-1]["kept"] == {"attnext": 1 << 20}
        assert "note: eager: its memory at 3 steps could not be measured" in " ".join(capsys.readouterr().out.split())

    def test_compare(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setattr(steps, "LOOPS", (TINY_LOOPS["additive"],))
        self.run(tmp_path, "--peers", "eager", "--quick")
        first, second = tmp_path / "steps.json", tmp_path / "slower.json"
        slower = json.loads(first.read_text())
        for row in slower["studies"]["steps"][:2]:
            row["seconds"]["attnext"] = [2.0 * max(row["seconds"]["attnext"])] * 3
        second.write_text(json.dumps(slower))
        capsys.readouterr()
        assert bench("--compare", str(first), str(second)) == 0
        shown = capsys.readouterr().out
        lines = [line for line in shown.splitlines() if line.endswith(("same", "slower ", "slower"))]
        assert [line.split()[-1] for line in lines] == ["slower", "same"] * 2, shown
        slower["studies"]["steps"][0]["seconds"]["eager"] = []
        second.write_text(json.dumps(slower))
        assert bench("--compare", str(first), str(second)) == 2
        assert "is not a result of attnext bench --json" in capsys.readouterr().err

    def test_work(self) -> None:
        b, tk, d, h, q, n = 2, 5, 7, 11, 3, 4
        sizes: dict[str, Any] = {"name": "", "batch": b, "keys": tk, "features": d, "values": h, "steps": n}
        located = loops.Decoder(**sizes, query=q, score="location", channels=2, filters=6, width=9, cell=True)
        pairs = b * tk * n
        forward = {
            "exponentials": pairs * d * 12,
            "scores": pairs * d * 3,
            "contexts": pairs * h,
            "location": pairs * (2 * 9 * 6 + 6 * d),
            "projections": b * n * q * d + b * tk * h * d,
            "cell": b * n * 4 * q * (h + q),
        }
        assert located.work("forward") == forward
        more = {"exponentials": 2, "scores": 2.5, "contexts": 3, "location": 4, "projections": 3, "cell": 3}
        assert located.work("forward + backward") == {part: forward[part] * more[part] for part in forward}
        assert located.memory_bytes == 4 * (b * tk * (d + h) + q * d + 4 * q * (h + q))
        assert (located.reads("forward"), located.reads("forward + backward")) == (n, 2 * n)
        beam = replace(located, beam=3)
        assert beam.work("forward")["scores"] == 3 * forward["scores"]
        assert beam.memory_bytes == located.memory_bytes
        covered = loops.Decoder(**sizes, query=q, score="coverage").work("forward")
        assert (covered["location"], covered["cell"]) == (pairs * d, 0)
        additive = loops.Decoder(**sizes, query=q, score="additive").work("forward + backward")
        assert (additive["exponentials"], additive["location"]) == (b * tk * d * 12, 0)
        call = calls.Call(**sizes | {"steps": 1})
        assert call.work("forward + backward")["exponentials"] == b * tk * d * 24
        step = calls.ModuleStep(**sizes | {"steps": 1}, query=q)
        assert step.work("forward") == {
            "exponentials": 0, "scores": b * tk * d * 3, "contexts": b * tk * h, "projections": b * q * d,
        }  # fmt: skip

    def test_steps_read_their_memory_again(self) -> None:
        peaks = {"multiply_adds": 100.0, "read_bandwidth": 10.0, "last_level_cache": 50}
        row = {"multiply_adds": 200.0, "memory_bytes": 60, "reads": 4}
        assert report.bound(row, peaks) == 24.0
        assert report.bound(row | {"memory_bytes": 40}, peaks) == 2.0  # all of them from the cache

    def test_ratios_by_round(self) -> None:
        assert steps_table.by_round([2.0, 4.0, 6.0], [1.0, 4.0, 2.0]) == [2.0, 1.0, 3.0]
        # Twice as many samples of the faster one: two in each round.
        assert steps_table.by_round([8.0, 12.0], [1.0, 3.0, 2.0, 4.0]) == [4.0, 4.0]
        assert [steps_table.short(x) for x in (0.854, 9.994, 9.996, 99.9, 123.4)] == [
            "0.85", "9.99", "10.0", "99.9", "123",
        ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark can't be set back")
def test_memory_that_steps_keep() -> None:
    loop = loops.Decoder(name="", batch=8, keys=128, features=256, values=64, query=32, steps=128, score="additive")
    element = loop.rows * loop.keys * loop.features * 4  # 128 MiB
    (ours, our_peak), (eager, eager_peak) = (kept.measured(loop, name, "cpu", 1) for name in ("attnext", "eager"))
    # Eager keeps the tanh; attnext what is as small as the weights, beside the keys.
    assert element <= eager < 3 * element
    assert eager_peak > eager
    assert 0 < ours < eager / 8
    assert ours < our_peak < eager_peak / 4
    with pytest.raises(Unavailable, match="its memory at 128 steps could not be measured: KeyError: 'nobody'"):
        kept.measured(loop, "nobody", "cpu", 1)


def document(**seconds: list[float]) -> dict[str, Any]:
    """A run of the case ``forward``, by peer; the kernels' name is ``attnext``."""
    case = {"case": "forward", "kind": "forward", "sizes": "B 1", "dtype": "float32"}
    work = {"elements": 10, "multiply_adds": 30.0, "memory_bytes": 0}
    results = [case | work | {"peer": peer, "seconds": times} for peer, times in seconds.items()]
    memory_rows = [
        {"peer": peer, "keys": keys, "seconds": keys * 1e-3, "bytes": keys << 20}
        for peer in seconds
        for keys in (32, 64)
    ]
    return {
        "schema": report.SCHEMA,
        "machine": {"cpu": "a cpu"},
        "versions": {"torch": "2.13.0", "jax": None, "python": "3.11"},
        "device": "cpu",
        "threads": 2,
        "peaks": {"multiply_adds": 1e9, "read_bandwidth": 1e9, "last_level_cache": 1},
        "results": results,
        "studies": {"memory": memory_rows},
        "notes": [],
    }


class TestCompare:
    STEADY = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01]  # noqa: RUF012

    def write(self, path: Path, content: dict[str, Any]) -> str:
        path.write_text(json.dumps(content))
        return str(path)

    def compared(self, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> int:
        return bench("--compare", self.write(tmp_path / "a.json", before), self.write(tmp_path / "b.json", after))

    def test_what_changed(self, tmp_path: Path, capsys: Captured) -> None:
        noisy = [0.5, 1.0, 1.5, 0.7, 1.3]
        before = document(same=self.STEADY, slow=self.STEADY, fast=self.STEADY, noisy=noisy, gone=self.STEADY)
        after = document(
            same=[1.01 * t for t in self.STEADY],
            slow=[1.2 * t for t in self.STEADY],
            fast=[0.5 * t for t in self.STEADY],
            noisy=[1.2 * t for t in noisy],
        )
        assert self.compared(tmp_path, before, after) == 0
        shown = capsys.readouterr().out
        rows = {line.split()[1]: line.split() for line in shown.splitlines() if line.startswith("forward, ")}
        assert {name: row[-1] for name, row in rows.items()} == {
            "same": "same", "slow": "slower", "fast": "faster", "noisy": "same",
        }  # fmt: skip
        assert rows["slow"][-2] == "1.20x"
        assert "only in one of them: forward, gone" in shown
        assert "99% bootstrap interval" in shown
        assert "warning" not in shown

    def test_another_machine(self, tmp_path: Path, capsys: Captured) -> None:
        before, after = document(eager=self.STEADY), document(eager=self.STEADY)
        after["threads"], after["machine"]["cpu"] = 4, "another"
        assert self.compared(tmp_path, before, after) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "warning: not measured alike: machine (a cpu, then another); threads (2, then 4)" in shown

    def test_other_sizes_are_another_case(self, tmp_path: Path, capsys: Captured) -> None:
        before, after = document(eager=self.STEADY), document(eager=self.STEADY)
        after["results"][0]["sizes"] = "B 2"
        assert self.compared(tmp_path, before, after) == 0
        shown = capsys.readouterr().out
        assert "only in one of them: forward, eager; forward, eager" in shown

    def test_files_that_are_no_results(self, tmp_path: Path, capsys: Captured) -> None:
        good = self.write(tmp_path / "good.json", document(eager=self.STEADY))
        other = document(eager=self.STEADY) | {"schema": 99}
        no_times = copy.deepcopy(document(eager=self.STEADY))
        no_times["results"][0]["seconds"] = []
        for content, message in (
            ("junk", "is not a result of attnext bench --json"),
            ("[1]", "is not a result of attnext bench --json"),
            ('{"schema": 1}', "is not a result of attnext bench --json"),
            (json.dumps(no_times), "is not a result of attnext bench --json"),
            (json.dumps(other), "has schema 99"),
            (None, "No such file"),
        ):
            bad = tmp_path / "bad.json"
            bad.unlink(missing_ok=True)
            if content is not None:
                bad.write_text(content)
            assert bench("--compare", good, str(bad)) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1


class TestMarkdown:
    def stored(self, **changes: Any) -> dict[str, Any]:
        """A run of two cases, one of which jax does not serve, and of two studies."""
        run = document(**{"attnext cpu": [2.0, 3.0, 4.0], "eager": [3.0, 3.0, 3.0], "jax": [30.0, 30.0, 30.0]})
        one, two, _ = run["results"]
        run["results"] += [
            result | {"case": "half", "dtype": "float16", "sizes": "B 2", "seconds": [x / 2 for x in result["seconds"]]}
            for result in (one, two)
        ]
        grid = [
            {"sizes": "1", "kind": "both", "chosen": "kernel", "seconds": {"attnext": [a], "kernel": [b], "eager": [c]}}
            for a, b, c in ((1.0, 1.0, 2.0), (1.1, 1.0, 1.0), (3.0, 2.0, 2.5))
        ]
        run["studies"] |= {"dot-grid": grid, "threads": [{"case": "forward", "threads": 2, "one": 3.0, "all": 2.0}]}
        run["studies"]["peers"] = [{"program": "of another table"}]
        machine = {"cpu": "AMD EPYC 7B13 64-Core Processor, 2 logical cores", "extension instructions": "x86-64-v3"}
        run |= {"machine": machine, "date": "2026-11-30T02:37:31+00:00", "notes": ["something was left out"]}
        run["command"] = ["attnext", "bench", "--json", "a.json", "--cases", "a,b", "--plot=b.png"]
        return run | {"peaks": {"multiply_adds": 9.1e10, "read_bandwidth": 3.4e10, "last_level_cache": 1}} | changes

    def lines(self, tmp_path: Path, capsys: Captured, *runs: dict[str, Any]) -> list[str]:
        paths = [tmp_path / f"{number}.json" for number in range(len(runs))]
        for path, run in zip(paths, runs, strict=True):
            report.save(path, run)
        assert bench("--markdown", *map(str, paths)) == 0
        return [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]

    def test_a_section(self, tmp_path: Path, capsys: Captured) -> None:
        found = self.lines(tmp_path, capsys, self.stored())
        peaks = "peaks of 91 G multiply-adds/s and 34 GB/s"
        near = "within 10% of the fastest way: 2 of 3; slower than eager by more: 1"
        assert [line for line in found if "---" not in line] == [
            "### AMD EPYC 7B13, AVX2, 2 threads",
            "",
            f"2026-11-30, torch 2.13.0, jax None, {peaks}: `attnext bench --cases a,b`.",
            "",
            "| case | kind and sizes | attnext | eager takes | jax takes | of bound |",
            "| forward | forward, B 1 | 3.00 s (2.50 s - 3.50 s) | 1.00x | 10.0x | 0% |",
            "| half | forward, B 2, float16 | 1.50 s (1.25 s - 1.75 s) | 1.00x | - | 0% |",
            "",
            "<details><summary>More of this run</summary>",
            "",
            "**memory**: forward + backward, B 16, Tq 128, D 256, H 512; peak beside the inputs",
            "",
            "| peer | Tk | median | peak |",
            *(
                f"| {peer} | {keys} | {keys}.0 ms | {keys} MiB |"
                for peer in ("attnext cpu", "eager", "jax")
                for keys in (32, 64)
            ),
            "",
            f"**dot-grid**: the way that is chosen for dot products, {near}",
            "",
            "**threads**: one against 2",
            "",
            "| case | one | all | ratio |",
            "| forward | 3.00 s | 2.00 s | 1.50x |",
            "",
            "</details>",
            "",
            "- something was left out",
        ]
        assert len([line for line in found if re.fullmatch(r"\|(-+\|)+", line)]) == 3  # a table each

    def test_lines_under_a_table(self, tmp_path: Path, capsys: Captured) -> None:
        row = {"model": "small", "batch": 1, "source": 2, "target": 3, "seconds": {"attnext": 1.0}}
        row |= {"shares": {"attnext": {"products": 1.0}}, "peaks": {"attnext": 1 << 20}}
        found = self.lines(tmp_path, capsys, self.stored(studies={"model": [row]}))
        start = found.index("| small | 1, 2, 3 | attnext | 1.00 s | 1.00x |")
        assert found[start + 1 : start + 4] == [
            "",
            "- small, attnext: products 100%",
            "- small: peak of memory: attnext 1 MiB",
        ]

    @pytest.mark.parametrize(
        ("changes", "heading"),
        [
            (
                {
                    "machine": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 8 logical cores",
                                "extension instructions": "x86-64-v4"},
                    "capabilities": ["amx_tile", "avx512_f"],
                    "threads": 1,
                },
                "Intel Xeon Platinum 8481C, AVX-512 and AMX, one thread",
            ),
            ({"machine": {"cpu": "Intel(R) Xeon(R) Processor, 2 logical cores"}}, "Intel Xeon, 2 threads"),
            (
                {
                    "machine": {"cpu": "a", "torch": "2.13.0 (CUDA 13.0), GPUs: NVIDIA H200"},
                    "device": "cuda",
                    "peaks": {"multiply_adds": 0.0, "read_bandwidth": 0.0, "last_level_cache": 1},
                },
                "NVIDIA H200",
            ),
        ],
    )  # fmt: skip
    def test_headings(self, changes: dict[str, Any], heading: str, tmp_path: Path, capsys: Captured) -> None:
        found = self.lines(tmp_path, capsys, self.stored(**changes))
        assert found[0] == f"### {heading}"
        assert ("peaks of" in found[2]) == (heading != "NVIDIA H200")

    def test_files_without_a_date_and_sections_in_their_order(self, tmp_path: Path, capsys: Captured) -> None:
        old = self.stored(results=[], studies={}, notes=[])
        del old["date"]
        found = self.lines(tmp_path, capsys, old, self.stored(threads=1), old)
        assert [line for line in found if line.startswith("### ")] == [
            f"### AMD EPYC 7B13, AVX2, {threads}" for threads in ("2 threads", "one thread", "2 threads")
        ]
        assert found[:4] == [found[0], "", found[2], ""]
        assert found[2].startswith("torch 2.13.0, peaks")
        assert found[-2:] == ["", found[2]]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema": 99}, "has schema 99"),
            ({"studies": {"threads": [{"case": "forward"}]}}, "is not a result of attnext bench --json"),
            ({"studies": {"threads": ["forward"]}}, "is not a result of attnext bench --json"),
            ({"machine": {"cpu": 3}}, "is not a result of attnext bench --json"),
            ({"command": None}, "is not a result of attnext bench --json"),
        ],
    )
    def test_files_that_are_no_results(
        self, changes: dict[str, Any], message: str, tmp_path: Path, capsys: Captured
    ) -> None:
        good, bad = tmp_path / "good.json", tmp_path / "bad.json"
        report.save(good, self.stored())
        report.save(bad, self.stored(**changes))
        assert bench("--markdown", str(good), str(bad)) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert message in shown.err
        assert str(bad) in shown.err
        assert shown.err.count("\n") == 1

    @in_the_repository
    def test_the_readme_has_the_stored_runs(self, tmp_path: Path) -> None:
        """What differs is to be put there by ``make tables``."""
        tables = runpy.run_path(str(ROOT / "benchmarks/tables.py"))
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert tables["put"](readme, tables["made"]()) == readme
        report.save(tmp_path / "b.json", self.stored(threads=1))
        report.save(tmp_path / "a.json", self.stored())
        changed = tables["put"](readme, tables["made"](tmp_path))
        assert changed.index("AVX2, 2 threads\n") < changed.index("AVX2, one thread\n")
        assert tables["put"](changed, tables["made"]()) == readme
        with pytest.raises(InputError, match="no place for the tables"):
            tables["put"](readme.replace(tables["END"], ""), "")


class TestPicture:
    @pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
    def test_the_same_picture_is_the_same_file(self, name: str, tmp_path: Path) -> None:
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            plots.draw(tmp_path / folder / name, document(attnext=[1.0, 1.1], eager=[2.0, 2.1]))
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    @pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
    def test_is_written(self, tmp_path: Path, name: str, start: bytes) -> None:
        plots.draw(tmp_path / name, document(attnext=[1.0, 1.1], eager=[2.0, 2.1], sdpa=[0.5, 0.4]))
        assert (tmp_path / name).read_bytes().startswith(start)

    def test_shows_the_ratios_on_no_ground(self, tmp_path: Path) -> None:
        svg, png = tmp_path / "a.svg", tmp_path / "a.png"
        for path in (svg, png):
            plots.draw(path, document(attnext=[1.0, 1.1], eager=[20.0, 21.0]))
        assert "<!-- 19.5 -->" in svg.read_text()
        image = pytest.importorskip("matplotlib.image").imread(png)
        assert image[0, 0, 3] == 0
        visible = image[image[..., 3] > 0.9][:, :3]
        lightness = visible @ [0.2126, 0.7152, 0.0722]
        assert 0.3 < lightness.min() < lightness.max() < 0.75  # far enough from white and from black

    @pytest.mark.usefixtures("_tiny")
    def test_brings_the_sweep_it_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"peer": "eager", "keys": 32, "seconds": 1.0, "bytes": 1}
        monkeypatch.setitem(studies.STUDIES, "memory", lambda *_: [row])
        path, kept = tmp_path / "a.png", tmp_path / "a.json"
        arguments = ("--quick", "--cases", "step", "--peers", "eager", "--plot", str(path), "--json", str(kept))
        assert bench(*arguments) == 0
        assert json.loads(kept.read_text())["studies"] == {"memory": [row]}
        assert path.exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark can't be set back")
def test_memory_of_a_call() -> None:
    case = Case("memory", "forward + backward", 8, 64, 64, 256, 64)
    intermediate = case.elements * 4  # 32 MiB
    fused, eager = (memory.peak(case, name, "cpu", 1) for name in (PEERS["attnext"].name, "eager"))
    # Eager keeps the tanh while it makes its gradient; the kernels' sums are a few times the gradients of the inputs.
    assert 2 * intermediate <= eager < 6 * intermediate
    assert 0 < fused < eager / 4


def test_memory_that_can_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(TINY["training"], name="memory")
    with pytest.raises(Unavailable, match="its memory at Tk 21 could not be measured: KeyError: 'nobody'"):
        memory.peak(case, "nobody", "cpu", 1)
    assert memory.fits(case)
    assert not memory.fits(replace(case, batch=1 << 40))


class TestMachine:
    def test_peaks_are_the_best_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rates = iter([3.0, 5.0, 4.0])
        monkeypatch.setattr(machine, "multiply_add_rate", lambda threads: next(rates))
        monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 1.0)
        peaks = machine.Peaks()
        for _ in range(3):
            peaks.update(2)
        assert peaks == machine.Peaks(5.0, 1.0)

    def test_rates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_READ_BYTES", 1 << 20)
        monkeypatch.setattr(machine, "last_level_cache", lambda: 1 << 18)
        # No processor reads less, or makes a hundred thousand multiply-adds in the time of one.
        assert 1e8 < machine.read_bandwidth(1) < 1e13
        assert machine.last_level_cache() > 0
        if machine._extension.load() is not None:
            assert 1e8 < machine.multiply_add_rate(2, seconds=0.005) < 1e13
        monkeypatch.setattr(machine._extension, "load", lambda: None)
        assert machine.multiply_add_rate(1) == 0.0


@in_the_repository
def test_suite_of_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    words = ("benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider", "-k", "step-small and not compile")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout.splitlines()[-1]
