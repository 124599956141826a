"""Attentions that project their keys anew at each step: within one forward of their decoder it is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attnext import functional
from attnext.compat._recipe import _KEPT, Kept, Recipe, Sizes

__all__ = ["Loop", "Scoped", "opened"]

T = TypeVar("T")

Given = dict[str, Any]
"""The arguments of :func:`attnext.prepare`."""


class Scoped(Recipe):
    """An attention that keeps nothing between calls, but where its decoder has opened a scope for it."""

    def _weigh(self, query: Tensor, sources: tuple[Any, ...], make: Callable[[], Given]) -> tuple[Tensor, Tensor]:
        """Context and weights of a query (B, D) or (B, Tq, D), additive where there is a score weight.

        Args:
            query: projected.
            sources: the arguments of forward that keys, values and mask are made of.
            make: what :func:`attnext.prepare` takes, made of them.
        """
        memory = self._once(sources, lambda: functional.prepare(**make())) if _KEPT in self.__dict__ else None
        more: Any = make() if memory is None else {"key": memory}
        additive = (more.get("score_weight") if memory is None else memory.score_weight) is not None
        attention = functional.additive_attention if additive else functional.dot_attention
        one = query.dim() == 3 and query.shape[1] == 1
        context, weights = attention(query.squeeze(1) if one else query, need_weights=True, **more)
        assert weights is not None
        return (context.unsqueeze(1), weights.unsqueeze(1)) if one else (context, weights)

    def _once(self, sources: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is made of these arguments of forward: within a scope again only where they are others."""
        kept: Kept | None = self.__dict__.get(_KEPT)
        return make() if kept is None else kept.once(sources, make)


@contextmanager
def opened(*attentions: Any) -> Iterator[None]:
    """A scope of attentions: what they prepare is kept until its end. Of others than those of here there is none."""
    found = [] if torch.compiler.is_compiling() else [x for x in attentions if isinstance(x, Scoped)]
    for attention in found:
        attention.__dict__[_KEPT] = Kept()
    try:
        yield
    finally:
        for attention in found:
            attention._forget()


class Loop(Recipe):
    """A decoder whose forward attends the same states at each step: it opens a scope for its attentions."""

    probed = False
    serves = "keys are projected once a forward"
    tensors: ClassVar[Sizes] = {}
    attends: ClassVar[tuple[tuple[str, type[Scoped]], ...]]
    """Names of its attentions, and their recipes."""

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        if not cls.has_its_arguments(type(module)):
            return False
        found = [(module._modules.get(name), recipe) for name, recipe in cls.attends]
        return any(
            isinstance(inner, recipe) or (inner is not None and recipe.knows(inner) and not recipe.declines(inner))
            for inner, recipe in found
        )

    def _scope(self, steps: int) -> AbstractContextManager[None]:
        """What its attentions prepare is kept until the end, where there are several steps to use it."""
        modules: Any = self._modules  # type: ignore[attr-defined]
        return opened(*(modules.get(name) for name in {name for name, _ in self.attends} if steps > 1))
