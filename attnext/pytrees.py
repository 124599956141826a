"""What attention modules and decoders hand from step to step, as trees of tensors: for export, which takes and gives
nothing else, and for ``torch.utils._pytree`` as other libraries use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnext.attention.past import Past
from attnext.memory import Memory, Prepared
from attnext.recurrent.state import DecoderState

__all__ = ["register"]

_TENSORS = ("key", "value", "lengths", "mask", "score_weight")


def _parts(memory: Memory) -> tuple[list[Any], list[Any]]:
    found = [None if name == "value" and memory.shared else getattr(memory, name) for name in _TENSORS]
    prepared = memory.prepared
    found += [None, None] if prepared is None else [prepared.exp_key, prepared.key_limit]
    others = [memory.shared, memory.slots is not None, memory.heads, memory.cleared, prepared and prepared.backend]
    return found, others


def _flattened(memory: Memory) -> tuple[list[Tensor], list[Any]]:
    found, others = _parts(memory)
    return [x for x in found if x is not None], [*others, [x is not None for x in found]]


def _with_keys(memory: Memory) -> tuple[list[tuple[Any, Tensor]], list[Any]]:
    # Words for people, of which none may begin with another: torch replaces them in texts.
    names = [*_TENSORS, "exponentials", "limits"]
    found, context = _flattened(memory)
    there = [name for name, is_there in zip(names, context[-1], strict=True) if is_there]
    return [(pytree.GetAttrKey(name), x) for name, x in zip(there, found, strict=True)], context


def _memory_of(tensors: Any, context: Sequence[Any]) -> Memory:
    shared, bound, heads, cleared, backend, there = context
    left = iter(tensors)
    parts: list[Any] = [next(left) if x else None for x in there]
    key, value, lengths, mask, score_weight, exp_key, key_limit = parts
    prepared = None if backend is None else Prepared(backend, exp_key, key_limit)
    return Memory(
        key, key if shared else value, lengths, mask, score_weight, prepared, heads, None, cleared,
        (lengths, mask) if bound else None,
    )  # fmt: skip


def register() -> None:
    """Tells PyTorch of them, once for a process."""
    pytree.register_pytree_node(
        Memory, _flattened, _memory_of, serialized_type_name="attnext.Memory", to_dumpable_context=list,
        from_dumpable_context=list, flatten_with_keys_fn=_with_keys,
    )  # fmt: skip
    for cls in (Past, DecoderState):
        pytree._register_namedtuple(cls, serialized_type_name=f"attnext.{cls.__name__}")
    # A saved program has the inputs that it was made with.
    torch.serialization.add_safe_globals([Memory, Prepared, Past, DecoderState])
