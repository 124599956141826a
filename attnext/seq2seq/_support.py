"""What every part of the reference model shares: errors for bad input, optional packages, atomic files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["InputError", "MissingExtra", "demo_extra", "make_writable", "write_atomically"]


class InputError(ValueError):
    """Something the user gave can't be used: a word, a folder, a checkpoint. The message is one line."""


class MissingExtra(ImportError):
    """A package of the ``demo`` extra is not installed."""


@contextmanager
def demo_extra() -> Iterator[None]:
    """Around imports of optional packages: for a missing one, :class:`MissingExtra` names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtra(
            f"this needs the package {package!r}, which is not installed: pip install 'attnext[demo]'"
        ) from error


def make_writable(folder: Path) -> None:
    """Makes the folder if need be, and makes sure that files can be written there.

    Raises:
        InputError: they can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write to the folder {str(folder)!r}: {error.strerror}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by one with this content, whole or not at all, also when the machine stops halfway."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would keep colleagues out
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
