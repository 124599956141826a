"""The command ``attnext``: ``info | verify | bench | gpu-check | train | evaluate | predict | demo``.

It stands beside the package, all of which imports torch: help, the version and a command that there isn't need none.
Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Raises:
        SystemExit: after ``--help``, ``--version`` and bad usage, as argparse does.
    """
    for name in ("stdout", "stderr"):  # which a daemon may have closed
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  as long as the process lives
    try:
        args = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = args.run
        code = run(args)
        sys.stdout.flush()  # here, where a broken pipe is caught
        return code
    except UnicodeEncodeError as error:
        advice = "" if error.encoding.startswith("utf") else ": set PYTHONIOENCODING=utf-8"
        return _complain(f"{error.encoding} has no {error.object[error.start : error.end]!a}{advice}", 1)
    except (ValueError, ImportError) as error:
        from attnext._support import InputError, MissingExtra  # what raises these has imported the package

        if not isinstance(error, (InputError, MissingExtra)):
            raise
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


class _Command(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Imports a command only when it is the one to run: ``attnext info`` needs nothing but torch."""

    load: Callable[[], _Command] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.load is not None:
            command, self.load = self.load(), None
            command.add_arguments(self)
            self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks up the installed version only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"attnext {version('attnext')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnext", description="Fused attention for encoder-decoder models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for summary, load in (
        ("show the installation, for a bug report", _info),
        ("check the kernels against the reference", _verify),
        ("time the kernels beside their peers", _bench),
        ("prove, tune and time everything on a GPU", _gpu_check),
        ("train the reference model", _train),
        ("count a trained model's errors", _evaluate),
        ("ask a trained model", _predict),
        ("verify, time, train and pronounce, in four minutes", _demo),
    ):
        description = f"{summary[0].upper()}{summary[1:]}."
        name = load.__name__[1:].replace("_", "-")
        commands.add_parser(name, help=summary, description=description).load = load
    return parser


def _info() -> _Command:
    from attnext import info

    def run(args: argparse.Namespace) -> int:
        print(info.render())
        return 0

    return _Command(lambda parser: None, run)


def _verify() -> _Command:
    from attnext import verify
    from attnext._support import extra

    def run(args: argparse.Namespace) -> int:
        with extra("demo"):
            return verify.run(args)

    return _Command(verify.add_arguments, run)


def _bench() -> _Command:
    from attnext._support import extra
    from attnext.bench import command

    def run(args: argparse.Namespace) -> int:
        with extra("bench"):
            return command.run(args)

    return _Command(command.add_arguments, run)


def _gpu_check() -> _Command:
    from attnext.gpu import command

    return _Command(command.add_arguments, command.run)


def _train() -> _Command:
    from attnext.seq2seq import commands

    return _Command(commands.add_train_arguments, commands.train)


def _evaluate() -> _Command:
    from attnext.seq2seq import commands

    return _Command(commands.add_evaluate_arguments, commands.evaluate)


def _predict() -> _Command:
    from attnext.seq2seq import commands

    return _Command(commands.add_predict_arguments, commands.predict)


def _demo() -> _Command:
    from attnext import demo

    return _Command(demo.add_arguments, demo.run)
