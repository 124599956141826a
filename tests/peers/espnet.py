"""ESPnet's attentions, one after another and in its own recurrent decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peers.packages import load
from peers.program import Program, Sizes

FILE = "espnet.nets.pytorch_backend.rnn.attentions"
CHANNELS, REACH = 3, 2


def _class(name: str) -> Any:
    return getattr(load("espnet", FILE), name)


def _located(name: str) -> Any:
    return lambda s: _class(name)(s.states, s.query, s.features, CHANNELS, REACH)


def _heads(name: str, *more: int) -> Any:
    return lambda s: _class(name)(s.states, s.query, 2, s.features, s.features + 1, *more)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states), *(draw(s.batch, s.query) for _ in range(s.steps))]


def _all(past: Any) -> list[Tensor]:
    return [past] if isinstance(past, Tensor) else [x for part in past for x in _all(part)]


def _run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor, past: Any = None) -> list[Tensor]:
    attend.reset()
    found: list[Tensor] = []
    for query in (None, *queries):
        context, past = attend(states, list(s.lengths), query, past)
        found += [context, *_all(past)]
    return found


def _from_a_list(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Of the module's own dtype, where what the original begins with is float32."""
    return _run(attend, s, states, *queries, past=[_uniform(s, states)])


def _from_heads(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    return _run(attend, s, states, *queries, past=[_uniform(s, states)] * 2)


def _from_states(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    zeros = states.new_zeros(s.batch, s.features)
    return _run(attend, s, states, *queries, past=(_uniform(s, states), (zeros, zeros)))


def _uniform(s: Sizes, states: Tensor) -> Tensor:
    lengths = torch.tensor(s.lengths).unsqueeze(1)
    return ((torch.arange(s.keys) < lengths) / lengths).to(states.dtype)


def _with_outputs(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    attend.reset()
    found, past = [], None
    for query in queries:
        context, past = attend(states, list(s.lengths), query, past, query[:, :1].expand(-1, 9))
        found += [context, past]
    return found


def _near_the_last(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """As ESPnet's synthesis calls it: of one sentence, with cumulated weights and a window."""
    attend.reset()
    found, past, last = [], None, 0
    for query in queries:
        length = [max(s.lengths)]
        context, weights = attend(states[:1], length, query[:1], past, last_attended_idx=last, forward_window=4)
        past, last = weights if past is None else past + weights, int(weights.argmax())
        found += [context, weights]
    return found


def _decoder(atype: str) -> Any:
    def make(s: Sizes) -> nn.Module:
        decoder = load("espnet", "espnet2.asr.decoder.rnn_decoder").RNNDecoder
        return decoder(11, s.states, hidden_size=s.query, att_conf={  # type: ignore[no-any-return]
            "atype": atype, "adim": s.features, "aconv_chans": CHANNELS, "aconv_filts": REACH, "aheads": 2,
        })  # fmt: skip

    return make


def _decode(decoder: Any, s: Sizes, states: Tensor) -> list[Tensor]:
    letters = torch.arange(s.batch * s.steps).view(s.batch, s.steps) % 11
    scores, _ = decoder(states, torch.tensor(s.lengths), letters, torch.full((s.batch,), s.steps))
    return [scores]


_GVEC, _OF_HEADS = ("gvec.bias",), ("gvec.0.bias", "gvec.1.bias")
_FLOAT = {"exact": torch.float32, "takes_half": False}
_COVERED: Any = lambda s: _class("AttCov")(s.states, s.query, s.features)  # noqa: E731
_FORWARD_TA: Any = lambda s: _class("AttForwardTA")(s.states, s.query, s.features, CHANNELS, REACH, 9)  # noqa: E731
PROGRAMS = [
    Program("espnet.AttAdd", lambda s: _class("AttAdd")(s.states, s.query, s.features), _inputs, _run, _GVEC),
    Program("espnet.AttLoc", _located("AttLoc"), _inputs, _run, _GVEC),
    Program("espnet.AttForward", _located("AttForward"), _inputs, _run, _GVEC),
    Program("espnet.AttForwardTA", _FORWARD_TA, _inputs, _with_outputs, _GVEC),
    Program("espnet.AttLoc near the last", _located("AttLoc"), _inputs, _near_the_last, _GVEC),
    Program("espnet.AttForward near the last", _located("AttForward"), _inputs, _near_the_last, _GVEC),
    Program("espnet.AttCov", _COVERED, _inputs, _from_a_list, _GVEC),
    Program("espnet.AttCov from nothing", _COVERED, _inputs, _run, _GVEC, **_FLOAT),
    Program("espnet.AttCovLoc", _located("AttCovLoc"), _inputs, _from_a_list, _GVEC),
    Program("espnet.AttCovLoc from nothing", _located("AttCovLoc"), _inputs, _run, _GVEC, **_FLOAT),
    Program("espnet.AttLocRec", _located("AttLocRec"), _inputs, _from_states, _GVEC),
    Program("espnet.AttLocRec from nothing", _located("AttLocRec"), _inputs, _run, _GVEC, **_FLOAT),
    Program("espnet.AttMultiHeadAdd", _heads("AttMultiHeadAdd"), _inputs, _run, _OF_HEADS),
    Program("espnet.AttMultiHeadLoc", _heads("AttMultiHeadLoc", CHANNELS, REACH), _inputs, _from_heads, _OF_HEADS),
    Program("espnet.AttMultiHeadLoc from nothing", _heads("AttMultiHeadLoc", CHANNELS, REACH), _inputs, _run, _OF_HEADS,
            **_FLOAT),
    Program("espnet.AttMultiHeadMultiResLoc", _heads("AttMultiHeadMultiResLoc", CHANNELS, 2 * REACH), _inputs,
            _from_heads, _OF_HEADS),
    *(Program(f"espnet.{n} in a decoder", _decoder(atype),
              lambda s, draw: [draw(s.batch, s.keys, s.states)], _decode, takes_half=False, exact=exact)
      for n, atype, exact in (("AttAdd", "add", torch.float64), ("AttLoc", "location", torch.float64),
                              ("AttCov", "coverage", torch.float32))),
]  # fmt: skip
