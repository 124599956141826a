"""Openspeech's attentions of its recurrent decoder (Kim, Ha and Cho, "Openspeech: open-source toolkit for end-to-end
speech recognition", 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext import functional
from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Sizes, Trial, by_name, inert, plain_weight, step
from attnext.memory import Memory


class _OneQuery(Scoped):
    code_base = "Openspeech"
    version = "openspeech-core==0.4.0"

    @staticmethod
    def _takes(query: Tensor, states: Tensor) -> bool:
        """Whether it is one query of each row; more would be added to the keys one by one."""
        return query.dim() == states.dim() == 3 and query.shape[:2] == (len(states), 1)


class _AdditiveAttention(_OneQuery):
    original = "openspeech.modules.additive_attention:AdditiveAttention"
    tensors: ClassVar[Sizes] = {
        "bias": ("D",), "query_proj.linear.weight": ("D", "D"), "key_proj.linear.weight": ("D", "D"),
        "score_proj.linear.weight": (1, "D"), "score_proj.linear.bias": (1,),
    }  # fmt: skip
    arguments = ("query", "key", "value")
    layers: ClassVar[Layers] = {"score_proj.linear": nn.Linear}
    serves = "one query a call"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        size = len(module.bias)  # type: ignore[arg-type]
        return Trial([draw(2, 1, size), draw(2, 5, size), draw(2, 5, size)], lambda attend, *x: attend(*x))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not (self._takes(query, key) and self._served(query, key, value)):
            found: tuple[Tensor, Tensor] = super().forward(query, key, value)  # type: ignore[misc]
            return found
        this: Any = self
        one = this.query_proj(query).squeeze(1) + this.bias
        context, weights = self._weigh(one, (key, value), lambda: self._keys(key, value))
        return context.unsqueeze(1) + query, weights

    def _keys(self, key: Tensor, value: Tensor) -> dict[str, Any]:
        this: Any = self
        v = inert(plain_weight(this, "score_proj.linear").squeeze(0), this.score_proj.linear.bias)
        return {"key": this.key_proj(key), "value": value, "score_weight": v}


class _LocationAwareAttention(_OneQuery):
    original = "openspeech.modules.location_aware_attention:LocationAwareAttention"
    tensors: ClassVar[Sizes] = {
        "bias": ("D",), "location_conv.weight": ("D", 1, "width"), "location_conv.bias": ("D",),
        "query_proj.linear.weight": ("D", "H"), "value_proj.linear.weight": ("D", "H"), "fc.linear.weight": (1, "D"),
        "fc.linear.bias": (1,),
    }  # fmt: skip
    arguments = ("query", "value", "last_alignment_energy")
    layers: ClassVar[Layers] = {"fc.linear": nn.Linear, "location_conv": nn.Conv1d}
    serves = "one query a call"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        size: int = module.query_proj.linear.in_features  # type: ignore[union-attr, assignment]

        def run(attend: Any, query: Tensor, states: Tensor) -> list[Tensor]:
            first = attend(query, states, None)
            return [*first, *attend(query, states, first[1])]

        return Trial([draw(2, 1, size), draw(2, 5, size)], run)

    def forward(self, query: Tensor, value: Tensor, last_alignment_energy: Tensor | None) -> tuple[Tensor, Tensor]:
        if not (self._takes(query, value) and self._served(query, value, last_alignment_energy)):
            found: tuple[Tensor, Tensor] = super().forward(query, value, last_alignment_energy)  # type: ignore[misc]
            return found
        this: Any = self
        memory: Memory = self._once((value,), lambda: self._prepared(value))
        one = this.query_proj(query).squeeze(1) + this.bias
        past = value.new_zeros(value.shape[:2]) if last_alignment_energy is None else last_alignment_energy
        if this.smoothing:
            return self._smoothed(one, memory, past)
        filters = plain_weight(this, "location_conv")
        context, weights = step(one, memory, filters, None, past, bias=this.location_conv.bias)
        return context.unsqueeze(1), weights

    def _smoothed(self, query: Tensor, memory: Memory, past: Tensor) -> tuple[Tensor, Tensor]:
        """The rule of a sigmoid, to which the bias of the scores matters: no kernel has one."""
        this: Any = self
        key = memory.key + this.location_conv(past.unsqueeze(1)).transpose(1, 2)
        weights = torch.sigmoid(functional.additive_scores(query, key, memory.score_weight) + this.fc.linear.bias)
        weights = weights / weights.sum(1, keepdim=True)
        return torch.bmm(weights.unsqueeze(1), memory.value), weights

    def _prepared(self, value: Tensor) -> Memory:
        this: Any = self
        v, bias = plain_weight(this, "fc.linear").squeeze(0), this.fc.linear.bias
        return functional.prepare(this.value_proj(value), value, v if this.smoothing else inert(v, bias))


class _LSTMAttentionDecoder(Loop):
    code_base = "Openspeech"
    version = "openspeech-core==0.4.0"
    original = "openspeech.decoders.lstm_attention_decoder:LSTMAttentionDecoder"
    arguments = ("encoder_outputs", "targets", "encoder_output_lengths", "teacher_forcing_ratio")
    attends = (("attention", _AdditiveAttention), ("attention", _LocationAwareAttention))

    def forward(self, encoder_outputs: Tensor, *further: Any, **named: Any) -> Any:
        with self._scope(2):  # at least, of all but one letter
            return super().forward(encoder_outputs, *further, **named)  # type: ignore[misc]


RECIPES = (_AdditiveAttention, _LocationAwareAttention, _LSTMAttentionDecoder)
__getattr__ = by_name(RECIPES)
