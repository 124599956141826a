"""The commands ``attnext train``, ``attnext evaluate`` and ``attnext predict``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import attnext
from attnext._support import InputError, extra, only_writer, writable_file, writable_picture, write_atomically
from attnext.cli import finite, path_argument, positive, require_backend
from attnext.seq2seq import config
from attnext.seq2seq.checkpoint import Checkpoint, load
from attnext.seq2seq.data import UNITS, Corpus, Entry
from attnext.seq2seq.distributed import Group, alone, joined
from attnext.seq2seq.evaluation import Errors, by_length, total
from attnext.seq2seq.lines import FORMATS, batches_of_input, written
from attnext.seq2seq.plots import alignment, errors_by_length
from attnext.seq2seq.search import Output, Translator
from attnext.seq2seq.session import Interrupted, Session
from attnext.seq2seq.together import together

__all__ = ["add_evaluate_arguments", "add_predict_arguments", "add_train_arguments", "evaluate", "predict", "train"]

_PARTS = ("train", "dev", "test")
_MOST_DRAWN = 60


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext train``."""
    parser.add_argument(
        "task", choices=["g2p", "pairs"], help="g2p: pronunciations of words; pairs: any lines of aligned text"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR",
        help="folder of the run (default: TASK-model)",
    )  # fmt: skip
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    begun.add_argument("--overwrite", action="store_true", help="begin anew where --out has a run, which is lost")
    data = parser.add_argument_group(
        "data", "g2p takes lexicons: lines of WORD, tab, phonemes, more pronunciations behind further tabs or lines "
        "(without: the CMU dictionary). pairs takes a file of sources and one of targets, a line each. Of the training "
        "data 2 % is held out to watch (dev) and 10 % to test on, where no file is named for that.",
    )  # fmt: skip
    for part in _PARTS:
        data.add_argument(f"--{_option(part, 'lexicon')}", metavar="FILE", help=f"of g2p: {part} data")
    for part in _PARTS:
        for side in ("source", "target"):
            data.add_argument(f"--{_option(part, side)}", metavar="FILE", help=f"of pairs: {part} {side}s")
    for side in ("source", "target"):
        data.add_argument(f"--{side}-units", choices=UNITS, help=f"of pairs: symbols of a {side} (default {UNITS[0]})")
    config.add_arguments(parser)
    _add_device_arguments(parser)


