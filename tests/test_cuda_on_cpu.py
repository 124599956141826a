"""The simulator that runs CUDA kernels on the CPU: it finds each planted mistake, and nothing where there is none."""

from __future__ import annotations

import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_on_cpu_build
import pytest
from cuda_on_cpu_build import SANITIZERS

if reason := cuda_on_cpu_build.why_not():
    pytest.skip(reason, allow_module_level=True)

SOURCE = cuda_on_cpu_build.FOLDER / "planted.cpp"
ORDERS = ("forward", "backward", "random:1", "random:2")

# What the mistake is found by, and what is then said; "right result" is where only the others can find it.
RACE = "WARNING: ThreadSanitizer: data race"
FOUND = [
    ("missing_barrier", "plain", "wrong result"),
    ("missing_barrier", "tsan", RACE),
    ("reused_buffer", "plain", "right result"),
    ("reused_buffer", "asan", "right result"),
    ("reused_buffer", "tsan", RACE),
    ("out_of_bounds", "plain", "right result"),
    ("out_of_bounds", "asan", "ERROR: AddressSanitizer: use-after-poison"),
    ("divergent_barrier", "plain", r"deadlock: 40 threads have left the kernel, 24 wait in __syncthreads at planted\."),
    (
        "different_barriers",
        "plain",
        r"threads meet at different barriers, __syncthreads at planted\.cpp:\d+ and __sync",
    ),
    ("missing_copy_wait", "plain", r"thread \(\d+, 0, 0\) leaves with 1 cp.async that it has not waited for"),
    ("copy_wait_too_short", "plain", "wrong result"),
    ("misaligned_copy", "plain", r"thread \(0, 0, 0\) copies 16 bytes"),
    ("race_between_blocks", "plain", "right result"),
    ("race_between_blocks", "tsan", RACE),
    ("race_across_barriers", "plain", "right result"),
    ("race_across_barriers", "tsan", RACE),
    ("missing_fence", "plain", "right result"),
    ("missing_fence", "tsan", RACE),
    ("missing_syncwarp", "tsan", RACE),
    ("exited_lanes", "plain", "with mask 0xffffffff names lanes that have left the kernel: 0x"),
    ("unnamed_caller", "plain", r"thread \(0, 0, 0\) \(lane 0\) is not in the mask of its __shfl_xor_sync"),
    ("unnamed_source", "plain", r"lane 0 of warp 0 reads lane 16, which is not in it: __shfl_xor_sync"),
    ("different_primitives", "plain", "lanes of warp 0 meet in different primitives, __shfl_xor_sync .* and __shfl_up"),
    ("shared_memory", "plain", "too much shared memory: 233472 bytes"),
    ("configuration", "plain", r"bad launch configuration: a block of \(1, 1, 65\) threads"),
]
NAMES = sorted({name for name, _, _ in FOUND})


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """planted.cpp as a program for each of the sanitizers, one compiled after the other."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in SANITIZERS:
        subprocess.run(cuda_on_cpu_build.command(name, SOURCE, "-o", folder / name), check=True)
    return {name: folder / name for name in SANITIZERS}


def _run(program: Path, name: str, kind: str, order: str) -> subprocess.CompletedProcess[str]:
    done = cuda_on_cpu_build.run(program, name, kind, order=order)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this compiler's TSan needs addresses that are not random, and this container forbids that")
    return done


def test_every_planted_mistake_is_tried(programs: dict[str, Path]) -> None:
    assert sorted(cuda_on_cpu_build.run(programs["plain"]).stdout.split()) == NAMES


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_where_there_is_no_mistake(programs: dict[str, Path], name: str, sanitizer: str) -> None:
    for order in ORDERS if sanitizer == "plain" else ORDERS[:1]:
        done = _run(programs[sanitizer], name, "right", order)
        assert (done.returncode, done.stdout, done.stderr) == (0, "right result\n", ""), order


@pytest.mark.parametrize(("name", "sanitizer", "said"), FOUND)
def test_a_planted_mistake_is_found(programs: dict[str, Path], name: str, sanitizer: str, said: str) -> None:
    done = _run(programs[sanitizer], name, "wrong", "forward")
    assert re.search(said, done.stdout + done.stderr)
    assert (done.returncode == 0) == (said == "right result")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["divergent_barrier", "different_barriers", "exited_lanes", "different_primitives"])
def test_a_mistake_in_meeting_is_found_in_every_order(programs: dict[str, Path], name: str, order: str) -> None:
    done = _run(programs["plain"], name, "wrong", order)
    assert re.fullmatch(rf"cuda_on_cpu: {name}<true> block \([012], 0, 0\): .*\n", done.stderr)
    assert done.returncode < 0, "ends by abort()"


def test_a_race_between_blocks_is_found_in_other_orders(programs: dict[str, Path]) -> None:
    for order in ("backward", "random:1"):
        assert RACE in _run(programs["tsan"], "race_across_barriers", "wrong", order).stderr


def test_an_order_that_shows_what_another_hides(programs: dict[str, Path]) -> None:
    done = _run(programs["plain"], "reused_buffer", "wrong", "backward")
    assert done.stdout == "wrong result\n"


def test_an_unknown_order_is_no_order(programs: dict[str, Path]) -> None:
    done = _run(programs["plain"], "missing_barrier", "right", "sideways")
    assert "CUDA_ON_CPU_ORDER is sideways" in done.stderr


def test_launches_of_two_threads_in_a_library_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "planted.so"
    subprocess.run(cuda_on_cpu_build.command("plain", "-shared", "-fPIC", SOURCE, "-o", library), check=True)
    run_planted = ctypes.CDLL(str(library)).run_planted
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "random:5")
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda name: run_planted(name.encode(), 0), NAMES * 20)) == {1}
