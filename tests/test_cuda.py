"""The CUDA kernels without a GPU: run on the CPU with their launches, under sanitizers, and compiled by nvcc.

The same cases and the same contract as for the other backends, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform, and brings cuobjdump")

import cuda_on_cpu_build as harness
import cuda_toolkit
import family

import attnext
from attnext import _extension
from attnext.backends import cuda

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc/cuda"
TORCH = Path(torch.__file__).parent
# Kinds of GPU that the kernels are built for by default.
ARCHS = ("75", "80", "90", "100", "120")
Result = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.skipif(bool(harness.why_not()), reason=harness.why_not() or "")


PLANTED = {
    "tsan": ("forward.cuh", "  __syncwarp();\n  const int count", "  const int count", "data race"),
    "asan": ("prepare.cuh", "tile[lane * kRow", "tile[(lane + 1) * kRow", "AddressSanitizer"),
}
"""A mistake for each sanitizer: file, what is right there, what is put in its place, and what is then said."""


def build(sanitizer: str, library: Path, sources: Path, level: str = "-O1") -> None:
    """The library of the kernels and their launches for the CPU, plain or with a sanitizer."""
    # The kernels read two numbers as one vector, which nvcc allows.
    options = ("-include", "cuda_on_cpu.h", "-fPIC", "-shared", "-fno-strict-aliasing", f"-I{sources}")
    stable = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020d000000000000")
    of_torch = ("-isystem", TORCH / "include", f"-L{TORCH}/lib", "-ltorch_cpu")
    source = ("-x", "c++", sources / "additive.cu", "-o", library)
    command = harness.command(sanitizer, level, *options, *stable, *source, *of_torch)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def plant(sanitizer: str, folder: Path) -> Path:
    """The sources with a mistake."""
    folder.mkdir()
    for path in SOURCES.iterdir():
        (folder / path.name).write_text(path.read_text())
    file, right, wrong, _ = PLANTED[sanitizer]
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong))
    return folder


class Libraries:
    """The kernels in libraries, by name: plain, asan, tsan and, with a mistake in each, planted-asan and planted-tsan.

    Built when one of a group is first asked for, those of the group at once: a few tests alone needn't wait for all.
    """

    GROUPS = (("plain",), ("tsan", "asan"), tuple(f"planted-{name}" for name in PLANTED))
    # With its checks of undefined behaviour, g++ would take longer to optimize than it then saves; those with a mistake
    # are run once, and stop early.
    LEVELS: ClassVar[dict[str, str]] = {"plain": "-O1", "tsan": "-O1"}

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        library = self._folder / f"{name}.so"
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self._build, next(group for group in self.GROUPS if name in group)))
        return library

    def _build(self, name: str) -> None:
        sanitizer = name.removeprefix("planted-")
        sources = SOURCES if sanitizer == name else plant(sanitizer, self._folder / name)
        build(sanitizer, self._folder / f"{name}.so", sources, self.LEVELS.get(name, "-O0"))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    return Libraries(tmp_path_factory.mktemp("cuda"))


def run(
    script: str,
    *arguments: str | Path,
    sanitizer: str = "plain",
    order: str = "forward",
    variables: tuple[str, ...] = (),
) -> Result:
    """Runs a script of this folder, with the sanitizer's runtime there before Python."""
    variables += ("OMP_NUM_THREADS=1", "ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0")
    if sanitizer != "plain":
        asked = [str(harness.COMPILER), f"-print-file-name=lib{sanitizer}.so"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        variables += (f"LD_PRELOAD={found}",)
    command = (sys.executable, Path(__file__).with_name(script), *arguments)
    return harness.run(Path("/usr/bin/env"), *variables, *map(str, command), order=order)


def assert_held(done: Result) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.strip().endswith("held"), done.stdout[-3000:]


def in_orders(library: Path, which: str, *orders: str) -> list[Result]:
    """Runs of the cases at a time, one for each order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda order: run("cuda_cases.py", library, which, order=order), orders))


def test_every_case_with_threads_in_any_order(libraries: Libraries) -> None:
    for done in in_orders(libraries["plain"], "table", "forward", "backward", "random:1"):
        assert_held(done)


def test_the_same_bits_with_threads_in_any_order(libraries: Libraries) -> None:
    runs = in_orders(libraries["plain"], "digest", "forward", "backward", "random:3")
    found = {done.stdout.strip() for done in runs}
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_a_step_reads_each_number_of_its_memory_once(tmp_path: Path) -> None:
    """D + H numbers a key, D where the keys are the values, and nothing of tiles beyond a row's length."""
    program = tmp_path / "step_reads"
    source = Path(__file__).with_name("step_reads.cpp")
    subprocess.run(harness.command("plain", f"-I{SOURCES}", source, "-o", program), check=True)
    done = harness.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "D + H numbers a key, or D\n", "")


