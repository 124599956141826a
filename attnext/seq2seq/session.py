"""A training run in a folder: its progress on the screen and in a log, the best model, and a state to go on from.

checkpoint.json, checkpoint-*.safetensors   the model with the least error on held-out data so far
training.json, training-*.safetensors       the run, to be gone on with
log.jsonl                                   a line of JSON for every few steps, and one for every epoch
curves.png                                  the same as a picture
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from attnext._support import InputError, extra, naming
from attnext.seq2seq.checkpoint import Checkpoint, load, read_json, read_record, save, tidy, write_record
from attnext.seq2seq.config import Config
from attnext.seq2seq.data import Corpus, Pairs, Vocabulary
from attnext.seq2seq.distributed import Group
from attnext.seq2seq.evaluation import Errors, evaluate
from attnext.seq2seq.model import Seq2Seq
from attnext.seq2seq.plots import curves
from attnext.seq2seq.training import Step, Trainer

__all__ = ["Interrupted", "Session"]

_SAVE_SECONDS, _LOG_STEPS = 300.0, 20
_ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Signals of people, of a machine that goes down, of a terminal that closes, and of a scheduler whose time is over."""
_HANG_UP = getattr(signal, "SIGHUP", None)


class Interrupted(Exception):
    """The user asked to stop; the run was saved."""


