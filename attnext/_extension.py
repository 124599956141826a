"""Loads the compiled half of the package, ``attnext._C``, and tells in plain words when and why it can't.

Importing the package never fails because of the extension: the backends that need it ask ``status()``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Before _C is loaded: it is linked to libtorch, which torch knows where to find.
import torch

PACKAGE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 13)
REBUILD = (
    "To build it, install again (`pip install .` or `pip install -e .` in the repository) with ATTNEXT_CPU=1 "
    "set, which stops at the first problem and shows it."
)


class Status(NamedTuple):
    available: bool
    broken: bool  # there is an extension, but it can't be used
    reason: str  # why not, and what to do; empty when available


def load() -> ModuleType | None:
    """``attnext._C``, or None where ``status()`` has a reason."""
    return _once()[0]


def status() -> Status:
    return _once()[1]


def build_record() -> dict[str, str]:
    """What the build wrote down: torch, compiler, flags, CUDA kernels, and the reasons for what is missing."""
    return _read_record(PACKAGE)


def misplaced(package: Path = PACKAGE) -> str:
    """Why parts are missing if `package` is a source checkout that hides the installed one, else ""."""
    installed = (Path(entry or ".", package.name).resolve() for entry in sys.path)
    # Every install writes a build record, with or without an extension.
    other = next((path for path in installed if path != package and (path / "_build.json").is_file()), None)
    if other is None:
        return ""
    return (
        f"this is the source folder {package}, which hides the installed package in {other}. Leave the "
        "repository folder, or install the repository itself with `pip install -e .`."
    )


@functools.cache
def _once() -> tuple[ModuleType | None, Status]:
    return _load(PACKAGE)


def _load(package: Path) -> tuple[ModuleType | None, Status]:
    files = sorted(path for path in package.glob("_C.*") if path.suffix in (".so", ".pyd"))
    mine = [path for path in files if path.name.removeprefix("_C") in EXTENSION_SUFFIXES]
    if not mine:
        return None, Status(False, bool(files), _missing(package, files))
    path = mine[0]
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        needed = "torch>={}.{}".format(*OLDEST_TORCH)
        reason = f"torch {torch.__version__} is too old for the C++ extension: run `pip install '{needed}'`."
        return None, Status(False, True, reason)
    if _truncated(path):
        reason = f"{path} is incomplete: its end is cut off, or it is no library. {REBUILD}"
        return None, Status(False, True, reason)
    try:
        return _import(path), Status(True, False, "")
    # A damaged library raises more than ImportError (SystemError was seen).
    except Exception as error:
        built = _read_record(package).get("torch") or "an unknown torch"
        reason = (
            f"{path} can't be loaded by Python {sys.version.split()[0]} with torch {torch.__version__} "
            f"(it was built against {built}): {error}. {REBUILD}"
        )
        return None, Status(False, True, reason)


def _missing(package: Path, other_files: list[Path]) -> str:
    if hidden := misplaced(package):
        return f"there is no C++ extension here: {hidden}"
    if other_files:
        names = ", ".join(path.name for path in other_files)
        python = ".".join(map(str, sys.version_info[:2]))
        return f"the C++ extension was built for another Python than this {python} ({names}). {REBUILD}"
    reason = _read_record(package).get("reason") or "this folder was never built"
    return f"the C++ extension is missing: {reason}. {REBUILD}"


def _read_record(package: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads((package / "_build.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _truncated(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections or one of its segments does.

    Loading such a file can kill the process (SIGBUS), so it has to be noticed before.
    """
    if sys.platform != "linux":
        return False
    data = path.read_bytes()
    if len(data) < 64 or data[:4] != b"\x7fELF":
        return True
    segments, sections = struct.unpack_from("QQ", data, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("HHHH", data, 54)
    end = max(segments + segment_size * segment_count, sections + section_size * section_count)
    if len(data) < end:
        return True
    headers = (segments + segment_size * index for index in range(segment_count))
    places = (struct.unpack_from("QQQQ", data, header + 8) for header in headers)
    return any(len(data) < offset + size for offset, _, _, size in places)


def _import(path: Path) -> ModuleType:
    name = f"{__package__}._C"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
