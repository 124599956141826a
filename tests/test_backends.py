"""Which backend serves a call, and what is said where one can't: nothing falls back in silence."""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnext
from attnext import _extension, info, reference, use_backend
from attnext.backends import Backend, choose
from attnext.backends import triton as of_triton
from attnext.ops import operators

registry: Any = importlib.import_module("attnext.backends")  # attnext.backends is the function of that name

NAMES = ("reference", "cpu", "triton", "cuda")
MISSING = [name for name, backend in attnext.backends().items() if not backend.available]


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is forced."""
    monkeypatch.setattr(registry._setting, "forced", None)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that computed something, in order."""
    found: list[str] = []

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*args: Any, **options: Any) -> Any:
            found.append(name)
            return call(*args, **options)

        return spied

    cpu = operators["cpu"]
    calls = {name: spy("cpu", getattr(cpu, name)) for name in ("prepare", "attention", "scores", "step")}
    monkeypatch.setitem(operators, "cpu", replace(cpu, **calls))
    monkeypatch.setattr(reference, "additive_attention", spy("reference", reference.additive_attention))
    monkeypatch.setattr(reference, "additive_step", spy("reference", reference.additive_step))
    # Which attention calls, too: only the name is of interest.
    monkeypatch.setattr(reference, "additive_scores", spy("reference", reference.additive_scores))
    return found


def inputs(device: str = "cpu") -> list[Tensor]:
    return [torch.randn(s, device=device) for s in ((2, 3, 8), (2, 5, 8), (2, 5, 6), (8,))]


def attend(backend: str | None = None) -> Tensor:
    return attnext.additive_attention(*inputs(), backend=backend)[0]


def score(backend: str | None = None) -> Tensor:
    query, key, _, v = inputs()
    return attnext.additive_scores(query, key, v, backend=backend)


def step() -> Tensor:
    attn = attnext.BahdanauAttention(4, 6, 8)
    context: Tensor = attn(torch.randn(2, 4), attn.prepare(torch.randn(2, 5, 6)))[0]
    return context


def module() -> Tensor:
    context: Tensor = attnext.BahdanauAttention(4, 6, 8)(torch.randn(2, 4), torch.randn(2, 5, 6))[0]
    return context


CALLS = pytest.mark.parametrize("call", [attend, score, step, module])


def status(available: bool = False, broken: bool = False) -> Callable[[], _extension.Status]:
    return lambda: _extension.Status(available, broken, "the dog ate it")


