"""One line for a model that exists: its attention modules by kernels, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from attnext.compat import recipes
from attnext.compat._probe import difference
from attnext.compat._recipe import Recipe, swapped

__all__ = ["Found", "Report", "accelerate", "restore"]


@dataclass(frozen=True)
class Found:
    """An attention module of a model.

    Attributes:
        name: its path in the model; empty for the model itself.
        kind: the name of its class.
        recipe: the code base and class that it was recognised as, as ``espnet.AttLoc``; empty where it was not.
        reason: why it was left alone; empty where it was swapped.
    """

    name: str
    kind: str
    recipe: str
    reason: str

    @property
    def swapped(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` found in a model. It prints as a table; it is true where a module was swapped."""

    found: tuple[Found, ...]

    @property
    def swapped(self) -> tuple[Found, ...]:
        return tuple(one for one in self.found if one.swapped)

    @property
    def left(self) -> tuple[Found, ...]:
        return tuple(one for one in self.found if not one.swapped)

    def __bool__(self) -> bool:
        return bool(self.swapped)

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        if not self.found:
            return "no module found that attnext knows"
        rows = [("module", "class", "recipe", "")]
        rows += [
            (one.name or "(the model)", one.kind, one.recipe or "-", f"left: {one.reason}" if one.reason else "swapped")
            for one in self.found
        ]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join("  ".join(x.ljust(n) for x, n in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows)


def accelerate(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    probe: bool = True,
) -> Report:
    """Makes attention modules and PyTorch's recurrent layers in a model call attnext's kernels, with the same results.

    A module whose parameters and arguments are those of a class in :mod:`attnext.compat`, wherever its code stands,
    gets a subclass of its own class that overrides ``forward``; nothing else changes: not its parameters, state_dict,
    optimizers, hooks or ``isinstance``. It is compared with the original first, in float64, in training and in
    evaluation, outputs and gradients; where these differ it is left alone. Where a kernel can't serve a call (another
    device or dtype, autocast, a traced, compiled or exported model, ``torch.func``) the original's forward does.

    A row without a visible key has context 0 where the original would give NaN. A pickle of the model is that of the
    original, which reads without attnext; accelerate it again after loading.

    Args:
        model: any module; an attention module itself, too.
        only: swap these alone: recipes ("espnet.AttLoc", "espnet.*") or paths in the model, patterns of
            :mod:`fnmatch`. A recipe that was not faster at realistic sizes is used only where it is named here.
        skip: leave these alone, likewise.
        probe: whether to compare. Without it a class must have the name that it has in its code base, too.

    Returns:
        Which modules were found, and for each whether it was swapped, or why not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted, unwanted = _patterns("only", only), _patterns("skip", skip)
    found = []
    for name, module in modules_of(model):
        one = _swap(name, module, wanted, unwanted, probe)
        if one is not None:
            found.append(one)
    return Report(tuple(found))


def restore(model: nn.Module) -> None:
    """Sets the classes of all modules that :func:`accelerate` has swapped back to their own.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for _, module in modules_of(model):
        if isinstance(module, Recipe):
            module._forget()
            original: Any = module._original
            module.__class__ = original


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model; of Keras's the layers too, which it keeps elsewhere."""
    seen = set()
    for name, module in model.named_modules():
        seen.add(id(module))
        yield name, module
        layers = getattr(module, "_flatten_layers", None)
        for layer in layers() if callable(layers) else ():
            if id(layer) not in seen and isinstance(layer, nn.Module):
                seen.add(id(layer))
                yield ".".join(filter(None, (name, getattr(layer, "name", type(layer).__name__)))), layer


def _patterns(name: str, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None or isinstance(given, str):
        return None if given is None else (given,)
    patterns = tuple(given)
    if not all(isinstance(x, str) for x in patterns):
        raise TypeError(f"{name} must be names, got {patterns!r}")
    return patterns


def _swap(
    name: str, module: nn.Module, only: tuple[str, ...] | None, skip: tuple[str, ...] | None, probe: bool
) -> Found | None:
    """Swaps a module where it can; None where it is no attention."""
    kind = type(module).__name__
    if isinstance(module, Recipe):
        return Found(name, kind, label(type(module)), "")
    if isinstance(module, torch.jit.ScriptModule):
        return None
    candidates = [recipe for recipe in recipes() if recipe.knows(module)]
    if not candidates:
        return Found(name, kind, "", "no recipe for its parameters and arguments") if _looks_like_one(module) else None
    candidates.sort(key=lambda recipe: class_name(recipe) != kind)  # the same name first
    reason = ""
    for recipe in candidates:
        reason = _reason(name, recipe, module, only, skip) or _unlike(recipe, module, probe)
        if not reason:
            module.__class__ = swapped(recipe, type(module))
            return Found(name, kind, label(recipe), "")
        if class_name(recipe) == kind:
            return Found(name, kind, label(recipe), reason)
    return Found(name, kind, label(recipe) if len(candidates) == 1 else "", reason)


def _reason(
    name: str, recipe: type[Recipe], module: nn.Module, only: tuple[str, ...] | None, skip: tuple[str, ...] | None
) -> str:
    """Why a module that a recipe knows is left alone; else empty."""
    if only is not None and not _named(only, name, recipe):
        return "not asked for"
    if skip is not None and _named(skip, name, recipe):
        return "to be skipped"
    if only is None and not recipe.pays:
        return f"not faster at realistic sizes; only={label(recipe)!r} swaps it all the same"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    declined = recipe.declines(module)
    if declined:
        return f"{declined}: not served"
    changed = recipe.changed_layer(module)
    return f"{changed} is not a plain layer, or has hooks" if changed else ""


def _unlike(recipe: type[Recipe], module: nn.Module, probe: bool) -> str:
    """What is known to differ from the class of a recipe."""
    if not recipe.probed or (not probe and class_name(recipe) == type(module).__name__):
        return ""
    return difference(recipe, module) if probe else f"its name is not {class_name(recipe)}, and it may not be tried"


def _named(patterns: tuple[str, ...], name: str, recipe: type[Recipe]) -> bool:
    known = (name, label(recipe), label(recipe).partition(".")[0])
    return any(fnmatchcase(x, pattern) for pattern in patterns for x in known)


def _looks_like_one(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False)) or len(module._modules) > 0
    named = re.search(r"(attention|attn)(layer|module|block)?$", type(module).__name__, re.IGNORECASE) is not None
    return own and named and not type(module).__module__.startswith(("torch.", "attnext."))


def label(recipe: type[Recipe]) -> str:
    """As ``espnet.AttLoc``."""
    return f"{recipe.__module__.rpartition('.')[2]}.{class_name(recipe)}"


def class_name(recipe: type[Recipe]) -> str:
    """The name of the class in its code base."""
    return recipe.original.partition(":")[2]
