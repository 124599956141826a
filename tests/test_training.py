"""Training steps: by the formulas, and gone on with to the same bits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from seq2seq_cases import (
    LETTERS,
    PHONEMES,
    TEN,
    by_the_formulas,
    checkpoint_of,
    close,
    equal,
    fit,
    half_trained,
    ten,
    tiny,
)

import attnext
from attnext.seq2seq import InputError
from attnext.seq2seq.checkpoint import tensors_of
from attnext.seq2seq.data import (
    END,
    PAD,
    START,
    Entry,
    Pairs,
)
from attnext.seq2seq.evaluation import Errors, count_errors, evaluate
from attnext.seq2seq.search import Translator
from attnext.seq2seq.training import Step, Trainer, loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert evaluate(checkpoint_of(model), TEN) == Errors(0, symbols, 0, 10)


def test_evaluation_counts_every_entry() -> None:
    checkpoint = checkpoint_of(half_trained("gru"))
    outputs = Translator(checkpoint)([entry.source for entry in TEN])
    each = [count_errors(output.best, entry.targets) for output, entry in zip(outputs, TEN, strict=True)]
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
    """Decay multiplies the parameters by -1e19 a step, until they are infinite. Without it, gates only saturate."""
    with pytest.raises(InputError, match=r"training diverged at step \d+: .*than 1e\+20"):
        fit(tiny(dtype=torch.float32), epochs=50, batch_size=6, learning_rate=1e20, weight_decay=0.1)


def test_the_running_mean_forgets_the_start_soon() -> None:
    model = tiny(average=0.75, epochs=16, batch_size=4, learning_rate=0.05)
    trainer, mean = Trainer(model, ten()), {name: x.clone() for name, x in tensors_of(model).items()}
    for _ in trainer.steps():
        done = trainer.progress.step
        share = 9 / (done + 9) if done <= 27 else 0.25
        for name, x in tensors_of(model).items():
            mean[name] = (1 - share) * mean[name] + share * x
            close(tensors_of(trainer.evaluated)[name], mean[name])
    assert done == 48
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
