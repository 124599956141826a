"""Words, small models and short training that the tests of the reference model share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from attnext.seq2seq import Config, Seq2Seq
from attnext.seq2seq.checkpoint import Checkpoint, tensors_of
from attnext.seq2seq.data import (
    Corpus,
    Entry,
    Pairs,
    Vocabulary,
)
from attnext.seq2seq.training import Step, Trainer

TEN = [
    Entry("knight", (("N", "AY", "T"),)),
    Entry("night", (("N", "AY", "T"),)),
    Entry("tomato", (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW"))),
    Entry("box", (("B", "AA", "K", "S"),)),
    Entry("don't", (("D", "OW", "N", "T"),)),
    Entry("phone", (("F", "OW", "N"),)),
    Entry("though", (("DH", "OW"),)),
    Entry("w", (("D", "AH", "B", "AH", "L", "Y", "UW"),)),
    Entry("queue", (("K", "Y", "UW"),)),
    Entry("attention", (("AH", "T", "EH", "N", "SH", "AH", "N"),)),
]
LETTERS = Vocabulary(tuple("'abcdefghijklmnopqrstuvwxyz"), "characters", lower=True)
PHONEMES = Corpus().vocabularies(TEN, 100)[1]
WORDS = [LETTERS.read(entry.source) for entry in TEN]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "input feeding": {"input_feeding": True},
    "tied embeddings": {"tied_embeddings": True},
    "two decoder layers": {"decoder_layers": 2},
    "two encoder layers": {"encoder_layers": 2},
    "one direction": {"bidirectional": False},
    "no attention": {"attention": "none"},
    "no attention, one direction": {"attention": "none", "bidirectional": False},
    "all at once": {"input_feeding": True, "tied_embeddings": True, "decoder_layers": 2, "encoder_layers": 2},
}


def tiny(cell: str = "gru", dtype: torch.dtype = torch.float64, seed: int = 1, **fields: Any) -> Seq2Seq:
    """A model with a different size of everything, so that mixed-up sizes show."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embedding_size": 6, "encoder_size": 7, "decoder_size": 9, "attention_size": 5}
    config = Config(cell=cell, **sizes | {"epochs": 1} | fields)
    return Seq2Seq(config, len(LETTERS), len(PHONEMES)).to(dtype).eval()


def checkpoint_of(model: Seq2Seq, **metrics: Any) -> Checkpoint:
    return Checkpoint(model, LETTERS, PHONEMES, metrics=metrics)


def ten() -> Pairs:
    return Pairs.of(TEN, LETTERS, PHONEMES)


def fit(model: Seq2Seq, **fields: Any) -> list[Step]:
    model.config = dataclasses.replace(model.config, **fields)
    return list(Trainer(model, ten()).steps())


@functools.cache
def half_trained(cell: str, **fields: Any) -> Seq2Seq:
    """As drawn, a model hardly tells one word from another and never ends."""
    model = tiny(cell, **fields)
    fit(model, epochs=30, batch_size=6, learning_rate=0.02)
    return model.eval()


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def by_the_formulas(model: Seq2Seq, word: list[int], previous: list[int]) -> Tensor:
    """The logits (Ty, V) of one word, every step and every score written out."""
    config, encoder, decoder = model.config, model.encoder, model.decoder
    states, last = encoder.recurrent(encoder.embedding(torch.tensor([word])))
    h = states[0]
    hidden = last[0] if config.cell == "lstm" else last  # layer by layer, in each the directions
    ends = torch.cat([hidden[-2, 0], hidden[-1, 0]]) if config.bidirectional else hidden[-1, 0]
    first = iter(torch.tanh(decoder.first(ends)).split(config.decoder_size))
    recurrent, depths = decoder.recurrent, range(config.decoder_layers)
    readout = recurrent.readout
    layers = [[next(first) for _ in range(1 if config.cell == "gru" else 2)] for _ in depths]
    feed = torch.zeros(readout.out_features, dtype=h.dtype)
    logits = []
    for number in previous:
        y = decoder.embedding.weight[number]
        if config.attention == "none":
            context = ends
        else:
            attn = recurrent.attention
            query = attn.query_projection.weight @ layers[-1][0]
            e = torch.stack([attn.score_weight @ torch.tanh(query + attn.memory_projection.weight @ h_j) for h_j in h])
            a = torch.exp(e) / torch.exp(e).sum()
            context = sum((a_j * h_j for a_j, h_j in zip(a, h, strict=True)), torch.zeros_like(h[0]))
        for depth in depths:
            x = layers[depth - 1][0] if depth else torch.cat([y, context, *([feed] if config.input_feeding else [])])
            parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            arguments: Any = [getattr(recurrent, f"{part}_l{depth}") for part in parts]
            if config.cell == "gru":
                layers[depth] = [torch.gru_cell(x[None], layers[depth][0][None], *arguments)[0]]
            else:
                pair = tuple(part[None] for part in layers[depth])
                layers[depth] = [part[0] for part in torch.lstm_cell(x[None], pair, *arguments)]
        feed = torch.tanh(readout.weight @ torch.cat([y, layers[-1][0], context]) + readout.bias)
        output = decoder.embedding.weight if config.tied_embeddings else decoder.output.weight
        logits.append(output @ feed + decoder.output.bias)
    return torch.stack(logits)
