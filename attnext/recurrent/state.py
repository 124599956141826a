"""What decoders carry from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from attnext import _checks

__all__ = ["DecoderState"]


class DecoderState(NamedTuple):
    """What a decoder carries from step to step, for one hypothesis a sentence (B, ...) or several (B, beam, ...).

    Attributes:
        hidden: (L, B, S) or (L, B, beam, S), of the layers from the lowest.
        cell: the same shape, of long short-term memory; else None.
        context: (B, H) or (B, beam, H), the last one, where it enters the next step; else None.
        vector: (B, R) or (B, beam, R), the last output vector, with input feeding; else None.
        attention: the attention's own state; None at the first step, and where it has none.
    """

    hidden: Tensor
    cell: Tensor | None = None
    context: Tensor | None = None
    vector: Tensor | None = None
    attention: Any = None

    def select(self, indices: Tensor) -> DecoderState:
        """The state of other rows (N,), or for each sentence of the hypotheses that go on (B, beam).

        Raises:
            TypeError, ValueError: ``indices`` is not that.
        """
        indices = _checks.tensor("indices", indices, 1, 2)
        batch = self.hidden.shape[1]
        if indices.dim() == 1:
            rows = _checks.indices("indices", indices, batch, self.hidden.device)
            return self.map(lambda x, dim: x.index_select(dim, rows), lambda state: state.select(rows))
        if self.hidden.dim() == 3:
            raise ValueError("indices of (B, beam) need a state of (L, B, beam, S), got one of (L, B, S)")
        _checks.size("indices", indices, 0, batch, "the state's batch")
        kept = _checks.indices("indices", indices.flatten(), self.hidden.shape[2], self.hidden.device).view(
            indices.shape
        )

        def take(x: Tensor, dim: int) -> Tensor:
            places = kept.unsqueeze(-1).expand(*kept.shape, x.shape[-1])
            return x.gather(dim + 1, places.expand(*x.shape[:dim], *places.shape))

        return self.map(take, lambda state: state.select(kept))

    def one_hypothesis(self) -> DecoderState:
        """The same as (B, 1, ...), before the first step."""
        if self.attention is not None:
            raise ValueError("one_hypothesis is of a state before the first step")
        return self.map(lambda x, dim: x.unsqueeze(dim + 1), lambda state: state)

    def detach(self) -> DecoderState:
        """The same without its history: where backpropagation through time is cut."""
        return self.map(lambda x, _: x.detach(), lambda state: state.map(lambda x: x.detach()))

    def map(self, change: Callable[[Tensor, int], Tensor], of_attention: Callable[[Any], Any]) -> DecoderState:
        """With each tensor changed, which is given with the dimension of its batch, and the attention's state."""
        hidden, cell, context, vector = (
            None if x is None else change(x, dim) for x, dim in zip(self[:4], (1, 1, 0, 0), strict=True)
        )
        assert hidden is not None
        attention = None if self.attention is None else of_attention(self.attention)
        return DecoderState(hidden, cell, context, vector, attention)