def train(args: argparse.Namespace) -> int:
    """Trains a model in a folder, keeps the one that does best on held-out data, and prints its errors on test data."""
    out = args.out or Path(f"{args.task}-model")
    corpus = _corpus(args)
    with (
        joined(args.device) as group,
        _backend(args, group),
        only_writer(out) if group.rank == 0 else nullcontext(),
    ):
        session = Session(out, corpus, config.given(args), group, resume=args.resume, overwrite=args.overwrite)
        if args.resume and session.first:
            begun = session.trainer.progress
            where = (
                f"from epoch {begun.epoch}, step {begun.step}" if session.resumed else "from the start: no run there"
            )
            print(f"going on in {out} {where}", file=sys.stderr)
        try:
            errors = session.run()
        except Interrupted:
            if session.first:
                with suppress(OSError):  # the terminal may be what has ended it
                    print(f"\nsaved in {out}; go on with the same command and --resume", file=sys.stderr)
            return 130
    if errors is not None:
        print(f"run in {out}: checkpoint.json, log.jsonl, curves.png")
        print(errors.describe(args.task))
    return 0


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext evaluate``."""
    parser.add_argument(
        "checkpoint", type=path_argument, nargs="+", metavar="DIR",
        help="folder of the model; of several they decode together, by the mean of their probabilities",
    )  # fmt: skip
    parser.add_argument("--test-lexicon", metavar="FILE", help="of g2p: other data than the model's own test data")
    parser.add_argument("--test-source", metavar="FILE", help="of pairs: likewise")
    parser.add_argument("--test-target", metavar="FILE", help="of pairs: likewise")
    parser.add_argument(
        "--beside", type=path_argument, action="append", default=[], metavar="DIR",
        help="another model, one with --attention none for instance, to be set beside this one; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=path_argument, metavar="FILE",
        help="draw the errors by the length of the source: .png, .svg or .pdf",
    )  # fmt: skip
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the errors and all outputs")
    _add_search_arguments(parser)
    _add_device_arguments(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Prints a model's errors by the length of the source, and in all in the last line."""
    if args.plot is not None:
        writable_picture("--plot", args.plot)
    if args.json is not None:
        writable_file("--json", args.json)
    group = alone(args.device)
    with _backend(args, group):
        first = together({folder: load(folder) for folder in args.checkpoint})
        models = {_label(args.checkpoint, first): first}
        for folder in args.beside:
            other = load(folder)
            if (other.corpus.task, other.corpus.units) != (first.corpus.task, first.corpus.units):
                raise InputError(f"--beside {folder}: a model of another task or other symbols can't be compared")
            models.setdefault(_label([folder], other), other)
        entries = _test_entries(first, args)
        found = {}
        for label, checkpoint in models.items():
            checkpoint.model.to(group.device)
            found[label] = _outputs(checkpoint, [entry.source for entry in entries], args, label)
    lengths = [len(first.source.read(entry.source)) for entry in entries]
    errors = {
        label: by_length(entries, [output.best for output in outputs], lengths) for label, outputs in found.items()
    }
    _print_by_length(errors, first.corpus.task)
    if args.plot is not None:
        errors_by_length(args.plot, errors, first.corpus.task)
    if args.json is not None:
        _write_json(args.json, entries, next(iter(found.values())), next(iter(errors.values())))
    for label, lengths_of in list(errors.items())[1:]:
        print(f"{label}: {total(lengths_of).describe(first.corpus.task)}")
    print(total(next(iter(errors.values()))).describe(first.corpus.task))
    return 0


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnext predict``."""
    parser.add_argument("checkpoint", type=path_argument, metavar="DIR", help="folder of the model")
    parser.add_argument("words", nargs="*", metavar="WORD", help="sources (default: the lines of standard input)")
    parser.add_argument("--nbest", type=positive(int), default=1, metavar="N", help="outputs for each, with scores")
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0],
        help="tsv: source, tab and output, as a lexicon, with --nbest scores between; json: an object for each source "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="stop at a source with unknown letters: else it is left out"
    )
    parser.add_argument(
        "--alignment", type=path_argument, metavar="FILE",
        help="also draw which symbols each output attends: .png, .svg or .pdf",
    )  # fmt: skip
    _add_search_arguments(parser)
    _add_device_arguments(parser)


def predict(args: argparse.Namespace) -> int:
    """Writes the outputs for sources as they come, and draws their alignment if asked to."""
    if args.alignment is not None:
        writable_picture("--alignment", args.alignment)
    args.beam = max(args.beam, args.nbest)
    group = alone(args.device)
    with _backend(args, group):
        checkpoint = load(args.checkpoint)
        checkpoint.model.to(group.device)
        batches: Iterable[list[str]] = [args.words] if args.words else batches_of_input()
        if args.alignment is not None:
            batches = [_to_be_drawn(checkpoint, batches)]
        translator, answered, drawn = Translator(checkpoint), 0, []
        for sources in batches:
            known = _known(checkpoint, sources, args.strict, "source" if args.words else "line", answered + 1)
            answered += len(sources)
            for source, output in zip(sources, _answers(translator, known, args), strict=True):
                print(written(source, output, checkpoint.target, args.nbest, args.format))
                drawn += [output] if args.alignment is not None and output is not None else []
            sys.stdout.flush()
    if drawn:
        alignment(args.alignment, drawn, checkpoint.source.unit)
        print(f"alignment in {args.alignment}", file=sys.stderr)
    return 0


def _to_be_drawn(checkpoint: Checkpoint, batches: Iterable[list[str]]) -> list[str]:
    """All sources, of which there may not be too many for a picture."""
    if checkpoint.model.config.attention == "none":
        raise InputError("--alignment: a model without attention has no weights to draw")
    sources = [source for batch in batches for source in batch]
    if len(sources) > _MOST_DRAWN:
        raise InputError(f"--alignment: at most {_MOST_DRAWN} words can be drawn, got {len(sources)}")
    return sources


def _known(checkpoint: Checkpoint, sources: Sequence[str], strict: bool, what: str, first: int) -> list[str | None]:
    """The sources that the model can answer, None in the place of the others: of empty ones, and of those with letters
    that are unknown, which are noted."""
    found: list[str | None] = []
    for number, source in enumerate(sources, first):
        unknown = _unknown(checkpoint, source)
        if unknown and strict:
            raise InputError(f"{what} {number}: {unknown}")
        if unknown:
            print(f"attnext: {what} {number} left out: {unknown}", file=sys.stderr)
        found.append(source if source.strip() and not unknown else None)
    return found


def _unknown(checkpoint: Checkpoint, source: str) -> str:
    """What a pronunciation can't be made of; lines of text may have symbols that their model doesn't know."""
    if checkpoint.corpus.task != "g2p" or not source.strip():
        return ""
    try:
        checkpoint.source.require(source)
    except InputError as error:
        return str(error)
    return ""


def _answers(
    translator: Translator, sources: Sequence[str | None], args: argparse.Namespace
) -> Iterator[Output | None]:
    there = [source for source in sources if source is not None]
    options = {"beam": args.beam, "length_power": args.length_power, "need_weights": args.alignment is not None}
    outputs = iter(translator(there, **options))
    return (None if source is None else next(outputs) for source in sources)


def _option(part: str, file: str) -> str:
    return file if part == "train" else f"{part}-{file}"


def _files(args: argparse.Namespace, task: str, part: str) -> tuple[str, ...]:
    """The files of a part of the data that the options name; another task's options are the user's error."""
    found: tuple[str, ...] = ()
    for kind, sides in {"g2p": ("lexicon",), "pairs": ("source", "target")}.items():
        options = {_option(part, side): getattr(args, _option(part, side).replace("-", "_")) for side in sides}
        given = [option for option, value in options.items() if value is not None]
        if given and kind != task:
            raise InputError(f"--{given[0]} is for {kind}, not for {task}")
        if given and len(given) < len(options):
            raise InputError(f"{' and '.join('--' + option for option in options)} go together")
        if given:
            found = tuple(str(Path(value).absolute()) for value in options.values())
    return found


def _corpus(args: argparse.Namespace) -> Corpus:
    """The data that the options name."""
    files = {part: _files(args, args.task, part) for part in _PARTS}
    units = (args.source_units or "characters", args.target_units or "characters")
    if args.task == "g2p":
        for side in ("source", "target"):
            if getattr(args, f"{side}_units") is not None:
                raise InputError(f"--{side}-units is for pairs, not for g2p")
        units = ("characters", "words")
    elif not files["train"]:
        raise InputError("pairs needs --source and --target")
    return Corpus(args.task, files["train"], files["dev"], files["test"], units)


def _test_entries(checkpoint: Checkpoint, args: argparse.Namespace) -> Sequence[Entry]:
    files = _files(args, checkpoint.corpus.task, "test")
    if not files:
        try:
            return checkpoint.corpus.split().test
        except InputError as error:
            option = "--test-lexicon" if checkpoint.corpus.task == "g2p" else "--test-source and --test-target"
            raise InputError(f"{error} (the model's own test data; name other by {option})") from error
    entries = checkpoint.corpus.entries(files)
    if not entries:  # no errors of none would read as a perfect model
        raise InputError("there is nothing in the test data")
    return entries


def _outputs(checkpoint: Checkpoint, sources: Sequence[str], args: argparse.Namespace, name: str) -> list[Output]:
    """The outputs of all sources, under a progress bar on stderr; then it says how long the search took."""
    with extra("demo"):
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress
    console, started = Console(stderr=True), time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        advance = partial(bar.advance, bar.add_task(escape(name), total=len(sources)))
        outputs = Translator(checkpoint)(sources, beam=args.beam, length_power=args.length_power, advance=advance)
    seconds = time.perf_counter() - started
    console.print(
        f"{name}: beam of {args.beam}, {len(sources)} sources in {seconds:.1f} s", highlight=False, markup=False
    )
    return outputs


def _label(folders: Sequence[Path], checkpoint: Checkpoint) -> str:
    attention = checkpoint.model.config.attention
    if len(folders) > 1:
        return f"{len(folders)} models together"
    return f"{folders[0]} ({'no attention' if attention == 'none' else attention})"


def _print_by_length(models: dict[str, dict[int, Errors]], task: str) -> None:
    with extra("demo"):
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    symbol, source = ("PER", "WER") if task == "g2p" else ("symbol errors", "line errors")
    table = Table(box=box.SIMPLE, title="by the length of the source", title_justify="left")
    table.add_column("length", justify="right")
    table.add_column("sources", justify="right")
    for name in models:
        table.add_column(f"{symbol}, {escape(name)}", justify="right")
        table.add_column(source, justify="right")
    first = next(iter(models.values()))
    for length in first:
        cells = [cell for lengths in models.values() for cell in _rates(lengths[length])]
        table.add_row(str(length), str(first[length].sources), *cells)
    Console().print(table)


def _rates(errors: Errors) -> tuple[str, str]:
    return f"{errors.of_symbols:.2%}", f"{errors.of_sources:.2%}"


def _write_json(path: Path, entries: Sequence[Entry], outputs: Sequence[Output], lengths: dict[int, Errors]) -> None:
    record = {
        "errors": total(lengths).record(),
        "by_length": {length: errors.record() for length, errors in lengths.items()},
        "outputs": [
            {"source": entry.source, "targets": entry.targets, "outputs": output.symbols, "scores": output.scores}
            for entry, output in zip(entries, outputs, strict=True)
        ],
    }
    write_atomically(path, json.dumps(record, indent=1).encode())


@contextmanager
def _backend(args: argparse.Namespace, group: Group) -> Iterator[None]:
    """Inside it the backend is the one that was asked for; one that can't serve there is the user's error."""
    require_backend(args.backend, group.device.type)
    with attnext.use_backend(args.backend) if args.backend else nullcontext():
        yield


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beam", type=positive(int), default=1, metavar="K", help="hypotheses kept at every step (default 1: greedy)"
    )
    parser.add_argument(
        "--length-power", type=finite, default=1.0, metavar="A",
        help="scores are divided by length ** A (default %(default)s)",
    )  # fmt: skip


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    choices = sorted(attnext.backends())
    parser.add_argument("--backend", choices=choices, help="what runs the attention (default: chosen by device)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to compute (default: a GPU where there is one)"
    )
