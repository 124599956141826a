"""Coqui TTS's attention of its Tacotron models (coqui-tts, and TTS and Mozilla TTS before it).

Additive, with the filters of Shen et al., "Natural TTS synthesis by conditioning WaveNet on mel spectrogram
predictions", 2018, and the forward attention of Zhang, Ling and Dai, "Forward attention in sequence-to-sequence
acoustic modeling for speech synthesis", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext import functional
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, inert, plain_weight, step, visible
from attnext.memory import Memory

_LENGTHS = (5, 3)  # of the probe
_ONE = 20.0
"""Whose tanh rounds to 1 in float64: the score of a feature that is this at all keys is its weight."""
_BEGUN = ("attention_weights", "attention_weights_cum", "alpha", "u")
_CONV, _DENSE = "location_layer.location_conv1d", "location_layer.location_dense.linear_layer"


class _OriginalAttention(Recipe):
    """Steps over keys that the caller has projected: those of one sequence are the very same tensor.

    The sigmoid's bias is the weight of one more feature. Forward attention mixes the weights outside the kernel, by the
    original's own method, so that the context is a product after it.
    """

    code_base = "Coqui TTS"
    original = "TTS.tts.layers.tacotron.attentions:OriginalAttention"
    version = "coqui-tts==0.28.0"
    tensors: ClassVar[Sizes] = {
        "query_layer.linear_layer.weight": ("D", "Q"), "inputs_layer.linear_layer.weight": ("D", "H"),
        "v.linear_layer.weight": (1, "D"), "v.linear_layer.bias": (1,), "ta.weight": (1, "both"), "ta.bias": (1,),
        f"{_CONV}.weight": ("F", 2, "width"), f"{_DENSE}.weight": ("D", "F"),
    }  # fmt: skip
    maybe = frozenset({"ta.weight", "ta.bias", f"{_CONV}.weight", f"{_DENSE}.weight"})
    arguments = ("query", "inputs", "processed_inputs", "mask")
    layers: ClassVar[Layers] = {"v.linear_layer": nn.Linear, _CONV: nn.Conv1d, _DENSE: nn.Linear}
    serves = "softmax and sigmoid, location, forward attention; in evaluation not windowing"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        size, states = this.query_layer.linear_layer.in_features, this.inputs_layer.linear_layer.in_features
        inputs = [draw(2, max(_LENGTHS), states), *(draw(2, size) for _ in range(3))]
        seen = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS).unsqueeze(1)

        def run(attend: Any, states: Tensor, *queries: Tensor) -> Sequence[Tensor]:
            attend.windowing = False  # which is the original's own, and has no gradient
            attend.init_states(states)
            for name in _BEGUN:  # which begin in float32
                if hasattr(attend, name):
                    setattr(attend, name, getattr(attend, name).to(states.dtype))
            keys = attend.preprocess_inputs(states)
            found = []
            for query in queries:
                context = attend(query, states, keys, seen)
                found += [context, attend.attention_weights]
            return [*found, *(getattr(attend, name) for name in _BEGUN if hasattr(attend, name))]

        return Trial(inputs, run)

    def init_states(self, inputs: Tensor) -> None:
        super().init_states(inputs)  # type: ignore[misc]
        self._forget()

    def forward(self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None) -> Any:
        this: Any = self
        if not (self._has_kernels(mask) and self._served(query, inputs, processed_inputs)):
            return super().forward(query, inputs, processed_inputs, mask)  # type: ignore[misc]
        context, weights = self._step(query, self._memory(inputs, processed_inputs, mask))
        if this.location_attention:  # a new tensor, as the kernel has the old one for its backward pass
            total = this.attention_weights_cum
            this.attention_weights_cum = (total + weights).to(total.dtype)
        if this.forward_attn:
            this.alpha = weights = this.apply_forward_attention(weights)
            context = torch.bmm(weights.unsqueeze(1), inputs).squeeze(1)
        this.attention_weights = weights
        if this.forward_attn and this.trans_agent:
            this.u = torch.sigmoid(this.ta(torch.cat([context, query], -1)))
        return context

    def _has_kernels(self, mask: Tensor | None) -> bool:
        """Not where its scores are written to, in evaluation: by windowing, and by a forward mask, which may give
        weight to hidden keys, where the filters see it."""
        this: Any = self
        leaks = this.forward_attn and this.forward_attn_mask and this.location_attention and mask is not None
        return this.norm in ("softmax", "sigmoid") and (this.training or not (this.windowing or leaks))

    def _step(self, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        this: Any = self
        query, projection = this.query_layer(query), None
        past: tuple[Tensor, ...] = ()
        filters = None
        if this.location_attention:
            filters, projection = plain_weight(this, _CONV), plain_weight(this, _DENSE)
            past = (this.attention_weights, this.attention_weights_cum)
        if this.norm == "sigmoid":
            query = F.pad(query, (0, 1))
            projection = None if projection is None else F.pad(projection, (0, 0, 0, 1))
        return step(query, memory, filters, projection, *past, rule=this.norm)

    def _memory(self, inputs: Tensor, keys: Tensor, mask: Tensor | None) -> Memory:
        """What is prepared of the caller's keys at its first step, and wherever it hands in other things with them."""
        this: Any = self
        return self._once((keys, inputs, mask, this.norm, this.forward_attn), lambda: self._prepare(inputs, keys, mask))

    def _prepare(self, inputs: Tensor, keys: Tensor, mask: Tensor | None) -> Memory:
        this: Any = self
        v, bias = this.v.linear_layer.weight.squeeze(0), this.v.linear_layer.bias
        if this.norm == "sigmoid":
            keys, v = F.pad(keys, (0, 1), value=_ONE), torch.cat([v, bias])
        else:
            v = inert(v, bias)
        values = inputs.new_zeros(*inputs.shape[:2], 1) if this.forward_attn else inputs
        return functional.prepare(keys, values, v, **({} if mask is None else visible(mask)))


RECIPES: tuple[type[Recipe], ...] = (_OriginalAttention,)
__getattr__ = by_name(RECIPES)
