"""Search: against searches written out, whose log-probabilities are in float32, also those of a model in float64."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    TEN,
    VARIANTS,
    WORDS,
    checkpoint_of,
    half_trained,
    ten,
    tiny,
)
from torch import Tensor

from attnext.seq2seq import Seq2Seq
from attnext.seq2seq.checkpoint import load, save
from attnext.seq2seq.config import ATTENTIONS
from attnext.seq2seq.data import (
    END,
    PAD,
    START,
    UNKNOWN,
    pad,
)
from attnext.seq2seq.model import Opened
from attnext.seq2seq.search import Translator, search
from attnext.seq2seq.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model = half_trained("lstm" if variant == "all at once" else "gru", seed=4, **VARIANTS[variant])
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
                    _, state, weights = step(torch.tensor([symbol]), state, memory, need_weights=True)
                    assert weights is not None
                    rows.append(weights[0].float())
            assert one.weights is not None
            expected = torch.stack(rows) if rows else torch.empty(0, len(word))
            torch.testing.assert_close(one.weights[:, : len(word)], expected)


def test_outputs_may_be_as_long_as_those_of_training(tmp_path: Path) -> None:
    """A word without an end: cut after twice its length and ten symbols, or after the longest of training and ten."""
    model = tiny()
    with torch.no_grad():
        model.decoder.output.bias[END] = -1e9
    for longest, cut in ((0, 16), (6, 16), (40, 50)):
        save(tmp_path, dataclasses.replace(checkpoint_of(model), longest=longest))
        assert load(tmp_path).longest == longest
        assert len(Translator(load(tmp_path))(["box"])[0].best) == cut


def test_search_says_when_a_model_is_damaged() -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.output.bias[5] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        search(model, *pad([[5, 6]]))
    with pytest.raises(ValueError, match="length_power must be from -16 to 16"):
        search(tiny(), *pad([[5, 6]]), length_power=math.nan)


def test_search_stops_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    steps = 0
    step, greedy = Opened.__call__, Opened.greedy

    def counted_step(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **options)

    def counted_greedy(self: Opened, previous: Tensor, state: Any, memory: Any, count: int, *others: Any) -> Any:
        nonlocal steps
        steps += count
        return greedy(self, previous, state, memory, count, *others)

    monkeypatch.setattr(Opened, "__call__", counted_step)
    monkeypatch.setattr(Opened, "greedy", counted_greedy)
    monkeypatch.setattr(importlib.import_module("attnext.seq2seq.search"), "_STEPS_OF_FEW", 1)
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


def test_a_translator_packs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = half_trained("gru"), []
    opened = type(model.decoder).opened
    monkeypatch.setattr(type(model.decoder), "opened", lambda decoder: packed.append(decoder) or opened(decoder))
    translator = Translator(checkpoint_of(model))
    for _ in range(3):
        translator(["box"])
        translator(["box", "night"], beam=2)
    assert len(packed) == 1


@pytest.mark.parametrize("beam", [1, 3])
def test_translate_gives_every_text_its_place(beam: int) -> None:
    model = copy.deepcopy(half_trained("gru", dropout=0.1)).train()  # who translates wants no dropout
    checkpoint = checkpoint_of(model)
    texts = [entry.source for entry in TEN] + ["TOMATO"]
    batches: list[int] = []
    translator = Translator(checkpoint)
    found = translator(texts, beam=beam, need_weights=True, batch_size=3, advance=batches.append)
    assert batches == [3, 3, 3, 2]
    assert [output.source for output in found] == texts
    assert found[10].symbols == found[2].symbols
    for one, text in zip(found, texts, strict=True):
        (alone,) = translator([text], beam=beam)
        assert (alone.symbols, alone.weights) == (one.symbols, None)
        assert one.best == one.symbols[0]
        assert len(one.symbols) == len(one.scores) == beam
        assert one.weights is not None
        assert [x.shape for x in one.weights] == [(len(symbols), len(text)) for symbols in one.symbols]
        (hypotheses,) = search(model, *pad([LETTERS.read(text)]), beam=beam)
        assert [PHONEMES.decode(hypothesis.symbols) for hypothesis in hypotheses] == one.symbols
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(one.scores, rel=1e-5)
    assert translator([]) == []
    (unknown,) = translator(["a!"])
    assert unknown.source == "a!"


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


@pytest.mark.parametrize("where", ["output", "embedding"])
def test_searches_call_layers_with_hooks(where: str) -> None:
    """Greedy search, whose steps are one operator otherwise, as beam search does."""
    model, calls = half_trained("gru"), list[int]()
    expected = [found[0].symbols for found in search(model, *pad(WORDS))]
    handle = getattr(model.decoder, where).register_forward_hook(lambda *_: calls.append(1))
    try:
        assert [found[0].symbols for found in search(model, *pad(WORDS))] == expected
    finally:
        handle.remove()
    assert calls
