"""The install: what happens where the extension can't be built, and what a broken one says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import setuptools
import torch
from torch.torch_version import TorchVersion

from attnext import _extension

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "build_backend"

if not BACKEND.is_dir():
    pytest.skip("the build backend is in the repository only", allow_module_level=True)

# A shared library that is surely here, and surely isn't ours.
LIBRARY = Path(str(torch._C.__file__))
HAS_COMPILER = bool(shutil.which(os.environ.get("CXX") or "c++"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder, with no other attnext on the path."""
    monkeypatch.setattr(sys, "path", [])
    folder = tmp_path / "attnext"
    folder.mkdir()
    return folder


def _reason(package: Path, *, broken: bool) -> str:
    module, status = _extension._load(package)
    assert module is None
    assert (status.available, status.broken) == (False, broken)
    return status.reason


def test_the_loaded_extension_is_the_module_of_its_name() -> None:
    module = _extension.load()
    if module is None:
        pytest.skip(_extension.status().reason)
    assert _extension.status() == (True, False, "")
    assert sys.modules["attnext._C"] is module
    assert module.instruction_set()
    assert _extension.build_record()["compiler"]


def test_never_built_tells_the_reason_that_the_build_wrote_down(package: Path) -> None:
    (package / "_build.json").write_text(json.dumps({"reason": "no C++ compiler, alas"}))
    reason = _reason(package, broken=False)
    assert "no C++ compiler, alas" in reason
    assert "ATTNEXT_CPU=1" in reason


@pytest.mark.parametrize("record", [None, "", "[1]", '{"torch": '])
def test_never_built_without_a_readable_record(package: Path, record: str | None) -> None:
    if record is not None:
        (package / "_build.json").write_text(record)
    assert "never built" in _reason(package, broken=False)


def test_extension_of_another_python(package: Path) -> None:
    (package / "_C.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    reason = _reason(package, broken=True)
    assert "another Python" in reason
    assert "cpython-27" in reason


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_extension(package: Path, kept: float) -> None:
    whole = LIBRARY.read_bytes()
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(whole[: int(kept * len(whole))])
    reason = _reason(package, broken=True)
    assert "incomplete" in reason
    assert "ATTNEXT_CPU=1" in reason


def test_library_that_is_not_ours(package: Path) -> None:
    other = package / f"_C{EXTENSION_SUFFIXES[0]}"
    # Any extension module that is a file will do, except torch._C, which has the same name as ours.
    shutil.copy(str(importlib.util.find_spec("_ctypes").origin), other)  # type: ignore[union-attr]
    (package / "_build.json").write_text(json.dumps({"torch": "2.99.0"}))
    reason = _reason(package, broken=True)
    assert str(other) in reason
    assert "PyInit__C" in reason  # the loader's own words
    assert "2.99.0" in reason
    assert "ATTNEXT_CPU=1" in reason


def test_torch_too_old(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(LIBRARY.read_bytes())
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    reason = _reason(package, broken=True)
    assert "2.12.1" in reason
    assert "torch>=2.13" in reason


def test_source_folder_that_hides_the_installed_package(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "attnext"
    installed.mkdir(parents=True)
    (installed / "_build.json").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(installed.parent)])
    reason = _reason(package, broken=False)
    assert str(installed) in reason
    assert "pip install -e ." in reason


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the packaging and the package with one small source file, so that a build takes no time."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("attnext", "kernels", "build_backend"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    (folder / "csrc").mkdir()
    (folder / "csrc" / "bindings.cpp").write_text("#error this file is wrong\n")
    return folder


Hook = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hook(checkout: Path, tmp_path: Path) -> Hook:
    """Calls a hook of the build backend as an installer does, in a process of its own."""

    def call(expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, 'build_backend'); import attnext_backend as b; {expression}"
        ours = ("ATTNEXT_CPU", "CXX", "CXXFLAGS", "LDFLAGS")
        clean = {k: v for k, v in os.environ.items() if k not in ours}
        (tmp_path / "empty").mkdir(exist_ok=True)
        if environment.pop("compiler", "no") == "no":
            environment["PATH"] = str(tmp_path / "empty")
        command = [environment.pop("python", sys.executable), "-c", code]
        return subprocess.run(
            command, cwd=checkout, env=clean | environment, capture_output=True, text=True, check=False
        )

    return call


def test_wheel_without_a_compiler(checkout: Path, hook: Hook) -> None:
    done = hook("b.build_wheel('dist')")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("WARNING: attnext") == 1
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("attnext/_build.json"))
    assert not [name for name in names if "_C" in name]
    assert {"attnext/py.typed", "attnext/__init__.py", "attnext/kernels/__init__.py"} <= set(names)
    assert "no C++ compiler" in record["reason"]
    assert "apt-get install g++" in record["reason"]


