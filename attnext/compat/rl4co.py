"""RL4CO's pointer network (Berto et al., "RL4CO: an extensive reinforcement learning for combinatorial optimization
benchmark", 2023; Bello et al., "Neural combinatorial optimization with reinforcement learning", 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from attnext import functional
from attnext.compat._loop import Loop, Scoped
from attnext.compat._recipe import Draw, Sizes, Trial, by_name

_FILE = "rl4co.models.zoo.ptrnet.decoder"


class _SimpleAttention(Scoped):
    """Scores alone, and the keys: the decoder does the rest."""

    code_base = "RL4CO"
    version = "rl4co==0.7.0"
    original = f"{_FILE}:SimpleAttention"
    tensors: ClassVar[Sizes] = {"v": ("D",), "project_query.weight": ("D", "D"), "project_query.bias": ("D",),
                                "project_ref.weight": ("D", "D", 1), "project_ref.bias": ("D",)}  # fmt: skip
    arguments = ("query", "ref")

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        size = len(module.v)  # type: ignore[arg-type]
        return Trial([draw(2, size), draw(5, 2, size)], lambda attend, query, ref: attend(query, ref))

    def forward(self, query: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
        if not self._served(query, ref):
            found: tuple[Tensor, Tensor] = super().forward(query, ref)  # type: ignore[misc]
            return found
        this: Any = self
        projected, key = self._once((ref,), lambda: self._projected(ref))
        scores = functional.additive_scores(this.project_query(query), key, this.v)
        return projected, this.C * scores.tanh() if this.use_tanh else scores

    def _projected(self, ref: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, Tk) as the original returns it, and as the kernel reads it."""
        this: Any = self
        projected: Tensor = this.project_ref(ref.permute(1, 2, 0))
        return projected, projected.transpose(1, 2).contiguous()


class _Decoder(Loop):
    code_base = "RL4CO"
    version = "rl4co==0.7.0"
    original = f"{_FILE}:Decoder"
    arguments = ("decoder_input", "embedded_inputs", "hidden", "context", "decode_type", "eval_tours")
    attends = (("pointer", _SimpleAttention), ("glimpse", _SimpleAttention))

    def forward(
        self, decoder_input: Tensor, embedded_inputs: Tensor, hidden: Any, context: Tensor, *further: Any, **named: Any
    ) -> Any:
        with self._scope(len(embedded_inputs)):
            return super().forward(decoder_input, embedded_inputs, hidden, context, *further, **named)  # type: ignore[misc]


RECIPES = (_SimpleAttention, _Decoder)
__getattr__ = by_name(RECIPES)
