"""EOLE's global attention, which is OpenNMT-py's with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.compat._recipe import Recipe, by_name, visible
from attnext.compat.opennmt import Global, InputFeeding

_VERSION = "eole==0.6.4"


class _GlobalAttention(Global):
    code_base = "EOLE"
    version = _VERSION
    original = "eole.modules.global_attention:GlobalAttention"
    arguments = ("src", "enc_out", "src_pad_mask", "coverage")

    @classmethod
    def _hidden(cls) -> Tensor:
        return torch.tensor([[[False] * 5], [[False] * 3 + [True] * 2]])

    def forward(
        self, src: Tensor, enc_out: Tensor, src_pad_mask: Tensor | None = None, coverage: Tensor | None = None
    ) -> Any:
        covers = coverage is not None and getattr(self, "linear_cover", None) is not None
        if covers or not self._served(src, enc_out) or not _is_mask(src_pad_mask, enc_out):
            return super().forward(src, enc_out, src_pad_mask, coverage)  # type: ignore[misc]

        def seen() -> dict[str, Tensor]:
            return {} if src_pad_mask is None else visible(~src_pad_mask.squeeze(1))

        return self._attend(src, enc_out, src_pad_mask, seen)


def _is_mask(mask: Tensor | None, states: Tensor) -> bool:
    """Whether it is one of the keys, the same for each query."""
    if mask is None:
        return True
    whole = mask.dtype == torch.bool and mask.device == states.device
    return whole and mask.shape == (len(states), 1, states.shape[1])


class _InputFeedRNNDecoder(InputFeeding):
    code_base = "EOLE"
    version = _VERSION
    original = "eole.decoders.rnn_decoder:InputFeedRNNDecoder"
    arguments = ("emb", "enc_out", "step", "kwargs")
    attends = (("attn", _GlobalAttention),)

    def forward(self, emb: Tensor, enc_out: Tensor | None = None, step: int | None = None, **kwargs: Any) -> Any:
        with self._scope(emb.shape[1]):
            return super().forward(emb, enc_out, step, **kwargs)  # type: ignore[misc]


RECIPES: tuple[type[Recipe], ...] = (_GlobalAttention, _InputFeedRNNDecoder)
__getattr__ = by_name(RECIPES)
