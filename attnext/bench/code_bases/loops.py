"""Programs of decoders whose forward is a loop over steps, with the attention inside swapped too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from attnext.bench.code_bases.program import Program, Sizes


def loop(
    recipe: str,
    kind: str,
    make: Callable[[Sizes], nn.Module],
    inputs: Any,
    run: Callable[..., Sequence[Tensor]],
    *inert: str,
    **options: Any,
) -> Program:
    """The decoder stands in a model under the name of its recipe, so that what is inside is asked for as well."""
    code_base, _, decoder = recipe.partition(".")

    def made(s: Sizes) -> nn.Module:
        return nn.ModuleDict({code_base: nn.ModuleDict({decoder: make(s)})})

    def called(model: Any, s: Sizes, *given: Tensor) -> Sequence[Tensor]:
        return run(model[code_base][decoder], s, *given)

    names = tuple(f"{recipe}.{name}" for name in inert)
    return Program(f"{recipe} {kind}", made, inputs, called, names, **{"takes_half": False, **options})
