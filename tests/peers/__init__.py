"""The code bases that attnext serves, for its tests: their real files, by ``make peers`` from PyPI."""

from peers import espnet
from peers.program import Program

PROGRAMS: list[Program] = [program for file in (espnet,) for program in file.PROGRAMS]
