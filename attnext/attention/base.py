"""What attention modules share: one interface, whatever the score."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_modules
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attnext import _checks, functional, reference
from attnext.memory import Memory, prepare, prepared_memory
from attnext.steps import gathered

__all__ = [
    "Attention",
    "StepParts",
    "context_of",
    "has_global_hooks",
    "has_own_hooks",
    "linear",
    "plain_layer",
    "weight_of",
]


class StepParts(NamedTuple):
    """What a step of attention is made of, for the operator that goes through the steps of a decoder.

    Attributes:
        score: "additive", "dot" or "past": additive with filters over past weights.
        weight: (D, Q), of the projection of a query; None where it is taken as it is.
        bias: (D,) of that projection.
        scale: multiplies the scores.
        dropout: the probability that a weight is dropped, now.
        rule: what makes weights of the scores.
        filters, projection: as :func:`attnext.additive_step` takes them.
        sees: of a past whether the filters see the last weights, and whether the sum of all.
    """

    score: str
    weight: Tensor | None
    bias: Tensor | None
    scale: float
    dropout: float
    rule: str = "softmax"
    filters: Tensor | None = None
    projection: Tensor | None = None
    sees: tuple[bool, bool] = (False, False)


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

    def _step_parts(self) -> StepParts | None:
        """What a step is made of; None where it is something else, or only its modules know."""
        return None

    def _kept_weight(self) -> Tensor | None:
        """The vector of an additive score, as a memory keeps it."""
        return self.score_weight

    @property
    def _is_additive(self) -> bool:
        """Whether the score is additive, or a dot product."""
        return self.score_weight is not None

    @property
    def _value_size(self) -> int:
        """The size of a value of the memory."""
        return self.memory_size

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

    def prepare(
        self,
        encoder_states: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Memory:
        """Projects encoder states once, for many steps.

        Args:
            encoder_states: (B, Tk, H).
            lengths: (B,) integers, how many leading states of each row are real.
            mask: bool (B, Tk), True where a state may be attended.
            dtype: bfloat16 or float16 holds the memory of a float32 module in half the bytes, which is what steps over
                long sources wait for; see :func:`attnext.prepare` for what that rounds. Under autocast the memory has
                autocast's dtype already, and no other is taken.

        Raises:
            TypeError, ValueError: an argument is not what it must be; the message names it.
        """
        _renew(self)
        memory = self._project("encoder_states", encoder_states, lengths, mask, queries=None)
        holding = _checks.holding(dtype, memory.key)
        memory = self._ahead(memory, holding)
        if holding is not None:
            memory = memory.held(holding)
        return replace(memory, slots=(memory.lengths, memory.mask))

    def _ahead(self, memory: Memory, holding: torch.dtype | None) -> Memory:
        """The memory with what can be made ahead of all steps; ``holding``: the half type that it will be held in."""
        key = memory.key
        attends = memory.score_weight is not None and not self._multiplies_values  # by a kernel that takes exponentials
        prepared = prepare(key, memory.lengths, memory.mask, None, holding) if attends else None
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
        query = self._checked(query)
        _checks.flag("need_weights", need_weights)
        if not isinstance(memory, Memory):
            memory = self._project("memory", memory, lengths, mask, self._masks_by_query(query))
        elif not (lengths is None and mask is None):
            functional.refuse_beside_memory(lengths=lengths, mask=mask)
        return self._attend(self._projected(query, memory), memory, need_weights)

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
        hooked = has_own_hooks(self) or has_global_hooks() or self._compiled_call_impl is not None
        attend = self if hooked else self.forward  # as the call of a module takes its time
        return *attend(query, prepared_memory(memory), need_weights=need_weights), None

    def _checked(self, query: Tensor) -> Tensor:
        like = self._parameter
        if like is not None and _checks.fits(query, self.query_size, like):
            return query
        query = _checks.tensor("query", query, 2, 3)
        _checks.size("query", query, -1, self.query_size, "query_size")
        _checks.same_kind_as_module("query", query, like)
        return query

    def _projected(self, query: Tensor, memory: Memory) -> Tensor:
        """The query in the space of the keys."""
        additive, value_size = memory.score_weight is not None, self._value_size
        if additive != self._is_additive or memory.heads != self.heads or memory.value.shape[2] != value_size:
            self._refuse(memory, value_size)
        key, batch = memory.key, query.shape[0]
        if key.shape[0] != batch * self.heads:
            _checks.size("memory", key if self.heads == 1 else key[:: self.heads], 0, batch, "query's batch")
        query = self._project_query(query)
        if not _checks.fits(query, key.shape[2], key, held=True):
            name = "attention_size" if self._projects_states else "memory_size"
            _checks.size("memory", key, 2, query.shape[-1], name + " / heads" * (self.heads > 1))
            _checks.same_kind(query, memory=key)
        return query

    def _refuse(self, memory: Memory, value_size: int) -> NoReturn:
        """Says what this memory is not: it comes from another module, or from :func:`attnext.prepare`."""
        additive = memory.score_weight is not None
        if additive != self._is_additive:
            wanted, got = ("dot products", "an additive score")[:: 1 if additive else -1]
            raise ValueError(f"memory must be prepared for {wanted}, got one for {got}")
        if memory.heads != self.heads:
            raise ValueError(f"memory must be prepared for heads={self.heads}, got one for heads={memory.heads}")
        raise ValueError(f"memory must have values of size {value_size}, got {memory.value.shape[2]}")

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
        if memory.score_weight is not None:
            return functional.scores_of(query, memory, self._scale)
        lengths, mask = memory.lengths, memory.mask
        return functional.dot_scores(query, memory.key, lengths=lengths, mask=mask, scale=self._scale)

    def _attend(self, query: Tensor, memory: Memory, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Context and weights of projected queries."""
        kernel = functional.attend_by_dot if memory.score_weight is None else functional.attend
        return kernel(query, memory, self._scale, self.dropout if self.training else 0.0, need_weights, None)

    def _masks_by_query(self, query: Tensor) -> int | None:
        """How many queries a mask may tell apart; None where it is one of the keys alone."""
        return 1 if query.dim() == 2 else query.shape[1]

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
        return Memory(key, value, lengths, mask, score_weight, None, cleared=needs_finite)


