"""Tensors that earlier releases have written, as this one names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["OLD", "renewed"]

OLD = 2
"""The format whose decoder had its matrices in parts."""

_PARTS = ("embedded", "context", "feed")


def renewed(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of format 2: of a model, its mean, or moments of its gradients, whose names have a word before the model's.

    A layer had a matrix for each argument, and one bias unless its unit needs two; LSTM gates were in the order input,
    forget, output, candidate. Attention and readout are parts of the recurrent decoder now.
    """
    found: dict[str, Tensor] = {}
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, x in tensors.items():
        prefix, at, rest = name.partition("decoder.")
        if not at:
            found[name] = x
        elif rest.startswith("layers."):
            number, _, part = rest.removeprefix("layers.").partition(".")
            layers.setdefault((prefix, number), {})[part.removeprefix("weights.")] = x
        elif rest.startswith(("attention.", "readout.")):
            found[f"{prefix}decoder.recurrent.{rest}"] = x
        else:
            found[name] = x
    for (prefix, number), parts in layers.items():
        # Of two biases in place of one the gradients are the same, and so are their moments.
        of_layer = _layer(parts, config["cell"], moments=prefix.startswith("exp_avg"))
        found |= {f"{prefix}decoder.recurrent.{name}_l{number}": x for name, x in of_layer.items()}
    return found


def _layer(parts: Mapping[str, Tensor], cell: str, *, moments: bool) -> dict[str, Tensor]:
    def ordered(x: Tensor) -> Tensor:
        if cell == "gru":
            return x
        take, keep, show, candidate = x.chunk(4)
        return torch.cat((take, keep, candidate, show))

    inputs = [parts[name] for name in _PARTS if name in parts] or [parts["below"]]
    bias = ordered(parts["bias"])
    return {
        "weight_ih": ordered(torch.cat(inputs, 1)),
        "weight_hh": ordered(parts["recurrent"]),
        "bias_ih": bias,
        "bias_hh": parts.get("recurrent_bias", bias.clone() if moments else torch.zeros_like(bias)),
    }
