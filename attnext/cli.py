"""The command ``attnext``: ``info | verify | train | predict | demo``.

Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input, 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

import attnext
from attnext.backends import choose
from attnext.seq2seq import InputError, MissingExtra, ModelConfig, Seq2Seq
from attnext.seq2seq._support import demo_extra, make_writable
from attnext.seq2seq.checkpoint import Checkpoint, load, save
from attnext.seq2seq.data import LETTERS, PHONEMES, Pairs, Split, load_cmudict, split
from attnext.seq2seq.evaluation import evaluate
from attnext.seq2seq.model import CELLS
from attnext.seq2seq.plots import alignment
from attnext.seq2seq.search import pronounce
from attnext.seq2seq.training import TrainingPlan, fit

__all__ = ["main", "positive"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Raises:
        SystemExit: after ``--help``, ``--version`` and bad usage, as argparse does.
    """
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (InputError, MissingExtra) as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(f"attnext: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from attnext import demo, verify

    parser = _Parser(prog="attnext", description="Fused attention for encoder-decoder models.")
    parser.add_argument("--version", action="version", version=f"attnext {attnext.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, add_arguments, run in (
        ("info", "show the installation, for a bug report", None, _info),
        ("verify", "check the kernels against the reference", verify.add_arguments, verify.run),
        ("train", "train the reference model", _add_train_arguments, _train),
        ("predict", "pronounce words with a trained model", _add_predict_arguments, _predict),
        ("demo", "verify, time, train and pronounce, in four minutes", demo.add_arguments, demo.run),
    ):
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        if add_arguments is not None:
            add_arguments(command)
    return parser


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """The type of an argument that is a finite number above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} above 0, got {text!r}")
        return value

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to below 2**63, got {text!r}")
    return int(text)


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Makes this the backend, or keeps the environment's choice; one that can't serve is the user's error."""
    try:
        choose(name, "cpu")
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error
    with attnext.use_backend(name) if name else nullcontext():
        yield


def _add_backend_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=sorted(attnext.backends()), help="run the attention on this (default: by device)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.set_defaults(backend=None)


def _info(args: argparse.Namespace) -> int:
    from attnext import info

    print(info.render())
    return 0


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["g2p"], help="g2p: pronunciations of English words (CMU dictionary)")
    parser.add_argument(
        "--out", type=Path, default=Path("g2p-model"), metavar="DIR",
        help="folder of the checkpoint; one that is there is replaced",
    )  # fmt: skip
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--minutes", type=positive(float), help="time to train (default: 5, if there is no other limit)"
    )
    limit.add_argument("--seconds", type=positive(float), help="the same in seconds")
    parser.add_argument("--epochs", type=positive(int), help="stop after so many times through the data")
    parser.add_argument("--seed", type=_seed, default=0, help="of the parameters and the order of the words")
    parser.add_argument(
        "--batch-size", type=positive(int), default=TrainingPlan.batch_size, help="words in a step"
    )
    parser.add_argument(
        "--learning-rate", type=positive(float), default=TrainingPlan.learning_rate, help="at its peak"
    )
    _add_backend_argument(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=sorted(CELLS), default=ModelConfig.cell, help="recurrent unit")
    for part in ("embedding", "encoder", "decoder", "attention"):
        default = getattr(ModelConfig, f"{part}_size")
        model.add_argument(f"--{part}-size", type=positive(int), default=default, help=f"size of the {part}")
    model.add_argument("--dropout", type=_share, default=ModelConfig.dropout, help="share of values dropped")


def _train(args: argparse.Namespace) -> int:
    seconds = args.minutes * 60 if args.minutes else args.seconds
    if seconds is None and args.epochs is None:
        seconds = 300.0
    plan = TrainingPlan(seconds, args.epochs, args.batch_size, args.learning_rate, seed=args.seed)
    make_writable(args.out)
    with demo_extra():  # find out now, not after the training
        import rapidfuzz
        import rich
        import safetensors.torch  # noqa: F401
    torch.manual_seed(args.seed)
    model = Seq2Seq(
        ModelConfig(
            len(LETTERS), len(PHONEMES), args.cell, args.embedding_size, args.encoder_size, args.decoder_size,
            args.attention_size, args.dropout,
        )
    )  # fmt: skip
    words = split(load_cmudict())
    with _backend(args.backend):
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


def _add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("words", nargs="+", metavar="WORD", help="words to pronounce")
    parser.add_argument(
        "--alignment", type=Path, metavar="PNG", help="also draw which letters each phoneme attends"
    )
    _add_backend_argument(parser)


def _predict(args: argparse.Namespace) -> int:
    if args.alignment is not None:
        make_writable(args.alignment.parent)
        if args.alignment.is_dir():
            raise InputError(f"--alignment must be a file, got the folder {str(args.alignment)!r}")
    with _backend(args.backend):
        found = pronounce(load(args.checkpoint), args.words, need_weights=args.alignment is not None)
    width = max(len(word.word) for word in found)
    for word in found:
        print(f"{word.word:{width}}  {' '.join(word.phonemes)}")
    if args.alignment is not None:
        alignment(args.alignment, found)
        print(f"alignment in {args.alignment}")
    return 0
