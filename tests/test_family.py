"""The table of attentions in the README says what is so; two of its columns are tested with Triton and with CUDA."""

from __future__ import annotations

from typing import Any

import family
import pytest
import torch
import torch._dynamo

from attnext.attention.family import STEPPED


@pytest.mark.usefixtures("one_thread")
def test_the_table_of_the_readme_is_true() -> None:
    """What differs is to be put there, from what this prints."""
    columns = {name: family.column_in_readme(name) for name in family.COLUMNS}
    columns["cpu"] = {member.name: family.served(member, "cpu") for member in family.FAMILY}
    assert family.in_readme() == family.table(columns)


def test_a_wrong_result_is_not_called_served(monkeypatch: pytest.MonkeyPatch) -> None:
    member = family.FAMILY[0]
    monkeypatch.setattr(
        family, "decode", lambda attn, query, states, lengths: [next(attn.parameters()) + torch.rand(1)]
    )
    with pytest.raises(AssertionError, match="not close"):
        family.served(member, "cpu")


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("whole", [False, True], ids=["step", "forward"])
@pytest.mark.usefixtures("one_thread")
def test_compiled_training_over_many_lengths(name: str, whole: bool) -> None:
    """Sources of twenty lengths take no more graphs than torch has room for: it gives up at eight for a function."""
    attn: Any = STEPPED[name].make(8, 8, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = torch.compile(attn if whole else attn.step, backend="eager", fullgraph=True)
    for keys in range(5, 25):
        states = torch.randn(2, keys, 8, requires_grad=True)
        lengths = torch.tensor([keys, keys - 3])
        if whole:
            contexts = [call(torch.randn(2, 3, 8), states, lengths=lengths)[0]]
        else:
            memory, state, contexts = attn.prepare(states, lengths), None, []
            for _ in range(3):
                context, _, state = call(torch.randn(2, 8), memory, state)
                contexts.append(context)
        sum(context.sum() for context in contexts).backward()
        assert states.grad is not None
    assert not torch._dynamo.utils.counters["recompile_limit"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