class TestList:
    def test_names_every_backend(self) -> None:
        assert tuple(attnext.backends()) == NAMES
        assert all(backend.reason for backend in attnext.backends().values())

    def test_says_what_the_cpu_runs(self) -> None:
        backend = attnext.backends()["cpu"]
        extension = _extension.load()
        assert extension is not None
        assert backend.available
        assert f"{extension.instruction_set()} instructions" in backend.reason

    def test_the_reference_is_always_there(self) -> None:
        assert attnext.backends()["reference"].available

    @pytest.mark.parametrize("broken", [False, True])
    def test_says_why_the_extension_is_not_there(self, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
        monkeypatch.setattr(_extension, "status", status(broken=broken))
        assert attnext.backends()["cpu"] == Backend(False, "the dog ate it", broken)


class TestByName:
    @pytest.mark.parametrize("name", ["cpu", "reference"])
    def test_serves(self, name: str, served: list[str]) -> None:
        attend(name)
        score(name)
        assert set(served) == {name}

    @pytest.mark.parametrize("name", MISSING)
    def test_one_that_is_not_there_says_why(self, name: str, served: list[str]) -> None:
        reason = attnext.backends()[name].reason
        for call in (lambda: attend(name), lambda: score(name), use_backend(name).__enter__):
            with pytest.raises(RuntimeError) as caught:
                call()
            assert str(caught.value) == f"backend='{name}' is not available: {reason}"
        assert not served

    def test_tensors_on_a_device_that_it_does_not_serve(self) -> None:
        with pytest.raises(ValueError, match=r"^backend='cpu' serves cpu tensors, got tensors on 'meta'"):
            attnext.additive_attention(*inputs("meta"), backend="cpu")
        with use_backend("cpu"), pytest.raises(ValueError, match="backend='cpu' serves cpu tensors"):
            attnext.additive_scores(*(inputs("meta")[i] for i in (0, 1, 3)))

    def test_the_reference_serves_every_device(self) -> None:
        assert choose("reference", "meta") == "reference"

    @pytest.mark.parametrize("name", ["gpu", "", "CPU", 7])
    def test_unknown(self, name: Any) -> None:
        with pytest.raises(ValueError, match=rf"^backend .*must be None or one of 'reference', .*'cuda', got {name!r}"):
            use_backend(name).__enter__()
        assert choose(None, "cpu") == "cpu"


class TestUseBackend:
    def test_nests(self, served: list[str]) -> None:
        seen = [choose(None, "cpu")]
        with use_backend("reference"):
            seen.append(choose(None, "cpu"))
            with use_backend("cpu"):
                seen.append(choose(None, "cpu"))
            seen.append(choose(None, "cpu"))
            with use_backend(None):  # automatic again
                seen.append(choose(None, "cpu"))
            seen.append(choose(None, "cpu"))
        seen.append(choose(None, "cpu"))
        assert seen == ["cpu", "reference", "cpu", "reference", "cpu", "reference", "cpu"]

    @CALLS
    def test_rules_every_call(self, call: Callable[[], Tensor], served: list[str]) -> None:
        with use_backend("reference"):
            call()
        assert set(served) == {"reference"}
        served.clear()
        call()
        assert set(served) == {"cpu"}

    def test_ends_with_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            raise ZeroDivisionError
        assert choose(None, "cpu") == "cpu"

    def test_a_failed_entry_changes_nothing(self) -> None:
        with use_backend("reference"):
            with pytest.raises(ValueError, match="must be None or one of"):
                use_backend("gpu").__enter__()
            assert choose(None, "cpu") == "reference"

    def test_is_of_the_thread(self) -> None:
        """Two that overlap, the first to begin the first to end, leave nothing behind."""
        begun, ended = threading.Event(), threading.Event()
        found: list[str] = []

        def other() -> None:
            begun.wait(60)
            found.append(choose(None, "cpu"))
            with use_backend("reference"):
                found.append(choose(None, "cpu"))
                ended.wait(60)
            found.append(choose(None, "cpu"))

        thread = threading.Thread(target=other)
        thread.start()
        with use_backend("reference"):
            begun.set()
            deadline = time.monotonic() + 60
            while len(found) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
        ended.set()
        thread.join(60)
        assert found == ["cpu", "reference", "cpu"]
        assert choose(None, "cpu") == "cpu"

    def test_is_seen_by_compiled_code(self) -> None:
        call = torch.compile(lambda x: (x + 1, choose(None, "cpu")), fullgraph=True, backend="eager")
        found, x = [], torch.zeros(2)
        for name in (None, "reference", None):
            with use_backend(name):
                found.append(call(x)[1])
        with use_backend("reference"), ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(call, x).result()[1])
        assert found == ["cpu", "reference", "cpu", "cpu"]

    @pytest.mark.parametrize(("outer", "argument"), [("reference", "cpu"), ("cpu", "reference")])
    def test_an_argument_beats_it(self, outer: str, argument: str, served: list[str]) -> None:
        with use_backend(outer):
            attend(argument)
            score(argument)
        assert set(served) == {argument}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what this machine has: ``machine(cuda=Backend(...), ...)``, all else missing but the reference."""

    def have(**found: Backend) -> None:
        for name, family in list(registry._FAMILIES.items()):
            if name != "reference":
                backend = found.get(name, Backend(False, f"no {name} here"))
                monkeypatch.setitem(registry._FAMILIES, name, replace(family, probe=lambda _, backend=backend: backend))

    return have


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two cards: one of today, and one that the CUDA kernels are too new for."""
    built = {"cuda": "13.0: 7.5 8.0 9.0+PTX"}
    extension = SimpleNamespace(
        build_info=lambda: dict(built), cuda_versions=lambda: (13000, 13000), instruction_set=lambda: "some"
    )
    monkeypatch.setattr(_extension, "load", lambda: extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: ((9, 0), (7, 0))[index or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: ("new", "old")[index or 0])
    yield
    for cached in (of_triton.too_old, of_triton.nothing_to_build_with):
        cached.cache_clear()


@pytest.mark.usefixtures("cards")
class TestCards:
    def test_each_has_what_serves_it(self) -> None:
        pytest.importorskip("triton")
        for index, chosen in ((0, "cuda"), (1, "triton"), (None, "cuda")):
            assert choose(None, "cuda", torch.float32, index=index) == chosen
            assert choose(None, "cuda", torch.float64, index=index) == "triton"
        with pytest.raises(RuntimeError, match=r"'cuda' is not available.*the GPU is of compute capability 7\.0"):
            choose("cuda", "cuda", torch.float32, index=1)
        assert attnext.backends()["cuda"] == Backend(True, "CUDA kernels on new")

    def test_one_that_can_not_be_asked_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(index: int) -> None:
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")

        monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
        for name in ("cuda", "triton"):
            status = attnext.backends()[name]
            assert not status.available
            assert "torch can't use the GPU: CUDA error: out of memory" in status.reason
        assert "torch can't use the GPU: CUDA error: out of memory, torch can't" in info.collect()["torch"]

    def test_triton_without_a_compiler_or_headers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("triton")
        monkeypatch.delenv("CC", raising=False)
        tools = tmp_path / "bin"
        tools.mkdir()
        monkeypatch.setenv("PATH", str(tools))
        headers = {"include": str(tmp_path)}
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: headers)

        def said() -> str:
            of_triton.nothing_to_build_with.cache_clear()
            status = attnext.backends()["triton"]
            return "" if status.available else status.reason

        assert said() == "Triton needs a C compiler, and gcc or clang is not there: install one, or set CC"
        monkeypatch.setenv("CC", "mycc -O2")  # which Triton takes for a name, as a whole
        assert "and mycc -O2 is not there" in said()
        # Of the other family's dtypes the reference is what is left, and it says why.
        with pytest.warns(RuntimeWarning, match="cuda: has no kernels for float64") as caught:
            assert choose(None, "cuda", torch.float64) == "reference"
        assert "triton: Triton needs a C compiler" in str(caught[0].message)
        assert choose(None, "cuda", torch.float32) == "cuda"
        monkeypatch.setenv("CC", "mycc")
        (tools / "mycc").write_text("#!/bin/sh")
        (tools / "mycc").chmod(0o755)
        assert "Python.h is not there: install python3-dev" in said()
        (tmp_path / "Python.h").touch()
        assert not said()

    @pytest.mark.parametrize(
        ("version", "old"), [("3.4.0", True), ("3.5.0", False), ("4.0.0+git1", False), ("?", False)]
    )
    def test_a_triton_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
        pytest.importorskip("triton")
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        of_triton.too_old.cache_clear()
        status = attnext.backends()["triton"]
        assert status.available != old
        assert ("Triton 3.4.0 is too old: 3.5 or later is needed" in status.reason) == old


