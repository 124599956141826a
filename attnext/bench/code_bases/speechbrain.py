"""SpeechBrain's attentions, one step after another and in its own recurrent decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

FILE = "speechbrain.nnet.attention"
OUTPUTS, SCALING = 3, 1.5


def _class(name: str) -> Any:
    return getattr(load("speechbrain", FILE), name)


def _made(name: str, *more: Any) -> Any:
    return lambda s: _class(name)(s.states, s.query, s.features, OUTPUTS, *more)


def _located(s: Sizes) -> Any:
    return _class("LocationAwareAttention")(s.states, s.query, s.features, OUTPUTS, s.filters, s.reach, SCALING)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _steps(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return [x for query in queries for x in attend(states, torch.tensor(s.lengths), query)]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    attend.reset()
    return _steps(attend, s, states, *queries)


def _with_new_states(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Keys are those of the first call, values those of each."""
    attend.reset()
    found = []
    for k, query in enumerate(queries):
        found += attend(states * (k + 1), torch.tensor(s.lengths), query)
    return found


def _of_own_dtype(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """With a past of the module's own dtype, as what the original begins with is float32; padding has some too."""
    attend.reset()
    seen = torch.arange(s.keys) < torch.tensor(s.lengths).unsqueeze(1)
    attend.precomputed_enc_h, attend.mask = attend.mlp_enc(states), seen.long()
    attend.prev_attn = states.new_full((s.batch, s.keys), 1 / s.keys)
    return _steps(attend, s, states, *queries)


def _as_a_beam(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """As the beam search does: hypotheses of a sentence are reordered, their past with them."""
    attend.reset()
    found: list[Tensor] = []
    with torch.no_grad():
        for query in queries:
            found += attend(states[:1].expand(s.batch, -1, -1), torch.tensor(s.lengths[:1] * s.batch), query)
            attend.prev_attn = torch.index_select(attend.prev_attn, dim=0, index=torch.arange(s.batch).flip(0))
    return [*found, *_run(attend, s, states, *queries)]


def _decoder(kind: str) -> Any:
    def make(s: Sizes) -> Any:
        decoder = load("speechbrain", "speechbrain.nnet.RNN").AttentionalRNNDecoder
        return decoder("gru", kind, s.query, s.features, 1, s.states, 4, scaling=SCALING, channels=s.filters,
                       kernel_size=s.reach)  # fmt: skip

    return make


def _decoded(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.steps, 4), draw(s.batch, s.keys, s.states)]


def _decode(decoder: Any, s: Sizes, letters: Tensor, states: Tensor) -> list[Tensor]:
    return list(decoder(letters, states, torch.tensor(s.lengths) / s.keys))


_FLOAT: Any = {"exact": torch.float32, "takes_half": False}
_CONTENT, _LOCATION = "speechbrain.ContentBasedAttention", "speechbrain.LocationAwareAttention"
PROGRAMS = [
    Program(_CONTENT, _made("ContentBasedAttention"), _inputs, _run),
    Program(f"{_CONTENT} with new states", _made("ContentBasedAttention", SCALING), _inputs, _with_new_states),
    Program(_LOCATION, _located, _inputs, _of_own_dtype),
    Program(f"{_LOCATION} from nothing", _located, _inputs, _run, **_FLOAT),
    Program(f"{_LOCATION} as a beam", _located, _inputs, _as_a_beam, **_FLOAT),
    Program("speechbrain.KeyValueAttention", _made("KeyValueAttention"), _inputs, _run),
    Program(f"{_CONTENT} in a decoder", _decoder("content"), _decoded, _decode, takes_half=False),
    Program(f"{_LOCATION} in a decoder", _decoder("location"), _decoded, _decode, **_FLOAT),
    Program("speechbrain.KeyValueAttention in a decoder", _decoder("keyvalue"), _decoded, _decode, takes_half=False),
]
