"""The code bases that attnext serves, as programs that use their real files, by ``make peers`` from PyPI."""

from __future__ import annotations

import importlib

from attnext.bench.code_bases.program import Program

FILES = ("allennlp", "coqui", "doctr", "espnet", "fairseq", "funasr", "gnmt", "joeynmt", "keras", "mmocr", "nn",
         "opennmt", "openspeech", "rl4co", "speechbrain", "stanza", "tacotron2", "torchmil", "tutorial")  # fmt: skip
PROGRAMS: list[Program] = [
    program for name in FILES for program in importlib.import_module(f"{__name__}.{name}").PROGRAMS
]
