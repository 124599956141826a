"""Tensors in a folder, in safetensors, with a JSON file that says what they are: trained models, and runs to resume.

The tensors' file is named by its checksum and written first. The JSON file has that checksum, and replaces the one
before it in one move: at any time a folder holds one whole record of each name, new or old.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnext._support import InputError, extra, make_writable, write_atomically
from attnext.seq2seq import formats
from attnext.seq2seq.config import Config
from attnext.seq2seq.data import Corpus, Vocabulary
from attnext.seq2seq.model import Seq2Seq

__all__ = [
    "FORMAT",
    "Checkpoint",
    "fill",
    "fit",
    "load",
    "read_json",
    "read_record",
    "save",
    "tensors_of",
    "tidy",
    "write_record",
]

FORMAT = 3
"""Raised when releases before can't read what this one writes; what this one reads of theirs is in ``formats``."""
_NOT_SO = (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
"""What may come of records and tensors that are not what they must be."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with what its numbers mean, where it comes from, and how it did.

    Attributes:
        model: the model.
        source: the vocabulary of its inputs.
        target: the vocabulary of its outputs.
        corpus: the data it was made with.
        metrics: anything JSON can say of its training.
        longest: symbols of the longest output it was trained on but for one in a thousand, the end mark included.
    """

    model: Seq2Seq
    source: Vocabulary
    target: Vocabulary
    corpus: Corpus = field(default_factory=Corpus)
    metrics: dict[str, Any] = field(default_factory=dict)
    longest: int = 0

    def description(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {
            "config": asdict(self.model.config),
            "source": asdict(self.source),
            "target": asdict(self.target),
            "corpus": asdict(self.corpus),
            "longest": self.longest,
            "metrics": self.metrics,
        }

    @classmethod
    def described(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Checkpoint:
        """A model with its parameters as drawn, of such a description, once these tensors are seen to fit it.

        Raises:
            AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError: it is none.
        """
        source, target = (Vocabulary(**_tuples(record[side])) for side in ("source", "target"))
        config = Config(**record["config"])
        if config.encoder_layers + config.decoder_layers > len(tensors):
            raise ValueError(f"it has more layers than there are tensors, {len(tensors)}")
        with torch.device("meta"):  # without numbers: the sizes may be anything
            fit(tensors_of(Seq2Seq(config, len(source), len(target))), tensors, folder)
        model = Seq2Seq(config, len(source), len(target))
        corpus, longest = Corpus(**_tuples(record["corpus"])), int(record.get("longest", 0))
        return cls(model, source, target, corpus, dict(record["metrics"]), longest)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in place of the one in that folder, if there is one.

    Raises:
        InputError: the folder can't be written to.
        MissingExtra: safetensors is not installed.
        OSError: a file can't be written; the checkpoint that was there still is.
    """
    make_writable(folder)
    write_record(folder, "checkpoint", tensors_of(checkpoint.model), checkpoint.description())


def load(folder: Path | str) -> Checkpoint:
    """Reads the checkpoint of a folder; its model is in evaluation mode.

    Raises:
        InputError: there is none, it is damaged, or it was written by a release with another format.
        MissingExtra: safetensors is not installed.
    """
    folder = Path(folder)
    record, tensors = read_record(folder, "checkpoint")
    try:
        checkpoint = Checkpoint.described(record, tensors, folder)
    except InputError:
        raise
    except _NOT_SO as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{str(folder / 'checkpoint.json')!r} is damaged: {reason}") from error
    if {x.dtype for x in tensors.values()} == {torch.float64}:
        checkpoint.model.double()
    fill(tensors_of(checkpoint.model), tensors, folder)
    checkpoint.model.eval()
    return checkpoint


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, each once."""
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def write_record(folder: Path, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replaces the folder's record of this name; see :func:`save` for the errors."""
    with extra("demo"):
        from safetensors.torch import save as serialize
    content = serialize({key: x.cpu().contiguous() for key, x in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    file = _tensor_file(folder, name, digest)
    write_atomically(file, content)
    text = json.dumps({"format": FORMAT, "tensors_sha256": digest} | dict(record), indent=1)
    write_atomically(folder / f"{name}.json", text.encode())
    tidy(folder, name, digest)


def tidy(folder: Path, name: str, digest: str) -> None:
    """Deletes what a process that was killed has left of earlier records of this name, and nobody else's files."""
    kept, hexadecimal = _tensor_file(folder, name, digest), "[0-9a-f]" * 12
    for pattern in (f"{name}-{hexadecimal}.safetensors", f".{name}-{hexadecimal}.safetensors.*", f".{name}.json.*"):
        for old in folder.glob(pattern):
            if old != kept:
                old.unlink(missing_ok=True)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The folder's record of this name; see :func:`load` for the errors."""
    record = _read_json(folder / f"{name}.json")
    if record.get("format") not in (formats.OLD, FORMAT):
        raise InputError(
            f"the {name} in {str(folder)!r} has format {record.get('format')!r}, this release reads formats "
            f"{formats.OLD} and {FORMAT}"
        )
    return record


def read_record(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The folder's record of this name and its tensors; see :func:`load` for the errors."""
    while True:
        record = read_json(folder, name)
        digest = record.get("tensors_sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            file = str(folder / f"{name}.json")
            raise InputError(f"{file!r} is damaged: it should name its tensors, got {digest!r}")
        try:
            tensors = _read_tensors(_tensor_file(folder, name, digest), digest)
        except InputError:
            if read_json(folder, name).get("tensors_sha256") == digest:
                raise
            continue  # it was replaced in the meantime
        return record, tensors if record["format"] == FORMAT else _renewed(tensors, record, folder / f"{name}.json")


def _renewed(tensors: Mapping[str, Tensor], record: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    try:
        return formats.renewed(tensors, record["config"])
    except _NOT_SO as error:
        raise InputError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error


def fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Makes sure that tensors of the same names are all there, with the right shapes, and floats for floats.

    Raises:
        InputError: they aren't.
    """
    expected, got = ({name: tuple(x.shape) for name, x in some.items()} for some in (own, tensors))
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise InputError(
                f"the tensors in {str(folder)!r} don't fit their configuration: {name} should have shape "
                f"{expected.get(name, 'none')}, got {got.get(name, 'none')}"
            )
        if tensors[name].is_floating_point() != own[name].is_floating_point():
            raise InputError(
                f"the tensors in {str(folder)!r} don't fit their configuration: {name} is of {tensors[name].dtype}"
            )


def fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies tensors into those of the same names; see :func:`fit` for the errors."""
    fit(own, tensors, folder)
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(tensors[name])


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where these classes have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def _tensor_file(folder: Path, name: str, digest: str) -> Path:
    return folder / f"{name}-{digest[:12]}.safetensors"


def _read(file: Path) -> bytes:
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # which would never end, or wait for ever
            raise InputError(f"{str(file)!r} must be an ordinary file")
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


def _read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    with extra("demo"):
        from safetensors import SafetensorError
        from safetensors.torch import load as deserialize
    content = _read(file)
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{str(file)!r} is damaged: its checksum is not the one in the JSON file")
    try:
        return deserialize(content)
    except (SafetensorError, *_NOT_SO) as error:  # a KeyError: of a type that it doesn't know
        raise InputError(f"{str(file)!r} is damaged: {error}") from error
