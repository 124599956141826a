"""The attention of PyTorch's tutorial "NLP from scratch: translation with a sequence to sequence network and attention"
(Robertson, 2017), which is copied into programs: it is known by its parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, inert, plain_weight

_VERSION = "PyTorch's seq2seq tutorial"


class _BahdanauAttention(Scoped):
    """One query over all keys, none of which is hidden."""

    code_base = "PyTorch's tutorial"
    version = _VERSION
    original = "__main__:BahdanauAttention"
    tensors: ClassVar[Sizes] = {
        "Wa.weight": ("D", "Q"), "Wa.bias": ("D",), "Ua.weight": ("D", "E"), "Ua.bias": ("D",),
        "Va.weight": (1, "D"), "Va.bias": (1,),
    }  # fmt: skip
    arguments = ("query", "keys")
    layers: ClassVar[Layers] = {"Ua": nn.Linear, "Va": nn.Linear}

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states, queries = draw(2, 5, this.Ua.in_features), [draw(2, 1, this.Wa.in_features) for _ in range(2)]

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            return [x for query in queries for x in attend(query, states)]

        return Trial([states, *queries], run)

    def forward(self, query: Tensor, keys: Tensor) -> Any:
        one = query.dim() == 3 and query.shape[1] == 1
        if not one or not self._served(query, keys):
            return super().forward(query, keys)  # type: ignore[misc]
        this: Any = self
        return self._weigh(this.Wa(query), (keys,), lambda: self._keys(keys))

    def _keys(self, states: Tensor) -> dict[str, Tensor]:
        this: Any = self
        v = inert(plain_weight(this, "Va").squeeze(0), this.Va.bias)
        return {"key": this.Ua(states), "value": states, "score_weight": v}


class _AttnDecoderRNN(Loop):
    code_base = "PyTorch's tutorial"
    version = _VERSION
    original = "__main__:AttnDecoderRNN"
    arguments = ("encoder_outputs", "encoder_hidden", "target_tensor")
    attends = (("attention", _BahdanauAttention),)

    def forward(self, encoder_outputs: Tensor, encoder_hidden: Tensor, target_tensor: Tensor | None = None) -> Any:
        with self._scope(2):  # how many is a constant of the program
            return super().forward(encoder_outputs, encoder_hidden, target_tensor)  # type: ignore[misc]


RECIPES: tuple[type[Recipe], ...] = (_BahdanauAttention, _AttnDecoderRNN)
__getattr__ = by_name(RECIPES)