class Session:
    """Trains a model in a folder.

    Args:
        folder: of the run; there, and nobody else's (``only_writer``).
        corpus: its data.
        given: fields of the configuration that were set; the others are by default or, resumed, as they were.
        group: the processes that train.
        resume: go on with the run in the folder, if there is one.
        overwrite: begin anew, whatever run there is.

    Raises:
        InputError: the folder can't be read, holds a run that was neither to be resumed nor overwritten, or one to be
            resumed of other data or another configuration; or the data can't be read.
    """

    def __init__(
        self, folder: Path, corpus: Corpus, given: Mapping[str, Any], group: Group, *, resume: bool = False,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.group, self.first = folder, group, group.rank == 0
        with extra("demo"):  # find out now, not after the training
            for package in ("matplotlib", "rapidfuzz", "rich", "safetensors.torch"):
                import_module(package)
        self.resumed = self._is_saved(resume or overwrite) and resume
        record, tensors = read_record(folder, "training") if self.resumed else ({}, {})
        try:
            config = _config(record.get("config", {}) if self.resumed else {}, given)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self.data = corpus.split()
        source, target = corpus.vocabularies(self.data.train, config.vocabulary_size)
        model = _model(config, source, target).to(group.device)
        pairs = Pairs.of(self.data.train, source, target)
        data = (source.symbols, target.symbols, pairs.sources, pairs.outputs, self.data.dev)
        self.digest = hashlib.sha256(repr(data).encode()).hexdigest()
        self.trainer = Trainer(model, pairs, group)
        self.checkpoint = Checkpoint(self.trainer.evaluated, source, target, corpus, longest=pairs.longest)
        self.best: dict[str, Any] = {}
        self.finished = bool(record.get("finished"))
        self.interval: list[Step] = []
        self.log_path, self.log_bytes = folder / "log.jsonl", 0
        if self.resumed:
            self._go_on(record, tensors)

    def _is_saved(self, known: bool) -> bool:
        """Whether the folder has a run. One that the user did not know of, or a model without its run, is refused."""
        folder = self.folder
        saved = (folder / "training.json").exists()
        if self.group.of_first(float(saved)) != saved:
            raise InputError(f"every process must see the folder {str(folder)!r} of the first: put it on a shared disk")
        if saved and not known:
            finished = read_json(folder, "training").get("finished")
            what, resume = ("a finished run", "") if finished else ("an unfinished run", "go on with it by --resume, ")
            raise _occupied(folder, what, resume)
        if not saved and not known and (folder / "checkpoint.json").exists():
            raise _occupied(folder, "a model")
        return saved

    def _go_on(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Takes up the folder's run."""
        if record.get("data_sha256") != self.digest:
            files = record.get("corpus")
            changed = ", changed since" if files == self.checkpoint.corpus.describe() else ""
            raise InputError(f"the run in {str(self.folder)!r} was begun with other data: {files}{changed}")
        try:
            self.best, self.log_bytes = dict(record["best"]), int(record["log_bytes"])
            self.interval = [Step(*step) for step in record["interval"]]
            self.trainer.go_on(tensors, record["progress"], self.folder)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{str(self.folder / 'training.json')!r} is damaged: {error!r}") from error
        if self.first:
            tidy(self.folder, "training", record["tensors_sha256"])

    def run(self) -> Errors | None:
        """Trains to the end; the best model's errors on the test data, in process 0 alone.

        Raises:
            Interrupted: the run was stopped by a signal (``_ENDS``), and saved.
            InputError: training diverged.
            OSError: a file can't be written; what was saved before is still there.
        """
        with self._open_log() as self.log, _Display(self) as display, _asked_to_stop() as asked:
            saved_at = time.perf_counter()
            over = self.trainer.progress.done >= 1.0 or self._stale
            if over and not self.finished:
                self._end_early(display)
            for step in () if over else self.trainer.steps():
                self.interval.append(step)
                progress = self.trainer.progress
                pause = progress.batch == 0 or progress.done >= 1.0
                if pause or progress.step % _LOG_STEPS == 0:
                    display.step(self._log_interval())
                if pause:
                    display.epoch(self._evaluate())
                stop = self.group.total([float(asked())])[0] > 0
                finished = progress.done >= 1.0 or self._stale
                if pause or stop or time.perf_counter() - saved_at > _SAVE_SECONDS:
                    self._save(finished)
                    saved_at = time.perf_counter()
                if finished:
                    break
                if stop:
                    raise Interrupted
        return self._test()

    def _end_early(self, display: _Display) -> None:
        """Ends a run whose limits, changed as it was resumed, are over already."""
        if self.interval:
            display.step(self._log_interval())
        if self.trainer.progress.batch:  # steps were made since the last evaluation
            display.epoch(self._evaluate())
        self._save(True)

    @property
    def _stale(self) -> bool:
        """Whether the error has not fallen for too long."""
        return bool(self.best) and self.trainer.progress.epoch - self.best["epoch"] >= self.trainer.config.patience

    def _log_interval(self) -> dict[str, Any]:
        """Writes down how the last steps went."""
        losses = [step.loss for step in self.interval]
        last, progress = self.interval[-1], self.trainer.progress
        self.interval = []
        return self._write(
            "steps", loss=sum(losses) / len(losses), norm=last.norm, rate=last.rate,
            words_per_second=progress.pairs / max(progress.seconds, 1e-9),
        )  # fmt: skip

    def _evaluate(self) -> dict[str, Any]:
        """Writes down the errors on held-out data; keeps the model if they are the fewest so far."""
        group, progress = self.group, self.trainer.progress
        own = evaluate(self.checkpoint, self.data.dev[group.rank :: group.size])
        errors = Errors(*map(int, group.total([float(count) for count in own])))
        better = not self.best or errors.of_symbols < self.best["symbol_errors"]
        if better:
            self.best = errors.record() | {"epoch": progress.epoch, "step": progress.step}
            if self.first:
                save(self.folder, replace(self.checkpoint, metrics={"dev": self.best, "progress": asdict(progress)}))
        return self._write("dev", **errors.record(), best=better, text=errors.describe(self.checkpoint.corpus.task))

    def _write(self, event: str, **values: Any) -> dict[str, Any]:
        progress = self.trainer.progress
        line = {"event": event, "step": progress.step, "epoch": progress.epoch, "seconds": round(progress.seconds, 3)}
        line |= values
        if self.log is not None:
            with naming(self.log_path):
                self.log.write(json.dumps(line).encode() + b"\n")
                self.log.flush()  # for who follows it
        return line

    @contextmanager
    def _open_log(self) -> Iterator[BinaryIO | None]:
        """The log, as it was when the run was saved; process 0 alone has one."""
        if not self.first:
            yield None
            return
        path = self.log_path
        if not self.resumed:  # the finished run that was here, before the first of its files changes
            (self.folder / "training.json").unlink(missing_ok=True)
        with path.open("r+b" if self.resumed and path.exists() else "w+b") as log:
            kept = log.read(self.log_bytes)
            log.truncate(kept.rfind(b"\n") + 1)  # whole lines, should someone have cut it
            log.seek(0, os.SEEK_END)
            try:
                yield log
            finally:
                with naming(path):
                    log.close()  # what a full disk did not take is tried once more

    def _save(self, finished: bool) -> None:
        if self.log is None:
            return
        with naming(self.log_path):
            os.fsync(self.log.fileno())
        tensors, progress = self.trainer.state()
        write_record(self.folder, "training", tensors, {
            "finished": finished, "config": asdict(self.trainer.config), "corpus": self.checkpoint.corpus.describe(),
            "data_sha256": self.digest, "progress": progress, "best": self.best, "interval": self.interval,
            "log_bytes": self.log.tell(),
        })  # fmt: skip

    def _test(self) -> Errors | None:
        """Draws the run, and adds to the best model how it does on the test data; the other processes wait."""
        errors = self._test_best() if self.first else None
        self.group.total([0.0])
        return errors

    def _test_best(self) -> Errors:
        best = load(self.folder)
        best.model.to(self.group.device)
        errors = evaluate(best, self.data.test)
        save(self.folder, replace(best, metrics=best.metrics | {"test": errors.record()}))
        curves(self.folder / "curves.png", self.log_path, self.checkpoint.corpus.task)
        return errors


def _occupied(folder: Path, what: str, resume: str = "") -> InputError:
    return InputError(
        f"the folder {str(folder)!r} has {what}: {resume}name another --out, or replace it by --overwrite"
    )


def _config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The configuration of a run, new or resumed: of a resumed one only the limits may change.

    Raises:
        ValueError: another field does, or one is not what it must be.
    """
    if "minutes" in given or "epochs" in given:  # other limits in place of those that were
        saved = {name: value for name, value in saved.items() if name not in ("minutes", "epochs")}
    for name, value in given.items():
        if name in saved and name not in ("minutes", "epochs", "patience") and value != saved[name]:
            raise ValueError(f"{name} can't change in a resumed run: it is {saved[name]!r}, got {value!r}")
    return Config(**{**saved, **given})


def _model(config: Config, source: Vocabulary, target: Vocabulary) -> Seq2Seq:
    """A model with parameters drawn by its seed."""
    torch.manual_seed(config.seed)
    try:
        return Seq2Seq(config, len(source), len(target))
    except (TypeError, ValueError) as error:  # sizes that an attention can't have
        raise InputError(
            f"attention {config.attention!r} can't be of these sizes: {error} (query_size is decoder_size, memory_size "
            "is encoder_size, twice if bidirectional)"
        ) from error


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, or a signal sent that asks for an end: the first asks, so that the step is ended and
    saved; the second ends at once. A terminal that closes is none to a run under nohup."""
    asked = False
    if threading.current_thread() is not threading.main_thread():  # where signals don't arrive
        yield lambda: asked
        return
    before = {number: handler for number in _ENDS if (handler := signal.getsignal(number)) is not None}
    if before.get(_HANG_UP) is signal.SIG_IGN:
        del before[_HANG_UP]

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        for one, handler in before.items():  # a job in the background has SIGINT ignored
            by_default = signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL
            signal.signal(one, by_default if handler is signal.SIG_IGN else handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """A progress bar on stderr with a line above it for every epoch; in processes but the first, nothing.

    A terminal that has closed takes no more of it, which is no reason to lose a run.
    """

    def __init__(self, session: Session) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.session = session
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not session.first)
        self.task = self.bar.add_task("training", total=1.0)
        self.bar.update(self.task, completed=session.trainer.progress.done)
        self.loss, self.speed, self.error = float("nan"), 0.0, ""

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.bar.stop()

    def step(self, line: Mapping[str, Any]) -> None:
        self.loss, self.speed = line["loss"], line["words_per_second"]
        self._update()

    def epoch(self, line: Mapping[str, Any]) -> None:
        self.error = f"  held-out error {line['symbol_errors']:.1%}"
        self._update()
        best = ", the best so far" if line["best"] else ""
        if self.session.first:
            text = f"epoch {line['epoch']}: loss {self.loss:.3f}, held-out {line['text']}{best}"
            with suppress(OSError):
                self.bar.console.print(text, highlight=False, soft_wrap=True)

    def _update(self) -> None:
        text = f"loss {self.loss:.3f}  {self.speed:,.0f} words/s{self.error}"
        self.bar.update(self.task, completed=self.session.trainer.progress.done, description=text)
