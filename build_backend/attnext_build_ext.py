"""Compiles csrc/**/*.cpp and *.cu into ``attnext._C`` and writes down in ``attnext/_build.json`` how that went.

The Python half of the package works without the extension, and the extension without its CUDA kernels, so a
machine that can't build them still gets an install. ATTNEXT_CPU=1 and ATTNEXT_CUDA=1 turn a failure into an error,
0 skips the extension or the CUDA kernels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import attnext_cuda
from attnext_cuda import Kernels, NoCuda
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

OLDEST_TORCH = (2, 13)
DEFINITIONS = [
    "-DNDEBUG",
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
]
# No -march=native: the library must run on every machine of its architecture, the sources choose the vector
# instructions at run time. No -ffast-math: it would delete the tests for NaN and infinity, and linked with it a library
# takes small numbers for 0 in the whole process.
COMPILE_FLAGS = [
    "-std=gnu++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-Wall",
    *DEFINITIONS,
]
# What of this kind site-wide settings bring along.
INEXACT = re.compile(
    "-Ofast|-ffp-model=.*|-m(no-)?daz-ftz|-f(fast-math|unsafe-math-optimizations|finite-math-only|associative-math|"
    "reciprocal-math|approx-func|no-honor-nans|no-honor-infinities|no-signed-zeros|denormal-fp-math.*)"
)
# Python's symbols are found when the module is loaded; macOS wants to be told. --as-needed keeps the OpenMP
# runtime out of the needed libraries where the code uses no more than `omp simd`.
LINK_FLAGS = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--as-needed"]


class Torch(NamedTuple):
    root: Path
    version: str


class Step(NamedTuple):
    """How the sources of one language become objects."""

    command: list[str]
    sources: list[str]
    headers: list[str]
    key: str  # what changes the objects, beside these files
    failure: type[CompileError]


def files(*suffixes: str) -> list[str]:
    return sorted(path.as_posix() for path in Path("csrc").rglob("*") if path.suffix in suffixes)


def extension_wanted() -> str:
    cpu, cuda = _mode("ATTNEXT_CPU", "no C++ extension"), cuda_wanted()
    if cuda == "1" and cpu == "0":
        raise OptionError("ATTNEXT_CUDA=1 contradicts ATTNEXT_CPU=0: that skips the extension that CUDA kernels are in")
    return cuda if cuda == "1" else cpu


def cuda_wanted() -> str:
    return _mode("ATTNEXT_CUDA", "no CUDA kernels")


def _mode(variable: str, without: str) -> str:
    mode = os.environ.get(variable, "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise OptionError(f"{variable} takes auto, 0 ({without}) or 1 (demand it), got {mode!r}")
    return mode


def find_compiler() -> list[str] | None:
    """The C++ compiler as the first words of a command line, or None."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen if shutil.which(chosen[0]) else None
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


def find_torch() -> Torch | None:
    """The torch to build against: this process' own, else that of the environment we are built for.

    pip isolates a build by means of PYTHONPATH. The same interpreter with -E ignores it, and so sees the
    packages of the environment that the install goes to.
    """
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    own = importlib.util.find_spec("torch")
    outside = subprocess.run([sys.executable, "-E", "-c", probe], capture_output=True, text=True, check=False)
    for origin in (own.origin if own else None, outside.stdout.strip()):
        if origin and (torch := _usable(Path(origin).parent)):
            return torch
    return None


def _usable(root: Path) -> Torch | None:
    version_file = root / "version.py"
    text = version_file.read_text() if version_file.is_file() else ""
    match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    complete = (root / "include/torch/csrc/stable/library.h").is_file()
    if match and complete and (int(match[2]), int(match[3])) >= OLDEST_TORCH:
        return Torch(root, match[1])
    return None


class BuildExtension(build_ext):
    """Builds the one extension with the C++ compiler itself, which gives parallel and incremental builds."""

    def run(self) -> None:
        extension, recorded = self._products()
        extension.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier build left here may be for another torch or of other sources.
        extension.unlink(missing_ok=True)
        record = {"torch": "", "compiler": "", "flags": "", "reason": "", "cuda": ""}
        record["cuda reason"] = "the C++ extension, which they are part of, was not built"
        try:
            if extension_wanted() == "0":
                record["reason"] = "the install was told to skip it with ATTNEXT_CPU=0"
            else:
                _build(extension, record)
        except CompileError as error:
            if extension_wanted() == "1":
                raise
            record["reason"] = str(error)
            print(f"WARNING: attnext is installed without its C++ extension: {error}", file=sys.stderr)
        recorded.write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._products() if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _products(self) -> tuple[Path, Path]:
        folder = Path("attnext") if self.inplace or self.editable_mode else Path(self.build_lib, "attnext")
        return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", folder / "_build.json"