def test_compiler_demanded_but_absent(hook: Hook) -> None:
    done = hook("b.build_wheel('dist')", ATTNEXT_CPU="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "no C++ compiler: CXX=/nonexistent/c++ is not there" in done.stderr


def test_extension_not_wanted_is_silent(checkout: Path, hook: Hook) -> None:
    stale = checkout / "attnext" / f"_C{EXTENSION_SUFFIXES[0]}"
    stale.touch()
    done = hook("b.build_editable('dist')", ATTNEXT_CPU="0")
    assert done.returncode == 0, done.stderr
    assert "WARNING: attnext" not in done.stdout + done.stderr
    assert not stale.exists(), "an older build must not outlive the wish for none"
    assert "ATTNEXT_CPU=0" in json.loads((checkout / "attnext" / "_build.json").read_text())["reason"]


def test_unknown_mode_is_an_error(hook: Hook) -> None:
    done = hook("b.get_requires_for_build_wheel()", ATTNEXT_CPU="perhaps")
    assert done.returncode != 0
    assert "ATTNEXT_CPU takes auto, 0" in done.stderr


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_source_that_does_not_compile(checkout: Path, hook: Hook) -> None:
    done = hook("b.build_editable('dist')", compiler="yes")
    assert done.returncode == 0, done.stderr
    record = json.loads((checkout / "attnext" / "_build.json").read_text())
    assert "csrc/bindings.cpp:1" in record["reason"]
    assert "this file is wrong" in record["reason"]
    assert record["compiler"]

    done = hook("b.build_editable('dist')", compiler="yes", ATTNEXT_CPU="1")
    assert done.returncode != 0
    assert "this file is wrong" in done.stderr


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A folder with setuptools and nothing else, as an installer's isolated build environment has it."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    packages = Path(str(setuptools.__file__)).parents[1]
    for name in ("setuptools", "_distutils_hack"):
        (folder / name).symlink_to(packages / name)
    # Hides the environment's own packages, in the way that pip does it.
    (folder / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('-packages')]\n"
    )
    return folder


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_torch_is_asked_for_only_where_there_is_none(hook: Hook, overlay: Path, tmp_path: Path) -> None:
    show = "import importlib.util as u; print(u.find_spec('torch'), b._torch_requirement())"
    isolated = {"PYTHONPATH": str(overlay), "compiler": "yes"}
    assert hook(show, **isolated).stdout == "None []\n"

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    assert hook(show, python=bare, **isolated).stdout == "None ['torch==2.13.0']\n"
    assert hook(show, python=bare, ATTNEXT_CPU="0", **isolated).stdout == "None []\n"
    # Nothing can be built without a compiler, so nothing is downloaded for it.
    assert hook(show, python=bare, PYTHONPATH=str(overlay)).stdout == "None []\n"


def test_info_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "attnext", "info"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for topic in (torch.__version__, "backend reference", "c++ compiler now", "extension C++"):
        assert topic in done.stdout
