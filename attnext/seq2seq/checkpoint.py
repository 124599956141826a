"""A trained model in a folder: tensors in safetensors, and a JSON file that says what they are.

The tensors' file is named by its checksum and written first. ``checkpoint.json`` has that checksum, and
replaces the one before it in one move: at any time a folder holds one whole checkpoint, new or old.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attnext._support import InputError, extra, make_writable, write_atomically
from attnext.seq2seq.data import LETTERS, PHONEMES, Vocabulary
from attnext.seq2seq.model import ModelConfig, Seq2Seq

__all__ = ["FORMAT", "Checkpoint", "load", "save"]

FORMAT = 1
"""Raised whenever a release can't read the checkpoints of the one before."""

_JSON = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with what its numbers mean, and how it did.

    Attributes:
        model: the model.
        source: the vocabulary of its inputs.
        target: the vocabulary of its outputs.
        metrics: anything JSON can say of its training.
    """

    model: Seq2Seq
    source: Vocabulary = LETTERS
    target: Vocabulary = PHONEMES
    metrics: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in place of the one in that folder, if there is one.

    Raises:
        InputError: the folder can't be written to.
        MissingExtra: safetensors is not installed.
    """
    with extra("demo"):
        from safetensors.torch import save as serialize
    make_writable(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    content = serialize(state)
    digest = hashlib.sha256(content).hexdigest()
    record = {
        "format": FORMAT,
        "weights_sha256": digest,
        "config": asdict(checkpoint.model.config),
        "source_symbols": checkpoint.source.symbols,
        "target_symbols": checkpoint.target.symbols,
        "metrics": checkpoint.metrics,
    }
    weights = _weights_file(folder, digest)
    write_atomically(weights, content)
    write_atomically(folder / _JSON, json.dumps(record, indent=1).encode())
    for old in folder.glob(_weights_file(folder, "*").name):
        if old != weights:
            old.unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint; its model is in evaluation mode.

    Raises:
        InputError: there is none, it is damaged, or it was written by a release with another format.
        MissingExtra: safetensors is not installed.
    """
    record = _read_json(folder / _JSON)
    if record.get("format") != FORMAT:
        raise InputError(
            f"the checkpoint in {str(folder)!r} has format {record.get('format')!r}, this release reads format {FORMAT}"
        )
    try:
        source = Vocabulary(tuple(map(str, record["source_symbols"])))
        target = Vocabulary(tuple(map(str, record["target_symbols"])))
        config = ModelConfig(**record["config"])
        digest, metrics = str(record["weights_sha256"]), dict(record["metrics"])
        if (config.source_symbols, config.target_symbols) != (len(source), len(target)):
            raise ValueError("config and vocabularies differ in size")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(folder / _JSON)!r} is damaged: {error!r}") from error
    model = Seq2Seq(config)
    _fill(model, _read_weights(_weights_file(folder, digest), digest), folder)
    return Checkpoint(model.eval(), source, target, metrics)


def _weights_file(folder: Path, digest: str) -> Path:
    return folder / f"weights-{digest[:12]}.safetensors"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"no checkpoint in {str(file.parent)!r}: {file.name}: {error.strerror}") from error


def _read_json(file: Path) -> dict[str, Any]:
    content = _read(file)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, not even text, or a million brackets
        raise InputError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{str(file)!r} is damaged: it should hold an object, got {type(record).__name__}")
    return record


def _read_weights(file: Path, digest: str) -> dict[str, Tensor]:
    with extra("demo"):
        from safetensors import SafetensorError
        from safetensors.torch import load as deserialize
    content = _read(file)
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{str(file)!r} is damaged: its checksum is not the one in {_JSON}")
    try:
        return deserialize(content)
    except SafetensorError as error:
        raise InputError(f"{str(file)!r} is damaged: {error}") from error


def _fill(model: Seq2Seq, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copies the tensors into the model, once they are all there and have the right shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise InputError(
                f"the checkpoint in {str(folder)!r} doesn't fit its configuration: {name} should have shape "
                f"{expected.get(name, 'none')}, got {got.get(name, 'none')}"
            )
    model.load_state_dict(tensors)
