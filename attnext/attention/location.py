"""Location-sensitive attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks
from attnext.attention.base import StepParts, weight_of
from attnext.attention.past import Past, PastAttention

__all__ = ["LocationSensitiveAttention"]

_FEATURES = ("previous", "cumulative", "both")


class LocationSensitiveAttention(PastAttention):
    """Additive attention that knows where it was: ``v . tanh(W query + U state_j + L f_j + b)``, f = F * past weights.

    A convolution over the weights of the last step, over the sum of all before, or over both tells the score about the
    place, so that a decoder moves on and does not skip or repeat. Chorowski, Bahdanau, Serdyuk, Cho and Bengio,
    "Attention-based models for speech recognition", 2015 (the weights of the last step); Shen et al., "Natural TTS
    synthesis by conditioning WaveNet on mel spectrogram predictions" (Tacotron 2), 2018 (both).

    Args:
        query_size: size Q of a query (a decoder state).
        memory_size: size H of an encoder state.
        attention_size: size D of the space in which both are compared.
        features: "previous", "cumulative" or "both": what the convolution sees.
        filters: its output channels.
        kernel_size: its width in encoder states, an odd number.
        options: bias, normalize, normalizer, temperature and dropout of :class:`attnext.BahdanauAttention`.

    Shapes:
        query (B, Q) for a step, (B, beam, Q) for a step of hypotheses, (B, Tq, Q) for Tq steps (``forward``); encoder
        states (B, Tk, H); context (B, H), (B, beam, H) or (B, Tq, H).

    Example:
        >>> attn = LocationSensitiveAttention(1024, 512, 128)
        >>> memory, state = attn.prepare(encoder_states, lengths), None
        >>> context, weights, state = attn.step(query, memory, state)   # at every step
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        features: str = "both",
        filters: int = 32,
        kernel_size: int = 31,
        **options: Any,
    ) -> None:
        _checks.choice("features", features, _FEATURES)
        _checks.at_least_one("filters", filters)
        if _checks.at_least_one("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a filter has a middle, got {kernel_size}")
        super().__init__(query_size, memory_size, attention_size, **options)
        self.features = features
        channels = 2 if features == "both" else 1
        self.location_convolution = nn.Conv1d(channels, filters, kernel_size, padding=kernel_size // 2, bias=False)
        self.location_projection = nn.Linear(filters, attention_size, bias=False)

    def reset_parameters(self) -> None:
        """Draws the parameters anew, convolution and projection of the location as torch does."""
        super().reset_parameters()
        self.location_convolution.reset_parameters()
        self.location_projection.reset_parameters()

    def _filters(self) -> tuple[Tensor, Tensor] | None:
        filters = weight_of(self, "location_convolution", nn.Conv1d)
        projection = weight_of(self, "location_projection", nn.Linear)
        return None if filters is None or projection is None else (filters, projection)

    def _step_parts(self) -> StepParts | None:
        filters = self._filters() if type(self) is LocationSensitiveAttention else None
        if filters is None:
            return None
        sees = self.features != "cumulative", self.features != "previous"
        return self._parts("past", filters=filters[0], projection=filters[1], sees=sees)

    def _seen(self, past: Past) -> tuple[Tensor, ...]:
        if self.features == "both":
            return past[:2]
        return (past.weights if self.features == "previous" else past.cumulative,)

    def _features(self, past: Past) -> Tensor:
        dtype = self.location_convolution.weight.dtype
        channels = torch.stack([x.to(dtype) for x in self._seen(past)], 1)
        if channels.shape[-1] == 0:  # no key, for which the convolution has no answer
            channels = channels.new_zeros(channels.shape[0], self.location_projection.in_features, 0)
        else:
            channels = self.location_convolution(channels)
        features: Tensor = self.location_projection(channels.transpose(1, 2))
        return features

    def extra_repr(self) -> str:
        return f"features={self.features!r}, {super().extra_repr()}"
