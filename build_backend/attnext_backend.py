"""The PEP 517 build backend: setuptools', plus a torch to build against where the target has none.

A fixed torch requirement would make pip download a second torch of several GB into its isolated build
environment. The extension uses LibTorch's stable ABI only: one library serves every torch from 2.13 on.
So the torch that is already in the target environment will do, or any other where there is none.
"""

from __future__ import annotations

from typing import Any

from attnext_build_ext import extension_wanted, find_compiler, find_torch
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

BUILD_TORCH = "torch==2.13.0"


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def _torch_requirement() -> list[str]:
    builds = extension_wanted() != "0" and find_compiler() is not None
    return [BUILD_TORCH] if builds and find_torch() is None else []
