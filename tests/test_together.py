"""Several models that search together: the mean of their probabilities, against searches written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from seq2seq_cases import LETTERS, WORDS, checkpoint_of, half_trained
from torch import Tensor

from attnext.seq2seq import InputError, Seq2Seq
from attnext.seq2seq.data import END, START, Vocabulary, pad
from attnext.seq2seq.search import Translator, search
from attnext.seq2seq.together import Together, together

pytestmark = pytest.mark.usefixtures("one_thread")


def models() -> list[Seq2Seq]:
    """Of different units, sizes of one kind, and attentions."""
    return [
        half_trained("gru", dtype=torch.float32, seed=4),
        half_trained("lstm", dtype=torch.float32, seed=5, attention="location-all-steps"),
        half_trained("gru", dtype=torch.float32, seed=5, decoder_layers=2, input_feeding=True),
    ]


def mean(some: list[Seq2Seq], word: list[int], found: list[int]) -> Tensor:
    """The log-probabilities of the symbols from END after these."""
    with torch.no_grad():
        each = [one(*pad([word]), torch.tensor([[START, *found]]))[0, -1, END:].softmax(0) for one in some]
    return torch.stack(each).mean(0).log()


def test_greedy_search_takes_the_best_of_the_mean() -> None:
    some = models()
    for word, (found,) in zip(WORDS, search(Together(some), *pad(WORDS)), strict=True):  # type: ignore[arg-type]
        symbols, score = list[int](), 0.0
        while True:
            best, choice = mean(some, word, symbols).max(0)
            score += float(best)
            if int(choice) == 0:
                break
            symbols.append(int(choice) + END)
        assert found.symbols == symbols
        assert found.score == pytest.approx(score / (len(symbols) + 1), rel=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_copies_together_are_the_model(beam: int) -> None:
    one = models()[0]
    alone = search(one, *pad(WORDS), beam=beam, need_weights=True)
    found = search(Together([one, one]), *pad(WORDS), beam=beam, need_weights=True)  # type: ignore[arg-type]
    for a, b in zip(alone, found, strict=True):
        assert [x.symbols for x in a] == [x.symbols for x in b]
        for x, y in zip(a, b, strict=True):
            assert x.score == pytest.approx(y.score, rel=1e-5)
            assert x.weights is not None
            assert y.weights is not None
            torch.testing.assert_close(x.weights, y.weights)


def test_weights_are_the_mean() -> None:
    some = models()[:2]
    (found,) = search(Together(some), *pad(WORDS[:1]), need_weights=True)[0]  # type: ignore[arg-type]
    forced, expected = torch.tensor([[START, *found.symbols[:-1]]]), []
    for one in some:
        memory, state = one.encode(*pad(WORDS[:1]))
        inputs = one.decoder.embed(forced)
        expected.append(one.decoder.recurrent(inputs, memory, state, need_weights=True)[3][0])
    assert found.weights is not None
    torch.testing.assert_close(found.weights, torch.stack(expected).mean(0).detach())


def test_texts_and_vocabularies() -> None:
    first, *others = (checkpoint_of(model) for model in models())
    both = together({Path("a"): first, Path("b"): dataclasses.replace(others[0], longest=31)})
    assert both.longest == 31
    assert len(Translator(both)(["box", "night"])[1].best) > 0
    assert together({Path("a"): first}) is first
    other = dataclasses.replace(others[1], source=Vocabulary(LETTERS.symbols[1:], "characters", lower=True))
    with pytest.raises(InputError, match="the models in 'a' and 'b' have other symbols"):
        together({Path("a"): first, Path("b"): other})


def test_one_without_attention_has_no_weights() -> None:
    some = [models()[0], half_trained("gru", dtype=torch.float32, seed=4, attention="none")]
    assert len(search(Together(some), *pad(WORDS))) == len(WORDS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need_weights must be False for a model without attention"):
        search(Together(some), *pad(WORDS), need_weights=True)  # type: ignore[arg-type]
