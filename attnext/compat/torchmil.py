"""torchmil's pooling of a bag of instances (Ilse, Tomczak and Welling, "Attention-based deep multiple instance
learning", 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attnext import functional
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, plain_weight, visible


class _AttentionPool(Recipe):
    code_base = "torchmil"
    pays = False
    version = "torchmil==1.0.2"
    original = "torchmil.nn.attention.attention_pool:AttentionPool"
    tensors: ClassVar[Sizes] = {
        "fc1.module.weight": ("D", "H"), "fc1.module.bias": ("D",), "fc2.weight": (1, "D"),
        "fc_gated.module.weight": ("D", "H"), "fc_gated.module.bias": ("D",),
    }  # fmt: skip
    maybe = frozenset({"fc_gated.module.weight", "fc_gated.module.bias"})
    arguments = ("X", "mask", "return_att")
    layers: ClassVar[Layers] = {"fc2": nn.Linear}
    serves = "act='tanh' without a gate"

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """Not before the first call has made its parameters."""
        return not any(is_lazy(parameter) for parameter in module.parameters()) and super().knows(module)

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        if getattr(module, "fc_gated", None) is not None:
            return "a gate"
        return "" if type(getattr(module, "act_layer", None)) is nn.Tanh else "another activation than tanh"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        size: int = module.fc1.module.in_features  # type: ignore[union-attr, assignment]
        seen = torch.tensor([[1.0, 0.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]])

        def run(pool: Any, bags: Tensor) -> list[Tensor]:
            return [pool(bags), pool(bags, seen), *pool(bags, mask=seen, return_att=True)]

        return Trial([draw(2, 5, size)], run)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        fits = X.dim() == 3 and (mask is None or mask.shape == X.shape[:2])
        if not (fits and self._served(X)):
            return super().forward(X, mask, return_att)  # type: ignore[misc]
        this: Any = self
        key, v = this.fc1(X), plain_weight(this, "fc2").squeeze(0)
        query = key.new_zeros(len(key), key.shape[2])
        if return_att:  # all scores, those of hidden instances too
            scores = functional.additive_scores(query, key, v)
            shown = scores if mask is None else scores.masked_fill(mask == 0, -torch.inf)
            return torch.bmm(shown.softmax(1).unsqueeze(1), X).squeeze(1), scores
        seen = {} if mask is None else visible(mask != 0)
        return functional.additive_attention(query, key, X, v, **seen)[0]


RECIPES = (_AttentionPool,)
__getattr__ = by_name(RECIPES)
