"""GNMT's attention, as in NVIDIA's and MLPerf's examples (Wu et al., "Google's neural machine translation system:
bridging the gap between human and machine translation", 2016), which is on no index of packages.

Its normalised score is that of Luong's and Google's tutorial, with weight normalisation (Salimans and Kingma, 2016).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext import functional
from attnext.compat._recipe import Draw, Recipe, Sizes, Trial, by_name, visible

_NORMALIZE = ("normalize_scalar", "normalize_bias")


class _BahdanauAttention(Recipe):
    """All queries of a sequence at once, or one; ``set_mask`` says which keys are hidden."""

    code_base = "GNMT"
    version = "NVIDIA DeepLearningExamples"
    original = "seq2seq.models.attention:BahdanauAttention"
    tensors: ClassVar[Sizes] = {
        "linear_q.weight": ("D", "Q"), "linear_k.weight": ("D", "E"), "linear_att": ("D",),
        "normalize_scalar": (1,), "normalize_bias": ("D",),
    }  # fmt: skip
    maybe = frozenset(_NORMALIZE)
    arguments = ("query", "keys")

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states, many = draw(2, 5, this.linear_k.in_features), draw(2, 3, this.linear_q.in_features)
        one, first = draw(2, this.linear_q.in_features), this.batch_first

        def run(attend: Any, states: Tensor, many: Tensor, one: Tensor) -> list[Tensor]:
            if not first:
                states, many = states.transpose(0, 1), many.transpose(0, 1)
            attend.set_mask(torch.tensor([5, 3]), states)
            return [x for query in (many, one) for x in attend(query, states)]

        return Trial([states, many, one], run)

    def forward(self, query: Tensor, keys: Tensor) -> Any:
        this: Any = self
        mask = this.mask
        if not self._served(query, keys) or not (mask is None or mask.dtype == torch.bool):
            return super().forward(query, keys)  # type: ignore[misc]
        swaps = query.dim() == 3 and not this.batch_first
        key, q, v = this.linear_k(keys), this.linear_q(query), this.linear_att
        if this.normalize:
            q, v = q + this.normalize_bias, v / v.norm() * this.normalize_scalar
        if not this.batch_first:
            key, keys = key.transpose(0, 1), keys.transpose(0, 1)
        if swaps:
            q = q.transpose(0, 1)
        seen = {} if mask is None else self._once((mask,), lambda: visible(~mask))
        one = q.dim() == 3 and q.shape[1] == 1  # as a step
        context, weights = functional.additive_attention(
            q.squeeze(1) if one else q, key, keys, v, need_weights=True, **seen
        )
        assert weights is not None
        if one:
            context, weights = context.unsqueeze(1), weights.unsqueeze(1)
        return (context.transpose(0, 1), weights.transpose(0, 1)) if swaps else (context, weights)


RECIPES: tuple[type[Recipe], ...] = (_BahdanauAttention,)
__getattr__ = by_name(RECIPES)
