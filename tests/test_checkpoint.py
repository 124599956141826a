"""Checkpoints: written whole or not at all, and what is said of damaged ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialize
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    VARIANTS,
    checkpoint_of,
    equal,
    ten,
    tiny,
)
from torch import Tensor

from attnext.seq2seq import InputError, checkpoint, formats
from attnext.seq2seq.checkpoint import Checkpoint, load, save, tensors_of
from attnext.seq2seq.data import (
    Corpus,
)
from attnext.seq2seq.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_checkpoint_comes_back(tmp_path: Path) -> None:
    model = tiny("lstm", torch.float32, **VARIANTS["all at once"], attention="coverage", epochs=7)
    corpus = Corpus("pairs", ("a", "b"), ("c", "d"), units=("characters", "words"))
    before = Checkpoint(model.train(), LETTERS, PHONEMES, corpus, {"test": {"symbol_errors": 0.5}})
    save(tmp_path / "new" / "folder", before)
    after = load(tmp_path / "new" / "folder")
    assert after.description() == before.description()
    assert (after.source, after.target, after.corpus) == (LETTERS, PHONEMES, corpus)
    assert after.metrics == {"test": {"symbol_errors": 0.5}}
    assert after.model.config == model.config
    assert not after.model.training
    assert equal(after.model, model)
    assert after.model.decoder.output.weight is after.model.decoder.embedding.weight


def test_a_checkpoint_of_float64(tmp_path: Path) -> None:
    save(tmp_path, checkpoint_of(tiny()))
    assert load(tmp_path).model.decoder.output.weight.dtype == torch.float64
    assert equal(load(tmp_path).model, tiny())


def of_format_2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model as the release before wrote them: matrices cut into parts, an LSTM's candidate last."""
    found, depths = {}, range(config["decoder_layers"])
    lowest = [config["embedding_size"], config["encoder_size"] * 2]
    lowest += [config["decoder_size"]] if config["input_feeding"] else []

    def ordered(x: Tensor) -> Tensor:
        take, keep, candidate, show = x.chunk(4)
        return torch.cat((take, keep, show, candidate)) if config["cell"] == "lstm" else x

    for name, x in tensors.items():
        if not name.startswith("decoder.recurrent."):
            found[name] = x
        elif "_l" not in name:
            found[name.replace("recurrent.", "")] = x
    for k in depths:
        w_input, w_hidden, b_input, b_hidden = (
            tensors[f"decoder.recurrent.{name}_l{k}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        names = ("embedded", "context", "feed") if k == 0 else ("below",)
        sizes = lowest if k == 0 else [w_input.shape[1]]
        for name, part in zip(names, w_input.split(sizes, 1), strict=False):
            found[f"decoder.layers.{k}.weights.{name}"] = ordered(part)
        found[f"decoder.layers.{k}.weights.recurrent"] = ordered(w_hidden)
        if config["cell"] == "lstm":
            found[f"decoder.layers.{k}.bias"] = ordered(b_input + b_hidden)
        else:
            found |= {f"decoder.layers.{k}.bias": b_input, f"decoder.layers.{k}.recurrent_bias": b_hidden}
    return found


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("variant", ["plain", "input feeding", "two decoder layers"])
def test_a_checkpoint_of_the_format_before(tmp_path: Path, cell: str, variant: str) -> None:
    model = tiny(cell, **VARIANTS[variant])
    save(tmp_path, checkpoint_of(model))
    record = json.loads((tmp_path / "checkpoint.json").read_text())
    old = of_format_2(tensors_of(model), record["config"])
    assert not any("decoder.recurrent" in name for name in old)
    content = serialize({name: x.contiguous() for name, x in old.items()})
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / f"checkpoint-{digest[:12]}.safetensors").write_bytes(content)
    (tmp_path / "checkpoint.json").write_text(json.dumps(record | {"format": 2, "tensors_sha256": digest}))
    source, previous = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        logits = [one(source, torch.tensor([3]), previous) for one in (model, load(tmp_path).model)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


def test_a_run_of_the_format_before_goes_on(tmp_path: Path) -> None:
    """Parameters, their mean, and the moments of gradients, which two biases in place of one have alike."""
    model = tiny("lstm", **VARIANTS["input feeding"], average=0.5)
    trainer = Trainer(model, ten())
    next(iter(trainer.steps()))
    tensors, progress = trainer.state()
    config = dataclasses.asdict(model.config)
    by_part: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        part, _, rest = name.partition(".")
        by_part.setdefault(part, {})[rest] = x
    old: dict[str, Tensor] = {}
    for part, some in by_part.items():
        of_part = dict(some)
        if part.startswith("exp_avg"):  # of one bias: the gradients of both
            of_part |= {name: x * 0 for name, x in some.items() if "bias_hh" in name}
        old |= {f"{part}.{name}": x for name, x in of_format_2(of_part, config).items()}
    renewed = formats.renewed(old, config)
    again = Trainer(tiny("lstm", **VARIANTS["input feeding"], average=0.5, seed=2), ten())
    again.go_on(renewed, progress, tmp_path)
    for name, x in tensors_of(model).items():
        if "bias_" not in name or "encoder" in name:
            torch.testing.assert_close(tensors_of(again.model)[name], x, rtol=0, atol=0)
    for moment in ("exp_avg", "exp_avg_sq"):
        found, name = again.state()[0], "decoder.recurrent.bias_{}_l0"
        for bias in ("ih", "hh"):
            expected = tensors[f"{moment}.{name.format('ih')}"]
            torch.testing.assert_close(found[f"{moment}.{name.format(bias)}"], expected, rtol=0, atol=1e-12)


def test_a_damaged_checkpoint_of_the_format_before(tmp_path: Path) -> None:
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    content = serialize({"decoder.layers.0.bias": torch.zeros(3)})
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / f"checkpoint-{digest[:12]}.safetensors").write_bytes(content)
    record = json.loads((tmp_path / "checkpoint.json").read_text()) | {"format": 2, "tensors_sha256": digest}
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is damaged: KeyError"):
        load(tmp_path)


def test_a_checkpoint_that_is_replaced_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    read = checkpoint.read_json

    def then_replaced(folder: Path, name: str) -> dict[str, Any]:
        monkeypatch.undo()
        record = read(folder, name)
        save(folder, checkpoint_of(tiny("lstm", torch.float32)))
        return record

    monkeypatch.setattr(checkpoint, "read_json", then_replaced)
    assert load(tmp_path).model.config.cell == "lstm"


def test_a_new_checkpoint_replaces_the_old(tmp_path: Path) -> None:
    for cell in ("gru", "lstm"):
        save(tmp_path, checkpoint_of(tiny(cell, torch.float32)))
    assert load(tmp_path).model.config.cell == "lstm"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_leaves_other_files_alone(tmp_path: Path) -> None:
    """But for what was being written when a process was killed."""
    kept = tmp_path / "weights-best.safetensors", tmp_path / "checkpoint-best.safetensors", tmp_path / ".hidden"
    left = tmp_path / ".checkpoint-0123456789ab.safetensors.x1", tmp_path / ".checkpoint.json.x2"
    for file in (*kept, *left):
        file.write_bytes(b"")
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failing: int
) -> None:
    """The tensors are written first, the JSON second; either may fail at any moment."""
    old = checkpoint_of(tiny("gru", torch.float32), old=True)
    save(tmp_path, old)
    owner: Any = Path if call == "replace" else os
    real, calls = getattr(owner, call), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        # A whole write is two fsync calls: of the file, and of its folder.
        if calls == (failing if call == "replace" else 2 * failing - 1):
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, checkpoint_of(tiny("lstm", torch.float32)))
    assert load(tmp_path).metrics == {"old": True}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    save(tmp_path, old)
    assert len(list(tmp_path.iterdir())) == 2


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "checkpoint.json").read_text())
    change(record)
    (folder / "checkpoint.json").write_text(json.dumps(record))


