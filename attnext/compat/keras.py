"""Keras's AdditiveAttention, on its torch backend (Chollet et al., "Keras", 2015)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnext import functional
from attnext.compat._recipe import Draw, Recipe, Sizes, Trial, by_name, visible

_NAMES = (("keras.src.api_export", "REGISTERED_OBJS_TO_NAMES"),
          ("keras.src.saving.object_registration", "GLOBAL_CUSTOM_NAMES"))  # fmt: skip
"""Where Keras keeps the names that it writes of classes."""


class _AdditiveAttention(Recipe):
    """A layer without projections, which attends with all queries in a call.

    A Keras layer is called through ``call``, and a copy or a pickle of it is what Keras saves and loads: the original.
    """

    code_base = "Keras"
    original = "keras.src.layers.attention.additive_attention:AdditiveAttention"
    version = "keras==3.15.1"
    tensors: ClassVar[Sizes] = {"scale": ("D",)}
    maybe = frozenset({"scale"})
    arguments = ("inputs", "mask", "training", "return_attention_scores", "use_causal_mask")
    methods = ("call",)
    serves = "all options; dropout in training, and float64, by the original"

    def __init_subclass__(cls, **options: Any) -> None:
        """Keras writes the name of the original."""
        super().__init_subclass__(**options)
        original = cls.__dict__.get("_original")
        if original is None:
            return
        cls.__module__ = original.__module__
        for module, table in _NAMES:
            names = getattr(sys.modules.get(module), table, {})
            if original in names:
                names[cls] = names[original]

    @classmethod
    def knows(cls, module: nn.Module) -> bool:
        """By the attributes: the names in its state_dict are made of the name of the layer."""
        this: Any = module
        if not (callable(getattr(module, "_calculate_scores", None)) and cls.has_its_arguments(type(module))):
            return False
        names = {"use_scale", "dropout", "built", "dtype_policy", "get_config"}
        if not all(hasattr(module, name) for name in names) or "score_mode" in this.get_config():  # of dot products
            return False
        scale = getattr(module, "scale", None)
        return scale is None or len(scale.shape) == 1

    @classmethod
    def has_its_arguments(cls, original: type[nn.Module]) -> bool:
        call = getattr(original, "call", None)
        return callable(call) and tuple(inspect.signature(call).parameters)[1:] == cls.arguments

    @classmethod
    def declines(cls, module: nn.Module) -> str:
        return "its call was replaced" if "call" in module.__dict__ else ""

    @classmethod
    def trial(cls, module: nn.Module, draw: Draw) -> Trial:
        scale = getattr(module, "scale", None)
        size = 4 if scale is None else int(scale.shape[0])
        inputs = [draw(2, 3, size), draw(2, 5, 3), draw(2, 5, size), draw(size)]

        def run(layer: Any, *inputs: Tensor) -> Sequence[Tensor]:
            if inputs[0].dtype == torch.float64:
                raise TypeError("Keras multiplies in float32")
            with importlib.import_module("keras").device("cpu"):  # where the inputs are to stay
                return _tried(layer, *inputs)

        return Trial(inputs, run)

    def __reduce_ex__(self, protocol: Any) -> Any:
        this: Any = self
        function, *rest = this.__reduce__()
        return getattr(self._original, function.__name__), *rest

    def call(
        self,
        inputs: Any,
        mask: Any = None,
        training: Any = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        this: Any = self
        dropped = training and this.dropout > 0
        found = None if dropped else self._attended(inputs, mask, return_attention_scores, use_causal_mask)
        if found is None:
            return super().call(  # type: ignore[misc]
                inputs, mask, training, return_attention_scores, use_causal_mask
            )
        context, weights = found
        if mask and mask[0] is not None:
            context = torch.where(mask[0].unsqueeze(-1), context, 0)
        return (context, weights) if return_attention_scores else context

    def _attended(
        self, inputs: Any, mask: Any, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Context and weights; None where no kernel serves."""
        this: Any = self
        if not (isinstance(inputs, list) and len(inputs) in (2, 3) and _are_masks(mask)):
            return None
        query, value, key = inputs if len(inputs) == 3 else (*inputs, inputs[1])
        if not _fit(query, value, key) or query.dtype == torch.float64 or query.is_meta:
            return None
        v = this.scale.value if this.use_scale else query.new_ones(query.shape[-1])
        if not self._served(query, value, key, v):
            return None
        seen = _seen(query, key, mask[1] if mask else None, causal)
        if seen is None:
            return None
        return functional.additive_attention(query, key, value, v, need_weights=need_weights, **seen)


def _tried(layer: Any, query: Tensor, value: Tensor, key: Tensor, scale: Tensor) -> list[Tensor]:
    """Of a layer that may not be built, whose scale Keras would draw."""
    if not layer.built:
        layer.build([x.shape for x in (query, value, key)])
        if layer.scale is not None:
            layer.scale.assign(scale.detach())
    layer.dtype_policy = str(query.dtype).removeprefix("torch.")
    seen = [torch.tensor([[True, True, False]] * 2), torch.arange(5) < torch.tensor([[5], [3]])]
    found = []
    for causal in (False, True):
        options = {"mask": seen, "return_attention_scores": True, "use_causal_mask": causal}
        found += layer([query, value, key], training=False, **options)
    return [*found, layer([query, key])]


def _are_masks(mask: Any) -> bool:
    """None, or what a layer of queries and values takes: each may be None."""
    if mask is None:
        return True
    return (
        isinstance(mask, list)
        and len(mask) in (2, 3)
        and all(x is None or (isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 2) for x in mask[:2])
    )


def _fit(query: Any, value: Any, key: Any) -> bool:
    """Whether they are as they should be, where Keras would also spread one of size 1."""
    if not all(isinstance(x, Tensor) and x.dim() == 3 for x in (query, value, key)):
        return False
    rows, features = query.shape[::2]
    return bool(key.shape[::2] == (rows, features) and value.shape[:2] == key.shape[:2])


def _seen(query: Tensor, key: Tensor, valid: Tensor | None, causal: bool) -> dict[str, Any] | None:
    """Which keys a query may attend; None where one may attend none: Keras then gives it the mean of all values."""
    if valid is not None and not bool((valid[:, 0] if causal else valid.any(1)).all()):
        return None
    if not causal:
        return {} if valid is None else visible(valid)
    before = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=key.device).tril()
    return {"mask": before.expand(len(query), -1, -1) if valid is None else before & valid.unsqueeze(1)}


RECIPES: tuple[type[Recipe], ...] = (_AdditiveAttention,)
__getattr__ = by_name(RECIPES)
