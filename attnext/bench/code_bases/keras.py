"""Keras's additive attention, on its torch backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


def attention(**options: Any) -> Any:
    return load("keras", "keras").layers.AdditiveAttention(**options)


def on_cpu() -> Any:
    """Keras would take its inputs to a GPU where there is one."""
    return load("keras", "keras").device("cpu")


def _layer(**options: Any) -> Any:
    def make(s: Sizes) -> Any:
        with on_cpu():
            load("keras", "keras").utils.set_random_seed(1)  # by which it draws its scale
            layer = attention(**options)
            layer.build([(s.batch, s.steps, s.features), (s.batch, s.keys, s.states)])
            return layer

    return make


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.steps, s.features), draw(s.batch, s.keys, s.states), draw(s.batch, s.keys, s.features)]


def _masks(s: Sizes) -> list[Tensor]:
    ends = torch.tensor(s.lengths).unsqueeze(1)
    return [torch.arange(s.steps) < (ends % s.steps + 1), torch.arange(s.keys) < ends]


def _call(layer: Any, inputs: Any, **options: Any) -> list[Tensor]:
    """In the dtype of the inputs: Keras would cast them to its own."""
    layer.dtype_policy = str(inputs[0].dtype).removeprefix("torch.")
    with on_cpu():
        found = layer(list(inputs), **options)
    return list(found) if isinstance(found, tuple) else [found]


def _all(layer: Any, s: Sizes, *inputs: Tensor) -> list[Tensor]:
    return _call(layer, inputs)


def _masked(layer: Any, s: Sizes, *inputs: Tensor) -> list[Tensor]:
    found = _call(layer, inputs, mask=_masks(s), return_attention_scores=True)
    return [*found, *_call(layer, inputs, mask=[None, _masks(s)[1]])]


def _causal(layer: Any, s: Sizes, *inputs: Tensor) -> list[Tensor]:
    found = _call(layer, inputs, use_causal_mask=True, return_attention_scores=True)
    return [*found, *_call(layer, inputs, mask=_masks(s), use_causal_mask=True)]


def _of_values(layer: Any, s: Sizes, query: Tensor, _: Tensor, value: Tensor) -> list[Tensor]:
    return _call(layer, (query, value), return_attention_scores=True)


def _rows_of_none(layer: Any, s: Sizes, *inputs: Tensor) -> list[Tensor]:
    """Rows without a key to attend, of which Keras takes the mean, and masks from the left."""
    none = torch.zeros(s.batch, s.keys, dtype=torch.bool)
    found = _call(layer, inputs, mask=[None, none], return_attention_scores=True)
    return [*found, *_call(layer, inputs, mask=[None, _masks(s)[1].flip(1)], use_causal_mask=True)]


def _program(name: str, run: Any, flags: Any = None, **options: Any) -> Program:
    """Keras multiplies matrices of float64 in float32."""
    label = f"keras.AdditiveAttention {name}".rstrip()
    return Program(label, _layer(**options), _inputs, run, exact=torch.float32, **(flags or {}))


PROGRAMS = [
    _program("", _all),
    _program("with masks", _masked),
    _program("causal", _causal),
    _program("without a scale", _masked, {"within_twice": False}, use_scale=False),  # v is 1 everywhere
    _program("of values", _of_values),
    _program("with nothing to attend", _rows_of_none, {"takes_half": False, "served": False}),  # NaN in float16
]
