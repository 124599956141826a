"""The install: what happens where the extension can't be built, and what a broken one says."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import setuptools
import torch
from torch.torch_version import TorchVersion

from attnext import _extension, info

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "build_backend"

if not BACKEND.is_dir():
    pytest.skip("the build backend is in the repository only", allow_module_level=True)

# A shared library that is surely here, and surely isn't ours.
LIBRARY = Path(str(torch._C.__file__))
HAS_COMPILER = bool(shutil.which(os.environ.get("CXX") or "c++"))
# What a build listens to.
VARIABLES = (
    "ATTNEXT_CPU",
    "ATTNEXT_CUDA",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDA_HOME",
    "CUDA_PATH",
    "TORCH_CUDA_ARCH_LIST",
)


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
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "attnext_command.py"):
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
        clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
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
    modules = ("attnext/__init__.py", "attnext/kernels/__init__.py", "attnext_command.py")
    assert {*modules, "attnext/py.typed"} <= set(names)
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


@pytest.mark.parametrize("variable", ["ATTNEXT_CPU", "ATTNEXT_CUDA"])
def test_unknown_mode_is_an_error(hook: Hook, variable: str) -> None:
    done = hook("b.get_requires_for_build_wheel()", **{variable: "perhaps"})
    assert done.returncode != 0
    assert f"{variable} takes auto, 0" in done.stderr
    assert "'perhaps'" in done.stderr


def test_cuda_kernels_without_the_extension_are_a_contradiction(hook: Hook) -> None:
    done = hook("b.get_requires_for_build_wheel()", ATTNEXT_CPU="0", ATTNEXT_CUDA="1")
    assert done.returncode != 0
    assert "ATTNEXT_CUDA=1 contradicts ATTNEXT_CPU=0" in done.stderr


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


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_flags_of_a_site_that_would_make_results_wrong(checkout: Path, hook: Hook) -> None:
    """They are left out, in the link too: with them it would set the processor to take small numbers for 0."""
    (checkout / "csrc" / "bindings.cpp").write_text(
        "#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || OTHERS != 2\n#error wrong\n#endif\n"
    )
    environment = {"CXXFLAGS": "-O2 -ffast-math -DOTHERS=2 -Ofast -ffinite-math-only", "LDFLAGS": "-Ofast -Wl,-O1"}
    done = hook("b.build_editable('dist')", compiler="yes", ATTNEXT_CPU="1", ATTNEXT_CUDA="0", **environment)
    assert done.returncode == 0, done.stderr
    assert (
        "NOTE: attnext is built without -ffast-math -Ofast -ffinite-math-only of CXXFLAGS: its results" in done.stderr
    )
    assert "NOTE: attnext is built without -Ofast of LDFLAGS" in done.stderr
    (link,) = (line for line in done.stdout.splitlines() if " -shared " in line and " -o attnext/" in line)
    assert {"-O2", "-DOTHERS=2", "-Wl,-O1"} <= set(link.split())
    assert not {"-ffast-math", "-Ofast", "-ffinite-math-only"} & set(link.split())


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
def test_the_sources_refuse_such_flags(flag: str) -> None:
    """Wherever they come from, a wrapper of the compiler say."""
    command = [os.environ.get("CXX") or "c++", "-std=gnu++17", "-fsyntax-only", "-x", "c++"]
    for flags, works in (([], True), ([flag], False)):
        done = subprocess.run(
            [*command, *flags, str(ROOT / "csrc/cpu/problem.h")], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == works
        assert ("attnext can't be built with -ffast-math" in done.stderr) != works


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


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"cuda": "13.0: 9.0+PTX", "cuda reason": ""}, "built with CUDA 13.0: 9.0+PTX"),
        ({"cuda": "", "cuda reason": "no nvcc"}, "none: no nvcc"),
        ({}, None),
    ],
)
def test_info_tells_of_cuda_kernels(monkeypatch: pytest.MonkeyPatch, record: dict[str, str], shown: str | None) -> None:
    monkeypatch.setattr(_extension, "load", lambda: None)
    monkeypatch.setattr(_extension, "build_record", lambda: record)
    facts = info._extension_facts()
    assert facts.get("CUDA kernels") == shown
    assert not [topic for topic in facts if topic.startswith("built with")]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build backend's module, with no toolkit in sight."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    monkeypatch.syspath_prepend(BACKEND)
    return importlib.import_module("attnext_cuda")


def _script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """What looks like CUDA 12.8, whose nvcc compiles nothing."""
    root = tmp_path / "toolkit"
    _script(
        root / "bin" / "nvcc",
        'case "$1" in',
        '--version) echo "Cuda compilation tools, release 12.8, V12.8.61" ;;',
        "--list-gpu-arch) for arch in 75 80 86 87 89 90; do echo compute_$arch; done ;;",
        f"--dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;",
        '*) echo "k.cu(1): error: no such luck"; exit 1 ;;',
        "esac",
    )
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (root / name).parent.mkdir()
        (root / name).touch()
    return root


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_by_variable(cuda: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, str(toolkit))
    found = cuda.find_toolkit()
    assert found.nvcc == str(toolkit / "bin" / "nvcc")
    assert found.version == "12.8"
    assert found.runtime == toolkit / "lib64" / "libcudart_static.a"


@pytest.mark.parametrize("kind", ["script", "link"])
def test_nvcc_on_the_path_outside_of_its_toolkit(
    cuda: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real, outside = toolkit / "bin" / "nvcc", tmp_path / "outside" / "nvcc"
    if kind == "script":
        _script(outside, f'exec {real} "$@"')
    else:
        # The real one, called through a link, does not tell where it is.
        real.write_text(real.read_text().replace("#$ TOP", "#$ BOTTOM"))
        outside.parent.mkdir()
        outside.symlink_to(real)
    monkeypatch.setenv("PATH", f"{outside.parent}:/bin:/usr/bin")
    found = cuda.find_toolkit()
    assert found.nvcc == str(outside if kind == "script" else real)
    assert found.runtime == toolkit / "lib64" / "libcudart_static.a"


def test_toolkit_of_packages(cuda: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pip installed the compiler and there is no other."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    packages = tmp_path / "site-packages"
    (packages / "nvidia").mkdir(parents=True)
    toolkit.rename(packages / "nvidia/cu13")
    found = cuda.find_toolkit(packages)
    assert found.nvcc == str(packages / "nvidia/cu13/bin/nvcc")
    with pytest.raises(cuda.NoCuda, match="no nvcc on the PATH"):
        cuda.find_toolkit(tmp_path)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("bin/nvcc", "has no bin/nvcc"),
        ("include/cuda_runtime.h", "has no include/cuda_runtime.h"),
        ("lib64/libcudart_static.a", "has no lib64/libcudart_static.a"),
        ("12.8", "CUDA toolkit 12.7 in"),
    ],
)
def test_unusable_toolkit(
    cuda: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, missing: str, told: str
) -> None:
    if missing == "12.8":
        nvcc = toolkit / "bin" / "nvcc"
        nvcc.write_text(nvcc.read_text().replace("12.8", "12.7"))
    else:
        (toolkit / missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    with pytest.raises(cuda.NoCuda, match=r"get 12\.8 or later from https:") as error:
        cuda.find_toolkit()
    assert told in str(error.value)
    assert str(toolkit) in str(error.value)


@pytest.mark.parametrize(
    "flag", ["--use_fast_math", "-use_fast_math", "-ftz=true", "-prec-div=false", "-Xcompiler=-Ofast"]
)
def test_nvcc_flags_that_would_make_results_wrong(
    cuda: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert cuda.plan(["g++"], []).title.startswith("12.8")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", f"-lineinfo {flag}")
    with pytest.raises(cuda.NoCuda, match=r"NVCC_APPEND_FLAGS has -.*, with which results would be wrong: take it out"):
        cuda.plan(["g++"], [])


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        (None, "7.5 8.0 9.0+PTX"),
        (" ; ", "7.5 8.0 9.0+PTX"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        (" 9.0a  8.0; 8.0 ", "9.0a 8.0"),
        ("10.3+PTX", "10.3+PTX"),
    ],
)
def test_arch_list(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str | None, archs: str) -> None:
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda.arch_list({"7.5", "8.0", "8.7", "9.0", "10.3"}) == archs.split()


@pytest.mark.parametrize("asked", ["Ampere", "80", "8.0,9.0", "8.0+ptx", "native"])
def test_arch_list_that_is_none(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"7.5 {asked}")
    with pytest.raises(cuda.OptionError) as error:
        cuda.arch_list({"7.5", "8.0", "9.0"})
    assert repr(asked) in str(error.value)
    assert "TORCH_CUDA_ARCH_LIST" in str(error.value)


def test_arch_that_nvcc_does_not_know(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 12.0")
    with pytest.raises(cuda.NoCuda, match=r"'12\.0' of TORCH_CUDA_ARCH_LIST; it knows 7\.5 9\.0"):
        cuda.arch_list({"9.0", "7.5"})


def test_code_for_each_gpu(cuda: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    kernels = cuda.plan(["ccache", "/opt/g++", "-m64"], ["-Icsrc"])
    assert kernels.title == "12.8: 8.0 9.0a+PTX"
    assert kernels.command[1:4] == ["-ccbin", "/opt/g++", "-Xcompiler=-m64"]
    assert [flag for flag in kernels.command if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


HOST = """
#ifndef ATTNEXT_WITH_CUDA
#define ATTNEXT_WITH_CUDA "none"
#endif
extern "C" __attribute__((visibility("default"))) const char* with_cuda() { return ATTNEXT_WITH_CUDA; }
"""
DEVICE = """
#include "kernel.cuh"
#include <torch/csrc/stable/accelerator.h>

