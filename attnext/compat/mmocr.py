"""MMOCR's recogniser of text in images (Li et al., "Show, attend and read: a simple and strong baseline for irregular
text recognition", 2019): its decoders have the attention within."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext.compat._loop import Scoped, opened
from attnext.compat._recipe import Draw, Layers, Sizes, Trial, by_name, inert, plain_weight

_FILE = "mmocr.models.textrecog.decoders.sar_decoder"
_SHARED: Sizes = {
    "conv1x1_1.bias": ("D",), "conv3x3_1.weight": ("D", "H", 3, 3), "conv3x3_1.bias": ("D",), "conv1x1_2.bias": (1,),
    "embedding.weight": ("classes", "E"), "prediction.weight": ("classes", "seen"), "prediction.bias": ("classes",),
}  # fmt: skip
_RATIOS = (0.6, 1.0)  # of the probe


def _cells(layers: Sequence[str], ends: Sequence[str], inputs: str) -> Sizes:
    """The parameters of recurrent layers."""
    sizes: dict[str, tuple[str | int, ...]] = {}
    for layer in layers:
        for end in ends:
            sizes |= {f"{layer}.weight_ih{end}": ("gates", inputs + end), f"{layer}.weight_hh{end}": ("gates", "E"),
                      f"{layer}.bias_ih{end}": ("gates",), f"{layer}.bias_hh{end}": ("gates",)}  # fmt: skip
    return sizes


class _OverMaps(Scoped):
    """Keys are the places of a feature map, in rows; the ends of rows that are padding are hidden."""

    code_base = "MMOCR"
    version = "mmocr==1.0.1"
    arguments = ("feat", "out_enc", "data_samples")
    methods = ("_2d_attention",)

    def _glimpse(self, query: Tensor, feat: Tensor, ratios: Sequence[float] | None) -> Tensor:
        return self._weigh(query, (feat, ratios), lambda: self._keys(feat, ratios))[0]

    def _keys(self, feat: Tensor, ratios: Sequence[float] | None) -> dict[str, Any]:
        this: Any = self
        key, value = (x.flatten(2).transpose(1, 2).contiguous() for x in (this.conv3x3_1(feat), feat))
        v = inert(plain_weight(this, "conv1x1_2").flatten(), this.conv1x1_2.bias)
        found = {"key": key, "value": value, "score_weight": v}
        if ratios is None:
            return found
        rows, _, height, width = feat.shape
        widths = torch.tensor([math.ceil(width * ratio) for ratio in ratios] + [width] * (rows - len(ratios)))
        seen = torch.arange(width) < widths.unsqueeze(1)
        return found | {"mask": seen.repeat(1, height).to(feat.device)}

    def _predicted(self, state: Tensor, glimpse: Tensor, holistic_feat: Tensor) -> Tensor:
        this: Any = self
        predicted: Tensor = this.prediction(
            torch.cat((state, glimpse, holistic_feat), -1) if this.pred_concat else glimpse
        )
        return predicted

    def forward_test(self, feat: Tensor, out_enc: Tensor, data_samples: Any = None) -> Any:
        with opened(self):
            return super().forward_test(feat, out_enc, data_samples)  # type: ignore[misc]


class _ParallelSARDecoder(_OverMaps):
    """All letters at once; at inference once for each letter, of which the keys are now made once."""

    original = f"{_FILE}:ParallelSARDecoder"
    tensors: ClassVar[Sizes] = {
        **_SHARED, "conv1x1_1.weight": ("D", "states"), "conv1x1_2.weight": (1, "D"),
        **_cells(["rnn_decoder"], ["_l0", "_l1", "_l0_reverse", "_l1_reverse"], "inputs"),
    }  # fmt: skip
    maybe = frozenset(name for name in tensors if name.endswith("_reverse"))
    layers: ClassVar[Layers] = {"conv1x1_2": nn.Linear}

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        size = this.embedding.embedding_dim
        inputs = [draw(2, 3, size), draw(2, this.conv3x3_1.in_channels, 2, 5), draw(2, 1, size)]
        return Trial(inputs, lambda decoder, *x: [decoder._2d_attention(*x, _RATIOS), decoder._2d_attention(*x)])

    def _2d_attention(
        self, decoder_input: Tensor, feat: Tensor, holistic_feat: Tensor, valid_ratios: Sequence[float] | None = None
    ) -> Tensor:
        if not self._served(decoder_input, feat):
            found: Tensor = super()._2d_attention(decoder_input, feat, holistic_feat, valid_ratios)  # type: ignore[misc]
            return found
        this: Any = self
        states = this.rnn_decoder(decoder_input)[0]
        glimpse = self._glimpse(this.conv1x1_1(states), feat, valid_ratios)
        if this.pred_concat:
            holistic_feat = holistic_feat.expand(*states.shape[:2], -1)
        dropped: Tensor = this.pred_dropout(self._predicted(states, glimpse, holistic_feat))
        return dropped


class _SequentialSARDecoder(_OverMaps):
    original = f"{_FILE}:SequentialSARDecoder"
    tensors: ClassVar[Sizes] = {
        **_SHARED, "conv1x1_1.weight": ("D", "states", 1, 1), "conv1x1_2.weight": (1, "D", 1, 1),
        **_cells(["rnn_decoder_layer1", "rnn_decoder_layer2"], [""], "E"),
    }  # fmt: skip
    layers: ClassVar[Layers] = {"conv1x1_2": nn.Conv2d}

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        size, of_state = this.embedding.embedding_dim, this.rnn_decoder_layer1.hidden_size
        holistic = this.prediction.in_features - this.conv1x1_1.in_channels - this.conv3x3_1.in_channels
        inputs = [draw(2, size), draw(2, this.conv3x3_1.in_channels, 2, 5), draw(2, max(holistic, 1))]
        inputs += [draw(2, of_state) for _ in range(4)]

        def run(decoder: Any, *inputs: Tensor) -> list[Tensor]:
            return [*decoder._2d_attention(*inputs, valid_ratios=_RATIOS), *decoder._2d_attention(*inputs)]

        return Trial(inputs, run)

    def forward_train(self, feat: Tensor, out_enc: Tensor, data_samples: Any = None) -> Any:
        with opened(self):
            return super().forward_train(feat, out_enc, data_samples)  # type: ignore[misc]

    def _2d_attention(
        self, y_prev: Tensor, feat: Tensor, holistic_feat: Tensor, hx1: Tensor, cx1: Tensor, hx2: Tensor, cx2: Tensor,
        valid_ratios: Sequence[float] | None = None,
    ) -> Any:  # fmt: skip
        if not self._served(y_prev, feat):
            return super()._2d_attention(  # type: ignore[misc]
                y_prev, feat, holistic_feat, hx1, cx1, hx2, cx2, valid_ratios
            )
        this: Any = self
        if this.dec_gru:
            hx1 = this.rnn_decoder_layer1(y_prev, hx1)
            hx2 = this.rnn_decoder_layer2(hx1, hx2)
        else:
            hx1, _ = this.rnn_decoder_layer1(y_prev, (hx1, cx1))
            hx2, _ = this.rnn_decoder_layer2(hx1, (hx2, cx2))
        glimpse = self._glimpse(this.conv1x1_1(hx2[:, :, None, None]).flatten(1), feat, valid_ratios)
        return self._predicted(hx2, glimpse, holistic_feat), hx1, hx1, hx2, hx2  # as the original, without the cells


RECIPES = (_ParallelSARDecoder, _SequentialSARDecoder)
__getattr__ = by_name(RECIPES)
