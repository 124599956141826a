"""Goes through the cases of attention, layers and decoders on the CPU, by each instruction set that the machine has.

    python tests/sanitized_cases.py [SET ...]     only by these

A program of its own, as a sanitizer's runtime has to be there before Python. Prints what is beyond its tolerance, and
"held" if nothing is.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from attnext import _extension, cases
from attnext.recurrent import cases as recurrent

SEED = 11
RANDOM = 40
"""Cases drawn beside the tables, of each instruction set others."""


def wrong(number: int) -> list[str]:
    found = []
    table = [replace(case, dtype=dtype) for case in cases.CASES for dtype in cases.DTYPES]
    for case in (*table, *cases.random_cases(RANDOM, SEED + number)):
        found += [f"{case}: {name}" for name, error in cases.compare(case, "cpu", SEED).items() if not error <= 1.0]
    layers = [replace(case, dtype=dtype) for case in recurrent.RECURRENT_CASES for dtype in recurrent.DTYPES]
    for layer in (*layers, *recurrent.random_cases(RANDOM // 4, SEED + number)):
        errors = recurrent.compare(layer, "cpu", SEED)
        found += [f"{layer}: {name}" for name, error in errors.items() if not error <= 1.0]
    return found


def main(sets: list[str]) -> int:
    module = _extension.load()
    assert module is not None, _extension.status().reason
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN: a number that isn't written shows
    module.set_poison(True)
    found = []
    for number, name in enumerate(sets or module.instruction_sets()):
        module.set_instruction_set(name)
        found += [f"{name}: {what}" for what in wrong(number)]
    print("\n".join(found) or "held")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
