"""Additive attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks, functional
from attnext.alignments import NORMALIZERS
from attnext.alignments import normalize as normalized
from attnext.attention.base import Attention, StepParts, context_of, linear, plain_layer
from attnext.memory import Memory
from attnext.ops import RULES

__all__ = ["BahdanauAttention"]


class BahdanauAttention(Attention):
    """Additive attention over encoder states: ``v . tanh(W query + U state + b)``, softmax, weighted sum.

    Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2015. With
    ``normalize`` it is the weight-normalised form of Google's neural machine translation system: v becomes g v / |v|
    with a learnt gain g, and b is there.

    Args:
        query_size: size Q of a query (a decoder state).
        memory_size: size H of an encoder state.
        attention_size: size D of the space in which both are compared.
        bias: add a learnt b inside the tanh.
        normalize: weight-normalised v and a bias.
        normalizer: what makes weights of the scores: "softmax", "sigmoid", "sparsemax" or "entmax15", see
            :func:`attnext.normalize`. Only softmax is one kernel; the others take scores and context apart.
        temperature: divides the scores; below 1 it sharpens the weights, above it levels them.
        dropout: probability that a weight is dropped in training.

    Shapes:
        query (B, Q) or (B, Tq, Q); encoder states (B, Tk, H); context (B, H) or (B, Tq, H); weights (B, Tk) or
        (B, Tq, Tk).

    Example:
        >>> attn = BahdanauAttention(512, 1024, 256)
        >>> memory = attn.prepare(encoder_states, lengths)   # once a sentence
        >>> context, weights = attn(state, memory, need_weights=True)   # at every step
    """

    score_weight: nn.Parameter
    _is_additive = True

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        bias: bool = False,
        normalize: bool = False,
        normalizer: str = "softmax",
        temperature: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size, dropout)
        self.normalizer = _checks.choice("normalizer", normalizer, NORMALIZERS)
        self.temperature = _checks.positive("temperature", temperature)
        bias, normalize = _checks.flag("bias", bias), _checks.flag("normalize", normalize)
        # The bias of the tanh enters with the query: one addition a query, none a key.
        self.query_projection = nn.Linear(query_size, attention_size, bias=bias or normalize)
        self.memory_projection = nn.Linear(memory_size, attention_size, bias=False)
        self.score_weight = nn.Parameter(torch.empty(attention_size))
        self.gain = nn.Parameter(torch.empty(1)) if normalize else None
        BahdanauAttention.reset_parameters(self)  # a subclass has no parameters of its own yet

    def reset_parameters(self) -> None:
        """Draws the parameters anew: uniform projections, v uniform within 1/sqrt(D), g of 1/sqrt(D), b of 0."""
        self.query_projection.reset_parameters()
        self.memory_projection.reset_parameters()
        bound = self.attention_size**-0.5
        nn.init.uniform_(self.score_weight, -bound, bound)
        if self.gain is not None:
            nn.init.constant_(self.gain, bound)
        if self.query_projection.bias is not None:
            nn.init.zeros_(self.query_projection.bias)

    def _project_query(self, query: Tensor) -> Tensor:
        return linear(self, "query_projection", query)

    def _step_parts(self) -> StepParts | None:
        return self._parts("additive") if type(self) is BahdanauAttention else None

    def _parts(self, score: str, **others: Any) -> StepParts | None:
        """Those, of weights that a rule of the kernels makes."""
        layer = plain_layer(self, "query_projection")
        if layer is None or self.normalizer not in (("softmax",) if score == "additive" else RULES[:2]):
            return None
        dropout = self.dropout if self.training else 0.0
        return StepParts(score, layer.weight, layer.bias, self._scale, dropout, self.normalizer, **others)

    def _project_states(self, states: Tensor) -> Tensor:
        projected: Tensor = self.memory_projection(states)
        return projected

    def _kept_weight(self) -> Tensor:
        if self.gain is None:
            return self.score_weight
        length: Tensor = torch.linalg.vector_norm(self.score_weight)
        return self.gain * self.score_weight / length

    @property
    def _parameter(self) -> Tensor | None:
        weight = self._parameters.get("score_weight")
        return next(self.parameters(), None) if weight is None else weight

    @property
    def _scale(self) -> float:
        return 1.0 / self.temperature

    def _attend(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        if self.normalizer == "softmax":
            return functional.attend(query, memory, 1.0 / self.temperature, dropout_p, need_weights, None)
        weights = nn.functional.dropout(normalized(self._scores(query, memory), self.normalizer), dropout_p)
        return context_of(weights, memory.factor), weights if need_weights else None

    @property
    def _multiplies_values(self) -> bool:
        return self.normalizer != "softmax"

    def extra_repr(self) -> str:
        rest = "" if self.normalizer == "softmax" else f", normalizer={self.normalizer!r}"
        rest += "" if self.temperature == 1.0 else f", temperature={self.temperature:g}"
        return f"normalize={self.gain is not None}, dropout={self.dropout}{rest}"
