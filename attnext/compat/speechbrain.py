"""SpeechBrain's attentions of recurrent decoders (Ravanelli et al., "SpeechBrain: A general-purpose speech toolkit",
2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext.compat._recipe import Draw, Layers, Ready, Recipe, Sizes, Trial, attend, by_name, plain_weight, ready, step

_LENGTHS = [5, 3]  # of the probe
_SCORED = {"mlp_enc.weight": ("D", "H"), "mlp_enc.bias": ("D",), "mlp_dec.weight": ("D", "Q"), "mlp_dec.bias": ("D",),
           "mlp_attn.weight": (1, "D"), "mlp_out.weight": ("O", "H"), "mlp_out.bias": ("O",)}  # fmt: skip
_SCORING: dict[str, type[nn.Module]] = {"mlp_dec": nn.Linear, "mlp_attn": nn.Linear}


class _Attention(Recipe):
    """Steps over encoder states, of which the first since ``reset`` keeps keys and mask."""

    code_base = "SpeechBrain"
    version = "speechbrain==1.1.2"
    arguments = ("enc_states", "enc_len", "dec_states")
    sees_past: ClassVar[bool] = False
    """Whether filters see the past, of which the original hides nothing: keys beyond the end are then hidden by a
    window."""

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        state = module.state_dict()
        of_states, of_query = (state[name].shape[1] for name in cls._projections)
        states = draw(len(_LENGTHS), max(_LENGTHS), of_states)
        queries = [draw(len(_LENGTHS), of_query) for _ in range(3)]

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            found: list[Tensor] = []
            for rows in (len(_LENGTHS), 1):
                attend.reset()
                for query in queries:
                    found += attend(states[:rows], torch.tensor(_LENGTHS[:rows]), query[:rows])
            attend.reset()
            return found

        return Trial([states, *queries], run)

    _projections: ClassVar[tuple[str, str]] = ("mlp_enc.weight", "mlp_dec.weight")

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._forget()

    def _ready(self, keys: Tensor, values: Tensor) -> Ready:
        """Made of what the original keeps, and of the values of the step."""
        seen: Tensor = self.mask  # type: ignore[attr-defined]

        def make() -> Ready:
            return ready(keys, values, self._score_weight(), seen.flatten(1) != 0, sees_past=self.sees_past)

        return self._once((keys, values, seen), make)

    def _score_weight(self) -> Tensor | None:
        """Of an additive score."""
        return None


class _Additive(_Attention):
    tensors: ClassVar[Sizes] = _SCORED
    layers: ClassVar[Layers] = _SCORING

    def _score_weight(self) -> Tensor | None:
        return plain_weight(self, "mlp_attn").squeeze(0)  # type: ignore[arg-type]

    def _begin(self, enc_states: Tensor, enc_len: Tensor) -> None:
        """The first step keeps keys and mask."""
        this: Any = self
        this.precomputed_enc_h = this.mlp_enc(enc_states)
        this.mask = _mask(enc_len, enc_states)

    def _query(self, dec_states: Tensor) -> Tensor:
        this: Any = self
        return F.linear(dec_states, plain_weight(this, "mlp_dec"), this.mlp_dec.bias)


class _ContentBasedAttention(_Additive):
    """Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2015."""

    original = "speechbrain.nnet.attention:ContentBasedAttention"

    def forward(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor) -> Any:
        this: Any = self
        if not self._served(enc_states, dec_states, this.precomputed_enc_h):
            return super().forward(enc_states, enc_len, dec_states)  # type: ignore[misc]
        if this.precomputed_enc_h is None:
            self._begin(enc_states, enc_len)
        memory, query = self._ready(this.precomputed_enc_h, enc_states).memory, self._query(dec_states)
        context, weights = attend(query, memory, this.scaling)
        return this.mlp_out(context), weights


class _LocationAwareAttention(_Additive):
    """Chorowski, Bahdanau, Serdyuk, Cho and Bengio, "Attention-based models for speech recognition", 2015."""

    original = "speechbrain.nnet.attention:LocationAwareAttention"
    tensors = _SCORED | {"conv_loc.weight": ("F", 1, "width"), "mlp_loc.weight": ("D", "F"), "mlp_loc.bias": ("D",)}
    layers = _SCORING | {"conv_loc": nn.Conv1d, "mlp_loc": nn.Linear}
    sees_past = True

    def forward(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor) -> Any:
        this: Any = self
        if not self._served(enc_states, dec_states, this.precomputed_enc_h):
            return super().forward(enc_states, enc_len, dec_states)  # type: ignore[misc]
        if this.precomputed_enc_h is None:
            self._begin(enc_states, enc_len)
            this.prev_attn = this.mask * (1 / enc_len.float()).unsqueeze(1)
        memory, window, *_ = self._ready(this.precomputed_enc_h, enc_states)
        query, filters = self._query(dec_states) + this.mlp_loc.bias, plain_weight(this, "conv_loc")
        projection, scale = plain_weight(this, "mlp_loc"), this.scaling
        context, weights = step(query, memory, filters, projection, this.prev_attn, window=window, scale=scale)
        this.prev_attn = weights.detach()
        return this.mlp_out(context), weights


class _KeyValueAttention(_Attention):
    """One head of dot products (Vaswani et al., "Attention is all you need", 2017)."""

    original = "speechbrain.nnet.attention:KeyValueAttention"
    tensors: ClassVar[Sizes] = {
        "key_linear.weight": ("D", "H"), "key_linear.bias": ("D",), "query_linear.weight": ("D", "Q"),
        "query_linear.bias": ("D",), "value_linear.weight": ("O", "H"), "value_linear.bias": ("O",),
    }  # fmt: skip
    _projections = ("key_linear.weight", "query_linear.weight")

    def forward(self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor) -> Any:
        this: Any = self
        if not self._served(enc_states, dec_states, this.keys, this.values):
            return super().forward(enc_states, enc_len, dec_states)  # type: ignore[misc]
        if this.keys is None:
            this.keys, this.values = this.key_linear(enc_states), this.value_linear(enc_states)
            this.mask = _mask(enc_len, enc_states).unsqueeze(2)
        memory = self._ready(this.keys, this.values).memory
        query, scale = this.query_linear(dec_states), 1 / float(this.scaling)
        context, weights = attend(query, memory, scale)
        return context, weights.unsqueeze(1)


def _mask(enc_len: Tensor, enc_states: Tensor) -> Tensor:
    """(B, T), of the dtype of the lengths: 1 where a state is real, 0 beyond the end."""
    places = torch.arange(enc_states.shape[1], device=enc_len.device, dtype=enc_len.dtype)
    return (places < enc_len.unsqueeze(1)).to(enc_states.device, enc_len.dtype)


RECIPES: tuple[type[Recipe], ...] = (_ContentBasedAttention, _LocationAwareAttention, _KeyValueAttention)
__getattr__ = by_name(RECIPES)
