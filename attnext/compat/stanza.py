"""Stanza's attentions of its lemmatizer and word expansion (Qi et al., "Stanza: A Python natural language processing
toolkit for many human languages", 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Sizes, Trial, by_name, plain_weight, visible

_FILE = "stanza.models.common.seq2seq_modules"


class _OneStep(Scoped):
    """A step over states that are the values, with an output of context and query."""

    code_base = "Stanza"
    version = "stanza==1.15.0"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        size: int = module.linear_in.in_features  # type: ignore[union-attr, assignment]
        hidden = torch.tensor([[False] * 5, [True, False, False, True, True]])

        def run(attend: Any, query: Tensor, context: Tensor) -> list[Tensor]:
            alone = attend(query, context, attn_only=True)
            return [*attend(query, context, mask=hidden), *attend(query, context), alone]

        return Trial([draw(2, size), draw(2, 5, size)], run)

    @staticmethod
    def _takes(context: Tensor, mask: Tensor | None) -> bool:
        """Whether a mask has a slot for each key, and no other number in it."""
        return mask is None or (mask.dtype == torch.bool and mask.shape == context.shape[:2])

    def _keys(self, context: Tensor) -> dict[str, Any]:
        raise NotImplementedError

    def _attended(self, query: Tensor, states: Tensor, mask: Tensor | None, attn_only: bool) -> Any:
        this: Any = self

        def make() -> dict[str, Any]:
            return self._keys(states) | ({} if mask is None else visible(~mask))

        context, weights = self._weigh(this.linear_in(query), (states, mask), make)
        return weights if attn_only else (this.tanh(this.linear_out(torch.cat((context, query), 1))), weights)


class _BasicAttention(_OneStep):
    original = f"{_FILE}:BasicAttention"
    tensors: ClassVar[Sizes] = {"linear_in.weight": ("D", "D"), "linear_c.weight": ("D", "D"), "linear_c.bias": ("D",),
                                "linear_v.weight": (1, "D"), "linear_out.weight": ("D", "2D")}  # fmt: skip
    arguments = ("input", "context", "mask", "attn_only")
    layers: ClassVar[Layers] = {"linear_v": nn.Linear}

    def forward(self, input: Tensor, context: Tensor, mask: Tensor | None = None, attn_only: bool = False) -> Any:
        if not (self._takes(context, mask) and self._served(input, context)):
            return super().forward(input, context, mask, attn_only)  # type: ignore[misc]
        return self._attended(input, context, mask, attn_only)

    def _keys(self, context: Tensor) -> dict[str, Any]:
        this: Any = self
        v = plain_weight(this, "linear_v").squeeze(0)
        return {"key": this.linear_c(context), "value": context, "score_weight": v}


class _SoftDotAttention(_OneStep):
    original = f"{_FILE}:SoftDotAttention"
    tensors: ClassVar[Sizes] = {"linear_in.weight": ("D", "D"), "linear_out.weight": ("D", "2D")}
    arguments = ("input", "context", "mask", "attn_only", "return_logattn")
    serves = "weights; their logarithms are the original's"

    def forward(
        self, input: Tensor, context: Tensor, mask: Tensor | None = None, attn_only: bool = False,
        return_logattn: bool = False,
    ) -> Any:  # fmt: skip
        if return_logattn or not (self._takes(context, mask) and self._served(input, context)):
            return super().forward(input, context, mask, attn_only, return_logattn)  # type: ignore[misc]
        return self._attended(input, context, mask, attn_only)

    def _keys(self, context: Tensor) -> dict[str, Any]:
        return {"key": context, "value": None}


class _LSTMAttention(Loop):
    code_base = "Stanza"
    version = "stanza==1.15.0"
    original = f"{_FILE}:LSTMAttention"
    arguments = ("input", "hidden", "ctx", "ctx_mask", "return_logattn")
    attends = (("attention_layer", _BasicAttention), ("attention_layer", _SoftDotAttention))

    def forward(
        self, input: Tensor, hidden: Any, ctx: Tensor, ctx_mask: Tensor | None = None, return_logattn: bool = False
    ) -> Any:
        this: Any = self
        with self._scope(input.shape[1 if this.batch_first else 0]):
            return super().forward(input, hidden, ctx, ctx_mask, return_logattn)  # type: ignore[misc]


RECIPES = (_BasicAttention, _SoftDotAttention, _LSTMAttention)
__getattr__ = by_name(RECIPES)
