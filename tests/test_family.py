"""The table of attentions in the README says what is so; two of its columns are tested with Triton and with CUDA."""

from __future__ import annotations

import family
import pytest
import torch


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
