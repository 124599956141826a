"""What the commands' options share: types of arguments, and the backend that was asked for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from attnext._support import InputError
from attnext.backends import choose

__all__ = ["finite", "non_negative", "path_argument", "positive", "require_backend"]


def require_backend(name: str | None, device_type: str = "cpu") -> None:
    """One that can't serve such tensors, asked for by name or in ATTNEXT_BACKEND, is the user's error.

    Raises:
        InputError: the message says why.
    """
    try:
        choose(name, device_type)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """The type of an argument that is a finite number above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} above 0, got {text!r}")
        return value

    return parse


def finite(text: str) -> float:
    """The type of an argument that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def non_negative(text: str) -> int:
    """The type of an argument that is a 64-bit integer of at least 0."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to below 2**63, got {text!r}")
    return int(text)


def path_argument(text: str) -> Path:
    """The type of an argument that is a file or a folder; an empty one, of an unset variable, would be this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)
