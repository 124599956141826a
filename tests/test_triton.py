"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for real targets.

Both in processes of their own: what the interpreter has replaced can't be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

import family

import attnext
from attnext.backends import backends
from attnext.backends.triton import OLDEST
from attnext.cases import CASES, DTYPES


def python(*arguments: str, interpreted: bool, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def verify(*arguments: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    return python("-m", "attnext", "verify", *arguments, interpreted=interpreted)


@pytest.mark.parametrize("dtype", [str(dtype).removeprefix("torch.") for dtype in DTYPES])
def test_every_case(dtype: str) -> None:
    """As a user would ask for it, where there is no GPU: in processes that interpret."""
    done = verify("--backend", "triton", "--dtype", dtype, "--cases", "5", interpreted=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"OK: {len(CASES) + 5} calls within tolerance on triton" in done.stdout


TILES = """
from dataclasses import replace
import torch
from attnext.cases import Case, compare
from attnext.kernels.tiles import TARGETS

torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN

options = {"lengths": True, "mask": "slots", "weights": True, "dropout_p": 0.2}
cases = (
    Case(batch=1, queries=17, keys=140, features=66, values=9, **options),
    Case(queries=9, keys=20, features=12, values=5, magnitude=100.0, mask="keys", poison=True),
    Case("step", queries=1, keys=300, features=9, values=7, lengths=True),
    Case("step", batch=1, queries=3, keys=260, features=5, values=130, weights=True),
    Case("scores", batch=1, queries=9, keys=140, features=5, lengths=True),
    Case("dot", batch=1, queries=5, keys=9, features=130, values=130, shared=True, **options),
    Case("dot", batch=1, queries=1, keys=50, features=1030, values=6, scale=0.03),
    Case("past", batch=1, queries=2, keys=40, features=20, values=70, channels=2, filters=3, width=5, rule="sigmoid"),
    Case("past", batch=1, queries=1, keys=20, features=20, values=5, channels=1, width=3, rule="forward"),
)
tried = set()
for target, kinds in [(t, k) for t, k in TARGETS.items() if t != "interpreter"]:
    for double, dtype in ((False, torch.float32), (True, torch.float64)):
        for number in range(max(map(len, kinds[double].values()))):
            # The others stay behind it: what is padded for them is padded for each.
            chosen = {name: tiles[(n := number % len(tiles)) :] + tiles[:n] for name, tiles in kinds[double].items()}
            if (double, str(chosen)) in tried:
                continue
            tried.add((double, str(chosen)))
            TARGETS["interpreter"] = (chosen, chosen)
            for case in cases:
                errors = compare(replace(case, dtype=dtype), "triton", 7)
                assert max(errors.values()) <= 1, (target, number, case, errors)
assert len(tried) >= 6, tried
print("held")
"""


TUNING = """
import torch, attnext
from attnext.kernels import additive, gradients, launch

torch.manual_seed(0)
# As many queries as are several slabs.
x = [torch.randn(s, requires_grad=True) for s in ((2, 70, 3), (2, 21, 3), (2, 21, 2), (3,))]

def run(backend):
    context, _ = attnext.additive_attention(*x, backend=backend)
    return [context, *torch.autograd.grad(context.square().sum(), x)]

for _ in range(2):  # while it is tuned, and with the choice
    for a, b in zip(run("triton"), run("cpu")):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
for kernel, kind in (
    (additive.forward, "forward"), (gradients.score_gradients, "pairs"), (gradients.input_gradients, "inputs")
):
    candidates = launch.tiles(kind, "sm_90", False)
    tuner = launch._tuner(kernel, candidates)
    (choice,) = tuner.cache.values()
    assert len(tuner.configs_timings) == len(candidates) > 1
    assert choice.kwargs in [dict(tile.blocks) for tile in candidates]

def of_scores(backend):
    scores = attnext.additive_scores(x[0], x[1], x[3], backend=backend)
    return torch.autograd.grad(scores.square().sum(), (x[0], x[1], x[3]))

# Tuned anew for no values; of scores, not of weights, the sums of ds are there to be added twice.
for a, b in zip(of_scores("triton"), of_scores("cpu")):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
before = launch._tuner.cache_info().currsize
torch.use_deterministic_algorithms(True)
launch._tuner.cache_clear()
assert all(torch.equal(a, b) for a, b in zip(run("triton"), run("triton")))
assert before == 3 and launch._tuner.cache_info().currsize == 0
print("held")
"""


Programs = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest) -> Iterator[Programs]:
    """What runs in the interpreter on one core, as many at a time as there are cores: each takes a minute or two.

    Those that the chosen tests ask for.
    """
    here = Path(__file__).parent
    scripts = {
        "contract": ("-m", "attnext.gpu.contract", "triton", "--device", "cpu"),
        "nonfinite": ("-W", "ignore::RuntimeWarning", str(here / "nonfinite.py"), "triton"),  # NumPy's, of NaN
        "tiles": ("-c", TILES),
        "family": (str(here / "family.py"), "triton"),
        "tuning": ("-c", TUNING),
    }
    variables = {"tuning": {"ATTNEXT_AUTOTUNE": "1"}}
    chosen = {name for name in scripts for item in request.session.items if name in item.name}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(partial(python, *scripts[name], interpreted=True, **variables.get(name, {})))
            for name in sorted(chosen)
        }


@pytest.mark.parametrize("name", ["contract", "nonfinite", "tiles", "tuning"])
def test_what_a_program_holds(programs: Programs, name: str) -> None:
    """The contract; what NaN and infinity give; every tile that a GPU may be given; tiles are tuned unless torch is to
    be deterministic."""
    done = programs[name].result()
    assert done.stdout.strip().endswith("held"), done.stdout[-2000:] + done.stderr[-4000:]


def test_every_attention_of_the_family(programs: Programs) -> None:
    done = programs["family"].result()
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == family.column_in_readme("triton")


def test_kernels_compile_for_every_target_and_spill_nothing() -> None:
    done = verify("--compile", interpreted=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        assert target in done.stdout


@pytest.mark.parametrize(
    ("version", "targets"), [(".".join(map(str, OLDEST)) + ".0", ["sm_90"]), ("3.7.1", ["sm_120", "gfx1100"])]
)
def test_kernels_compile_with_other_tritons(tmp_path: Path, version: str, targets: list[str]) -> None:
    """The oldest that serves, and the one that torch's own CUDA build brings."""
    install = ("-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "triton"), f"triton=={version}")
    done = python(*install, interpreted=False)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = os.pathsep.join(filter(None, (str(tmp_path / "triton"), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert (
        python("-c", "import triton; print(triton.__version__)", interpreted=False, **variables).stdout
        == f"{version}\n"
    )
    asked = [word for target in targets for word in ("--target", target)]
    dtypes = ("--dtype", "float32", "--dtype", "float64", "--dtype", "bfloat16")
    done = python("-m", "attnext", "verify", "--compile", *asked, *dtypes, interpreted=False, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "spill nothing" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "interpreted", "message"),
    [
        (["--compile", "--target", "sm_35"], False, "--target must be one of sm_80"),
        (["--target", "sm_90"], False, "--target goes with --compile"),
        (["--compile"], True, "unset TRITON_INTERPRET"),
    ],
)
def test_what_can_not_be_compiled_is_said_in_a_line(arguments: list[str], interpreted: bool, message: str) -> None:
    done = verify(*arguments, interpreted=interpreted)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_cpu_tensors_are_not_triton_s_outside_the_interpreter() -> None:
    done = python("-c", "import attnext; print(attnext.backends()['triton'])", interpreted=False)
    assert "available=False" in done.stdout or "on " in done.stdout
    if not backends()["triton"].available:
        with (
            pytest.raises(RuntimeError, match="is not available: no GPU that torch can use"),
            attnext.use_backend("triton"),
        ):
            pass


def test_the_inner_loops_stay_within_their_budgets(tmp_path: Path) -> None:
    tool, numbers = Path(__file__).parents[1] / "benchmarks/gpu_cost.py", tmp_path / "cost.json"
    done = python(str(tool), "--target", "sm_90", "--json", str(numbers), interpreted=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(numbers.read_text())
    cost = {row["loop"]: row for row in found["loops"] if row["family"] == "Triton"}
    assert cost["tanh.approx"]["special"] == 1.0
    forward, step, again, gradients = (
        cost[name] for name in ("forward: scores", "step: scores", "backward: scores again", "backward: gradients")
    )
    assert max(forward["special"], step["special"]) <= 0.5
    assert max(forward["slots"], again["slots"]) <= 5.0
    assert forward["bound"] >= 1.8 * cost["tanh.approx"]["bound"]
    assert again["special"] + gradients["special"] <= 1.0
    assert gradients["slots"] <= 11.0
    assert gradients["shared"] == 0.0
    assert max(forward["shared"], again["shared"]) <= 0.2
    for way, most in (("", 110), (", backward", 315)):
        assert cost[f"past: features{way}"]["slots"] <= 2.2  # a multiply-add
        # An element, with the products of 32 filters inside it: one of them forward, three backward.
        assert cost[f"past: sums{way}"]["slots"] <= most
        assert cost[f"past: sums{way}"]["special"] == 2.0
    least = found["least us"]
    # A step beyond the caches is bound by memory: 64 x 1024 keys of 256 + 512 float32 at 3,350 GB/s, and its queries.
    assert 60.0 <= least["step-large"]["H100 SXM, Triton"] <= 60.5
    assert least["forward"]["H100 SXM, Triton"] < least["training"]["H100 SXM, Triton"]
