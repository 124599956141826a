"""AllenNLP's additive attention (Gardner et al., "AllenNLP: a deep semantic natural language processing platform",
2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext import functional
from attnext.compat._recipe import Draw, Recipe, Sizes, Trial, by_name


class _AdditiveAttention(Recipe):
    """Its scores; the softmax of those that a mask leaves is its own, whose denominator is not the bare sum."""

    code_base = "AllenNLP"
    pays = False
    version = "allennlp==2.10.1"
    original = "allennlp.modules.attention.additive_attention:AdditiveAttention"
    tensors: ClassVar[Sizes] = {"_w_matrix": ("D", "D"), "_u_matrix": ("H", "D"), "_v_vector": ("D", 1)}
    arguments = ("vector", "matrix", "matrix_mask")
    methods = ("_forward_internal",)

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        return "" if hasattr(type(module), "_forward_internal") else "scores that are not made apart"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        states, size = module._u_matrix.shape  # type: ignore[misc]
        seen = torch.tensor([[True] * 5, [True, False, True, True, False]])
        inputs = [draw(2, size), draw(2, 5, states)]
        return Trial(inputs, lambda attend, query, states: [attend(query, states), attend(query, states, seen)])

    def _forward_internal(self, vector: Tensor, matrix: Tensor) -> Tensor:
        if not (vector.dim() == 2 and len(vector) == len(matrix) and self._served(vector, matrix)):
            found: Tensor = super()._forward_internal(vector, matrix)  # type: ignore[misc]
            return found
        this: Any = self
        return functional.additive_scores(vector @ this._w_matrix, matrix @ this._u_matrix, this._v_vector.squeeze(1))


RECIPES = (_AdditiveAttention,)
__getattr__ = by_name(RECIPES)
