"""How a test uses a module of a peer, as its code base would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Batch, keys, query size, state size, attention size, and how many keys of each row are real."""

    batch: int
    keys: int
    query: int
    states: int
    features: int
    lengths: tuple[int, ...]
    steps: int = 3
    filters: int = 3
    reach: int = 2
    """Of the filters over the past, on both sides of a key."""

    @property
    def width(self) -> int:
        return 2 * self.reach + 1


SIZES = (
    Sizes(3, 7, 5, 6, 4, (7, 5, 2)),
    Sizes(1, 1, 1, 1, 1, (1,)),
    Sizes(2, 33, 17, 19, 37, (33, 1)),
    Sizes(4, 70, 24, 8, 66, (70, 64, 13, 65)),
)


@dataclass(frozen=True)
class Program:
    """A module, its inputs, and a few calls of it.

    Attributes:
        name: the recipe, as ``espnet.AttLoc``, then what distinguishes the program.
        make: the module of these sizes.
        inputs: tensors of these sizes, drawn by a function that takes sizes; they are differentiated.
        run: the calls, of a module, the sizes and the inputs, with whatever is kept between them; all results.
        inert: parameters that change no result, whose gradient is 0.
        takes_half: whether the original runs in half types.
        within_twice: whether errors stay within twice the original's: the kernels' grow with the sum of all |v|.
        pickles: whether it can be pickled.
        exact: the dtype in which results are compared, where the original can't run in float64.
        served: whether kernels serve some of it in evaluation, or all is left to the original.
    """

    name: str
    make: Callable[[Sizes], nn.Module]
    inputs: Callable[[Sizes, Callable[..., Tensor]], Sequence[Tensor]]
    run: Callable[..., Sequence[Tensor]]
    inert: tuple[str, ...] = ()
    takes_half: bool = True
    within_twice: bool = True
    pickles: bool = True
    exact: torch.dtype = torch.float64
    served: bool = True

    @property
    def recipe(self) -> str:
        return self.name.partition(" ")[0]

    def drawn(self, sizes: Sizes, dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return [x.to(dtype).requires_grad_() for x in self.inputs(sizes, draw)]

    def results(self, module: Any, sizes: Sizes, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs, and gradients by name."""
        outputs = [x for x in self.run(module, sizes, *inputs) if x.is_floating_point()]
        generator = torch.Generator().manual_seed(2)
        followed = [x for x in outputs if x.requires_grad]
        incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in followed]
        names = [f"input {k}" for k in range(len(inputs))] + [name for name, _ in module.named_parameters()]
        leaves = [*inputs, *module.parameters()]
        grads = torch.autograd.grad(followed, leaves, incoming, allow_unused=True)
        return [x.detach() for x in outputs], {n: g for n, g in zip(names, grads, strict=True) if g is not None}
