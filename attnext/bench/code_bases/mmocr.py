"""MMOCR's decoders of text in images, in training and in inference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnext.bench.code_bases.packages import load
from attnext.bench.code_bases.program import Program, Sizes

HEIGHT, LETTERS = 2, 9


class _Sample(SimpleNamespace):
    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def _make(name: str, **options: Any) -> Any:
    def make(s: Sizes) -> Any:
        kind = getattr(load("mmocr", "mmocr.models.textrecog.decoders.sar_decoder"), name)
        known = SimpleNamespace(num_classes=LETTERS, start_idx=0, padding_idx=1)
        return kind(known, d_model=s.states, d_enc=s.query, d_k=s.features, max_seq_len=s.steps, **options)

    return make


def _inputs(s: Sizes, draw: Any) -> list[Tensor]:
    return [draw(s.batch, s.states, HEIGHT, s.keys), draw(s.batch, s.query)]


def _samples(s: Sizes) -> list[_Sample]:
    letters = torch.arange(s.batch * s.steps).view(s.batch, -1) % LETTERS
    return [
        _Sample(gt_text=SimpleNamespace(padded_indexes=row), valid_ratio=length / s.keys)
        for row, length in zip(letters, s.lengths, strict=True)
    ]


def _run(decoder: Any, s: Sizes, features: Tensor, holistic: Tensor) -> list[Tensor]:
    found = [decoder.forward_train(x, holistic, _samples(s)) for x in (features, features * 0.5)]
    if not decoder.training:
        with torch.no_grad():  # as it writes into its own inputs
            found += [decoder(features, holistic, _samples(s)), decoder(feat=features * 0.5, out_enc=holistic)]
    return found


def _learn(decoder: Any, s: Sizes, features: Tensor, holistic: Tensor) -> list[Tensor]:
    """What can be run where another dtype may choose another letter."""
    return [decoder.forward_train(features, holistic, data_samples=_samples(s))]


_BIAS = ("conv1x1_2.bias",)
PROGRAMS = [
    Program("mmocr.ParallelSARDecoder", _make("ParallelSARDecoder"), _inputs, _run, _BIAS, takes_half=False),
    Program("mmocr.ParallelSARDecoder with more", _make("ParallelSARDecoder", enc_bi_rnn=True, dec_bi_rnn=True,
            dec_gru=True, pred_concat=True), lambda s, draw: [_inputs(s, draw)[0], draw(s.batch, 2 * s.query)], _run,
            _BIAS, takes_half=False),
    Program("mmocr.ParallelSARDecoder without masks", _make("ParallelSARDecoder", mask=False), _inputs, _learn, _BIAS),
    Program("mmocr.SequentialSARDecoder", _make("SequentialSARDecoder"), _inputs, _run, _BIAS, takes_half=False),
    Program("mmocr.SequentialSARDecoder with more", _make("SequentialSARDecoder", dec_gru=True, pred_concat=True),
            _inputs, _learn, _BIAS),
    Program("mmocr.SequentialSARDecoder without masks", _make("SequentialSARDecoder", mask=False, pred_concat=True),
            _inputs, _learn, _BIAS),
]  # fmt: skip
