"""One configuration for the model and its training: a dataclass, a TOML file, and options of the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from attnext._support import InputError, extra
from attnext.attention.family import STEPPED
from attnext.cli import path_argument

__all__ = ["ATTENTIONS", "Config", "add_arguments", "from_toml", "given"]

ATTENTIONS = (*STEPPED, "none")
"""The names of ``Config.attention``: every attention of the package that a decoder can step, and none at all."""


class _Kind(NamedTuple):
    """What a field may hold: of these types, which one check accepts, and what to say otherwise."""

    types: tuple[type, ...]
    holds: Callable[[Any], bool]
    text: str
    choices: Sequence[str] = ()


def _choice(*names: str) -> _Kind:
    return _Kind((str,), lambda x: x in names, f"one of {', '.join(names)}", names)


_COUNT = _Kind((int,), lambda x: x >= 1, "an integer of at least 1")
_SEED = _Kind((int,), lambda x: 0 <= x < 2**63, "an integer from 0 to below 2**63")
_SHARE = _Kind((float, int), lambda x: 0 <= x < 1, "a number from 0 to below 1")
_POSITIVE = _Kind((float, int), lambda x: 0 < x < math.inf, "a number above 0")
_FLAG = _Kind((bool,), lambda x: True, "true or false")


def _field(default: Any, kind: _Kind, text: str) -> Any:
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass(frozen=True)
class Config:
    """A model and how it is trained; ``attnext train --help`` has a line on each field.

    Without ``minutes`` and ``epochs`` training takes five minutes. With ``minutes`` the clock sets the learning rate,
    so that two runs differ; with ``epochs`` alone a run repeats bit for bit.

    Raises:
        ValueError: a field is not what it must be; the message names it.
    """

    cell: str = _field("gru", _choice("gru", "lstm"), "recurrent unit")
    attention: str = _field("additive", _choice(*ATTENTIONS), "what attends, or none: one fixed context")
    embedding_size: int = _field(64, _COUNT, "of a symbol's vector, on both sides")
    encoder_size: int = _field(128, _COUNT, "of the encoder's state, in each direction")
    encoder_layers: int = _field(1, _COUNT, "of the encoder")
    bidirectional: bool = _field(True, _FLAG, "read the source from both ends")
    decoder_size: int = _field(192, _COUNT, "of the decoder's state")
    decoder_layers: int = _field(1, _COUNT, "of the decoder")
    attention_size: int = _field(96, _COUNT, "of the space in which states are compared")
    input_feeding: bool = _field(False, _FLAG, "the last step's output vector enters the next step (Luong 2015)")
    tied_embeddings: bool = _field(False, _FLAG, "the output's matrix is the embedding of the outputs (Press 2017)")
    dropout: float = _field(0.0, _SHARE, "share of values dropped, of embeddings, states and output vectors")
    label_smoothing: float = _field(0.0, _SHARE, "share of the target spread over all symbols")
    vocabulary_size: int = _field(32_000, _COUNT, "symbols of a vocabulary at most, the most frequent")
    batch_size: int = _field(256, _COUNT, "pairs in a step, of all processes together")
    learning_rate: float = _field(3e-3, _POSITIVE, "its peak, after the warm-up")
    warm_up: float = _field(0.05, _SHARE, "share of the run in which it rises; then it falls on half a cosine")
    weight_decay: float = _field(0.0, _SHARE, "decoupled from the gradient (AdamW)")
    clip: float = _field(1.0, _POSITIVE, "largest norm of a step's gradient")
    average: float = _field(
        0.0, _SHARE, "decay of the running mean of the parameters that is evaluated, early a shorter one; 0: none"
    )
    patience: int = _field(20, _COUNT, "stop after so many epochs in which the error on held-out data did not fall")
    epochs: int | None = _field(None, _COUNT, "times through the data")
    minutes: float | None = _field(None, _POSITIVE, "time to train (default 5, or no limit with epochs)")
    amp: bool = _field(False, _FLAG, "matrix products in bfloat16, parameters in float32")
    seed: int = _field(0, _SEED, "of parameters, dropout and the order of the data")

    def __post_init__(self) -> None:
        for one in fields(self):
            kind, value = one.metadata["kind"], getattr(self, one.name)
            optional = one.default is None and value is None
            # A bool is an int to Python, not to a reader.
            right = type(value) in kind.types and kind.holds(value)
            if not (optional or right):
                raise ValueError(f"{one.name} must be {kind.text}, got {value!r}")
        if self.minutes is None and self.epochs is None:
            object.__setattr__(self, "minutes", 5.0)

    def rate(self, done: float) -> float:
        """The learning rate when this share of the run is over."""
        if done < self.warm_up:
            return self.learning_rate * done / self.warm_up
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up)))


def from_toml(path: Path) -> dict[str, Any]:
    """The fields that a TOML file sets.

    Raises:
        InputError: it can't be read, is not TOML, or names what is no field or not what that must be.
        MissingExtra: Python is older than 3.11 and tomli is not installed.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        with extra("demo"):
            import tomli as tomllib
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"can't read the configuration {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"the configuration {str(path)!r} is not TOML: {error}") from error
    if unknown := sorted(found.keys() - {one.name for one in fields(Config)}):
        raise InputError(f"the configuration {str(path)!r} has unknown fields: {', '.join(map(repr, unknown))}")
    try:
        Config(**found)
    except ValueError as error:
        raise InputError(f"the configuration {str(path)!r}: {error}") from error
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every field of the configuration; those not given leave no trace."""
    group = parser.add_argument_group("model and training", "also as fields of a TOML file, with _ for -")
    group.add_argument(
        "--config", type=path_argument, metavar="TOML", help="a file of these; options given beside it win"
    )
    for one in fields(Config):
        kind: _Kind = one.metadata["kind"]
        name = "--" + one.name.replace("_", "-")
        names = f": {', '.join(kind.choices)}" if kind.choices else ""
        shown = "" if one.default is None else f" (default {one.default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": one.metadata["text"] + names + shown}
        if kind is _FLAG:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        elif kind.choices:
            group.add_argument(name, choices=kind.choices, **options | {"metavar": "NAME"})
        else:
            group.add_argument(name, type=_parser(kind), metavar="N", **options)


def given(args: argparse.Namespace) -> Mapping[str, Any]:
    """The fields that a command line sets, by its TOML file or its options."""
    names = {one.name for one in fields(Config)}
    of_file = from_toml(args.config) if args.config is not None else {}
    return of_file | {name: value for name, value in vars(args).items() if name in names}


def _parser(kind: _Kind) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind.types[0](text)
            right = kind.holds(value)
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"must be {kind.text}, got {text!r}")
        return value

    return parse
