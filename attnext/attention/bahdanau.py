"""Additive attention as a module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks, functional, reference
from attnext.alignments import NORMALIZERS
from attnext.alignments import normalize as normalized
from attnext.memory import Memory, prepare

__all__ = ["BahdanauAttention"]


class BahdanauAttention(nn.Module):
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
        super().__init__()
        self.query_size = _checks.at_least_one("query_size", query_size)
        self.memory_size = _checks.at_least_one("memory_size", memory_size)
        self.attention_size = _checks.at_least_one("attention_size", attention_size)
        self.normalizer = _checks.choice("normalizer", normalizer, NORMALIZERS)
        self.temperature = _checks.positive("temperature", temperature)
        self.dropout = _checks.probability("dropout", dropout)
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

    def prepare(self, encoder_states: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Memory:
        """Projects encoder states once, for many steps.

        Args:
            encoder_states: (B, Tk, H).
            lengths: (B,) integers, how many leading states of each row are real.
            mask: bool (B, Tk), True where a state may be attended.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        memory = self._project("encoder_states", encoder_states, lengths, mask, queries=None)
        return replace(memory, prepared=prepare(memory.key, memory.lengths, memory.mask, None))

    def forward(
        self,
        query: Tensor,
        memory: Memory | Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends a prepared memory, or encoder states with their lengths and mask, all in one call.

        Args:
            query: (B, Q) or (B, Tq, Q).
            memory: what :meth:`prepare` returned, or encoder states (B, Tk, H).
            lengths: (B,) integers; only with encoder states, as a prepared memory has its own.
            mask: bool (B, Tk) or (B, Tq, Tk); likewise.
            need_weights: also return the weights.

        Returns:
            context (B, H) or (B, Tq, H), and weights (B, Tk) or (B, Tq, Tk) or None.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        query, need_weights = self._checked(query), _checks.flag("need_weights", need_weights)
        memory = self._memory(memory, lengths, mask, self._masks_by_query(query))
        return self._over_queries(self._projected(query, memory), memory, need_weights)

    def step(
        self, query: Tensor, memory: Memory, state: Any = None, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, Any]:
        """One decoder step, in the shape that all attention modules share; this one has no state.

        Args:
            query: (B, Q), or (B, beam, Q) for hypotheses that share the memory.
            memory: what :meth:`prepare` returned.
            state: None.
            need_weights: also return the weights.

        Returns:
            context (B, H) or (B, beam, H), weights (B, Tk) or (B, beam, Tk) or None, and the next step's state.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        if state is not None:
            raise TypeError(f"state must be None for {type(self).__name__}, got {type(state).__name__}")
        return *self(query, prepared_memory(memory), need_weights=need_weights), None

    def _checked(self, query: Tensor) -> Tensor:
        query = _checks.tensor("query", query, 2, 3)
        _checks.size("query", query, -1, self.query_size, "query_size")
        _checks.same_kind_as_module("query", query, self.query_projection.weight)
        return query

    def _memory(
        self, memory: Memory | Tensor, lengths: Tensor | None, mask: Tensor | None, queries: int | None
    ) -> Memory:
        """The memory itself, or encoder states as one for a single call."""
        if not isinstance(memory, Memory):
            return self._project("memory", memory, lengths, mask, queries)
        if lengths is not None or mask is not None:
            name = "lengths" if lengths is not None else "mask"
            raise ValueError(f"{name} must be None with a prepared memory: pass it to prepare() instead")
        return memory

    def _projected(self, query: Tensor, memory: Memory) -> Tensor:
        """The query in the space of the keys."""
        _checks.size("memory", memory.key, 0, query.shape[0], "query's batch")
        _checks.size("memory", memory.key, 2, self.attention_size, "attention_size")
        query = self.query_projection(query)
        _checks.same_kind(query, memory=memory.key)
        return query

    def scores(self, query: Tensor, memory: Memory) -> Tensor:
        """The scores before the softmax, divided by the temperature: logits over the encoder states.

        Args:
            query: (B, Q) or (B, Tq, Q).
            memory: what :meth:`prepare` returned.

        Returns:
            (B, Tk) or (B, Tq, Tk), minus infinity in masked slots.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        query = self._checked(query)
        return self._scores(self._projected(query, prepared_memory(memory)), memory)

    def _scores(self, query: Tensor, memory: Memory) -> Tensor:
        return functional.additive_scores(
            query,
            memory.key,
            memory.score_weight,
            lengths=memory.lengths,
            mask=memory.mask,
            scale=1.0 / self.temperature,
        )

    def _masks_by_query(self, query: Tensor) -> int | None:
        """How many queries a mask may tell apart; None where it is one of the keys alone."""
        return 1 if query.dim() == 2 else query.shape[1]

    def _over_queries(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Context and weights of projected queries."""
        return self._attend(query, memory, need_weights, self.dropout if self.training else 0.0)

    def _attend(
        self, query: Tensor, memory: Memory, need_weights: bool, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        if self.normalizer == "softmax":
            return functional.attend(query, memory, 1.0 / self.temperature, dropout_p, need_weights, None)
        weights = nn.functional.dropout(normalized(self._scores(query, memory), self.normalizer), dropout_p)
        return context_of(weights, memory.value), weights if need_weights else None

    @property
    def _multiplies_values(self) -> bool:
        """Whether the context is a matrix product rather than the kernel's, so that hidden values must be finite."""
        return self.normalizer != "softmax"

    def extra_repr(self) -> str:
        rest = "" if self.normalizer == "softmax" else f", normalizer={self.normalizer!r}"
        rest += "" if self.temperature == 1.0 else f", temperature={self.temperature:g}"
        return f"normalize={self.gain is not None}, dropout={self.dropout}{rest}"

    def _project(
        self, name: str, encoder_states: Tensor, lengths: Tensor | None, mask: Tensor | None, queries: int | None
    ) -> Memory:
        states = _checks.tensor(name, encoder_states, 3)
        _checks.size(name, states, 2, self.memory_size, "memory_size")
        _checks.same_kind_as_module(name, states, self.memory_projection.weight)
        lengths, mask = _checks.lengths(lengths, states), _checks.mask(mask, states, queries)
        needs_finite = torch.is_grad_enabled() or self._multiplies_values
        if needs_finite and (lengths is not None or mask is not None):
            # NaN in the padding would reach the gradient of the projection's weight, as 0 * NaN, or such a context.
            visible = reference.valid_slots(states, states, lengths, mask).any(1)
            states = states.masked_fill(~visible.unsqueeze(-1), 0.0)
        key = self.memory_projection(states)
        # Under autocast the projection has its dtype: cast the states with it, once instead of at every step.
        value = states.to(key.dtype)
        if not torch.is_grad_enabled():  # `to` may give the states themselves, which have a gradient
            value = value.detach()
        # A copy: the memory keeps v as it is now.
        score_weight = self._normalized_weight().to(key.dtype, copy=True)
        return Memory(key, value, lengths, mask, score_weight, None)

    def _normalized_weight(self) -> Tensor:
        if self.gain is None:
            return self.score_weight
        length: Tensor = torch.linalg.vector_norm(self.score_weight)
        return self.gain * self.score_weight / length


def prepared_memory(memory: object) -> Memory:
    """A memory, and not encoder states."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be what prepare() returned, got {type(memory).__name__}")
    return memory


def context_of(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sum of the values, for weights (B, Tk) or (B, Tq, Tk) that no kernel made."""
    return (weights.unsqueeze(1) @ value).squeeze(1) if weights.dim() == 2 else weights @ value
