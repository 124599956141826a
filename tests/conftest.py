"""What every test runs under."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoder_cases import FORMS, KINDS, Case, Decoder, recorded

from attnext import _extension

_registry: Any = importlib.import_module("attnext.backends")  # attnext.backends is the function of that name


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills new tensors and scratch memory with NaN, so that a number which a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    if module := _extension.load():
        module.set_poison(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _no_choice_remembered() -> Iterator[None]:
    """A choice of backend warns once in a process: which test was the first must not matter."""
    _registry._resolved.cache_clear()
    yield
    _registry._resolved.cache_clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and wait for each other where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_EXTENSION = _extension.load()


@pytest.fixture(params=_EXTENSION.instruction_sets() if _EXTENSION else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this machine can run."""
    assert _EXTENSION is not None
    before = _EXTENSION.instruction_set()
    _EXTENSION.set_instruction_set(request.param)
    yield request.param
    _EXTENSION.set_instruction_set(before)


# Of the tests of decoders.


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Decoder]:
    found: type[Decoder] = request.param
    return found


@pytest.fixture(params=FORMS, ids=lambda case: "-".join(map(str, case[:3])))
def form(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Of the operator of the forward pass."""
    return recorded(monkeypatch)
