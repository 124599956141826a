"""Whether a swapped module gives what the original gives: outputs and gradients on small random inputs."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attnext.compat._recipe import Recipe, Trial, swapped

__all__ = ["difference"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of a number beside the largest of its tensor. Some originals make float32 tensors of their own and can't be float64:
those are compared in float32."""


def difference(recipe: type[Recipe], module: nn.Module) -> str:
    """What differs between a module and its copy with the recipe's class; empty where nothing does.

    In training and in evaluation, in float64. The module, torch's random state and its own buffers and caches are as
    before, as copies of it are called.
    """
    try:
        for dtype in (torch.float64, torch.float32):
            reason, original_fails = _compare(recipe, module, dtype)
            if not original_fails:
                return reason
    except Exception as error:  # whatever another's code does, the model is left as it is
        return f"its copy could not be tried: {type(error).__name__}: {_first_line(error)}"
    return f"the original could not be tried: {reason}"


def _compare(recipe: type[Recipe], module: nn.Module, dtype: torch.dtype) -> tuple[str, bool]:
    generator = torch.Generator().manual_seed(20)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    trial = recipe.trial(module, draw)
    with torch.enable_grad(), _alone():
        for training in (True, False):
            try:
                expected = _results(_copied(module, dtype, training), trial)
            except Exception as error:
                return f"{type(error).__name__}: {_first_line(error)}", True
            ours = _copied(module, dtype, training)
            ours.__class__ = swapped(recipe, type(module))
            found = _results(ours, trial)
            if where := _first_difference(found, expected, _TOLERANCE[dtype]):
                return f"{where} differs from the original's in {'training' if training else 'evaluation'}", False
    return "", False


def _alone() -> Any:
    """Without the caller's autocast."""
    return torch.autocast("cpu", enabled=False) if torch.amp.is_autocast_available("cpu") else nullcontext()


def _copied(module: nn.Module, dtype: torch.dtype, training: bool) -> nn.Module:
    """A copy on the CPU, without hooks, whose kept tensors are detached."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for name, value in inner.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
            else:
                for x in _tensors_in(value):
                    if not x.is_leaf:
                        memo[id(x)] = x.detach().clone()
    copied = copy.deepcopy(module, memo).to("cpu", dtype).train(training)
    for parameter in copied.parameters():
        parameter.requires_grad_()
    return copied


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in _tensors_in(part)]
    if isinstance(value, dict):
        return [x for part in value.values() for x in _tensors_in(part)]
    return []


def _results(module: nn.Module, trial: Trial) -> dict[str, Tensor | None]:
    """Outputs and gradients, by a name for each; torch's random state is as before, also where the module fails."""
    inputs = [x.detach().clone().requires_grad_() for x in trial.inputs]
    with torch.random.fork_rng(devices=[]):
        outputs = [x for x in trial.run(module, *inputs) if x.is_floating_point()]
    names = [f"the gradient of input {k}" for k in range(len(inputs))]
    names += [f"the gradient of {name}" for name, _ in module.named_parameters()]
    followed = [x for x in outputs if x.requires_grad]
    generator = torch.Generator().manual_seed(21)
    incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in followed]
    found = torch.autograd.grad(followed, [*inputs, *module.parameters()], incoming, allow_unused=True)
    grads: tuple[Tensor | None, ...] = found
    return {f"output {k}": x.detach() for k, x in enumerate(outputs)} | dict(zip(names, grads, strict=True))


def _first_difference(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> str:
    if found.keys() != expected.keys():
        return "the number of results"
    for name, right in expected.items():
        ours = found[name]
        if right is None and (ours is None or not ours.any()):
            continue
        if ours is None or right is None or ours.shape != right.shape or ours.dtype != right.dtype:
            return name
        largest = right.abs().nan_to_num().max() if right.numel() else right.new_zeros(())
        if not torch.allclose(ours, right, rtol=0.0, atol=tolerance * (1.0 + float(largest)), equal_nan=True):
            return name
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