def put_tensors(folder: Path, content: bytes) -> None:
    """Other tensors under a right checksum."""
    next(folder.glob("*.safetensors")).unlink()
    digest = hashlib.sha256(content).hexdigest()
    (folder / f"checkpoint-{digest[:12]}.safetensors").write_bytes(content)
    edit(folder, lambda record: record.update(tensors_sha256=digest))


def cut_file(pattern: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = next(folder.glob(pattern))
        file.write_bytes(file.read_bytes()[:-50])

    return cut


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in tensors_of(load(folder).model).items()}
        change(state)
        put_tensors(folder, serialize(state))

    return damage


def change_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def write_json(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "checkpoint.json").write_bytes(content)


def folder_for_json(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()
    (folder / "checkpoint.json").mkdir()


def pipe_for_json(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()
    os.mkfifo(folder / "checkpoint.json")


def device_for_tensors(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.unlink()
    file.symlink_to("/dev/zero")


HEADER = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
ODD_TENSORS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0"

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint in .*No such file"),
    "json is a folder": (folder_for_json, "no checkpoint in .*Is a directory"),
    "no tensors": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "checkpoint-.*No such file"),
    "truncated json": (cut_file("*.json"), "checkpoint.json' is damaged"),
    "truncated tensors": (cut_file("*.safetensors"), "safetensors' is damaged: its checksum"),
    "flipped bit": (flip_a_bit, "safetensors' is damaged: its checksum"),
    "not text": (write_json(b"\xff\x00"), "checkpoint.json' is damaged"),
    "deep json": (write_json(b"[" * 100_000), "checkpoint.json' is damaged"),
    "not an object": (write_json(b"[]"), "hold an object, got list"),
    "not safetensors": (lambda folder: put_tensors(folder, b"hello"), "safetensors' is damaged"),
    "format": (
        change_json(lambda record: record.update(format=1)),
        "has format 1, this release reads formats 2 and 3",
    ),
    "no format": (change_json(lambda record: record.pop("format")), "has format None"),
    "no checksum": (change_json(lambda record: record.pop("tensors_sha256")), "should name its tensors, got None"),
    "odd checksum": (change_json(lambda record: record.update(tensors_sha256="../" * 30)), "should name its tensors"),
    "a checksum of other letters": (
        change_json(lambda record: record.update(tensors_sha256="\0*?\n" * 16)),
        "should name its tensors",
    ),
    "json is a pipe": (pipe_for_json, "checkpoint.json' must be an ordinary file"),
    "tensors are a device": (device_for_tensors, "safetensors' must be an ordinary file"),
    "numbers without end": (write_json(b'{"format": 3, "tensors_sha256": 1e999}'), "should name its tensors, got inf"),
    "an output without end": (
        change_json(lambda record: record.update(longest=float("inf"))),
        "damaged: OverflowError",
    ),
    "a size that is no number": (
        change_json(lambda record: record["config"].update(encoder_size=float("nan"))),
        "damaged: .*encoder_size",
    ),
    "numbers as symbols": (
        change_json(lambda record: record["target"].update(symbols=list(range(len(PHONEMES))))),
        "damaged: .*symbols",
    ),
    "integers for floats": (
        change_tensors(lambda state: state.update({"decoder.output.bias": state["decoder.output.bias"].int()})),
        "decoder.output.bias is of torch.int32",
    ),
    "a type that nobody knows": (lambda folder: put_tensors(folder, ODD_TENSORS), "safetensors' is damaged"),
    "layers without end": (
        change_json(lambda record: record["config"].update(encoder_layers=10**9)),
        "damaged: .*more layers than",
    ),
    "a huge model": (change_json(lambda record: record["config"].update(decoder_size=10**6)), "should have shape"),
    "no config": (change_json(lambda record: record.pop("config")), "is damaged: KeyError.*config"),
    "no metrics": (change_json(lambda record: record.pop("metrics")), "is damaged: KeyError.*metrics"),
    "no vocabulary": (change_json(lambda record: record.pop("target")), "is damaged: KeyError.*target"),
    "unknown field": (change_json(lambda record: record["config"].update(depth=3)), "is damaged: .*depth"),
    "bad field": (
        change_json(lambda record: record["config"].update(encoder_size=-3)),
        "damaged: .*encoder_size",
    ),
    "sizes that don't fit": (
        change_json(lambda record: record["config"].update(attention="dot")),
        "is damaged: .*query_size must be memory_size",
    ),
    "sizes beyond memory": (
        change_json(lambda record: record["config"].update(encoder_size=7 * 10**11)),
        "damaged: RuntimeError",
    ),
    "config is a list": (change_json(lambda record: record.update(config=[1])), "is damaged"),
    "vocabulary is a list": (change_json(lambda record: record.update(source=[1])), "is damaged"),
    "corpus is a list": (change_json(lambda record: record.update(corpus=[1])), "is damaged"),
    "metrics are a number": (change_json(lambda record: record.update(metrics=1)), "is damaged"),
    "unknown unit": (change_json(lambda record: record["source"].update(unit="syllables")), "damaged: .*unit"),
    "symbol twice": (change_json(lambda record: record["target"]["symbols"].append("T")), "damaged: .*twice"),
    "smaller vocabulary": (
        change_json(lambda record: record["source"]["symbols"].pop()),
        r"encoder.embedding.weight should have shape \(30, 6\), got \(31, 6\)",
    ),
    "another model": (
        change_json(lambda record: record["config"].update(attention_size=11)),
        r"decoder.recurrent.attention.memory_projection.weight should have shape \(11, 14\), got \(5, 14\)",
    ),
    "missing tensor": (
        change_tensors(lambda state: state.pop("decoder.output.bias")),
        rf"decoder.output.bias should have shape \({len(PHONEMES)},\), got none",
    ),
    "extra tensor": (
        change_tensors(lambda state: state.update(more=torch.zeros(3))),
        r"more should have shape none, got \(3,\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write to the folder .*Not a directory"):
        save(tmp_path / "file" / "below", checkpoint_of(tiny()))
