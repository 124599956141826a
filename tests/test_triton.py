"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for real targets.

Both in processes of their own: what the interpreter has replaced can't be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

import attnext
from attnext.backends import backends


def python(*arguments: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def verify(*arguments: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    return python("-m", "attnext", "verify", *arguments, interpreted=interpreted)


def test_every_case_in_every_dtype() -> None:
    pairs = [("float32", "float16"), ("float64", "bfloat16")]

    def run(pair: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        options = [option for dtype in pair for option in ("--dtype", dtype)]
        return verify("--backend", "triton", "--cases", "2", *options, interpreted=True)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, pairs):
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert "OK" in done.stdout


CONTRACT = """
import torch, attnext
from attnext.backends import backends

torch.manual_seed(0)
assert backends()["triton"].available, backends()["triton"]
x = [torch.randn(s, requires_grad=True) for s in ((2, 9, 12), (2, 21, 12), (2, 21, 7), (12,))]
lengths, none = torch.tensor([21, 4]), None
ops = torch.ops.attnext
for arguments in ((none, none, lengths, none, none, 1.0, 0.0, True), (none, none, none, none, none, 0.5, 0.0, False)):
    torch.library.opcheck(ops.additive_attention_triton.default, (*x, *arguments))
torch.library.opcheck(ops.additive_scores_triton.default, (x[0], x[1], x[3], lengths, none, 1.0))
torch.library.opcheck(ops.additive_prepare_triton.default, (x[1].detach(), lengths, none))

def run(backend):
    context, weights = attnext.additive_attention(*x, lengths=lengths, need_weights=True, backend=backend)
    grads = torch.autograd.grad(context.sum() + weights.square().sum(), x)  # an expanded gradient comes in
    return [context, weights, *grads]

first, second, expected = run("triton"), run("triton"), run("cpu")
assert all(torch.equal(a, b) for a, b in zip(first, second))
for a, b in zip(first, expected):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def of_weights(backend):  # no gradient of the context comes in
    _, weights = attnext.additive_attention(*x, lengths=lengths, need_weights=True, backend=backend)
    return torch.autograd.grad(weights.square().sum(), x)

for a, b in zip(of_weights("triton"), of_weights("cpu")):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

attention = attnext.BahdanauAttention(8, 7, 12)
states, query = torch.randn(2, 21, 7), torch.randn(2, 8)
with attnext.use_backend("triton"):
    memory = attention.prepare(states, lengths=lengths)
    a, _ = attention(query, memory)
with attnext.use_backend("cpu"):
    b, _ = attention(query, states, lengths=lengths)
torch.testing.assert_close(a, b)

double = [t.detach().double().requires_grad_() for t in x]
torch.autograd.gradcheck(
    lambda *t: attnext.additive_attention(*t, lengths=lengths, backend="triton")[0], double, fast_mode=True
)
w = x[3].detach().clone()
w[2] = torch.inf
context, _ = attnext.additive_attention(*x[:3], w, backend="triton")
assert context.isnan().all()
print("held")
"""


def test_the_contract() -> None:
    done = python("-c", CONTRACT, interpreted=True)
    assert done.stdout.strip().endswith("held"), done.stdout[-2000:] + done.stderr[-4000:]


def test_kernels_compile_for_every_target_and_spill_nothing() -> None:
    done = verify("--compile", "--dtype", "float32", interpreted=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        assert target in done.stdout
    half = verify("--compile", "--dtype", "bfloat16", "--target", "sm_90", "--target", "gfx942", interpreted=False)
    assert half.returncode == 0, half.stdout[-3000:] + half.stderr[-3000:]


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


def test_the_inner_loops_cost_what_the_notes_say(tmp_path: Path) -> None:
    tool, numbers = Path(__file__).parents[1] / "benchmarks/gpu_cost.py", tmp_path / "cost.json"
    done = python(str(tool), "--target", "sm_90", "--json", str(numbers), interpreted=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cost = {row["loop"]: row for row in json.loads(numbers.read_text())}
    assert cost["tanh.approx"]["special"] == 1.0
    forward, queries, keys = (cost[n] for n in ("forward: score", "backward: queries", "backward: keys and v"))
    assert forward["special"] <= 0.5
    assert forward["slots"] <= 5.0
    assert forward["bound"] >= 1.8 * cost["tanh.approx"]["bound"]
    assert queries["special"] + keys["special"] <= 1.0
    assert queries["slots"] + keys["slots"] <= 13.5
    for row in (forward, queries, keys):
        assert row["shared"] <= 0.1
