"""ESPnet's attentions, one after another and in its own recurrent decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes


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
    def make(s: Sizes) -> Any:
        decoder = load("espnet", "espnet2.asr.decoder.rnn_decoder").RNNDecoder
        return decoder(11, s.states, hidden_size=s.query, att_conf={
            "atype": atype, "adim": s.features, "aconv_chans": s.filters, "aconv_filts": s.reach, "aheads": 2,
        })  # fmt: skip

    return make


def _encoded(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.states)]


def _decode(decoder: Any, s: Sizes, states: Tensor) -> list[Tensor]:
    letters = torch.arange(s.batch * s.steps).view(s.batch, s.steps) % 11
    scores, _ = decoder(states, torch.tensor(s.lengths), letters, torch.full((s.batch,), s.steps))
    return [scores]


_GVEC, _OF_HEADS = ("gvec.bias",), ("gvec.0.bias", "gvec.1.bias")
_FLOAT: dict[str, Any] = {"exact": torch.float32, "takes_half": False}


def programs(package: str, file: str, decoder: Callable[[str], Any], suffix: str = "") -> list[Program]:
    """Of a package that has ESPnet's classes in a file, and a decoder by the name of its attention."""

    def made(name: str) -> Any:
        return lambda s: getattr(load(package, file), name)(s.states, s.query, s.features)

    def located(name: str, *more: int) -> Any:
        return lambda s: getattr(load(package, file), name)(s.states, s.query, s.features, s.filters, s.reach, *more)

    def heads(name: str, located: int = 0) -> Any:
        def make(s: Sizes) -> Any:
            filters = (s.filters, located * s.reach) if located else ()
            return getattr(load(package, file), name)(s.states, s.query, 2, s.features, s.features + 1, *filters)

        return make

    def program(name: str, make: Any, run: Any = _run, inert: tuple[str, ...] = _GVEC, **flags: Any) -> Program:
        return Program(f"espnet.{name}{suffix}", make, _inputs, run, inert, **flags)

    return [
        program("AttDot", made("AttDot"), inert=()),
        program("AttAdd", made("AttAdd")),
        program("AttLoc", located("AttLoc")),
        program("AttForward", located("AttForward")),
        program("AttForwardTA", located("AttForwardTA", 9), _with_outputs),
        program("AttLoc near the last", located("AttLoc"), _near_the_last),
        program("AttForward near the last", located("AttForward"), _near_the_last),
        program("AttCov", made("AttCov"), _from_a_list),
        program("AttCov from nothing", made("AttCov"), **_FLOAT),
        program("AttCovLoc", located("AttCovLoc"), _from_a_list),
        program("AttCovLoc from nothing", located("AttCovLoc"), **_FLOAT),
        program("AttLocRec", located("AttLocRec"), _from_states),
        program("AttLocRec from nothing", located("AttLocRec"), **_FLOAT),
        program("AttMultiHeadDot", heads("AttMultiHeadDot"), inert=()),
        program("AttMultiHeadAdd", heads("AttMultiHeadAdd"), inert=_OF_HEADS),
        program("AttMultiHeadLoc", heads("AttMultiHeadLoc", located=1), _from_heads, _OF_HEADS),
        program("AttMultiHeadLoc from nothing", heads("AttMultiHeadLoc", located=1), inert=_OF_HEADS, **_FLOAT),
        program("AttMultiHeadMultiResLoc", heads("AttMultiHeadMultiResLoc", located=2), _from_heads,
                _OF_HEADS),
        *(Program(f"espnet.{name} in a decoder{suffix}", decoder(atype), _encoded, _decode, takes_half=False,
                  exact=exact)
          for name, atype, exact in (("AttDot", "dot", torch.float64), ("AttAdd", "add", torch.float64),
                                     ("AttLoc", "location", torch.float64), ("AttCov", "coverage", torch.float32),
                                     ("AttMultiHeadDot", "multi_head_dot", torch.float64))),
    ]  # fmt: skip


PROGRAMS = programs("espnet", "espnet.nets.pytorch_backend.rnn.attentions", _decoder)
