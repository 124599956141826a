"""Where the CUDA toolkit is: its headers, with which g++ compiles kernels for the CPU, and its compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# The last comes from another package on PyPI than the others, and cuda_fp16.h includes it.
HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_pipeline.h", "nv/target")


def _folder_of(nvcc: Path) -> Path | None:
    """The toolkit's folder as the compiler itself tells it, since the nvcc on the path is often a script."""
    command: list[str | Path] = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def _from_packages(name: str) -> Iterator[Path]:
    """Folders of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    yield from map(Path, (spec and spec.submodule_search_locations) or ())


@cache
def _toolkits() -> list[tuple[Path, Path | None]]:
    """Folders with the headers, the first the one to use, and the compiler that belongs to each."""
    named = [shutil.which("nvcc"), *(os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH"))]
    compilers = [path / "bin/nvcc" if path.is_dir() else path for path in map(Path, filter(None, named))]
    compilers += [folder / "cu13/bin/nvcc" for folder in _from_packages("nvidia")]
    found: list[tuple[Path, Path | None]] = []
    for nvcc in compilers:
        working = _folder_of(nvcc)
        folder = working or nvcc.parents[1]
        if all((folder / "include" / header).is_file() for header in HEADERS):
            found.append((folder, nvcc if working else None))
    return found


def include_folder() -> Path | None:
    """The folder of the headers."""
    return next((folder / "include" for folder, _ in _toolkits()), None)


def nvcc() -> Path | None:
    """The compiler."""
    return next((nvcc for _, nvcc in _toolkits() if nvcc), None)


def cuobjdump() -> Path | None:
    """What shows machine code: the toolkit's, or the one that Triton brings."""
    folders = [folder / "bin" for folder, _ in _toolkits()]
    folders += [folder / "backends/nvidia/bin" for folder in _from_packages("triton")]
    return next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").is_file()), None)
