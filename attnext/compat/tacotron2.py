"""The attention of Tacotron 2, in torchaudio and in the copies of NVIDIA's (Shen et al., "Natural TTS synthesis by
conditioning WaveNet on mel spectrogram predictions", 2018)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, layer_at, plain_weight, ready, step

_LENGTHS = [5, 3]  # of the probe
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Linear, nn.Conv1d, nn.Linear)


class _Located(Recipe):
    """Keeps nothing between calls: keys, weights and their sum are the caller's.

    What is made of the keys is kept as long as the same tensors are handed in. The weight of the score is read at each
    step, as keys may outlive an optimizer's step.
    """

    code_base = "Tacotron 2"
    arguments = ("attention_hidden_state", "memory", "processed_memory", "attention_weights_cat", "mask")
    paths: ClassVar[tuple[str, str, str, str]]
    """The layers of the query, of the score, of the filters and of their projection."""

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        return "" if _hides(module) else "a score other than minus infinity in padding (score_mask_value)"

    def _served(self, first: Tensor, *others: Tensor | None) -> bool:
        return _hides(self) and super()._served(first, *others)

    @classmethod
    def changed_layer(cls, module: nn.Module) -> str:
        """Those of the base class, and a wrapper that has gained another layer, such as an adapter."""
        changed = super().changed_layer(module)
        for path in cls.paths if not changed else ():
            outer, _, name = path.rpartition(".")
            wrapper = module if outer in ("", "location_layer") else layer_at(module, outer)
            others = wrapper is not module and any(x is not None for n, x in wrapper._modules.items() if n != name)
            changed = changed or (outer if others else "")
        return changed

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        of_query = plain_weight(module, cls.paths[0]).shape[1]
        of_states = module.state_dict()[cls.paths[0].replace("query", "memory") + ".weight"].shape[1]
        rows, keys = len(_LENGTHS), max(_LENGTHS)
        memory, past = draw(rows, keys, of_states), draw(rows, 2, keys)
        queries = [draw(rows, of_query) for _ in range(2)]
        mask = torch.arange(keys) >= torch.tensor(_LENGTHS).unsqueeze(1)

        def run(attend: Any, memory: Tensor, past: Tensor, *queries: Tensor) -> list[Tensor]:
            processed, found = attend.memory_layer(memory), []
            last, total = past.unbind(1)
            for query in queries:
                context, last = attend(query, memory, processed, torch.stack([last, total], 1), mask)
                total = total + last
                found += [context, last]
            return found

        return Trial([memory, past, *queries], run)

    def forward(
        self,
        attention_hidden_state: Tensor,
        memory: Tensor,
        processed_memory: Tensor,
        attention_weights_cat: Tensor,
        mask: Tensor | None,
    ) -> Any:
        of_batch = mask is None or (mask.dtype == torch.bool and mask.shape == processed_memory.shape[:2])
        if not of_batch or not self._served(attention_hidden_state, memory, processed_memory, attention_weights_cat):
            return super().forward(  # type: ignore[misc]
                attention_hidden_state, memory, processed_memory, attention_weights_cat, mask
            )
        query, score, filters, projection = (plain_weight(self, path) for path in self.paths)  # type: ignore[arg-type]
        kept = self._once(
            (processed_memory, memory, mask),
            lambda: ready(processed_memory, memory, score.squeeze(0), None if mask is None else ~mask, sees_past=True),
        )
        live = replace(kept.memory, score_weight=score.squeeze(0))
        past = attention_weights_cat.unbind(1)
        return step(F.linear(attention_hidden_state, query), live, filters, projection, *past, window=kept.window)


def _hides(module: Any) -> bool:
    return bool(getattr(module, "score_mask_value", -math.inf) == -math.inf)


def _tensors(query: str, score: str, filters: str, projection: str, memory: str) -> Sizes:
    linear: Sizes = {query: ("D", "Q"), score: (1, "D"), projection: ("D", "F"), memory: ("D", "H")}
    return {f"{path}.weight": size for path, size in {**linear, filters: ("F", 2, "width")}.items()}


class _OfTorchaudio(_Located):
    original = "torchaudio.models.tacotron2:_Attention"
    version = "torchaudio==2.11.1"
    paths = ("query_layer", "v", "location_layer.location_conv", "location_layer.location_dense")
    tensors = _tensors(*paths, "memory_layer")
    layers: ClassVar[Layers] = dict(zip(paths, _KINDS, strict=True))


class _OfNvidia(_Located):
    """The layers are in wrappers; NeMo's, SpeechBrain's, fairseq's and those of many repositories are the same."""

    original = "tacotron2_model.model:Attention"
    version = "tacotron2-model==0.2.4"
    paths = ("query_layer.linear_layer", "v.linear_layer", "location_layer.location_conv.conv",
             "location_layer.location_dense.linear_layer")  # fmt: skip
    tensors = _tensors(*paths, "memory_layer.linear_layer")
    layers: ClassVar[Layers] = dict(zip(paths, _KINDS, strict=True))


RECIPES: tuple[type[Recipe], ...] = (_OfTorchaudio, _OfNvidia)
__getattr__ = by_name(RECIPES)