def test_a_step_that_sees_its_past(libraries: Libraries) -> None:
    """It makes no tensor of its features."""
    assert_held(run("cuda_cases.py", libraries["plain"], "memory"))


def test_few_features_and_many_queries_take_few_launches(libraries: Libraries) -> None:
    """A slab has 128 queries at least."""
    done = run("cuda_cases.py", libraries["plain"], "slabs", variables=("CUDA_ON_CPU_TRACE=1",))
    assert_held(done)
    assert re.findall(r"launch: (\w*score_gradients)", done.stderr) == [
        *["score_gradients"] * 10,
        *["dot_score_gradients"] * 10,
    ]


def test_random_cases(libraries: Libraries) -> None:
    assert_held(run("cuda_cases.py", libraries["plain"], "random"))


@pytest.mark.parametrize("checks", ["contract", "running"])
def test_what_a_gpu_is_asked(libraries: Libraries, checks: str) -> None:
    """What ``attnext gpu-check`` asks of a card."""
    assert_held(run("gpu_checks.py", checks, libraries["plain"]))


def test_nan_and_infinity(libraries: Libraries) -> None:
    assert_held(run("nonfinite.py", "cuda", libraries["plain"]))


def test_every_attention_of_the_family(libraries: Libraries) -> None:
    done = run("family.py", "cuda", libraries["plain"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == family.column_in_readme("cuda")


def test_no_access_out_of_bounds_and_no_race(libraries: Libraries) -> None:
    jobs = {"tsan": (libraries["tsan"], "tiny"), "asan": (libraries["asan"], "table")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda name: run("cuda_cases.py", *jobs[name], sanitizer=name), jobs):
            assert_held(done)


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_a_planted_mistake_is_found(libraries: Libraries, sanitizer: str) -> None:
    """The checks above can fail: without a barrier, and with a row too many in shared memory."""
    done = run("cuda_cases.py", libraries[f"planted-{sanitizer}"], "tiny", sanitizer=sanitizer)
    assert done.returncode != 0
    assert PLANTED[sanitizer][-1] in done.stderr


def test_nvcc_has_nothing_to_say(tmp_path: Path) -> None:
    """No warning, for every kind of GPU."""
    nvcc = cuda_toolkit.nvcc()
    assert nvcc is not None, "no nvcc: pip install -r tests/cuda-toolkit.txt"

    def compile_for(arch: str) -> Result:
        target = ["-cubin", f"-arch=sm_{arch}", "-o", str(tmp_path / f"{arch}.cubin")]
        command = [str(nvcc), "-std=c++17", "-O3", "-Werror=all-warnings", f"-I{SOURCES}", *target]
        source = str(Path(__file__).with_name("cuda_kernels.cu"))
        return subprocess.run([*command, source], capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for arch, done in zip(ARCHS, pool.map(compile_for, ARCHS), strict=True):
            assert done.returncode == 0, (arch, done.stderr[-3000:])
            assert "warning" not in done.stderr


@pytest.fixture(scope="module")
def built() -> str:
    """The kinds of GPU that the installed extension has kernels for."""
    module = _extension.load()
    assert module is not None
    kernels = module.build_info().get("cuda", "")
    assert kernels, _extension.build_record().get("cuda reason")
    return str(kernels)


def test_no_kernel_spills(built: str) -> None:
    assert _extension.load() is not None
    library, tool = str(_extension.load().__file__), str(cuda_toolkit.cuobjdump())  # type: ignore[union-attr]
    archs = [arch.removesuffix("+PTX").replace(".", "") for arch in built.split(": ")[1].split()]
    assert archs
    print(f"\n{'':8}kernels  registers  spilled bytes  static shared bytes")
    for arch in archs:
        command = [tool, "--dump-resource-usage", "-arch", f"sm_{arch}", library]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        registers, stack, shared, local = ([int(x) for x in column] for column in zip(*found, strict=True))
        print(f"sm_{arch:5}{len(found):7}{max(registers):11}{sum(stack + local):15}{max(shared):21}")
        assert len(found) == 75, "twenty-five kernels in three dtypes"
        assert sum(stack + local) == 0
        # Four blocks of 128 threads, or three, have a multiprocessor's registers.
        assert max(registers) <= 168
        assert max(shared) <= 1024


def test_the_inner_loops_stay_within_their_budgets(built: str, tmp_path: Path) -> None:
    if "9.0" not in built:
        pytest.skip(f"built for {built} by TORCH_CUDA_ARCH_LIST")
    tool, numbers = ROOT / "benchmarks/gpu_cost.py", tmp_path / "cost.json"
    command = [sys.executable, str(tool), "--target", "sm_90", "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "27.5 instructions forward, 34.5 backward" in " ".join(done.stdout.split())
    cost = {row["loop"]: row for row in json.loads(numbers.read_text())["loops"] if row["family"] == "CUDA"}
    for name in ("forward: scores", "backward: scores again"):
        assert cost[name]["special"] <= 0.5
        assert cost[name]["slots"] <= 4.0
    assert cost["backward: gradients"]["special"] <= 1.0
    assert cost["backward: gradients"]["slots"] <= 8.5
    for kernel in ("", ", backward"):  # a multiply-add
        assert cost[f"past: features{kernel}"]["slots"] <= 1.3
        assert cost[f"past: projection{kernel}"]["slots"] <= 1.5
        assert cost[f"past: sums{kernel}"]["special"] <= 1.5
    # The number of a key, and backward that of its gradient, from and to memory take longer on cards of today.
    assert cost["past: sums"]["slots"] <= 24
    assert cost["past: sums, backward"]["slots"] <= 52
    # A score element of a step is a number of F, which one load brings; what comes with it is the same for all lanes.
    assert cost["step: scores"]["vector_bytes"] == 4.0


@pytest.mark.parametrize(
    ("capability", "driver", "said"),
    [
        ((8, 0), 13000, ""),
        ((8, 9), 13020, ""),
        ((9, 0), 13000, ""),
        ((12, 1), 14000, ""),  # by PTX
        ((7, 5), 13000, "compute capability 7.5"),
        ((9, 1), 13000, "compute capability 9.1"),
        ((10, 0), 13000, "compute capability 10.0"),
        ((8, 0), 12080, "a driver for CUDA 13.0 or later, and this one is for 12.8"),
    ],
)
def test_gpus_that_the_kernels_serve(capability: tuple[int, int], driver: int, said: str) -> None:
    problem = cuda.problem_with(capability, (driver, 13000), "13.0: 8.0 9.0a 12.0+PTX")
    assert said in problem
    assert bool(problem) == bool(said)


@pytest.mark.parametrize(("driver", "serves"), [(12030, False), (12040, True), (12080, True), (13000, True)])
def test_compressed_kernels_need_a_driver_that_reads_them(driver: int, serves: bool) -> None:
    """Drivers of 12.0 to 12.3 take code of 12.8, but not compressed."""
    problem = cuda.problem_with((8, 0), (driver, 12080), "12.8: 8.0")
    assert problem == ("" if serves else "they need a driver for CUDA 12.4 or later, and this one is for 12.3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_without_a_gpu(built: str) -> None:
    status = attnext.backends()["cuda"]
    assert not status.available
    assert f"built with {built}" in status.reason
    x = torch.zeros(1, 1, 2)
    module = _extension.load()
    assert module is not None
    _, runtime = module.cuda_versions()
    assert f"{runtime // 1000}.{runtime % 1000 // 10}" == built.split(":")[0]
    with pytest.raises(RuntimeError, match="no NVIDIA GPU that torch can use"):
        attnext.additive_attention(x, x, x, torch.zeros(2), backend="cuda")