def linear(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer of a module gives, past the layer's call where that adds nothing: it takes a fifth of a small step.

    By dictionaries, as each attribute that a module looks up takes as long as a check of the query.
    """
    plain: Any = plain_layer(module, name)
    if plain is not None:
        parameters = plain._parameters
        return nn.functional.linear(x, parameters["weight"], parameters["bias"])
    layer: Any = module._modules[name]
    projected: Tensor = layer(x)
    return projected


def plain_layer(module: nn.Module, name: str) -> nn.Linear | None:
    """A layer of a module, if it is a linear one whose call does nothing more."""
    layer = module._modules[name]
    return layer if type(layer) is nn.Linear and _is_only(layer, nn.Linear) else None


def weight_of(module: nn.Module, name: str, cls: type[nn.Module]) -> Tensor | None:
    """The weight of a layer without bias that does what its class does; None where the layer's call may do more."""
    layer: Any = module._modules[name]
    if not _is_only(layer, cls):
        return None
    weight: Tensor | None = layer._parameters.get("weight")
    return layer.weight if weight is None else weight  # of a parametrization


def _is_only(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a layer does what its class does and no more: its call runs no hook, and no forward of another's."""
    hooks = has_own_hooks(layer) or has_global_hooks()
    return type(layer).forward is cls.forward and "forward" not in layer.__dict__ and not hooks


def has_own_hooks(layer: nn.Module) -> bool:
    """Whether the call of a module runs more than its forward."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _renew(module: nn.Module) -> None:
    """Has hooks that make parameters of others at each call (of pruning, weight and spectral norm) make them now, where
    the module is not called but asked to prepare."""
    if not module._forward_pre_hooks:
        return
    pruning = sys.modules.get("torch.nn.utils.prune")  # imported by whoever prunes
    kinds = (WeightNorm, SpectralNorm, *((pruning.BasePruningMethod,) if pruning else ()))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, kinds):
            hook(module, ())


def has_global_hooks() -> bool:
    """Whether the call of every module does."""
    return bool(_of_modules._has_any_global_hook())


def context_of(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sum of the values, for weights (B, Tk) or (B, Tq, Tk) that no kernel made, in their dtype."""
    if value.dtype != weights.dtype and not _checks.autocasts(value.device.type):  # of a memory that is held in it
        value = value.to(weights.dtype)
    return (weights.unsqueeze(1) @ value).squeeze(1) if weights.dim() == 2 else weights @ value
