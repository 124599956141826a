"""OpenNMT-py's and EOLE's global attention: alone, and in their decoders with input feeding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnext.bench.code_bases.loops import loop
from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

TYPES = ("dot", "general", "mlp")


class Words(nn.Embedding):
    """As much of OpenNMT-py's embeddings as its decoder calls."""

    embedding_size = 3

    def __init__(self) -> None:
        super().__init__(11, self.embedding_size)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.squeeze(2))


def _attention(package: str, kind: str, **more: Any) -> Any:
    module = {"OpenNMT-py": "onmt", "eole": "eole"}[package] + ".modules.global_attention"
    return lambda s: load(package, module).GlobalAttention(s.features, attn_type=kind, **more)


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.features), draw(s.batch, s.steps, s.features), draw(s.batch, s.features)]


def _lengths(s: Sizes) -> Tensor:
    return torch.tensor(s.lengths)


def _mask(s: Sizes) -> Tensor:
    return (torch.arange(s.keys) >= _lengths(s).unsqueeze(1)).unsqueeze(1)


def _each(hidden: Any) -> Any:
    """All queries at once, then one; with hidden keys and without."""

    def run(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
        return [x for query in queries for seen in (hidden(s), None) for x in attend(query, states, seen)]

    return run


def _covered(attend: Any, s: Sizes, states: Tensor, *queries: Tensor) -> list[Tensor]:
    """Of one that has a coverage layer, with coverage for one of the calls, which the original serves."""
    covered = attend(queries[1], states + 0, _lengths(s), torch.ones(s.batch, s.keys, dtype=states.dtype))
    return [*_each(_lengths)(attend, s, states, *queries), *covered]


def _onmt_decoder(kind: str, copies: bool = False) -> Any:
    def make(s: Sizes) -> nn.Module:
        decoder = load("OpenNMT-py", "onmt.decoders.decoder").InputFeedRNNDecoder
        made: nn.Module = decoder("GRU", False, 2, s.features, kind, copy_attn=copies, embeddings=Words())
        return made

    return make


def _eole_decoder(kind: str) -> Any:
    def make(s: Sizes) -> Any:
        config = SimpleNamespace(
            hidden_size=s.features, tgt_word_vec_size=3, global_attention=kind, global_attention_function="softmax",
            bidirectional_encoder=False, layers=1, rnn_type="LSTM", context_gate=None, coverage_attn=False,
        )  # fmt: skip
        return load("eole", "eole.decoders.rnn_decoder").InputFeedRNNDecoder(config)

    return make


def _decoder_inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.keys, s.features), draw(2, s.batch, s.features), draw(s.batch, s.steps, 3)]


def _decode(decoder: Any, s: Sizes, states: Tensor, last: Tensor, _: Tensor) -> list[Tensor]:
    """A sentence, and the first step of another."""
    letters, found = torch.arange(s.batch * s.steps).view(s.batch, s.steps, 1) % 11, []
    for steps in (s.steps, 1):
        decoder.init_state(None, None, last)
        outputs, weights = decoder(letters[:, :steps], states, src_len=_lengths(s))
        found += [outputs, *weights.values()]
    return found


def _decode_words(decoder: Any, s: Sizes, states: Tensor, last: Tensor, words: Tensor) -> list[Tensor]:
    found = []
    for steps in (s.steps, 1):
        decoder.init_state(enc_final_hs=(last[:1], last[1:]))
        outputs, weights = decoder(words[:, :steps], states, src_pad_mask=_mask(s))
        found += [outputs, *weights.values()]
    return found


PROGRAMS = [
    *(Program(f"opennmt.GlobalAttention {kind}", _attention("OpenNMT-py", kind), _inputs, _each(_lengths))
      for kind in TYPES),
    Program("opennmt.GlobalAttention mlp with coverage", _attention("OpenNMT-py", "mlp", coverage=True), _inputs,
            _covered),
    *(Program(f"eole.GlobalAttention {kind}", _attention("eole", kind), _inputs, _each(_mask)) for kind in TYPES),
    *(Program(f"opennmt.GlobalAttention {kind} in a decoder", _onmt_decoder(kind), _decoder_inputs, _decode,
              takes_half=False) for kind in TYPES),
    *(loop("opennmt.InputFeedRNNDecoder", kind, _onmt_decoder(kind, copies), _decoder_inputs, _decode)
      for kind, copies in (("dot", False), ("general", True), ("mlp", True))),
    *(loop("eole.InputFeedRNNDecoder", kind, _eole_decoder(kind), _decoder_inputs, _decode_words) for kind in TYPES),
]  # fmt: skip
