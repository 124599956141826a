"""The configuration: its fields, TOML files and options."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from seq2seq_cases import (
    tiny,
)

from attnext.seq2seq import Config, InputError
from attnext.seq2seq.config import add_arguments, from_toml, given

pytestmark = pytest.mark.usefixtures("one_thread")


BAD: dict[tuple[str, ...], list[Any]] = {
    ("cell",): ["rnn", None, 3, ["gru"]],
    ("attention",): ["luong", "additive, normalised", None, True],
    ("embedding_size", "encoder_size", "encoder_layers", "decoder_size", "decoder_layers", "attention_size"): [
        0, -1, 2.0, True, "3", None,
    ],
    ("vocabulary_size", "batch_size", "patience"): [0, -1, 2.0, True, "3", None],
    ("epochs",): [0, -1, 2.0, True, "3"],
    ("bidirectional", "input_feeding", "tied_embeddings", "amp"): [1, 0.0, "true", None],
    ("dropout", "label_smoothing", "warm_up", "weight_decay", "average"): [
        -0.1, 1.0, 1, math.nan, math.inf, True, "0.1", None,
    ],
    ("learning_rate", "clip"): [0.0, 0, -1.0, math.nan, math.inf, True, "1", None],
    ("minutes",): [0.0, 0, -1.0, math.nan, math.inf, True, "1"],
    ("seed",): [-1, 2**63, 1.0, True, "1", None],
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_bad_values_name_their_field(field: str) -> None:
    (values,) = [values for names, values in BAD.items() if field in names]
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} must be .*, got ") as caught:
            Config(**{field: value})
        assert str(caught.value).endswith(f"got {value!r}")


def test_configurations_are_checked_and_completed() -> None:
    assert Config().minutes == 5.0
    assert Config(epochs=3).minutes is None
    assert (Config(epochs=3, minutes=2).minutes, Config(minutes=2).epochs) == (2, None)
    assert Config(**dataclasses.asdict(Config(epochs=3))) == Config(epochs=3)
    assert Config(dropout=0, seed=2**63 - 1, average=0.999).dropout == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().cell = "lstm"  # type: ignore[misc]


def test_learning_rate_rises_and_falls() -> None:
    config = Config(learning_rate=2.0, warm_up=0.1)
    assert [config.rate(done) for done in (0.0, 0.05, 0.1)] == [0.0, 1.0, 2.0]
    assert config.rate(0.55) == pytest.approx(1.0)
    assert config.rate(0.325) == pytest.approx(1.0 + math.sqrt(0.5))
    assert config.rate(1.0) == pytest.approx(0.0)
    assert Config(learning_rate=2.0, warm_up=0.0).rate(0.0) == 2.0


def test_sizes_that_an_attention_cannot_have() -> None:
    for attention, message in (("dot", "query_size must be memory_size"), ("several-heads", "multiple of heads")):
        with pytest.raises(ValueError, match=message):
            tiny(attention=attention)


def test_fields_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('cell = "lstm"  # ö\ndropout = 0.25\ninput_feeding = true\nepochs = 7\n', encoding="utf-8")
    assert from_toml(file) == {"cell": "lstm", "dropout": 0.25, "input_feeding": True, "epochs": 7}
    file.write_text("")
    assert from_toml(file) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"depth = 3\ncell = 'gru'\nwidth = 2\n", "has unknown fields: 'depth', 'width'"),
        (b"[model]\ncell = 'gru'\n", "has unknown fields: 'model'"),
        (b"dropout = 'much'\n", "dropout must be a number from 0 to below 1, got 'much'"),
        (b"epochs = 3.5\n", "epochs must be an integer of at least 1, got 3.5"),
        (b"amp = 1\n", "amp must be true or false, got 1"),
        (b"cell gru\n", "is not TOML: "),
        (b"cell = 'gru'\ncell = 'lstm'\n", "is not TOML: "),
        (b"# \xff\n", "is not TOML: 'utf-8' codec"),
        (None, "can't read the configuration .*No such file"),
    ],
)
def test_bad_toml(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        from_toml(file)
    assert "\n" not in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_toml_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't read the configuration .*Is a directory"):
        from_toml(tmp_path)


def test_options_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("cell = 'lstm'\ndropout = 0.25\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert given(parser.parse_args([])) == {}
    options = ["--config", str(tmp_path / "run.toml"), "--dropout", "0.5", "--no-bidirectional", "--seed", "3"]
    assert given(parser.parse_args(options)) == {"cell": "lstm", "dropout": 0.5, "bidirectional": False, "seed": 3}
    for name in dataclasses.fields(Config):
        assert f"--{name.name.replace('_', '-')}" in parser.format_help()
    for bad in (["--dropout", "1"], ["--epochs", "2.5"], ["--attention", "luong"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(bad)
        assert bad[0] in capsys.readouterr().err