def _build(extension: Path, record: dict[str, str]) -> None:
    compiler = find_compiler()
    if compiler is None:
        asked = os.environ.get("CXX")
        what = f"CXX={asked} is not there" if asked else "none of c++, g++, clang++ is on the PATH"
        raise CompileError(f"no C++ compiler: {what} (Debian and Ubuntu: apt-get install g++)")
    torch = find_torch()
    if torch is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CompileError(f"no torch >= {oldest} with its C++ headers to build against")
    try:
        import pybind11
    except ImportError as error:
        raise CompileError("pybind11 is missing (with --no-build-isolation: pip install pybind11)") from error

    compiler = _exact(compiler, "CXX")
    flags = COMPILE_FLAGS + _openmp(compiler) + _exact(shlex.split(os.environ.get("CXXFLAGS", "")), "CXXFLAGS")
    record["torch"] = torch.version
    record["compiler"] = _run([*compiler, "--version"]).partition("\n")[0]
    record["flags"] = " ".join(flags)
    includes = ["-Icsrc", f"-I{torch.root}/include"]
    host = [*compiler, *flags, *includes, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    # Objects are kept between builds, apart for everything that changes them. That is not the folders of the
    # headers: installers put these into a new one for each build.
    key = repr((record, pybind11.__version__, sysconfig.get_config_var("EXT_SUFFIX")))
    kernels, reason = None, ""
    try:
        kernels = _kernels(compiler, [*DEFINITIONS, *includes], torch.root.parent)
        objects = _compile(host, kernels, key)
    except NoCuda as error:
        if cuda_wanted() == "1":
            raise
        kernels, reason = None, str(error)
        print(f"NOTE: attnext's extension is built without CUDA kernels: {error}", file=sys.stderr)
        objects = _compile(host, None, key)
    # No rpath: `import torch` has loaded the library by then, wherever torch lives.
    links = [*LINK_FLAGS, f"-L{torch.root}/lib", "-ltorch_cpu"]
    links += _exact(shlex.split(os.environ.get("LDFLAGS", "")), "LDFLAGS")
    _run([*compiler, "-shared", *flags, *objects, *(kernels.links if kernels else []), *links, "-o", str(extension)])
    record |= {"cuda": kernels.title if kernels else "", "cuda reason": reason}


def _exact(words: list[str], variable: str) -> list[str]:
    """The words of a variable of the environment, but for flags with which results would be wrong."""
    if left_out := [word for word in words if INEXACT.fullmatch(word)]:
        print(f"NOTE: attnext is built without {' '.join(left_out)} of {variable}: its results would be wrong",
              file=sys.stderr)  # fmt: skip
    return [word for word in words if not INEXACT.fullmatch(word)]


def _kernels(compiler: list[str], flags: list[str], packages: Path) -> Kernels:
    if cuda_wanted() == "0":
        raise NoCuda("the install was told to go without them with ATTNEXT_CUDA=0")
    if not files(".cu"):
        raise NoCuda("this version has no CUDA kernels")
    return attnext_cuda.plan(compiler, flags, packages)


def _compile(host: list[str], kernels: Kernels | None, key: str) -> list[str]:
    """The objects. `host` compiles a C++ file."""
    told = [f'-DATTNEXT_WITH_CUDA="{kernels.title}"'] if kernels else []
    steps = [Step([*host, *told], files(".cpp"), files(".h"), key + repr(told), CompileError)]
    if kernels:
        # First, as they take longest.
        steps.insert(0, Step(kernels.command, files(".cu"), files(".h", ".cuh"), key + kernels.key, NoCuda))
    jobs = [(step, source) for step in steps for source in step.sources]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: _object(*job), jobs))


def _object(step: Step, source: str) -> str:
    target = Path("build", "objects-" + hashlib.sha256(step.key.encode()).hexdigest()[:12], f"{source}.o")
    newest = max(Path(path).stat().st_mtime for path in [source, *step.headers])
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _run([*step.command, "-c", source, "-o", str(target)])
        except CompileError as error:
            raise step.failure(str(error)) from error
    return str(target)


def _openmp(compiler: list[str]) -> list[str]:
    empty = ["-x", "c++", os.devnull, "-shared", "-fPIC", "-fopenmp", "-o", os.devnull]
    works = subprocess.run([*compiler, *empty], capture_output=True, check=False).returncode == 0
    return ["-fopenmp"] if works else []


def _run(command: list[str]) -> str:
    """What the command printed, which the build's log shows too. A failure raises its first error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(shlex.join(command), done.stdout, sep="\n", flush=True)
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r" error: |undefined reference|cannot find -l", line))
    first = next(telling, lines[-1] if lines else f"exit status {done.returncode}")
    hint = " (Debian and Ubuntu: apt-get install python3-dev)" if "Python.h" in first else ""
    raise CompileError(f"{Path(command[0]).name} failed: {first}{hint}")
