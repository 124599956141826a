"""Keras's models, which hold their layers elsewhere than other modules do, and save and copy them by config."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnext
from attnext.bench.code_bases.keras import attention, on_cpu
from attnext.bench.code_bases.packages import load
from attnext.compat._recipe import Recipe

QUERIES, KEYS, SIZE = 3, 7, 5


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with on_cpu():
        yield


def keras() -> Any:
    return load("keras", "keras")


def functional(**options: Any) -> Any:
    layers = keras().layers
    query, value = layers.Input((QUERIES, SIZE)), layers.Input((KEYS, SIZE))
    hidden = layers.Dense(SIZE)(query)
    context = layers.AdditiveAttention(name="attend", **options)([hidden, value])
    return keras().Model([query, value], layers.Dense(2)(context))


def listed() -> Any:
    class Listed(keras().Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attentions = [attention(name=name) for name in ("first", "second")]

        def call(self, inputs: Any) -> Any:
            query, value = inputs
            for attend in self.attentions:
                query = attend([query, value])
            return query

    return Listed()


def inputs() -> list[Tensor]:
    return [torch.randn(2, QUERIES, SIZE), torch.randn(2, KEYS, SIZE)]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "count"), [(functional, 1), (listed, 2)])
def test_layers_of_a_model(make: Any, count: int) -> None:
    model, given = make(), inputs()
    before = model(given)
    report = attnext.accelerate(model)
    assert [one.recipe for one in report.swapped] == ["keras.AdditiveAttention"] * count, str(report)
    assert sum(isinstance(layer, Recipe) for layer in model._flatten_layers()) == count
    assert close(model(given), before)
    attnext.restore(model)
    assert not any(isinstance(layer, Recipe) for layer in model._flatten_layers())
    assert torch.equal(model(given), before)


def test_a_layer_by_its_path() -> None:
    model = functional()
    assert not attnext.accelerate(model, skip="attend")
    assert attnext.accelerate(model, only="attend")


def test_a_layer_that_is_not_built() -> None:
    layer = attention()
    assert attnext.accelerate(layer)
    assert not layer.built
    given = inputs()
    found = layer(given)
    attnext.restore(layer)
    assert close(found, layer(given))


def test_keras_writes_the_original(tmp_path: Path) -> None:
    model, given = functional(), inputs()
    written = keras().saving.serialize_keras_object(model)
    attnext.accelerate(model)
    assert keras().saving.serialize_keras_object(model) == written
    expected = model(given)
    model.save(tmp_path / "model.keras")
    for read in (keras().saving.load_model(tmp_path / "model.keras"), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(layer, Recipe) for layer in read._flatten_layers())
        assert close(read(given), expected)
    clone = keras().models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert close(clone(given), expected)


@pytest.mark.parametrize("options", [{}, {"use_scale": True}, {"score_mode": "concat"}])
@pytest.mark.parametrize("probe", [True, False])
def test_attention_by_dot_products_is_another(options: Any, probe: bool) -> None:
    layer = keras().layers.Attention(**options)
    layer(inputs())
    assert not attnext.accelerate(layer, probe=probe)


def test_keras_writes_the_name_of_a_class_of_the_users() -> None:
    @keras().saving.register_keras_serializable(package="mine")
    class Pasted(keras().layers.AdditiveAttention):  # type: ignore[misc]
        pass

    layer = Pasted()
    written = keras().saving.serialize_keras_object(layer)
    assert attnext.accelerate(layer)
    assert keras().saving.serialize_keras_object(layer) == written


def test_dropout_is_the_originals() -> None:
    layer, given = attention(dropout=0.5, seed=3), inputs()
    layer(given)
    twin = copy.deepcopy(layer)
    attnext.accelerate(twin)
    assert close(twin(given), layer(given))
    assert torch.equal(twin(given, training=True), layer(given, training=True))
    assert not torch.equal(twin(given, training=True), twin(given, training=False))


def test_training_by_keras() -> None:
    model = functional()
    twin = keras().models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert attnext.accelerate(twin)
    given, targets = inputs(), torch.randn(2, QUERIES, 2)
    for one in (model, twin):
        one.compile(optimizer="sgd", loss="mse")
        one.fit(given, targets, epochs=3, verbose=0)
    for right, found in zip(model.get_weights(), twin.get_weights(), strict=True):
        assert abs(right - found).max() < 1e-5


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float64"])
def test_dtype_policies(policy: str) -> None:
    layer, given = attention(dtype=policy), inputs()
    before = layer(given)
    assert attnext.accelerate(layer)
    found = layer(given)
    assert found.dtype == before.dtype
    assert torch.allclose(found, before, atol=0.02)


def test_by_name() -> None:
    import attnext.compat.keras as ours

    layer, given = ours.AdditiveAttention(name="attend"), inputs()
    assert isinstance(layer, Recipe)
    found = layer(given)
    attnext.restore(layer)
    assert close(found, layer(given))


def test_malformed_inputs_are_refused_as_before() -> None:
    layer, given = attention(), inputs()
    layer(given)
    attnext.accelerate(layer)
    for wrong in (tuple(given), given[:1], [*given, *given]):
        with pytest.raises(ValueError, match="AdditiveAttention"):
            layer.call(wrong)
