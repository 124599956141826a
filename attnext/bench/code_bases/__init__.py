"""The code bases that attnext serves, for its tests: their real files, by ``make peers`` from PyPI."""

from attnext.bench.code_bases import (
    allennlp,
    coqui,
    doctr,
    espnet,
    fairseq,
    funasr,
    gnmt,
    joeynmt,
    keras,
    mmocr,
    opennmt,
    openspeech,
    rl4co,
    speechbrain,
    stanza,
    tacotron2,
    torchmil,
    tutorial,
)
from attnext.bench.code_bases.program import Program

FILES = (
    allennlp,
    coqui,
    doctr,
    espnet,
    fairseq,
    funasr,
    gnmt,
    joeynmt,
    keras,
    mmocr,
    opennmt,
    openspeech,
    rl4co,
    speechbrain,
    stanza,
    tacotron2,
    torchmil,
    tutorial,
)
PROGRAMS: list[Program] = [program for file in FILES for program in file.PROGRAMS]
