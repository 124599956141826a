"""What is timed: one table of cases, and how much work each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnext import cases

__all__ = ["CASES", "Case", "Kind"]

Score = Literal["additive", "dot"]
Kind = Literal["forward", "forward + backward", "step", "scores", "backward of the scores"]

# Multiply-adds of the paired form, of each score element, and (times H) of each query and key. A score element is
# x = 1 + E F, its share of the division, the sum: 3. (Folded weights do with 2.25 and some additions, which other units
# take.) Backward, x, half a product, r, ds r and u are 4.5, after the scores once more, and the values are in two
# products beside the context's.
_WORK: dict[Kind, tuple[float, float]] = {
    "forward": (3.0, 1.0),
    "forward + backward": (3.0 + 3.0 + 4.5, 3.0),
    "step": (3.0, 1.0),
    "scores": (3.0, 0.0),
    "backward of the scores": (4.5, 0.0),
}
# Of dot products with keys that are the values: two products, and in backward the scores and dC . h again and three
# sums.
_WORK_OF_DOT: dict[Kind, float] = {"forward": 2.0, "step": 2.0, "forward + backward": 7.0}


@dataclass(frozen=True)
class Case:
    """One call to time. A step attends a prepared memory, for one query; its memory's preparation is not timed.

    The keys of dot products are the values. ``weights`` are returned, too. attnext's memory is ``held`` in a half type.
    """

    name: str
    kind: Kind
    batch: int
    queries: int
    keys: int
    features: int
    values: int = 0
    dtype: torch.dtype = torch.float32
    score: Score = "additive"
    weights: bool = False
    held: torch.dtype | None = None

    def __str__(self) -> str:
        sizes = f"B {self.batch}, Tq {self.queries}, Tk {self.keys}, D {self.features}"
        sizes += f", H {self.values}" if self.values else ""
        sizes += (", dot" if self.score == "dot" else "") + (", weights" if self.weights else "")
        return sizes + (f", memory in {str(self.held).removeprefix('torch.')}" if self.held else "")

    @property
    def differentiated(self) -> bool:
        """Whether gradients are what is timed; the other kinds run under ``no_grad``."""
        return self.kind in ("forward + backward", "backward of the scores")

    @property
    def only_scores(self) -> bool:
        return self.kind in ("scores", "backward of the scores")

    @property
    def elements(self) -> int:
        """Score elements, each a tanh: B Tq Tk D."""
        return self.batch * self.queries * self.keys * self.features

    @property
    def multiply_adds(self) -> float:
        """The bound: float32 multiply-adds of the paired form. The kernels' folded scores make do with fewer."""
        if self.score == "dot":
            return self.elements * _WORK_OF_DOT[self.kind]
        element, value = _WORK[self.kind]
        return self.elements * element + self.batch * self.queries * self.keys * self.values * value

    @property
    def memory_bytes(self) -> int:
        """What a step reads, keys and values; 0 for other kinds, which use what they read many times."""
        itemsize = (self.held or self.dtype).itemsize
        return itemsize * self.batch * self.keys * (self.features + self.values) if self.kind == "step" else 0

    def inputs(self, device: str) -> cases.Inputs:
        """The tensors, the same at every call, drawn as those of ``attnext verify``."""
        op: Literal["scores", "attention", "dot"] = "scores" if self.only_scores else "attention"
        shared = self.score == "dot"
        values = self.features if shared else self.values
        sizes = (self.batch, self.queries, self.keys, self.features, values)
        return cases.draw(cases.Case("dot" if shared else op, *sizes, self.dtype, shared=shared), 0, device)

    def arguments(self, inputs: cases.Inputs) -> list[Tensor]:
        """Query, key, value (unless only scores are wanted) and score weight, or query and key alone; detached."""
        value = [] if self.only_scores else [inputs.value]
        x = [inputs.query, inputs.key]
        x += [] if self.score == "dot" else [*value, inputs.score_weight]
        return [tensor.detach().requires_grad_(self.differentiated) for tensor in x]

    def incoming(self, inputs: cases.Inputs) -> Tensor:
        """The gradient of the result."""
        return inputs.grads["scores" if self.only_scores else "context"]


CASES = (
    Case("forward", "forward", 16, 128, 256, 256, 512),
    Case("training", "forward + backward", 16, 64, 256, 256, 512),
    Case("training-short", "forward + backward", 32, 32, 64, 256, 512),
    Case("step", "step", 64, 1, 64, 256, 512),
    Case("step-small", "step", 1, 1, 20, 128, 128),
    Case("step-large", "step", 64, 1, 1024, 256, 512),
    Case("step-large-bfloat16", "step", 64, 1, 1024, 256, 512, held=torch.bfloat16),
    Case("step-large-float16", "step", 64, 1, 1024, 256, 512, held=torch.float16),
    Case("dot-step", "step", 64, 1, 1024, 512, score="dot"),
    Case("dot-step-weights", "step", 64, 1, 1024, 512, score="dot", weights=True),
    Case("dot-beam", "step", 32, 5, 1024, 512, score="dot"),
    Case("dot-training", "forward + backward", 32, 50, 50, 512, score="dot"),
    Case("dot-queries", "forward + backward", 8, 256, 256, 64, score="dot"),
    Case("scores", "scores", 16, 128, 256, 256),
    Case("scores-backward", "backward of the scores", 16, 128, 256, 256),
    Case("forward-float16", "forward", 16, 128, 256, 256, 512, torch.float16),
    Case("forward-bfloat16", "forward", 16, 128, 256, 256, 512, torch.bfloat16),
    Case("dot-bfloat16", "forward", 16, 128, 256, 256, dtype=torch.bfloat16, score="dot"),
)
