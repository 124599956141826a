"""Steps, preparation and scores as exported programs: saved, loaded in another process, and the same there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnext
from attnext.attention.family import STEPPED

BATCH, KEYS, SIZE = 2, 6, 8
LENGTHS = torch.tensor([KEYS, 3])
pytestmark = pytest.mark.usefixtures("one_thread")


class Called(nn.Module):
    """A module whose forward is what is to be exported."""

    def __init__(self, attn: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.attn, self.call = attn, call

    def forward(self, *given: Any) -> Any:
        return self.call(self.attn, *given)


def sequence(attn: Any, queries: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
    memory, state, contexts = attn.prepare(states, lengths), None, []
    for query in queries.unbind(1):
        context, _, state = attn.step(query, memory, state)
        contexts.append(context)
    return torch.stack(contexts, 1)


def programs(attn: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What there is to export of an attention, and what it is called with."""
    states, query = torch.randn(BATCH, KEYS, SIZE), torch.randn(BATCH, SIZE)
    with torch.no_grad():
        memory = attn.prepare(states, LENGTHS)
        state = attn.step(query, memory, None)[2]
    found: dict[str, Any] = {
        "prepare": (lambda attn, *given: attn.prepare(*given), (states, LENGTHS)),
        "step": (lambda attn, *given: attn.step(*given, need_weights=True), (query, memory, state)),
        "sequence": (sequence, (torch.randn(BATCH, 3, SIZE), states, LENGTHS)),
    }
    if hasattr(attn, "scores"):
        found["scores"] = (
            lambda attn, query, *given: attn.scores(query, attn.prepare(*given)),
            (query, states, LENGTHS),
        )
    return found


LOADER = """
import sys, torch, attnext
from pathlib import Path
from torch.utils import _pytree as pytree
for file in sorted(Path(sys.argv[1]).glob("*.pt2")):
    given, expected = torch.load(file.with_suffix(".pt"), weights_only=True)
    with torch.set_grad_enabled("recorded" in file.name):
        found = pytree.tree_leaves(torch.export.load(file).module()(*given))
    torch.testing.assert_close([x for x in found if isinstance(x, torch.Tensor)], expected)
    print(file.name)
"""


@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
def test_the_family(tmp_path: Path, recorded: bool) -> None:
    count = 0
    for name, member in STEPPED.items():
        attn: Any = member.make(SIZE, SIZE, 4).eval()
        for of, (call, given) in programs(attn).items():
            with torch.set_grad_enabled(recorded):
                module = Called(attn, call)
                expected = [x.detach() for x in pytree.tree_leaves(module(*given)) if isinstance(x, Tensor)]
                program = torch.export.export(module, given, strict=False)
            file = tmp_path / f"{name} {of}{' recorded' if recorded else ''}.pt2"
            torch.export.save(program, file)
            torch.save((given, expected), file.with_suffix(".pt"))
            count += 1
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == count > 60


def test_exponentials_are_made_for_whom_they_serve() -> None:
    states = torch.randn(BATCH, KEYS, SIZE)
    for normalizer in ("softmax", "sparsemax"):
        attn = attnext.BahdanauAttention(SIZE, SIZE, 4, normalizer=normalizer)
        assert (attn.prepare(states, LENGTHS).prepared is not None) == (normalizer == "softmax")


@pytest.mark.parametrize("name", ["additive", "general", "several-heads", "several-heads-additive", "coverage"])
def test_a_memory_is_a_tree_of_its_tensors(name: str) -> None:
    attn: Any = STEPPED[name].make(SIZE, SIZE, 4)
    memory, query = attn.prepare(torch.randn(BATCH, KEYS, SIZE), LENGTHS), torch.randn(BATCH, SIZE)
    again = pytree.tree_map(lambda x: x.clone(), memory)
    assert isinstance(again, attnext.Memory)
    assert again.shared == memory.shared
    assert again.key is not memory.key
    assert torch.equal(attn.step(query, again)[0], attn.step(query, memory)[0])
    with pytest.raises(ValueError, match="can't be replaced"):
        type(again)(*[getattr(again, field) for field in ("key", "value", "lengths")], LENGTHS > 0, *(
            getattr(again, field) for field in ("score_weight", "prepared", "heads", "steps", "cleared", "slots")
        ))  # fmt: skip
    tensors, spec = pytree.tree_flatten(memory.to(torch.float64))
    assert {x.dtype for x in tensors} == {torch.float64, torch.int64}
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
