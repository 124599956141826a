"""Writes the README's section of measured processors, from the runs in benchmarks/results.

    attnext bench --json benchmarks/results/<processor>-<date>.json
    make tables

A section a file, in the order of their names; `attnext bench --markdown FILE` prints one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from attnext._support import InputError, write_atomically
from attnext.bench import markdown

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks/results"
BEGIN, END = "<!-- the processors, from benchmarks/results by `make tables` -->\n", "<!-- end of the processors -->\n"


def made(results: Path = RESULTS) -> str:
    """The section, of the files that are there."""
    paths = sorted(results.glob("*.json"))
    return markdown.sections(paths) if paths else "No run is stored yet.\n"


def put(text: str, section: str) -> str:
    """The text of a README, with the section between its two comments.

    Raises:
        InputError: it has no such comments.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError(f"the README has no place for the tables: {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def main() -> int:
    """Writes the README; 0, or 2 where a file is no result."""
    try:
        write_atomically(README, put(README.read_text(encoding="utf-8"), made()).encode())
    except InputError as error:
        print(f"attnext: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
