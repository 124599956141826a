"""``torch.onnx.export`` of models with these modules as they stand: ONNX Runtime gives what they give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import attnext
from attnext.backends import choose

MEMORY = 10


class Attends(nn.Module):
    """An attention over states, with lengths: context and weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.attention(query, states, lengths=lengths, need_weights=True)
        return found


class Steps(nn.Module):
    """Two steps of a decoder over a memory that is prepared inside."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        memory, state = self.attention.prepare(states, lengths), None
        _, _, state = self.attention.step(query[:, 0], memory, state)
        context, weights, _ = self.attention.step(query[:, 1], memory, state, need_weights=True)
        return context, weights


class Plain(nn.Module):
    """The functions themselves."""

    def forward(self, query: Tensor, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        key = states[..., :8]
        context, _ = attnext.dot_attention(query, key, states)
        return context, attnext.additive_scores(query, key, torch.linspace(-1, 1, 8), lengths=lengths).exp()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "additive": lambda: Attends(attnext.BahdanauAttention(8, MEMORY, 6)),
    "general": lambda: Attends(attnext.LuongAttention(8, MEMORY, score="general")),
    "several heads": lambda: Attends(attnext.MultiHeadAttention(8, MEMORY, 6, 2)),
    "steps": lambda: Steps(attnext.BahdanauAttention(8, MEMORY, 6)),
    "location": lambda: Steps(attnext.LocationSensitiveAttention(8, MEMORY, 6, filters=3, kernel_size=5)),
    "functions": Plain,
}


def inputs(batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.arange(batch) % keys + 1
    return torch.randn(batch, 3, 8), torch.randn(batch, keys, MEMORY), lengths


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_gives_the_same(name: str, tmp_path: Path) -> None:
    """With batches and sources of other sizes than it was exported with."""
    model, path = MODELS[name]().eval(), tmp_path / "model.onnx"
    batch, keys = Dim("batch", min=2, max=64), Dim("keys", min=2, max=512)
    shapes = ({0: batch}, {0: batch, 1: keys}, {0: batch})
    torch.onnx.export(model, inputs(3, 7), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    for sizes in ((3, 7), (5, 40)):
        x = inputs(*sizes)
        given = {
            key: value.numpy() for key, value in zip(("query", "states", "lengths"), x, strict=True) if key in names
        }
        with torch.no_grad():
            expected = model(*x)
        for found, right in zip(session.run(None, given), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), right, rtol=1e-4, atol=1e-5)


def test_kernels_serve_again_behind_it(tmp_path: Path) -> None:
    torch.onnx.export(MODELS["additive"]().eval(), inputs(3, 7), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert choose(None, "cpu") == "cpu"
