"""Additive attention that is told where it attended before: what location-sensitive attention and coverage share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnext import _checks, functional
from attnext.alignments import normalize
from attnext.attention.bahdanau import BahdanauAttention
from attnext.attention.base import context_of
from attnext.memory import Memory, prepared_memory
from attnext.ops import RULES, accumulator
from attnext.steps import gathered

__all__ = ["Past", "PastAttention"]


class Past(NamedTuple):
    """The weights of the steps so far, and whatever else an attention carries from step to step.

    Attributes:
        weights: (B, Tk) or (B, beam, Tk), those of the last step, before dropout, in the dtype that they are computed
            in: float64 for float64, float32 for the others.
        cumulative: the same shape and dtype: their sum over all steps (the coverage).
        transition: (B, 1) or (B, beam, 1), how likely forward attention with an agent moves on at the next step; else
            None.
        position: (B, 1) or (B, beam, 1) int64, how many steps local attention has made, where it counts them; else
            None.
    """

    weights: Tensor
    cumulative: Tensor
    transition: Tensor | None = None
    position: Tensor | None = None

    def select(self, indices: Tensor) -> Past:
        """The state of other rows: (N,) integers take rows of the batch, as :meth:`attnext.Memory.select` does; (B,
        beam) integers take for each sentence the hypotheses that go on.

        Raises:
            TypeError, ValueError: ``indices`` is not that.
        """
        indices = _checks.tensor("indices", indices, 1, 2)
        shape, device = self.weights.shape, self.weights.device
        if indices.dim() == 1:
            rows = _checks.indices("indices", indices, shape[0], device)
            return self.map(lambda x: x.index_select(0, rows))
        if len(shape) == 2:
            raise ValueError("indices of (B, beam) need a state of (B, beam, Tk), got one of (B, Tk)")
        _checks.size("indices", indices, 0, shape[0], "the state's batch")
        kept = _checks.indices("indices", indices.flatten(), shape[1], device).view(*indices.shape, 1)
        return self.map(lambda x: x.gather(1, kept.expand(-1, -1, x.shape[2])))

    def map(self, change: Callable[[Tensor], Tensor]) -> Past:
        """The state with each of its tensors changed."""
        return Past._make(None if x is None else change(x) for x in self)


Filters = tuple[Tensor | None, Tensor | None]


class PastAttention(BahdanauAttention):
    """Additive attention with features of its past weights: ``v . tanh(W query + U state_j + features_j + b)``.

    In ``forward`` a query of (B, Tq, Q) is Tq steps in their order, from a beginning without a past, and a mask is
    (B, Tk). Weights are returned as they were before dropout.
    """

    @property
    def _rule(self) -> str | None:
        """The kernel's name for what makes weights of the scores; None where the kernel has not got it."""
        return self.normalizer if self.normalizer in RULES else None

    def _filters(self) -> Filters | None:
        """The filters over the past and their projection, as :func:`attnext.additive_step` takes them.

        None where only the layers know what they do, as a hook may change it.
        """
        return None, None

    def _seen(self, past: Past) -> tuple[Tensor, ...]:
        """What the filters see."""
        return ()

    def _features(self, past: Past) -> Tensor | None:
        """By the layers, (N, Tk, D) of a state of (N, Tk), to be added to the projected states; None for none."""
        return None

    def _filters_of_kernel(self) -> Filters | None:
        """Those, where a step is one kernel; None where there is one for the scores, and the rest is PyTorch's."""
        return None if self._rule is None else self._filters()

    def _masks_by_query(self, query: Tensor) -> int | None:
        return None

    def _attend(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Step after step, from a beginning without a past: (B, Tq, D) is Tq steps in their order."""
        past = self._beginning(memory, query.shape[:1])
        if query.dim() == 2:
            context, past = self._step(query, memory, past)
            return context, past.weights.to(context.dtype) if need_weights else None
        contexts, weights = [], []
        for one in query.unbind(1):
            context, past = self._step(one, memory, past)
            contexts.append(context)
            weights.append(past.weights.to(context.dtype))
        if not contexts:  # no step
            batch, keys = memory.key.shape[:2]
            context = query.new_empty(batch, 0, memory.value.shape[2])
            return context, query.new_empty(batch, 0, keys) if need_weights else None
        return torch.stack(contexts, 1), torch.stack(weights, 1) if need_weights else None

    def step(
        self, query: Tensor, memory: Memory, state: Past | None = None, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, Past]:
        """One decoder step.

        Args:
            query: (B, Q), or (B, beam, Q) for hypotheses that share the memory, each with its own past.
            memory: what :meth:`prepare` returned.
            state: what the last step returned; None at the first.
            need_weights: also return the weights, which stand in the state too.

        Returns:
            context (B, H) or (B, beam, H), weights (B, Tk) or (B, beam, Tk) or None, and the next step's state.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        query = self._checked(query)
        need_weights = _checks.flag("need_weights", need_weights)
        projected = self._projected(query, prepared_memory(memory))
        if state is None:
            state = self._beginning(memory, projected.shape[:-1])
        elif not isinstance(state, Past):
            raise TypeError(f"state must be None or a Past, got {type(state).__name__}")
        wanted = (*projected.shape[:-1], memory.key.shape[1])
        if state.weights.shape != wanted:
            raise ValueError(f"state must have weights of shape {wanted}, got {tuple(state.weights.shape)}")
        if query.dim() == 3 and query.shape[1] == 0:
            raise ValueError("query must have at least one hypothesis, got shape " + str(tuple(query.shape)))
        wide = accumulator(memory.key.dtype)
        if state.weights.dtype != wide:  # a state of the caller's own making
            state = state.map(lambda x: x.to(wide) if x.is_floating_point() else x)
        context, past = self._step(projected, memory, state)
        return context, past.weights.to(context.dtype) if need_weights else None, past

    def _step(self, query: Tensor, memory: Memory, past: Past) -> tuple[Tensor, Past]:
        """One step of projected queries (B, D) or (B, beam, D)."""
        filters = self._filters_of_kernel()
        if filters is None:
            context, weights = self._attend_apart(query, memory, past)
        else:
            context, weights = self._attend_at_once(query, memory, past, filters)
        return context, Past(weights, past.cumulative + weights)

    def _attend_at_once(
        self, query: Tensor, memory: Memory, past: Past, filters: Filters, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Context, after dropout, and weights, before it: what was dropped has been attended all the same."""
        rule, scale, dropout_p = self._rule, 1.0 / self.temperature, self.dropout if self.training else 0.0
        assert rule is not None
        seen = self._seen(past)
        return functional.attend_step(
            query, memory, *filters, seen, rule=rule, scale=scale, dropout_p=dropout_p, **options
        )

    def _attend_apart(self, query: Tensor, memory: Memory, past: Past) -> tuple[Tensor, Tensor]:
        """The same with a kernel for the scores, which has the features as a part of the keys."""
        scores = self._scores_apart(query, memory, past)
        weights = self._weights(scores.to(accumulator(scores.dtype)), past)
        return self._dropped_context(weights.to(query.dtype), memory.factor), weights

    def _scores_apart(self, query: Tensor, memory: Memory, past: Past) -> Tensor:
        """Those of hypotheses as of more sentences, as the keys differ."""
        features = self._features(past.map(lambda x: x.flatten(0, -2)))
        if features is None:
            return self._scores(query, memory)
        rows, beam = query.shape[:-1], 1 if query.dim() == 2 else query.shape[1]
        batch, keys, size = memory.key.shape
        key = memory.key.unsqueeze(1) + features.to(query.dtype).view(batch, beam, keys, size)
        lengths, mask = (None if x is None else x.repeat_interleave(beam, 0) for x in (memory.lengths, memory.mask))
        of_rows = Memory(key.flatten(0, 1), memory.value, lengths, mask, memory.score_weight, None)
        return self._scores(query.flatten(0, -2), of_rows).view(*rows, keys)

    def _weights(self, scores: Tensor, past: Past) -> Tensor:
        """Weights of the scores by PyTorch."""
        return normalize(scores, self.normalizer)

    def _dropped_context(self, weights: Tensor, value: Tensor) -> Tensor:
        """The context by weights that no kernel made, with dropout in training."""
        return context_of(nn.functional.dropout(weights, self.dropout, self.training), value)

    @property
    def _multiplies_values(self) -> bool:
        return self._filters_of_kernel() is None

    def _beginning(self, memory: Memory, rows: torch.Size) -> Past:
        """The state before the first step: nothing was attended."""
        key = memory.key
        weights = key.new_zeros(*rows, key.shape[1], dtype=accumulator(key.dtype))
        return Past(weights, weights)

    def _project(
        self, name: str, encoder_states: Tensor, lengths: Tensor | None, mask: Tensor | None, queries: int | None
    ) -> Memory:
        """For many steps, in a call too; nothing more can be made ahead, as the past enters each step's keys."""
        memory = super()._project(name, encoder_states, lengths, mask, queries)
        if self._filters_of_kernel() is None:
            return memory
        return replace(memory, steps=gathered(memory.key, memory.value, memory.score_weight))

    def _ahead(self, memory: Memory, holding: torch.dtype | None) -> Memory:
        return memory


def at_the_first_key(past: Past, memory: Memory) -> Past:
    """A beginning for readers that only move on: all weight on the first visible key, and no coverage yet."""
    if memory.key.shape[1] == 0:
        return past
    at = first_visible(memory).view(-1, *(1,) * (past.weights.dim() - 1)).expand(*past.weights.shape[:-1], 1)
    return past._replace(weights=past.weights.scatter(-1, at, 1.0))


def first_visible(memory: Memory) -> Tensor:
    """The first key that the mask shows, (B,); 0 where there is none."""
    if memory.mask is None:
        return torch.zeros(memory.key.shape[0], dtype=torch.int64, device=memory.key.device)
    return memory.mask.to(torch.uint8).argmax(1)