extern "C" __attribute__((visibility("default"))) int launch(int device, float* y) {
  torch::stable::accelerator::DeviceGuard guard(device);
  auto* stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
  twice<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(y);
  return cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : -1;
}
"""


@pytest.fixture
def both(checkout: Path) -> Path:
    """The checkout with a C++ file that compiles in no time, and a kernel."""
    (checkout / "csrc" / "bindings.cpp").write_text(HOST)
    (checkout / "csrc" / "kernel.cuh").write_text("__global__ void twice(float* y) { y[threadIdx.x] *= 2; }\n")
    (checkout / "csrc" / "kernel.cu").write_text(DEVICE)
    return checkout


def _built(checkout: Path) -> tuple[ctypes.CDLL, dict[str, str]]:
    folder = checkout / "attnext"
    library = ctypes.CDLL(str(folder / f"_C{EXTENSION_SUFFIXES[0]}"))
    library.with_cuda.restype = ctypes.c_char_p
    return library, json.loads((folder / "_build.json").read_text())


def test_source_archive_has_the_kernels(both: Path, hook: Hook) -> None:
    done = hook("b.build_sdist('dist')")
    assert done.returncode == 0, done.stderr
    (archive,) = (both / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"csrc/kernel.cu", "csrc/kernel.cuh", "build_backend/attnext_cuda.py"} <= names


@pytest.mark.skipif(not HAS_COMPILER or sys.platform != "linux", reason="needs a C++ compiler")
def test_no_toolkit_on_the_path(both: Path, hook: Hook, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("as", "ld"):
        (tools / name).symlink_to(str(shutil.which(name)))
    site = tmp_path / "site"  # torch, and no toolkit that pip has installed beside it
    site.mkdir()
    (site / "torch").symlink_to(Path(torch.__file__).parent)
    here = {"compiler": "yes", "PATH": str(tools), "CXX": str(shutil.which(os.environ.get("CXX") or "c++"))}
    here["PYTHONPATH"] = str(site)
    done = hook("b.build_editable('dist')", ATTNEXT_CUDA="1", **here)
    assert done.returncode != 0
    assert "no nvcc on the PATH" in done.stderr
    assert "https://developer.nvidia.com/cuda-downloads" in done.stderr

    done = hook("b.build_editable('dist')", **here)
    assert done.returncode == 0, done.stderr
    library, record = _built(both)
    assert library.with_cuda() == b"none"
    assert (record["reason"], record["cuda"]) == ("", "")
    assert "no nvcc on the PATH" in record["cuda reason"]


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_toolkit_that_compiles_nothing(both: Path, hook: Hook, toolkit: Path) -> None:
    here = {"compiler": "yes", "CUDA_HOME": str(toolkit)}
    done = hook("b.build_editable('dist')", ATTNEXT_CUDA="1", **here)
    assert done.returncode != 0
    assert "nvcc failed: k.cu(1): error: no such luck" in done.stderr

    done = hook("b.build_editable('dist')", TORCH_CUDA_ARCH_LIST="8.0 Volta", **here)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST" in done.stderr
    assert "'Volta'" in done.stderr

    done = hook("b.build_editable('dist')", **here)
    assert done.returncode == 0, done.stderr
    library, record = _built(both)
    assert library.with_cuda() == b"none"
    assert (record["reason"], record["cuda"]) == ("", "")
    assert "no such luck" in record["cuda reason"]


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_cuda_kernels_are_built_and_load(both: Path, hook: Hook, tmp_path: Path) -> None:
    find = "from pathlib import Path; import attnext_cuda; attnext_cuda.find_toolkit(Path({!r}))"
    probe = hook(find.format(str(Path(torch.__file__).parents[1])), compiler="yes")
    if probe.returncode:
        pytest.skip(probe.stderr.splitlines()[-1])
    here = {"compiler": "yes", "ATTNEXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    done = hook("b.build_editable('dist')", **here)
    assert done.returncode == 0, done.stderr
    library, record = _built(both)
    assert record["cuda"].endswith(": 9.0+PTX")
    assert record["cuda reason"] == ""
    assert library.with_cuda().decode() == record["cuda"]
    # The runtime is inside: no other library, no GPU and no driver is needed to load it and ask.
    assert library.runtime_version() >= 12040

    def ages() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted((both / "build").rglob("*.o"))]

    first = ages()
    assert len(first) == 2
    # As in an isolated build environment, whose folder has another name each time.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pybind11").symlink_to(Path(str(pybind11.__file__)).parent)
    assert hook("b.build_editable('dist')", PYTHONPATH=str(tmp_path / "other"), **here).returncode == 0
    assert ages() == first
    # A device header is no matter of the C++ file.
    (both / "csrc" / "kernel.cuh").touch()
    assert hook("b.build_editable('dist')", **here).returncode == 0
    assert sum(a != b for a, b in zip(ages(), first, strict=True)) == 1
