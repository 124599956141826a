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
import threading, time
import torch, attnext
from attnext.kernels import additive, gradients, launch, tiles

torch.manual_seed(0)
launch.LEAST_SLAB = 16  # 40 queries are several slabs
TUNED = ((additive.forward, "forward"), (gradients.score_gradients, "pairs"), (gradients.input_gradients, "inputs"))

def inputs(queries=40, features=3):
    sizes = ((2, queries, features), (2, 21, features), (2, 21, 2), (features,))
    return [torch.randn(size, requires_grad=True) for size in sizes]

def run(backend, x, **options):
    context, _ = attnext.additive_attention(*x, backend=backend, **options)
    return [context, *torch.autograd.grad(context.square().sum(), x)]

def same(x, **options):
    for a, b in zip(run("triton", x, **options), run("cpu", x, **options)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def candidates(kind):
    return launch.tiles(kind, "sm_90", False)

x = inputs()
for _ in range(2):  # while it is tuned, and with the choice
    same(x)
# What is chosen serves calls with other options, and other sizes than D and H.
same(x, lengths=torch.tensor([21, 4]))
same(x, mask=torch.rand(2, 21) < 0.7)
same(inputs(17))
for kernel, kind in TUNED:
    tuner = launch._tuner(kernel, candidates(kind), torch.device('cpu'))
    (choice,) = tuner.cache.values()
    assert len(tuner.configs_timings) == len(candidates(kind)) > 1
    assert choice.kwargs in [dict(tile.blocks) for tile in candidates(kind)]
assert len(launch._choices) == 3
assert {call.kernel for call in launch._choices} == {kernel for kernel, _ in TUNED}
assert all(choice in call.candidates for call, choice in launch._choices.items())

# The one that was found is taken, not the first: the launches say so.
taken = []
options = tiles.Tiles.options
tiles.Tiles.options = lambda self, backend: taken.append(self) or options(self, backend)
for call in list(launch._choices):
    launch._choices[call] = call.candidates[-1]
run("triton", x)
assert {call.candidates[-1] for call in launch._choices} <= set(taken)

def of_scores(backend):
    scores = attnext.additive_scores(x[0], x[1], x[3], backend=backend)
    return torch.autograd.grad(scores.square().sum(), (x[0], x[1], x[3]))

# Tuned anew for no values; of scores, not of weights, the sums of ds are there to be added twice.
for a, b in zip(of_scores("triton"), of_scores("cpu")):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert len(launch._choices) == 6

# Where nothing may be timed the first tiles are taken, and not remembered as a choice.
def nothing_is_timed(features):
    before = dict(launch._choices)
    taken.clear()
    same(inputs(features=features))
    assert launch._choices == before
    assert {candidates(kind)[0] for _, kind in TUNED} <= set(taken)
    assert not {candidates(kind)[-1] for _, kind in TUNED} & set(taken)

capturing, launch._capturing = launch._capturing, lambda: True
nothing_is_timed(4)
taken.clear()
run("triton", x)  # what is known is taken in a capture as before it
assert {call.candidates[-1] for call in launch._choices if call.values == 2} <= set(taken)
launch._capturing = capturing
torch.distributed.is_initialized, torch.distributed.get_world_size = lambda: True, lambda: 2
nothing_is_timed(5)
nothing_is_timed(3)  # for which a choice is known: another rank may have another
torch.distributed.get_world_size = lambda: 1

# A full card: the first tiles, without an error, and nothing of the call is kept.
def full(call, quantiles):
    call()
    raise torch.OutOfMemoryError("CUDA out of memory")
def made(*args):
    tuners.append(tuner(*args))
    return tuners[-1]
tuners, tuner, wall_clock = [], launch._tuner, launch._wall_clock
tuner.cache_clear()
launch._tuner, launch._wall_clock = made, full
same(inputs(features=6))
assert [tuner.nargs for tuner in tuners] == [None] * 3
assert [choice == call.candidates[0] for call, choice in launch._choices.items() if call.features == 6] == [True] * 3
launch._tuner, launch._wall_clock = tuner, wall_clock
tuner.cache_clear()

# First calls of several threads at once: one of them times, the others wait and launch what it has found.
class Kernel:
    arg_names = ["query", "key", "D", "H"]
    launched = []
    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(options)
timed = []
def slowly(call, *_):
    timed.append(call)
    time.sleep(0.2)
    return call.candidates[-1]
fastest, launch._fastest, kernel = launch._fastest, slowly, Kernel()
arguments = (kernel, candidates("forward"), lambda options: (1,), x[0], x[1], 3, 2)
threads = [threading.Thread(target=launch._launch, args=arguments) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(timed) == 1 and len(kernel.launched) == 2
assert all(options["BM"] == candidates("forward")[-1]["BM"] for options in kernel.launched)
launch._fastest = fastest

torch.use_deterministic_algorithms(True)
nothing_is_timed(8)
assert all(torch.equal(a, b) for a, b in zip(run("triton", x), run("triton", x)))
print("held")
"""


EXPONENTIALS = """
import numpy as np, torch, attnext
from triton.runtime import interpreter

# As a GPU takes them: two to the power of one product in float32, where NumPy's are exact.
LOG2_E = np.float32(1.4426950408889634)
builder = interpreter.InterpreterBuilder
builder.create_exp = lambda self, arg: self.unary_op(arg, lambda x: np.exp2((x * LOG2_E).astype(x.dtype)))
torch.manual_seed(0)
v = torch.tensor([1.0, 0.7])
for size in (5.0, 10.0, 15.0):
    query, key = torch.randn(1, 40, 2) + size, torch.randn(1, 60, 2) - size  # which cancel
    scores = attnext.additive_scores(query, key, v, backend="triton")
    exact = attnext.additive_scores(query.double(), key.double(), v.double(), backend="reference")
    off = ((scores - exact).abs().max() / v.abs().sum()).item()
    print(size, off)
    # In units of 2^-24, half of what E, F and the sum they make are off by, and the reciprocal's: 9 at the very most,
    # 5.4e-7, which never come all one way; one rounded product alone is |2 q| of them.
    assert off <= 4e-7, (size, off)

# And the keys' gradients, in which one query's are not evened out: some ten roundings of each.
torch.manual_seed(0)
query, key = torch.full((1, 1, 2), 10.0), torch.rand(1, 400, 2) - 10.7
def of_keys(x, backend):
    k = x[1].clone().requires_grad_()
    return torch.autograd.grad(attnext.additive_scores(x[0], k, x[2], backend=backend).sum(), k)[0]
found, exact = of_keys((query, key, v), "triton"), of_keys((query.double(), key.double(), v.double()), "reference")
off = ((found - exact) / exact).abs().max().item()
print("gradients", off)
assert off <= 6e-7, off
print("held")
"""


KEYS = """
import random, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from attnext.kernels import launch, launch_steps

backend, keys, binders = make_backend(GPUTarget("cuda", 90, 32)), set(), {}
launches = []
launch._target = lambda device: "sm_90"
launch._multiprocessors = launch_steps._multiprocessors = lambda device: 132

def counted(kernel, candidates, grid, *args, **constants):
    # What Triton would compile a kernel for.
    options = candidates[0].options("cuda")
    assert max(grid(options)[1:], default=1) <= 65535, kernel
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, rest = binders[kernel](*args, **constants, **options)
    keys.add((kernel.__name__, str(specialization), str(sorted(rest.items()))))
    launches.append(kernel.__name__)

launch._launch = launch_steps._launch = counted
drawn, op, counts, features = random.Random(0), launch.OPERATORS, [], int(sys.argv[1])
for _ in range(60):
    batch, queries, keys_ = drawn.randint(8, 64), drawn.randint(5, 300), drawn.randint(20, 400)
    q, k, v = (torch.empty(batch, *sizes) for sizes in ((queries, features), (keys_, features), (keys_, 16)))
    w, lengths = torch.empty(features), torch.full((batch,), keys_)
    rest = (lengths, None, None, 1.0, 0.0)
    found = op["additive_attention"](q, k, v, w, None, None, *rest, True)
    op["additive_attention_backward"](*found[:2], q, k, v, w, None, None, *rest, *found)
    op["additive_attention"](q[:, 0], k, v, w, *op["additive_prepare"](k, lengths, None), *rest, True)
    op["additive_scores_backward"](op["additive_scores"](q, k, w, lengths, None, 1.0), q, k, w, lengths, None, 1.0)
    found = op["dot_attention"](q, k, v, *rest, True)
    op["dot_attention_backward"](*found[:2], q, k, v, *rest, *found)
    of_past = (torch.empty(10, 1, 31), torch.empty(features, 10), torch.empty(batch, keys_), None, None, None)
    inputs = (q[:, 0], k, v, w, *of_past, lengths, None, None, None, 1.0, 0.0, 0)
    context, weights = op["additive_step"](*inputs)
    op["additive_step_backward"](context, weights, *inputs, weights)
    counts.append(len(keys))
long = 65536 * 16 + 1  # keys, of which a tile of a step has 16
q, k, w, past = torch.empty(1, 2), torch.empty(1, long, 2), torch.empty(2), torch.empty(1, long)
inputs = (q, k, k, w, torch.empty(1, 1, 3), None, past, None, past, *(None,) * 5, 1.0, 0.0, 2)
context, weights = op["additive_step"](*inputs)
op["additive_step_backward"](context, weights, *inputs, weights)
launches.clear()  # of few features and many queries
q, k, v, w, rest = torch.empty(1, 1280, 2), torch.empty(1, 9, 2), torch.empty(1, 9, 2), torch.empty(2), (None,) * 3
found = op["additive_attention"](q, k, v, w, None, None, *rest, 1.0, 0.0, True)
op["additive_attention_backward"](*found[:2], q, k, v, w, None, None, *rest, 1.0, 0.0, *found)
found = op["dot_attention"](q, k, v, *rest, 1.0, 0.0, True)
op["dot_attention_backward"](*found[:2], q, k, v, *rest, 1.0, 0.0, *found)
print(counts[0], counts[9], counts[19], counts[-1], launches.count("score_gradients"),
      launches.count("dot_score_gradients"))
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
        "exponentials": ("-c", EXPONENTIALS),
    }
    variables = {"tuning": {"ATTNEXT_AUTOTUNE": "1"}}
    chosen = {name for name in scripts for item in request.session.items if name in item.name}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(partial(python, *scripts[name], interpreted=True, **variables.get(name, {})))
            for name in sorted(chosen)
        }


@pytest.mark.parametrize("name", ["contract", "nonfinite", "tiles", "tuning", "exponentials"])
def test_what_a_program_holds(programs: Programs, name: str) -> None:
    """The contract; what NaN and infinity give; every tile that a GPU may be given; when tiles are tuned; scores of
    large queries and keys that cancel, and their gradients."""
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


@pytest.mark.parametrize("features", [24, 5])
def test_kernels_are_not_compiled_again_for_other_lengths(features: int) -> None:
    """Of batches of many sizes, each of the same D and H: what Triton would compile on a GPU. Nor are launches many, or
    grids larger than a GPU takes."""
    done = python("-c", KEYS, str(features), interpreted=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, of_ten, of_twenty, of_all, *slabs = map(int, done.stdout.split())
    assert slabs == [10, 10]
    assert of_all == of_twenty <= of_ten + 1
    assert of_all <= first + 4


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
