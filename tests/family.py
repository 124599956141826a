"""The family on a backend: what serves each attention there, after its results were held to the reference.

    python tests/family.py triton
    python tests/family.py cuda LIBRARY

A program of its own: Triton interprets where a variable was set before Python, and the CUDA kernels come in a library.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnext import use_backend
from attnext.attention.family import FAMILY, Member
from attnext.bench.studies import decode, decoder_inputs

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- the family, from tests/family.py -->\n", "<!-- end of the family -->\n"
COLUMNS = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA"}
LENGTHS = torch.tensor([5, 3])


class Recorded(TorchDispatchMode):
    """The names of this project's operators that are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "attnext":
            self.names.append(op.name().partition("::")[2])
        return op(*args, **(kwargs or {}))


def module(member: Member) -> nn.Module:
    torch.manual_seed(0)
    return member.make(4, 4, 6)


def results(attn: nn.Module, query: Tensor, states: Tensor) -> list[Tensor]:
    """Contexts and weights, and their gradients."""
    found = decode(attn, query, states, LENGTHS)
    loss = torch.stack([(x.cos() * (k + 1)).sum() for k, x in enumerate(found)]).sum()
    leaves = [states, *attn.parameters()]
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def served(member: Member, backend: str) -> str:
    """How a backend serves an attention: by one kernel, or by one for the scores; its results are the reference's."""
    attn, (query, states) = module(member), decoder_inputs(2, 2, 5, 4)
    with use_backend(backend), Recorded() as recorded:
        found = results(attn, query, states)
    with use_backend("reference"):
        expected = results(attn, query, states)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(name.endswith(f"_{backend}") for name in recorded.names), recorded.names
    whole = {name for name in recorded.names if "_attention" in name or "_step" in name}
    # The gradients of keys are made by the backward pass of scores, at the end of all steps.
    scores = {name for name in recorded.names if "_scores" in name and "_backward" not in name}
    return "kernel of the scores" if scores else "one kernel" if whole else "PyTorch"


def differentiable_weights(member: Member) -> bool:
    """Whether weights come back and have a gradient."""
    attn, (query, states) = module(member), decoder_inputs(2, 2, 5, 4)
    weights = decode(attn, query, states, LENGTHS)[1]
    (grad,) = torch.autograd.grad(weights.square().sum(), states, materialize_grads=True)
    return bool((grad != 0).any())


def compiles(member: Member) -> bool:
    """Whether torch.compile(fullgraph=True) takes the steps; it gives their result."""
    attn, (query, states) = module(member), decoder_inputs(2, 2, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, s: decode(attn, q, s)[-2], fullgraph=True, backend="aot_eager")
    try:
        found = compiled(query, states)
    except torch._dynamo.exc.Unsupported:
        return False
    torch.testing.assert_close(found, decode(attn, query, states)[-2])
    return True


def table(columns: dict[str, dict[str, str]]) -> str:
    """In Markdown, from what each backend said."""
    head = ["attention", "module", "paper", *COLUMNS.values(), "weights", "`torch.compile`"]
    lines = [head, ["---"] * len(head)]
    for member in FAMILY:
        by_backend = [columns[name][member.name] for name in COLUMNS]
        marks = ["yes" if fact(member) else "no" for fact in (differentiable_weights, compiles)]
        lines.append([member.name, member.module, member.paper, *by_backend, *marks])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_readme() -> str:
    """The table that stands there."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n"


def column_in_readme(backend: str) -> dict[str, str]:
    """What the README says of a backend, by the attention's name."""
    head, _, *rows = (re.split(r" *\| *", line.strip("| ")) for line in in_readme().splitlines())
    place = head.index(COLUMNS[backend])
    return {row[0]: row[place] for row in rows}


def main(backend: str, *library: str) -> None:
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    if library:
        from cuda_cases import serve_cuda_on_cpu

        serve_cuda_on_cpu(*library)
    print(json.dumps({member.name: served(member, backend) for member in FAMILY}))


if __name__ == "__main__":
    main(*sys.argv[1:])
