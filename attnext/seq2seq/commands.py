"""The commands ``attnext train`` and ``attnext predict``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import attnext
from attnext._support import extra, make_writable, writable_file
from attnext.cli import non_negative, positive, require_backend, share
from attnext.seq2seq import ModelConfig, Seq2Seq
from attnext.seq2seq.checkpoint import Checkpoint, load, save
from attnext.seq2seq.data import LETTERS, PHONEMES, Pairs, Split, load_cmudict, split
from attnext.seq2seq.evaluation import evaluate
from attnext.seq2seq.model import CELLS
from attnext.seq2seq.plots import alignment
from attnext.seq2seq.search import pronounce
from attnext.seq2seq.training import TrainingPlan, fit

__all__ = ["add_predict_arguments", "add_train_arguments", "predict", "train"]


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext train``."""
    parser.add_argument("task", choices=["g2p"], help="g2p: pronunciations of English words (CMU dictionary)")
    parser.add_argument(
        "--out", type=Path, default=Path("g2p-model"), metavar="DIR",
        help="folder of the checkpoint, in place of one that is there (default %(default)s)",
    )  # fmt: skip
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--minutes",
        type=positive(float),
        metavar="M",
        help="time to train (default 5, or no limit with --epochs)",
    )
    limit.add_argument("--seconds", type=positive(float), metavar="S", help="the same in seconds")
    for name, kind, default, text in (
        ("epochs", positive(int), None, "stop after so many times through the data"),
        ("seed", non_negative, TrainingPlan.seed, "of the parameters and the order of the words"),
        ("batch-size", positive(int), TrainingPlan.batch_size, "words in a step"),
        ("learning-rate", positive(float), TrainingPlan.learning_rate, "its peak, after a warm-up"),
        (
            "embedding-size",
            positive(int),
            ModelConfig.embedding_size,
            "size of a letter's or phoneme's vector",
        ),
        ("encoder-size", positive(int), ModelConfig.encoder_size, "size of the encoder's state, each way"),
        ("decoder-size", positive(int), ModelConfig.decoder_size, "size of the decoder's state"),
        (
            "attention-size",
            positive(int),
            ModelConfig.attention_size,
            "size of the space they are compared in",
        ),
        ("dropout", share, ModelConfig.dropout, "share of values dropped in training"),
    ):
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text}{shown}")
    parser.add_argument(
        "--cell", choices=sorted(CELLS), default=ModelConfig.cell, help="recurrent unit (default %(default)s)"
    )
    _add_backend_argument(parser)


def train(args: argparse.Namespace) -> int:
    """Trains a model, writes its checkpoint and prints its error rates on held-out words."""
    seconds = args.minutes * 60 if args.minutes else args.seconds
    if seconds is None and args.epochs is None:
        seconds = 300.0
    plan = TrainingPlan(seconds, args.epochs, args.batch_size, args.learning_rate, seed=args.seed)
    with _backend(args.backend):
        make_writable(args.out)
        with extra("demo"):  # find out now, not after the training
            import rapidfuzz  # noqa: F401
            import rich  # noqa: F401
            import safetensors.torch  # noqa: F401
        words = split(load_cmudict())
        torch.manual_seed(args.seed)
        sizes = (args.embedding_size, args.encoder_size, args.decoder_size, args.attention_size)
        model = Seq2Seq(ModelConfig(len(LETTERS), len(PHONEMES), args.cell, *sizes, args.dropout))
        metrics = _fit_with_progress(Checkpoint(model), words, plan, args.out)
        rates = evaluate(Checkpoint(model), words.test)
    metrics |= {"test": rates._asdict(), "plan": asdict(plan)}
    save(args.out, Checkpoint(model, metrics=metrics))
    print(f"checkpoint in {args.out}")
    print(rates)
    return 0


def _fit_with_progress(checkpoint: Checkpoint, words: Split, plan: TrainingPlan, out: Path) -> dict[str, Any]:
    """Trains under a progress bar on stderr; after each epoch but the last, shows dev errors and saves."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    pairs = Pairs.of(words.train)
    started, mean_loss, epoch = time.perf_counter(), 0.0, 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=1.0)
        for step in fit(checkpoint.model, pairs, plan):
            if step.epoch > epoch:
                epoch = step.epoch
                rates = evaluate(checkpoint, words.dev)
                save(out, Checkpoint(checkpoint.model, metrics={"epochs": epoch, "dev": rates._asdict()}))
                bar.console.print(f"epoch {epoch}: loss {mean_loss:.3f}, held-out {rates}", highlight=False)
            mean_loss = step.loss if mean_loss == 0.0 else 0.95 * mean_loss + 0.05 * step.loss
            speed = step.pairs / (time.perf_counter() - started)
            bar.update(task, completed=step.done, description=f"loss {mean_loss:.3f}  {speed:,.0f} words/s")
    return {"seconds": time.perf_counter() - started, "pairs": step.pairs, "loss": mean_loss}


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext predict``."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("words", nargs="+", metavar="WORD", help="words to pronounce")
    parser.add_argument("--alignment", type=Path, metavar="PNG", help="also draw which letters each phoneme attends")
    _add_backend_argument(parser)


def predict(args: argparse.Namespace) -> int:
    """Prints the pronunciations of words, and draws their alignment if asked to."""
    if args.alignment is not None:
        writable_file("--alignment", args.alignment)
    with _backend(args.backend):
        found = pronounce(load(args.checkpoint), args.words, need_weights=args.alignment is not None)
    width = max(len(word.word) for word in found)
    for word in found:
        print(f"{word.word:{width}}  {' '.join(word.phonemes)}")
    if args.alignment is not None:
        alignment(args.alignment, found)
        print(f"alignment in {args.alignment}")
    return 0


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Makes this the backend, or keeps the environment's choice; one that can't serve is the user's error."""
    require_backend(name)
    with attnext.use_backend(name) if name else nullcontext():
        yield


def _add_backend_argument(parser: argparse.ArgumentParser) -> None:
    choices = sorted(attnext.backends())
    parser.add_argument("--backend", choices=choices, help="what runs the attention (default: chosen by device)")