YES, BROKEN = Backend(True, "yes"), Backend(False, "half of it", broken=True)


class TestAutomaticChoice:
    @pytest.mark.parametrize(
        ("found", "device", "chosen"),
        [
            ({"cpu": YES, "cuda": YES, "triton": YES}, "cpu", "cpu"),
            ({"cpu": YES, "cuda": YES, "triton": YES}, "cuda", "cuda"),
            ({"cpu": YES, "triton": YES}, "cuda", "triton"),
            ({"cpu": YES, "triton": YES, "cuda": BROKEN}, "cpu", "cpu"),
        ],
    )
    def test_is_by_device(
        self, found: dict[str, Backend], device: str, chosen: str, machine: Callable[..., None]
    ) -> None:
        machine(**found)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(None, device) == chosen

    def test_warns_of_the_reference(self, machine: Callable[..., None]) -> None:
        machine(cpu=YES)
        with pytest.warns(RuntimeWarning, match="no kernels for 'cuda' tensors.*triton: no triton.*cuda: no cuda"):
            assert choose(None, "cuda") == "reference"
        with pytest.warns(RuntimeWarning, match="'meta' tensors.*no backend serves that device"):
            assert choose(None, "meta") == "reference"

    def test_does_not_pass_over_a_broken_backend(self, machine: Callable[..., None]) -> None:
        machine(cpu=YES, triton=YES, cuda=BROKEN)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="'cuda' is installed but broken: half of it"):
                choose(None, "cuda")
        assert choose("triton", "cuda") == "triton"


