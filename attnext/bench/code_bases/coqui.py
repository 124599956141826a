"""Coqui TTS's attention of Tacotron, step after step and in its Tacotron 2 decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


@contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    """Its states begin in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attention(
    norm: str, location: bool = True, windowing: bool = False, forward: bool = False, agent: bool = False,
    forward_mask: bool = False,
) -> Any:  # fmt: skip
    def make(s: Sizes) -> nn.Module:
        original = load("coqui-tts", "TTS.tts.layers.tacotron.attentions").OriginalAttention
        options = (location, s.filters, s.width, windowing, norm, forward, agent, forward_mask)
        module: nn.Module = original(s.query + 1, s.states, s.features, *options)
        return module

    return make


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.query + 1) for _ in range(s.steps))]


def _longer(s: Sizes, draw: Any) -> list[Tensor]:
    """The original's forward mask wants two keys or more."""
    return _inputs(replace(s, keys=s.keys + 2), draw)


def _seen(s: Sizes, states: Tensor) -> Tensor:
    return torch.arange(states.shape[1]) < torch.tensor(s.lengths).unsqueeze(1)


def _steps(attend: Any, mask: Tensor | None, states: Tensor, *queries: Tensor) -> list[Tensor]:
    attend.init_states(states)
    keys = attend.preprocess_inputs(states)
    found = []
    for query in queries:
        found.append(attend(query, states, keys, mask))
        found += [getattr(attend, x) for x in ("attention_weights", "alpha", "u") if hasattr(attend, x)]
    return found


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    with _by_default(states.dtype):
        return _steps(attend, _seen(s, states), states, *queries)


def _from_float32(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return _steps(attend, _seen(s, states), states, *queries)


def _without_mask(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    with _by_default(states.dtype):
        return _steps(attend, None, states, *queries)


def _windowed(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Its first step has no gradient in evaluation, as its scores are written to."""
    with torch.no_grad():
        found = _without_mask(attend, s, states, *queries)
    with _by_default(states.dtype):
        attend.init_states(states)
        attend.win_idx = 0
        keys = attend.preprocess_inputs(states)
        return [*found, *(attend(query, states, keys, None) for query in queries)]


def _with_holes(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Of a mask that hides more than ends; and the original takes the last step, where a caller hides more."""
    seen = _seen(s, states)
    seen[:, 1:-1:3] = False
    with _by_default(states.dtype):
        attend.init_states(states)
        keys = attend.preprocess_inputs(states)
        found = [attend(query, states, keys, seen) for query in queries]
        more = seen & (torch.arange(states.shape[1]) < 2)
        return [*found, attend(queries[0], states, keys, more), attend.attention_weights]


def _decoder(norm: str, **options: Any) -> Any:
    def make(s: Sizes) -> nn.Module:
        decoder = load("coqui-tts", "TTS.tts.layers.tacotron.tacotron2").Decoder
        module: nn.Module = decoder(s.states, 4, 2, "original", False, norm, "original", False, options.get("agent"),
                                    options.get("agent"), False, options.get("location", True), 4, True, 9)  # fmt: skip
        return module

    return make


def _decode(decoder: Any, s: Sizes, states: Tensor) -> list[Tensor]:
    frames = torch.linspace(-1, 1, s.batch * 2 * s.steps * 4).view(s.batch, -1, 4).to(states.dtype)
    torch.manual_seed(3)  # of its dropout
    with _by_default(states.dtype):
        outputs, alignments, stops = decoder(states, frames, _seen(s, states))
    return [outputs, alignments, stops]


def _program(name: str, run: Any, inputs: Any = _inputs, **options: Any) -> Program:
    in_place = options.keys() & {"forward_mask", "windowing"}  # of the original, whose bias then has a rounding
    inert = () if options["norm"] == "sigmoid" or in_place else ("v.linear_layer.bias",)
    left = name in ("forward with a mask", "windowing")
    return Program(f"coqui.OriginalAttention {name}", _attention(**options), inputs, run, inert, served=not left)


PROGRAMS = [
    _program("softmax", _run, norm="softmax"),
    _program("softmax without location", _run, norm="softmax", location=False),
    _program("sigmoid", _run, norm="sigmoid"),
    _program("sigmoid without location", _run, norm="sigmoid", location=False),
    _program("softmax with holes", _with_holes, norm="softmax"),
    _program("sigmoid with holes", _with_holes, norm="sigmoid"),
    _program("forward", _run, norm="softmax", forward=True),
    _program("forward without location", _run, norm="sigmoid", location=False, forward=True),
    _program("forward with an agent", _run, norm="sigmoid", forward=True, agent=True),
    _program("forward with a mask", _run, _longer, norm="softmax", forward=True, forward_mask=True),
    _program("forward with a mask of all", _without_mask, _longer, norm="sigmoid", forward=True, forward_mask=True),
    _program("windowing", _windowed, norm="softmax", windowing=True),
    *(Program(f"coqui.OriginalAttention {name} from float32", _attention(**options), _inputs, _from_float32,
              takes_half=False, exact=torch.float32)
      for name, options in (
          ("softmax", {"norm": "softmax"}),
          ("everything", {"norm": "sigmoid", "forward": True, "agent": True}))),
    *(Program(f"coqui.OriginalAttention in a decoder {name}", _decoder(**options),
              lambda s, draw: [draw(s.batch, s.keys, s.states)], _decode, takes_half=False)
      for name, options in (
          ("softmax", {"norm": "softmax"}),
          ("sigmoid", {"norm": "sigmoid", "agent": True}))),
]  # fmt: skip
