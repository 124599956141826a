"""PyTorch's own recurrent layers: the gated recurrent unit (Cho et al., "Learning phrase representations using RNN
encoder-decoder for statistical machine translation", 2014) and long short-term memory (Hochreiter and Schmidhuber,
1997)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from attnext.compat._recipe import Draw, Recipe, Trial, by_name
from attnext.recurrent.modules import GatedLayers, MemoryLayers


class _Recurrent(Recipe):
    code_base = "PyTorch"
    version = "torch==2.13.0"
    arguments = ("input", "hx")
    tensors: ClassVar[dict[str, Any]] = {}  # as many as there are layers

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        original: Any = getattr(nn, cls.original.partition(":")[2])
        return isinstance(module, original) and type(module).forward is original.forward

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        return "proj_size" if getattr(module, "proj_size", 0) else ""

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        made: Any = module

        def run(layers: Any, x: Tensor) -> list[Tensor]:
            lengths = torch.tensor([1, 3] if layers.batch_first else [3, 1, 2])
            packed = pack_padded_sequence(x, lengths, batch_first=layers.batch_first, enforce_sorted=False)
            (whole, state), (part, last) = layers(x), layers(packed)
            return [whole, *_states(state), part.data, *_states(last)]

        return Trial([draw(2 if made.batch_first else 3, 3, made.input_size)], run)

    def _serves(self, input: Any, data: Any, state: tuple[Tensor, ...]) -> bool:
        this: Any = super()
        return isinstance(data, Tensor) and self._served(data) and this._serves(input, data, state)


def _states(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


class _GRU(_Recurrent, GatedLayers):
    original = "torch.nn:GRU"


class _LSTM(_Recurrent, MemoryLayers):
    original = "torch.nn:LSTM"
    serves = "all options but proj_size"


RECIPES = (_GRU, _LSTM)
__getattr__ = by_name(RECIPES)
