"""Compiles csrc/**/*.cpp into ``attnext._C`` and writes down in ``attnext/_build.json`` how that went.

The Python half of the package works without the extension, so a machine that can't build it still gets an
install. ATTNEXT_CPU=1 turns a failure into an error, ATTNEXT_CPU=0 skips the extension.
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

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

OLDEST_TORCH = (2, 13)
# No -march=native: the library must run on every machine of its architecture, the sources choose the vector
# instructions at run time. No -ffast-math: it would delete the tests for NaN and infinity.
COMPILE_FLAGS = [
    "-std=gnu++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-Wall",
    "-DNDEBUG",
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
]
# Python's symbols are found when the module is loaded; macOS wants to be told. --as-needed keeps the OpenMP
# runtime out of the needed libraries where the code uses no more than `omp simd`.
LINK_FLAGS = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--as-needed"]


class Torch(NamedTuple):
    root: Path
    version: str


def sources() -> list[str]:
    return sorted(path.as_posix() for path in Path("csrc").rglob("*.cpp"))


def headers() -> list[str]:
    return sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))


def extension_wanted() -> str:
    mode = os.environ.get("ATTNEXT_CPU", "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise OptionError(f"ATTNEXT_CPU takes auto, 0 (no C++ extension) or 1 (demand it), got {mode!r}")
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
        record = {"torch": "", "compiler": "", "flags": "", "reason": ""}
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

    flags = COMPILE_FLAGS + _openmp(compiler) + shlex.split(os.environ.get("CXXFLAGS", ""))
    record["torch"] = torch.version
    record["compiler"] = _run([*compiler, "--version"]).partition("\n")[0]
    record["flags"] = " ".join(flags)
    # Objects are kept between builds, apart for everything that changes them.
    key = repr((record, pybind11.__version__, sysconfig.get_config_var("EXT_SUFFIX")))
    folder = Path("build", "objects-" + hashlib.sha256(key.encode()).hexdigest()[:12])
    includes = ["csrc", torch.root / "include", pybind11.get_include(), sysconfig.get_path("include")]
    command = [*compiler, *flags, *(f"-I{path}" for path in includes)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda source: _compile(command, source, folder), sources()))
    # No rpath: `import torch` has loaded the library by then, wherever torch lives.
    links = [*LINK_FLAGS, f"-L{torch.root}/lib", "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]
    _run([*compiler, "-shared", *flags, *objects, *links, "-o", str(extension)])


def _compile(command: list[str], source: str, folder: Path) -> str:
    target = folder / f"{source}.o"
    newest = max(Path(path).stat().st_mtime for path in [source, *headers()])
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([*command, "-c", source, "-o", str(target)])
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
