"""What attention modules share: one interface, whatever the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnext import _checks, functional, reference
from attnext.memory import Memory, prepare
from attnext.steps import gathered

__all__ = ["Attention", "context_of", "prepared_memory"]


class Attention(nn.Module, ABC):
    """Attention over encoder states that are projected once.

    A score says what a query and the states are to it (``_project_query``, ``_project_states``). With a
    ``score_weight`` it is additive, else a dot product.
    """

    score_weight: nn.Parameter | None
    """v, (D,) or (heads, D)."""

    heads: int = 1
    """Rows of the memory and of projected queries for each sentence."""

    def __init__(self, query_size: int, memory_size: int, attention_size: int, dropout: float) -> None:
        super().__init__()
        self.query_size = _checks.at_least_one("query_size", query_size)
        self.memory_size = _checks.at_least_one("memory_size", memory_size)
        self.attention_size = _checks.at_least_one("attention_size", attention_size)
        self.dropout = _checks.probability("dropout", dropout)

    @abstractmethod
    def _project_query(self, query: Tensor) -> Tensor:
        """(..., Q) in the space of the keys, (..., D)."""

    @abstractmethod
    def _project_states(self, states: Tensor) -> Tensor:
        """Encoder states (B, Tk, H) as keys (B, Tk, D); the states themselves where they are the keys."""

    @property
    def _scale(self) -> float:
        """What multiplies the scores."""
        return 1.0

    def _kept_weight(self) -> Tensor | None:
        """The vector of an additive score, as a memory keeps it."""
        return self.score_weight

    @property
    def _parameter(self) -> Tensor | None:
        """A parameter, whose dtype and device are the module's; None where there is none."""
        return next(self.parameters(), None)

    @property
    def _projects_states(self) -> bool:
        """Whether the keys are made of the states by a parameter, or are the states themselves."""
        return True

    @property
    def _multiplies_values(self) -> bool:
        """Whether the context is a matrix product rather than a kernel's, so that hidden values must be finite."""
        return False

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
        key, additive = memory.key, memory.score_weight is not None
        prepared = prepare(key, memory.lengths, memory.mask, None) if additive else None
        return replace(memory, prepared=prepared, steps=gathered(key, memory.value, memory.score_weight))

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
        _checks.same_kind_as_module("query", query, self._parameter)
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
        wanted, got = ("dot products" if x.score_weight is None else "an additive score" for x in (self, memory))
        if wanted != got:
            raise ValueError(f"memory must be prepared for {wanted}, got one for {got}")
        if memory.heads != self.heads:
            raise ValueError(f"memory must be prepared for heads={self.heads}, got one for heads={memory.heads}")
        key = memory.key if self.heads == 1 else memory.key[:: self.heads]
        _checks.size("memory", key, 0, query.shape[0], "query's batch")
        name = "attention_size" if self._projects_states else "memory_size"
        _checks.size("memory", key, 2, self.attention_size // self.heads, name + " / heads" * (self.heads > 1))
        query = self._project_query(query)
        _checks.same_kind(query, memory=memory.key)
        return query

    def scores(self, query: Tensor, memory: Memory) -> Tensor:
        """The scores before the softmax: logits over the encoder states.

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
        """The logits of projected queries."""
        key, v, lengths, mask = memory.key, memory.score_weight, memory.lengths, memory.mask
        if v is None:
            return functional.dot_scores(query, key, lengths=lengths, mask=mask, scale=self._scale)
        return functional.additive_scores(query, key, v, lengths=lengths, mask=mask, scale=self._scale)

    def _attend(
        self, query: Tensor, memory: Memory, need_weights: bool, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        """Context and weights of projected queries."""
        kernel = functional.attend_by_dot if memory.score_weight is None else functional.attend
        return kernel(query, memory, self._scale, dropout_p, need_weights, None)

    def _masks_by_query(self, query: Tensor) -> int | None:
        """How many queries a mask may tell apart; None where it is one of the keys alone."""
        return 1 if query.dim() == 2 else query.shape[1]

    def _over_queries(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Context and weights of projected queries."""
        return self._attend(query, memory, need_weights, self.dropout if self.training else 0.0)

    def _project(
        self, name: str, encoder_states: Tensor, lengths: Tensor | None, mask: Tensor | None, queries: int | None
    ) -> Memory:
        states = _checks.tensor(name, encoder_states, 3)
        _checks.size(name, states, 2, self.memory_size, "memory_size")
        _checks.same_kind_as_module(name, states, self._parameter)
        lengths, mask = _checks.lengths(lengths, states), _checks.mask(mask, states, queries)
        needs_finite = (torch.is_grad_enabled() and self._projects_states) or self._multiplies_values
        if needs_finite and (lengths is not None or mask is not None):
            # NaN in the padding would reach the gradient of the projection's weight, as 0 * NaN, or such a context.
            visible = reference.valid_slots(states, states, lengths, mask).any(1)
            states = states.masked_fill(~visible.unsqueeze(-1), 0.0)
        if not torch.is_grad_enabled():  # what is not copied below would have its gradient
            states = states.detach()
        key = self._project_states(states)
        # Under autocast the projection has its dtype: cast the states with it, once instead of at every step.
        value = states.to(key.dtype) if self._projects_states else key
        score_weight = self._kept_weight()
        if score_weight is not None:  # a copy: the memory keeps v as it is now
            score_weight = score_weight.to(key.dtype, copy=True)
        return Memory(key, value, lengths, mask, score_weight, None)


def prepared_memory(memory: object) -> Memory:
    """A memory, and not encoder states."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be what prepare() returned, got {type(memory).__name__}")
    return memory


def context_of(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sum of the values, for weights (B, Tk) or (B, Tq, Tk) that no kernel made."""
    return (weights.unsqueeze(1) @ value).squeeze(1) if weights.dim() == 2 else weights @ value
