"""Encoder states projected once and attended at every decoder step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnext import _checks, reference
from attnext.backends import choose, takes_held
from attnext.ops import operators
from attnext.steps import Steps, gathered

__all__ = ["Memory", "Prepared", "prepare", "prepared_memory"]


class Prepared(NamedTuple):
    """What one backend precomputes from projected keys: exp(2 key), and how far it may be trusted."""

    backend: str
    exp_key: Tensor
    """float32 or float64, or the half type that the memory is held in, in the backend's own layout: exp(2 key), 0 in
    masked slots and in the padding."""
    key_limit: Tensor
    """(B, Tk or more): the largest |key| of each row, infinity for a row whose exponentials are not all normal."""


@dataclass(frozen=True, repr=False)
class Memory:
    """Projected encoder states, made by :func:`attnext.prepare` or by the ``prepare`` of an attention module.

    Which slots are hidden is a part of what was prepared: :meth:`with_mask` and :meth:`with_lengths` hide more of them.

    Attributes:
        key: (B, Tk, D) projected encoder states, with their gradient. They, the values and what is prepared of them may
            be held in a half type, for queries of float32.
        value: (B, Tk, H) the encoder states themselves; the very tensor of the keys where the keys are the values.
        lengths: (B,) int64, or None: how many leading states of each row are real.
        mask: (B, Tk) bool, or None: True where a state may be attended.
        score_weight: (D,), or (heads, D) of several heads, the weight vector of an additive score, as it was when the
            memory was prepared, or None.
        prepared: what the backend computed ahead of the steps, or None.
        heads: rows of the tensors for each sentence, one after another.
        steps: the keys and values for steps, whose gradients are then summed in place, or None.
        cleared: whether the values in hidden slots are known to be 0.
        slots: the lengths and the mask that it was prepared for, or None where nothing depends on them.

    Raises:
        ValueError: by ``dataclasses.replace`` it would have other lengths or another mask than it was prepared for.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    score_weight: Tensor | None
    prepared: Prepared | None
    heads: int = 1
    steps: Steps | None = None
    cleared: bool = False
    slots: tuple[Tensor | None, Tensor | None] | None = None

    def __post_init__(self) -> None:
        if self.slots is not None and (self.slots[0] is not self.lengths or self.slots[1] is not self.mask):
            raise ValueError(
                "a memory was prepared for its lengths and mask, which can't be replaced: memory.with_mask(mask) and "
                "memory.with_lengths(lengths) hide more slots"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no steps: its tensors are others."""
        return self.__dict__ | {"steps": None}

    def __repr__(self) -> str:
        batch, keys, size = self.key.shape
        sizes = {"batch": batch // self.heads, "keys": keys, "key_size": size, "value_size": self.value.shape[2]}
        parts = [f"{name}={value}" for name, value in sizes.items()]
        parts += [f"heads={self.heads}"] * (self.heads > 1)
        parts += [str(self.key.dtype), f"device={str(self.key.device)!r}"]
        parts += [name for name in ("lengths", "mask") if getattr(self, name) is not None]
        parts += [f"prepared by {self.prepared.backend}"] if self.prepared is not None else []
        return f"Memory({', '.join(parts)})"

    @property
    def shape(self) -> torch.Size:
        """(B, Tk, H): sentences, slots, and the size of a value, of all heads together."""
        rows, keys, size = self.value.shape
        return torch.Size((rows // self.heads, keys, size * self.heads))

    @property
    def shared(self) -> bool:
        """Whether the keys are the values."""
        return self.value is self.key

    def held(self, dtype: torch.dtype) -> Memory:
        """The same memory with its keys and values, of float32, held in a half type; it is prepared as it was."""
        key = self.key.to(dtype)
        value = key if self.shared else self.value.to(dtype)
        return replace(self, key=key, value=value, steps=self.steps and gathered(key, value, self.score_weight))

    def widened(self, dtype: torch.dtype, family: str) -> Memory:
        """What is held in a half type in the dtype of its queries, for a backend whose kernels don't take it so."""
        if takes_held(family):
            return self
        key = self.key.to(dtype)
        return replace(self, key=key, value=key if self.shared else self.value.to(dtype), prepared=None, steps=None)

    @property
    def factor(self) -> Tensor:
        """The values to be multiplied by weights of 0, which would keep a NaN in a hidden slot: there they are 0."""
        if self.cleared or (self.lengths is None and self.mask is None):
            return self.value
        visible = reference.valid_slots(self.key, self.key, self.lengths, self.mask).any(1)
        return self.value.masked_fill(~visible.unsqueeze(-1), 0.0)

    def with_mask(self, mask: Tensor) -> Memory:
        """The same memory with more slots hidden: for one step of a pointer network those that were visited, say.

        Nothing is copied or prepared anew. What was hidden stays so: take the mask of each step from the memory that
        :meth:`prepare` gave.

        Args:
            mask: bool (B, Tk), True where a key may still be attended.

        Raises:
            TypeError, ValueError: ``mask`` is not that.
        """
        found = _checks.mask(_checks.tensor("mask", mask, 2), self.key[:: self.heads], None)
        assert found is not None
        by_row = found.repeat_interleave(self.heads, 0) if self.heads > 1 else found
        return self._hiding(self.lengths, by_row if self.mask is None else self.mask & by_row)

    def with_lengths(self, lengths: Tensor) -> Memory:
        """The same memory, likewise, with the slots from these lengths (B,) on hidden.

        Raises:
            TypeError, ValueError: ``lengths`` is not what it must be.
        """
        found = _checks.lengths(_checks.tensor("lengths", lengths, 1), self.key[:: self.heads])
        assert found is not None
        by_row = found.repeat_interleave(self.heads, 0) if self.heads > 1 else found
        return self._hiding(by_row if self.lengths is None else self.lengths.minimum(by_row), self.mask)

    def _hiding(self, lengths: Tensor | None, mask: Tensor | None) -> Memory:
        return replace(self, lengths=lengths, mask=mask, slots=(lengths, mask), cleared=False)

    def detach(self) -> Memory:
        """The same memory without the history of its tensors: gradients end here, those of its score weight too."""
        key = self.key.detach()
        score_weight = None if self.score_weight is None else self.score_weight.detach()
        value = key if self.shared else self.value.detach()
        return replace(self, key=key, value=value, score_weight=score_weight, steps=None)

    def select(self, indices: Tensor) -> Memory:
        """The rows of the batch at ``indices``, in that order: finished sentences dropped, or hypotheses reordered.

        Args:
            indices: (N,) integers from 0 to B - 1, on the memory's device; a row may come several times or not at all.

        Returns:
            A memory of N rows, prepared where this one is; gradients flow to the rows that were taken.

        Raises:
            TypeError, ValueError: ``indices`` is not that.
        """
        indices = _checks.indices("indices", indices, self.key.shape[0] // self.heads, self.key.device)
        if self.heads > 1:
            of_heads = torch.arange(self.heads, device=indices.device)
            indices = (indices.unsqueeze(1) * self.heads + of_heads).flatten()

        def take(x: Tensor) -> Tensor:
            return x.index_select(0, indices)

        before, key = self.prepared, take(self.key)
        value = key if self.shared else take(self.value)
        lengths, mask = (None if x is None else take(x) for x in (self.lengths, self.mask))
        return replace(
            self,
            key=key,
            value=value,
            lengths=lengths,
            mask=mask,
            slots=self.slots and (lengths, mask),
            prepared=before and Prepared(before.backend, take(before.exp_key), take(before.key_limit)),
            steps=self.steps and gathered(key, value, self.score_weight),
        )

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Memory:
        """The same memory on another device, in another floating dtype, or both; prepared anew where it was prepared.

        As that of a tensor, it takes a dtype alone too.

        Raises:
            TypeError: ``dtype`` is not float32, float64, float16 or bfloat16, or is given twice.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"device must be a device, got {device}")
            device, dtype = None, device
        device = self.key.device if device is None else torch.device(device)
        dtype = self.key.dtype if dtype is None else _checks.floating("dtype", dtype)
        key = self.key.to(device, dtype)
        if key is self.key:  # and so are the others, which have its device and dtype
            return self
        lengths = None if self.lengths is None else self.lengths.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        v = self.score_weight
        # Of one that is held in a half type the score weight is not.
        of_weight = v.dtype if v is not None and dtype == self.key.dtype else dtype
        holding = dtype if of_weight != dtype else None
        prepared = None if self.prepared is None else prepare(key, lengths, mask, None, holding)
        value = key if self.shared else self.value.to(device, dtype)
        score_weight = None if v is None else v.to(device, of_weight)
        steps = self.steps and gathered(key, value, score_weight)
        slots = self.slots and (lengths, mask)
        return Memory(key, value, lengths, mask, score_weight, prepared, self.heads, steps, self.cleared, slots)


_NORMAL = {torch.bfloat16: float("inf"), torch.float16: 4.85}
"""The largest |k| of which exp(2 k) and exp(-2 k) are normal numbers, where kernels don't stop before."""


def prepare(
    key: Tensor, lengths: Tensor | None, mask: Tensor | None, backend: str | None, holding: torch.dtype | None = None
) -> Prepared | None:
    """What the backend computes of the keys ahead of the steps; None where it has no use for that.

    ``holding`` is the half type that the memory is held in: rows beyond its range are taken by the keys themselves.
    """
    family = choose(backend, key.device.type, key.dtype, holding is not None, key.device.index)
    if family not in operators:
        return None
    exp_key, limit = operators[family].prepare(key.detach(), lengths, mask)
    if holding is not None and takes_held(family):
        exp_key, limit = exp_key.to(holding), limit.masked_fill(limit > _NORMAL[holding], float("inf"))
    return Prepared(family, exp_key, limit)


def prepared_memory(memory: object) -> Memory:
    """A memory, and not encoder states."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be what prepare() returned, got {type(memory).__name__}")
    return memory
