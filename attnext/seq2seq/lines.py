"""What ``attnext predict`` reads and writes, a line for each source."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from attnext._support import InputError
from attnext.seq2seq.data import Vocabulary
from attnext.seq2seq.search import Output

__all__ = ["FORMATS", "batches_of_input", "written"]

FORMATS = ("tsv", "json")
_BYTES, _MOST = 1 << 16, 4096
"""Read at a time, and lines answered together."""


def batches_of_input() -> Iterator[list[str]]:
    """The lines of standard input, as many as have come: an answer needn't wait for lines that are not there yet.

    Raises:
        InputError: it is closed, or not UTF-8 text.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed: name the sources on the command line")
    left = ""
    for text in _decoded(sys.stdin.buffer):
        *lines, left = (left + text).split("\n")
        for begin in range(0, len(lines), _MOST):
            yield [line.strip() for line in lines[begin : begin + _MOST]]
    if left:
        yield [left.strip()]


def _decoded(stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = getattr(stream, "read1", stream.read)
    try:
        while piece := read(_BYTES):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error.reason}") from error


def written(source: str, output: Output | None, target: Vocabulary, count: int, form: str) -> str:
    """The line, or the lines, of a source's best outputs; of a source without an answer one that keeps its place."""
    pairs: Sequence[tuple[tuple[str, ...], float]] = ()
    if output is not None:
        pairs = list(zip(output.symbols, output.scores, strict=True))[:count]
    if form == "json":
        outputs = [{"output": target.write(symbols), "symbols": symbols, "score": score} for symbols, score in pairs]
        return json.dumps({"source": source, "outputs": outputs}, ensure_ascii=False)
    scored, source = count > 1, source.replace("\t", " ")  # a column is a column
    return "\n".join("\t".join([source, *[f"{score:.4f}"] * scored, target.write(symbols)]) for symbols, score in pairs)
