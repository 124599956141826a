"""Finds the CUDA toolkit, and says how nvcc compiles csrc/**/*.cu for which GPUs.

They take nvcc, not a CUDA build of torch: on the stable ABI, and with the CUDA runtime linked in, the library that
holds them loads beside a CPU build of torch too, with no GPU and no driver.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from setuptools.errors import CompileError, OptionError

OLDEST_CUDA = (12, 8)  # the first that knows --compress-mode and 10.0
# From Turing on, the first of each generation, whose code serves the rest of it (8.6 and 8.9 run that of 8.0). The last
# one's PTX serves the GPUs that come after it.
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")
# No USE_CUDA: torch/csrc/stable/accelerator.h needs none, and what it adds to the headers is in CUDA builds of torch
# only; a library with such a symbol would not load beside another torch.
# Code for several kinds of GPU, compressed, is a tenth of what it is without.
COMPILE_FLAGS = ["-std=c++17", "-O3", "--compress-mode=size", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
INEXACT = re.compile(r"(^|\s)--?(use_fast_math|ftz[= ]true|prec-(div|sqrt)[= ]false)|-ffast-math|-Ofast")
OLDEST = ".".join(map(str, OLDEST_CUDA))
HOW = f"get {OLDEST} or later from https://developer.nvidia.com/cuda-downloads, or name its folder in CUDA_HOME"


class NoCuda(CompileError):
    """Why the CUDA kernels can't be built; the rest of the extension may well be."""


class Kernels(NamedTuple):
    """How a .cu file is compiled and its object linked."""

    title: str  # version of the toolkit and the GPUs: "13.0: 8.0 9.0+PTX"
    command: list[str]
    links: list[str]
    key: str  # what changes the object: nvcc itself, its flags and variables


class Toolkit(NamedTuple):
    nvcc: str
    version: str
    described: str  # nvcc's own words, which tell builds of one version apart
    runtime: Path  # the static library


def plan(host: list[str], flags: list[str], packages: Path | None = None) -> Kernels:
    """NoCuda where there is no usable toolkit.

    `host` is the C++ compiler; `flags` are added to nvcc's; in `packages` may be a toolkit that pip installed.
    """
    toolkit = find_toolkit(packages)
    archs = arch_list(_known_archs(toolkit.nvcc))
    # nvcc takes the compiler alone: no launcher (ccache) before it, its options apart.
    compiler = [word for word in host if not word.startswith("-")][-1]
    options = [f"-Xcompiler={word}" for word in host if word.startswith("-")]
    gpus = dict.fromkeys(flag for arch in archs for flag in _code(arch))
    variables = sorted(item for item in os.environ.items() if re.fullmatch("NVCC_(PRE|AP)PEND_FLAGS", item[0]))
    for name, value in variables:  # which nvcc reads by itself
        if inexact := INEXACT.search(value):
            raise NoCuda(f"{name} has {inexact[0].strip()}, with which results would be wrong: take it out")
    command = [toolkit.nvcc, "-ccbin", compiler, *options, *COMPILE_FLAGS, *gpus]
    threads = f"--threads={os.environ.get('MAX_JOBS') or os.cpu_count() or 1}"  # kinds of GPU at a time
    return Kernels(
        title=f"{toolkit.version}: {' '.join(archs)}",
        command=[*command, threads, *flags],
        links=[str(toolkit.runtime), "-ldl", "-lrt", "-lpthread"],
        key=repr((command, toolkit.described, variables)),
    )


def find_toolkit(packages: Path | None = None) -> Toolkit:
    nvcc, root = _find_nvcc(packages)
    described = _ask(nvcc, "--version")
    release = re.search(r"release ((\d+)\.(\d+))", described)
    if not release:
        raise NoCuda(f"{nvcc} does not tell its version: {described.strip() or 'it prints nothing'}")
    if (int(release[2]), int(release[3])) < OLDEST_CUDA:
        raise NoCuda(f"the CUDA toolkit {release[1]} in {root} is too old ({HOW})")
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    target = f"targets/{machine}-linux"
    includes = [root / "include", root / target / "include"]
    if not any((folder / "cuda_runtime.h").is_file() for folder in includes):
        raise NoCuda(f"the CUDA toolkit in {root} has no include/cuda_runtime.h ({HOW})")
    libraries = [root / folder / "libcudart_static.a" for folder in ("lib64", "lib", f"{target}/lib")]
    runtime = next((path for path in libraries if path.is_file()), None)
    if runtime is None:
        raise NoCuda(f"the CUDA toolkit in {root} has no lib64/libcudart_static.a ({HOW})")
    return Toolkit(nvcc, release[1], described, runtime)


def _find_nvcc(packages: Path | None) -> tuple[str, Path]:
    """nvcc and the folder of its toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            nvcc = Path(folder, "bin", "nvcc")
            if not os.access(nvcc, os.X_OK):
                raise NoCuda(f"no CUDA toolkit: {variable}={folder} has no bin/nvcc ({HOW})")
            return str(nvcc), Path(folder)
    found = shutil.which("nvcc")
    wheels = sorted(packages.glob("nvidia/cu*/bin/nvcc")) if packages else []
    if found is None and wheels:
        return str(wheels[-1]), wheels[-1].parent.parent
    if found is None:
        raise NoCuda(f"no CUDA toolkit: no nvcc on the PATH, and no CUDA_HOME ({HOW})")
    # It may be a script that calls the real one, which knows where it is.
    if top := re.search(r"^#\$ TOP=(.+)$", _ask(found, "--dryrun", "x.cu"), re.MULTILINE):
        return found, Path(top[1].strip()).resolve()
    # Through a symbolic link nvcc finds neither its settings nor its toolkit.
    real = Path(found).resolve()
    return str(real), real.parent.parent


def arch_list(known: set[str]) -> list[str]:
    """The GPUs to compile for, as TORCH_CUDA_ARCH_LIST writes them, given those that nvcc knows."""
    asked = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t\n"))
    if asked == [""]:
        usable = [arch for arch in DEFAULT_ARCHS if arch in known]
        if not usable:
            raise NoCuda(f"nvcc knows none of {' '.join(DEFAULT_ARCHS)}: set TORCH_CUDA_ARCH_LIST")
        return [*usable[:-1], f"{usable[-1]}+PTX"]
    for arch in asked:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not match:
            raise OptionError(f"TORCH_CUDA_ARCH_LIST takes a list such as '8.0;9.0+PTX', and can't read {arch!r}")
        if match[1] not in known:
            names = " ".join(sorted(known, key=float))
            raise NoCuda(f"nvcc does not know {arch!r} of TORCH_CUDA_ARCH_LIST; it knows {names}")
    return list(dict.fromkeys(asked))


def _known_archs(nvcc: str) -> set[str]:
    listed = re.findall(r"compute_(\d+)(\d)\b", _ask(nvcc, "--list-gpu-arch"))
    return {f"{major}.{minor}" for major, minor in listed}


def _code(arch: str) -> list[str]:
    number, _, ptx = arch.replace(".", "").partition("+")
    flag = f"-gencode=arch=compute_{number},code="
    return [f"{flag}sm_{number}", *([f"{flag}compute_{number}"] if ptx else [])]


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stdout
