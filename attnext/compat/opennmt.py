"""OpenNMT-py's global attention (Klein et al., "OpenNMT: open-source toolkit for neural machine translation", 2017).

Its scores are those of Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation",
2015, and of Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Layers, Recipe, Sizes, Trial, by_name, plain_weight

_LENGTHS = [5, 3]  # of the probe
_OUT = "linear_out.weight"


class Global(Scoped):
    """One query or many, whose context is projected together with them. Code bases differ in how keys are hidden."""

    tensors: ClassVar[Sizes] = {_OUT: ("D", "both"), "linear_out.bias": ("D",), "linear_in.weight": ("D", "D"),
               "linear_context.weight": ("D", "D"), "linear_query.weight": ("D", "D"), "linear_query.bias": ("D",),
               "v.weight": (1, "D"), "linear_cover.weight": ("D", 1)}  # fmt: skip
    maybe = frozenset(tensors) - {_OUT}
    layers: ClassVar[Layers] = {"linear_context": nn.Linear, "v": nn.Linear}
    serves = "dot, general and mlp; not sparsemax, nor calls with coverage"

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        return super().knows(module) and getattr(module, "attn_type", "") in ("dot", "general", "mlp")

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        function = getattr(module, "attn_func", "softmax")
        return "" if function == "softmax" else f"attn_func={function!r}"

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        this: Any = module
        states, many, one = (draw(*sizes, this.dim) for sizes in ((2, max(_LENGTHS)), (2, 3), (2,)))

        def run(attend: Any, states: Tensor, *queries: Tensor) -> list[Tensor]:
            calls = [(query, states, hidden) for query in queries for hidden in (cls._hidden(), None)]
            return [x for call in calls for x in attend(*call)]

        return Trial([states, many, one], run)

    @classmethod
    def _hidden(cls) -> Tensor:
        """What the forward is given for rows of the lengths of the probe."""
        raise NotImplementedError

    def _attend(self, src: Tensor, states: Tensor, hidden: Any, seen: Callable[[], dict[str, Tensor]]) -> Any:
        """Attends states of which those that are not ``seen`` are hidden, as the argument ``hidden`` says."""
        this: Any = self
        names = {"general": "linear_in", "mlp": "linear_query"}
        query = src if this.attn_type == "dot" else getattr(this, names[this.attn_type])(src)
        context, weights = self._weigh(query, (states, hidden), lambda: self._keys(states) | seen())
        result = this.linear_out(torch.cat([context, src], -1))
        return result if this.attn_type == "mlp" else torch.tanh(result), weights

    def _keys(self, states: Tensor) -> dict[str, Any]:
        this: Any = self
        if this.attn_type != "mlp":
            return {"key": states, "value": None}
        v = plain_weight(this, "v").squeeze(0)
        return {"key": this.linear_context(states), "value": states, "score_weight": v}


class _GlobalAttention(Global):
    code_base = "OpenNMT-py"
    version = "OpenNMT-py==3.5.1"
    original = "onmt.modules.global_attention:GlobalAttention"
    arguments = ("src", "enc_out", "src_len", "coverage")

    @classmethod
    def _hidden(cls) -> Tensor:
        return torch.tensor(_LENGTHS)

    def forward(
        self, src: Tensor, enc_out: Tensor, src_len: Tensor | None = None, coverage: Tensor | None = None
    ) -> Any:
        if coverage is not None or not self._served(src, enc_out) or not _are_lengths(src_len, enc_out):
            return super().forward(src, enc_out, src_len, coverage)  # type: ignore[misc]

        def seen() -> dict[str, Tensor]:
            return {} if src_len is None else {"lengths": src_len.clamp(0, enc_out.shape[1])}

        return self._attend(src, enc_out, src_len, seen)


def _are_lengths(lengths: Tensor | None, states: Tensor) -> bool:
    if lengths is None:
        return True
    whole = not lengths.is_floating_point() and not lengths.is_complex() and lengths.dtype != torch.bool
    return whole and lengths.shape == states.shape[:1] and lengths.device == states.device


class InputFeeding(Loop):
    """A decoder that attends at each step, as its context is an input of the next (Luong et al., 2015)."""

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        return super().knows(module) and not isinstance(getattr(module, "rnn", None), nn.RNNBase)


class _InputFeedRNNDecoder(InputFeeding):
    code_base = "OpenNMT-py"
    version = _GlobalAttention.version
    original = "onmt.decoders.decoder:InputFeedRNNDecoder"
    arguments = ("tgt", "enc_out", "src_len", "step", "kwargs")
    attends = (("attn", _GlobalAttention), ("copy_attn", _GlobalAttention))

    def forward(
        self, tgt: Tensor, enc_out: Tensor, src_len: Tensor | None = None, step: int | None = None, **kwargs: Any
    ) -> Any:
        with self._scope(tgt.shape[1]):
            return super().forward(tgt, enc_out, src_len, step, **kwargs)  # type: ignore[misc]


RECIPES: tuple[type[Recipe], ...] = (_GlobalAttention, _InputFeedRNNDecoder)
__getattr__ = by_name(RECIPES)
