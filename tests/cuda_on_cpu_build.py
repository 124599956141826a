"""Compiles and runs what includes cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cuda_toolkit

FOLDER = Path(__file__).with_name("cuda_on_cpu")
SANITIZERS: dict[str, tuple[str, ...]] = {
    "plain": ("-O2",),
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
COMPILER = shutil.which(os.environ.get("CXX") or "g++")
ADDR_NO_RANDOMIZE = 0x0040000


def why_not() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the fibers are for x86-64 Linux"
    if not COMPILER:
        return "no g++"
    if not cuda_toolkit.include_folder():
        return "no headers of the CUDA toolkit"
    return ""


def command(sanitizer: str, *arguments: str | Path) -> list[str]:
    """The compiler with its options; sources, more options and the output are the arguments."""
    includes = (f"-I{FOLDER}", "-isystem", cuda_toolkit.include_folder())
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # unroll
    options = ("-std=c++17", "-g", *warnings, *SANITIZERS[sanitizer])
    return [str(part) for part in (COMPILER, *options, *includes, *arguments)]


@contextmanager
def _no_random_addresses() -> Iterator[None]:
    """For programs started meanwhile. The TSan of GCC before 14 does not know all places where Linux may put a program;
    where a container forbids this, the program runs as it is."""
    personality = ctypes.CDLL(None).personality
    before = personality(0xFFFFFFFF)
    personality(before | ADDR_NO_RANDOMIZE)
    yield
    personality(before)


def run(program: Path, *arguments: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    """Runs a compiled program; what it says about mistakes is in stderr."""
    environment = os.environ | {
        "CUDA_ON_CPU_ORDER": order,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",  # a fake stack for each of 1024 fibers takes too much memory
        "TSAN_OPTIONS": "history_size=5",  # enough to tell where the earlier access of a race was
    }
    with _no_random_addresses():
        return subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
