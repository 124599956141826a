"""docTR's recogniser of text in images (Li et al., "Show, attend and read: a simple and strong baseline for irregular
text recognition", 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Sizes, Trial, by_name, plain_weight

_FILE = "doctr.models.recognition.sar.pytorch"


class _AttentionModule(Scoped):
    """Keys are the places of a feature map, in rows."""

    code_base = "docTR"
    version = "python-doctr==1.1.0"
    original = f"{_FILE}:AttentionModule"
    tensors: ClassVar[Sizes] = {
        "feat_conv.weight": ("D", "C", 3, 3), "feat_conv.bias": ("D",), "state_conv.weight": ("D", "Q", 1, 1),
        "attention_projector.weight": (1, "D", 1, 1),
    }  # fmt: skip
    arguments = ("features", "hidden_state")
    layers: ClassVar[Layers] = {"attention_projector": nn.Conv2d}

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        inputs = [draw(2, this.feat_conv.in_channels, 3, 4), draw(2, this.state_conv.in_channels)]
        return Trial(inputs, lambda attend, features, state: [attend(features, state)])

    def forward(self, features: Tensor, hidden_state: Tensor) -> Tensor:
        if not self._served(features, hidden_state):
            found: Tensor = super().forward(features, hidden_state)  # type: ignore[misc]
            return found
        this: Any = self
        query = this.state_conv(hidden_state[:, :, None, None]).flatten(1)
        return self._weigh(query, (features,), lambda: self._keys(features))[0]

    def _keys(self, features: Tensor) -> dict[str, Any]:
        this: Any = self
        key, value = (x.flatten(2).transpose(1, 2).contiguous() for x in (this.feat_conv(features), features))
        return {"key": key, "value": value, "score_weight": plain_weight(this, "attention_projector").flatten()}


class _SARDecoder(Loop):
    code_base = "docTR"
    version = "python-doctr==1.1.0"
    original = f"{_FILE}:SARDecoder"
    arguments = ("features", "holistic", "gt")
    attends = (("attention_module", _AttentionModule),)

    def forward(self, features: Tensor, holistic: Tensor, gt: Tensor | None = None) -> Any:
        this: Any = self
        with self._scope(this.max_length + 1):
            return super().forward(features, holistic, gt)  # type: ignore[misc]


RECIPES = (_AttentionModule, _SARDecoder)
__getattr__ = by_name(RECIPES)