class TestCompiled:
    def test_the_choice_is_a_constant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is made by Python while a call is compiled: what the compiler can't follow breaks no graph."""

        def resolved(*_: object) -> str:
            torch._dynamo.graph_break()
            return "some backend"

        @torch.compile(backend="eager", fullgraph=True)
        def twice(x: Tensor) -> tuple[Tensor, str]:
            return 2 * x, choose(None, x.device.type, x.dtype)

        monkeypatch.setattr(registry, "_resolved", resolved)
        assert twice(torch.ones(1)) == (torch.full((1,), 2.0), "some backend")

    def test_marked_as_torch_itself_does(self) -> None:
        marked = torch.compiler.assume_constant_result(lambda: None)
        assert vars(marked)
        assert vars(registry._resolve) == vars(marked)


class TestWithoutTheExtension:
    @CALLS
    def test_missing_warns_once(
        self, call: Callable[[], Tensor], served: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_extension, "status", status())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = call(), call()
        assert first.isfinite().all()
        assert second.isfinite().all()
        assert set(served) == {"reference"}
        assert [w.category for w in caught] == [RuntimeWarning]
        for part in ("'cpu'", "reference", "the dog ate it"):
            assert part in str(caught[0].message)

    @CALLS
    def test_the_warning_points_at_the_call(self, call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_extension, "status", status())
        with pytest.warns(RuntimeWarning) as caught:
            call()
        lines = {line for _, _, line in call.__code__.co_lines()}
        assert Path(caught[0].filename) == Path(__file__)
        assert caught[0].lineno in lines

    @CALLS
    def test_broken_raises_every_time(
        self, call: Callable[[], Tensor], served: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_extension, "status", status(broken=True))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="'cpu' is installed but broken: the dog ate it"):
                call()
        assert not served
        with use_backend("reference"):  # the way out
            call()
        assert set(served) == {"reference"}

    @pytest.mark.parametrize("broken", [False, True])
    def test_by_name(self, broken: bool, served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_extension, "status", status(broken=broken))
        with pytest.raises(RuntimeError, match="backend='cpu' is not available: the dog ate it"):
            attend("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend("reference")
        assert set(served) == {"reference"}


def python(code: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("ATTNEXT_BACKEND", backend)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


class TestEnvironment:
    def test_forces_a_backend_for_the_whole_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code = """
from attnext.backends import choose, use_backend
print(choose(None, "cpu"), choose("cpu", "cpu"))
with use_backend(None):
    print(choose(None, "cpu"))
"""
        done = python(code, "reference", monkeypatch)
        assert (done.returncode, done.stdout.split()) == (0, ["reference", "cpu", "cpu"]), done.stderr

    def test_unknown_is_an_error_at_the_first_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code = """
import torch, attnext
print("imported")
x = torch.zeros(1, 1, 1)
attnext.additive_attention(x, x, x, x[0, 0])
print("attended")
"""
        done = python(code, "gpu", monkeypatch)
        assert (done.returncode != 0, done.stdout.split()) == (True, ["imported"])
        message = done.stderr.splitlines()[-1]
        assert message.startswith("ValueError: ")
        for part in ("ATTNEXT_BACKEND", "'reference', 'cpu', 'triton', 'cuda'", "got 'gpu'"):
            assert part in message

    @pytest.mark.parametrize(("value", "forced"), [("", None), (None, None), ("cpu", "cpu"), ("cuda", "cuda")])
    def test_is_read(self, value: str | None, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        if value is None:
            monkeypatch.delenv("ATTNEXT_BACKEND", raising=False)
        else:
            monkeypatch.setenv("ATTNEXT_BACKEND", value)
        assert runpy.run_path(registry.__file__)["_setting"].forced == forced

    @pytest.mark.parametrize("name", MISSING)
    def test_one_that_is_not_there_says_why_at_the_call(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry._setting, "forced", name)
        with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: "):
            attend()
