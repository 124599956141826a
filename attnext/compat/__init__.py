"""Attention modules of other code bases, served by attnext's kernels: one file for each code base.

``attnext.accelerate(model)`` swaps those that it finds in a model. Where a code base is installed, its classes can also
be had by name, as for a new model: ``attnext.compat.espnet.AttLoc(...)`` takes what ESPnet's takes.

A new one is a file with its recipes (:class:`attnext.compat._recipe.Recipe`) and its name below.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from attnext.compat._recipe import Recipe

__all__ = ["CODE_BASES", "recipes"]

CODE_BASES = (
    "nn",
    "coqui",
    "keras",
    "espnet",
    "speechbrain",
    "tacotron2",
    "stanza",
    "rl4co",
    "torchmil",
    "doctr",
    "mmocr",
    "allennlp",
    "openspeech",
    "opennmt",
    "eole",
    "joeynmt",
    "fairseq",
    "gnmt",
    "tutorial",
)
"""The files with recipes; of several recipes that fit a module the first that passes the probe is taken."""


@cache
def recipes() -> tuple[type[Recipe], ...]:
    """All recipes of all code bases."""
    return tuple(recipe for name in CODE_BASES for recipe in importlib.import_module(f"{__name__}.{name}").RECIPES)


def __getattr__(name: str) -> Any:
    if name in CODE_BASES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
