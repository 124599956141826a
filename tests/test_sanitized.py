"""The CPU's kernels under AddressSanitizer and UBSan: no access out of bounds, no undefined behaviour.

The extension is built anew, in a copy of the package, and goes through the cases in processes of its own. There each
piece of scratch memory is an allocation, so that its ends are watched as those of tensors are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_on_cpu_build as harness
import pytest

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
FLAGS = "-fsanitize=address,undefined"
GUARD = ("(j < nj ? j : nj - 1) * b_row", "j * b_row")
"""In gemm.h, and a mistake in its place: of the last columns of a product three rows more are read."""


def runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    if not harness.COMPILER:
        return name
    asked = [harness.COMPILER, f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


# The compiler answers with the name alone where it has no such library.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path(runtime("libasan.so")).is_absolute(), reason="no compiler with a libasan.so"
)


def build(folder: Path) -> None:
    """The extension, in a copy of the package with its sources."""
    environment = os.environ | {
        "ATTNEXT_CPU": "1",
        "ATTNEXT_CUDA": "0",
        "CXX": str(harness.COMPILER),
        "CXXFLAGS": f"-O1 -g1 {FLAGS} -fno-sanitize-recover=undefined",
        "LDFLAGS": FLAGS,
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the copy."""
    folder = tmp_path_factory.mktemp("sanitized")
    without = shutil.ignore_patterns("_C*", "__pycache__", "kernels")
    for name in ("attnext", "csrc", "build_backend"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    shutil.copytree(ROOT / "kernels", folder / "attnext" / "kernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "attnext_command.py"):
        shutil.copy(ROOT / name, folder)
    build(folder)
    return folder


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with the package in the folder. What throws has to be there when the sanitizer looks for it."""
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MALLOC_PERTURB_", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_nothing_is_reported(package: Path) -> None:
    """For any case of attention, layers and decoders, nor for the steps of searches."""
    tests = [TESTS / name for name in ("test_step_kernels.py", "test_decoder_steps.py")]
    runs = ([TESTS / "sanitized_cases.py"], ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda arguments: run(package, *arguments), runs):
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_a_planted_mistake_is_found(package: Path, tmp_path: Path) -> None:
    """The check above can fail. One set of instructions is enough for that."""
    folder = tmp_path / "planted"
    shutil.copytree(package, folder)
    source = folder / "csrc/cpu/gemm.h"
    text = source.read_text()
    assert GUARD[0] in text
    source.write_text(text.replace(*GUARD))
    for path in (folder / "build").rglob("*.o"):
        if path.name != "isa_portable.cpp.o":  # the build would think them old
            os.utime(path, (source.stat().st_mtime + 1,) * 2)
    build(folder)
    done = run(folder, TESTS / "sanitized_cases.py", "portable")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
