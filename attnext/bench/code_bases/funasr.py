"""FunASR's copies of ESPnet's attentions, which are recognised as those; and its decoder."""

from __future__ import annotations

from typing import Any

from attnext.bench.code_bases import espnet
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Sizes


def _decoder(atype: str) -> Any:
    def make(s: Sizes) -> Any:
        decoder = load("funasr", "funasr.models.transducer.rnn_decoder").RNNDecoder
        return decoder(11, s.states, hidden_size=s.query, att_conf={
            "atype": atype, "adim": s.features, "aconv_chans": s.filters, "aconv_filts": s.reach,
            "aheads": 2,
        })  # fmt: skip

    return make


PROGRAMS = espnet.programs("funasr", "funasr.models.language_model.rnn.attentions", _decoder, " of FunASR")
