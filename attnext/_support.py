"""What the commands share: errors for bad input, optional packages, atomic files."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "InputError", "MissingExtra", "extra", "make_writable", "naming", "only_writer", "writable_file",
    "writable_picture", "write_atomically", "write_picture",
]  # fmt: skip

_PICTURES = (".png", ".svg", ".pdf")


class InputError(ValueError):
    """Something the user gave can't be used: a word, a folder, a file. The message is one line."""


class MissingExtra(ImportError):
    """A package of one of the extras is not installed."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of the packages of an extra: for a missing one, :class:`MissingExtra` says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtra(
            f"this needs the package {package!r}, which is not installed: pip install 'attnext[{name}]'"
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


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes that ask for the same out of it while the block runs; one
    that was made and stays empty is removed.

    Raises:
        InputError: it can't be written to, or another process is in it.
    """
    made = not folder.exists()
    make_writable(folder)
    try:
        with _locked(folder):
            yield
    finally:
        if made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"another process is at work in the folder {str(folder)!r}") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def writable_file(option: str, path: Path) -> None:
    """Makes sure, before long work, that the file of an option can be written; makes its folder if need be.

    Raises:
        InputError: it can't.
    """
    make_writable(path.parent)
    if path.is_dir():
        raise InputError(f"{option} must be a file, got the folder {str(path)!r}")
    if path.exists() and not path.is_file():  # a pipe or a device would be replaced
        raise InputError(f"{option} must be an ordinary file, got {str(path)!r}")


def writable_picture(option: str, path: Path) -> None:
    """The same of a picture, whose name says what it is to be.

    Raises:
        InputError: it can't be written, or is called by another suffix than those there are.
    """
    if path.suffix.lower() not in _PICTURES:
        raise InputError(f"{option} must end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}, got {str(path)!r}")
    writable_file(option, path)


def write_picture(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a figure as its file's name says, whole or not at all; the same figure gives the same bytes."""
    from matplotlib import rc_context

    kind, picture = path.suffix[1:].lower(), io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "attnext"}):
        figure.savefig(picture, format=kind, dpi=150, metadata=dates.get(kind, {}), **options)
    write_atomically(path, picture.getvalue())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file to an error that names none, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by one with this content, whole or not at all, also when the machine stops halfway."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
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
            with naming(path.parent):
                os.fsync(folder)
        finally:
            os.close(folder)
