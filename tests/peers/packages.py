"""Which packages the peers are in, and how their attention files are imported without what they depend on.

    python tests/peers/packages.py [FOLDER]    install them, without their dependencies, each into a folder of its own

A file of attention imports little of its package, but the package's own ``__init__`` imports everything. So a package
may be a skeleton here, an empty module with the real folder as its path, and what is imported and never called a
stand-in.
"""

from __future__ import annotations

import ast
import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / ".peers"


@dataclass(frozen=True)
class Package:
    """A peer on PyPI.

    Attributes:
        requirements: what pip installs, pinned, without dependencies.
        skeletons: packages whose own code is not run.
        stand_ins: modules that are not there, by name: what must be found in them; anything else in them is a class
            that does nothing. A function gets the folder of the package.
    """

    requirements: tuple[str, ...]
    skeletons: tuple[str, ...] = ()
    stand_ins: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    pip: tuple[str, ...] = ()


PACKAGES: dict[str, Package] = {
    "espnet": Package(
        ("espnet==202511",),
        stand_ins={
            "editdistance": {}, "humanfriendly": {}, "six": {}, "torch_complex": {}, "torch_complex.tensor": {},
            "typeguard": {"typechecked": lambda f=None, **_: f or (lambda g: g)},
            "espnet.asr.asr_utils": {}, "espnet.nets.e2e_asr_common": {}, "espnet.nets.ctc_prefix_score": {},
        },
    ),
}  # fmt: skip
"""By the name of the folder."""


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=_Anything):
    """Takes the place of what is imported and not used: a base class, a decorator, a function."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        decorates = cls is Nothing and len(arguments) == 1 and not options
        if decorates and isinstance(arguments[0], (type, types.FunctionType)):
            return arguments[0]
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return Nothing(*arguments, **options)

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


def parts(path: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Functions and classes of a file, without the rest of it."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope: dict[str, Any] = dict(known)
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return {name: scope[name] for name in names}


_prepared: set[str] = set()


def load(package: str, module: str) -> Any:
    """A module of a peer's package.

    Raises:
        FileNotFoundError: the packages are not installed.
    """
    folder = FOLDER / package
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: run `make peers`")
    if package not in _prepared:
        _prepare(package, folder)
    return importlib.import_module(module)


def _prepare(package: str, folder: Path) -> None:
    import os

    peer = PACKAGES[package]
    os.environ.update(peer.environment)
    sys.path.insert(0, str(folder))
    for name in peer.skeletons:
        _put(name, types.ModuleType(name), [str(folder.joinpath(*name.split(".")))])
    stand_ins = peer.stand_ins(folder) if callable(peer.stand_ins) else peer.stand_ins
    for name, contents in stand_ins.items():
        stand_in = _StandIn(name)
        stand_in.__dict__.update(contents)
        _put(name, stand_in, contents.get("__path__", []))
    logging.getLogger().addFilter(lambda record: record.levelno > logging.WARNING)  # one at each call, of some
    _prepared.add(package)


def _put(name: str, module: types.ModuleType, path: list[str]) -> None:
    if name in sys.modules and not isinstance(sys.modules[name], _StandIn) and name not in sys.stdlib_module_names:
        return  # the real one is installed
    module.__path__ = path
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = path
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def install(folder: Path = FOLDER) -> None:
    """Installs what is not there in the wanted versions."""
    for name, peer in PACKAGES.items():
        target, stamp = folder / name, folder / f"{name}.txt"
        wanted = "\n".join(peer.requirements)
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        print(f"{name}: {' '.join(peer.requirements)}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*command, "--target", str(target), *peer.pip, *peer.requirements], check=True)
        stamp.write_text(wanted)


if __name__ == "__main__":
    install(*(Path(argument) for argument in sys.argv[1:]))
