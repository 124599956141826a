"""fairseq's attentions of recurrent decoders (Ott et al., "fairseq: a fast, extensible toolkit for sequence modeling",
2019): Luong's, and the additive one of its speech translation (Bérard et al., "End-to-end automatic speech translation
of audiobooks", 2018). Time is their first dimension.

Where keys are hidden the originals round the scores to float32, of a float64 model too; here they are not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, plain_weight, visible

_VERSION = "fairseq==0.12.2"


class _OverTime(Scoped):
    """A query (B, Q) over states (S, B, E), of which a mask (S, B) hides some."""

    code_base = "fairseq"
    version = _VERSION

    @classmethod
    def sizes(cls, module: Any) -> tuple[int, int]:
        """Those of a query and of a state."""
        raise NotImplementedError

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        """Where a mask is given one key is seen, so that it matters not how scores are rounded."""
        size, of_states = cls.sizes(module)
        states, queries = draw(4, 3, of_states), [draw(3, size) for _ in range(2)]
        hidden = ~torch.eye(4, 3, dtype=torch.bool)

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            return [x for query in queries for mask in (None, hidden) for x in attend(query, states, mask)]

        return Trial([states, *queries], run)

    def _serves(self, query: Tensor, states: Tensor, mask: Tensor | None) -> bool:
        if mask is None:
            return self._served(query, states)
        fits = mask.dtype == torch.bool and mask.shape == states.shape[:2] and mask.device == states.device
        return fits and self._served(query, states)

    def _attend(self, query: Tensor, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Context, and weights (S, B)."""

        def make() -> dict[str, Any]:
            return self._keys(states) | ({} if mask is None else visible(~mask.t()))

        context, weights = self._weigh(query, (states, mask), make)
        return context, weights.t()

    def _keys(self, states: Tensor) -> dict[str, Any]:
        return {"key": states.transpose(0, 1), "value": None}


class _AttentionLayer(_OverTime):
    original = "fairseq.models.lstm:AttentionLayer"
    tensors: ClassVar[Sizes] = {
        "input_proj.weight": ("E", "Q"), "input_proj.bias": ("E",), "output_proj.weight": ("out", "both"),
        "output_proj.bias": ("out",),
    }  # fmt: skip
    maybe = frozenset({"input_proj.bias", "output_proj.bias"})
    arguments = ("input", "source_hids", "encoder_padding_mask")

    @classmethod
    def sizes(cls, module: Any) -> tuple[int, int]:
        return module.input_proj.in_features, module.input_proj.out_features

    def forward(self, input: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        if not self._serves(input, source_hids, encoder_padding_mask):
            return super().forward(input, source_hids, encoder_padding_mask)  # type: ignore[misc]
        this: Any = self
        context, weights = self._attend(this.input_proj(input), source_hids, encoder_padding_mask)
        return torch.tanh(this.output_proj(torch.cat([context, input], 1))), weights


class _MLPAttention(_OverTime):
    original = "fairseq.models.speech_to_text.berard:MLPAttention"
    tensors: ClassVar[Sizes] = {
        "encoder_proj.weight": ("D", "E"), "encoder_proj.bias": ("D",), "decoder_proj.weight": ("D", "Q"),
        "to_scores.weight": (1, "D"),
    }  # fmt: skip
    arguments = ("decoder_state", "source_hids", "encoder_padding_mask")
    layers: ClassVar[Layers] = {"encoder_proj": nn.Linear, "to_scores": nn.Linear}

    @classmethod
    def sizes(cls, module: Any) -> tuple[int, int]:
        return module.decoder_proj.in_features, module.encoder_proj.in_features

    def forward(self, decoder_state: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None) -> Any:
        if not self._serves(decoder_state, source_hids, encoder_padding_mask):
            return super().forward(decoder_state, source_hids, encoder_padding_mask)  # type: ignore[misc]
        this: Any = self
        return self._attend(this.decoder_proj(decoder_state), source_hids, encoder_padding_mask)

    def _keys(self, states: Tensor) -> dict[str, Any]:
        this: Any = self
        key, value = this.encoder_proj(states).transpose(0, 1), states.transpose(0, 1)
        return {"key": key, "value": value, "score_weight": plain_weight(this, "to_scores").squeeze(0)}


class _Decoder(Loop):
    """Both decoders have one name. A search calls them for a step at a time."""

    code_base = "fairseq"
    version = _VERSION

    @staticmethod
    def _steps(letters: Tensor, incremental_state: Any) -> int:
        return 1 if incremental_state else letters.shape[1]


class _LSTMDecoder(_Decoder):
    original = "fairseq.models.lstm:LSTMDecoder"
    arguments = ("prev_output_tokens", "encoder_out", "incremental_state", "src_lengths")
    attends = (("attention", _AttentionLayer),)

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None,
        src_lengths: Any = None,
    ) -> Any:  # fmt: skip
        with self._scope(self._steps(prev_output_tokens, incremental_state)):
            return super().forward(  # type: ignore[misc]
                prev_output_tokens, encoder_out, incremental_state, src_lengths
            )


class _BerardDecoder(_Decoder):
    original = "fairseq.models.speech_to_text.berard:LSTMDecoder"
    arguments = ("prev_output_tokens", "encoder_out", "incremental_state", "kwargs")
    attends = (("attention", _MLPAttention),)

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None, **kwargs: Any
    ) -> Any:
        with self._scope(self._steps(prev_output_tokens, incremental_state)):
            return super().forward(  # type: ignore[misc]
                prev_output_tokens, encoder_out, incremental_state, **kwargs
            )


RECIPES: tuple[type[Recipe], ...] = (_AttentionLayer, _MLPAttention, _LSTMDecoder, _BerardDecoder)
__getattr__ = by_name(RECIPES)
