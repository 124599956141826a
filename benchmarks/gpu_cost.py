"""What the Triton kernels' inner loops cost on NVIDIA GPUs, by their machine code: no GPU needed, and nothing is timed.

    python benchmarks/gpu_cost.py [--target sm_90] [--json FILE]

Compiles the kernels, finds the innermost loops that compute reciprocals, and divides their instructions by the score
elements that a turn of the loop serves. The bound of a loop is what the scarcest of three resources allows a
multiprocessor in a clock: 16 special-unit operations, 128 issued instructions (4 schedulers of 32 lanes), and 128
multiply-adds, 64 on sm_80. From these and the cards' published rates follows the time that each case of ``attnext
bench`` must take at least: a bound, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.compiler import ASTSource

from attnext._support import write_atomically
from attnext.bench.cases import CASES, Case
from attnext.kernels import ahead

SPECIAL, ISSUED = 16, 128
MULTIPLY_ADDS = {"sm_80": 64, "sm_90": 128, "sm_100": 128, "sm_120": 128}
REGISTERS, WARPS = 65536, {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}


@dataclass(frozen=True)
class Card:
    """A data sheet: multiprocessors, boost clock in GHz, memory in GB/s."""

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float


CARDS = {
    "A100 80 GB": Card("sm_80", 108, 1.41, 2039),
    "H100 SXM": Card("sm_90", 132, 1.98, 3350),
    "B200": Card("sm_100", 148, 1.965, 8000),
}
"""With the multiply-adds above, the published 19.5, 67 and 75 float32 TFLOPS."""


@dataclass(frozen=True)
class Cost:
    """A loop's instructions for each score element: all, and where they go."""

    loop: str
    target: str
    slots: float
    special: float
    multiply_adds: float
    """With products and sums; from sm_100 on, one instruction may do two."""
    arithmetic: float
    """Instructions that do these."""
    loads: float
    stores: float
    shared: float
    """Loads and stores of shared memory, shuffles and barriers: what an exchange between threads takes."""
    other: float
    """Addresses, counters, copies."""
    registers: int
    occupancy: float

    @property
    def bound(self) -> float:
        """Elements a clock and multiprocessor, at most."""
        arithmetic = MULTIPLY_ADDS[self.target] / self.multiply_adds
        return min(SPECIAL / self.special, ISSUED / self.slots, arithmetic)


@triton.jit
def hardware_tanh(q, k, v, out, Tq, Tk, D, BM: tl.constexpr, BN: tl.constexpr):
    """The same sums with tanh.approx for each element, what a straightforward kernel would do."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    q_d = q + i
    k_d = k + j
    for d in range(D):
        x = tl.load(q_d)[:, None] + tl.load(k_d)[None, :]
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        acc += tl.load(v + d) * tanh
        q_d += Tq
        k_d += Tk
    tl.store(out + i[:, None] * Tk + j[None, :], acc)


def compile_tanh(target: str) -> Any:
    constants = {"BM": 8, "BN": 128}
    names = hardware_tanh.arg_names
    signature = {n: "constexpr" if n in constants else "i32" if n in ("Tq", "Tk", "D") else "*fp32" for n in names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if n not in constants}
    source = ASTSource(hardware_tanh, signature, constants, aligned)
    options = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=ahead.TARGETS[target], options=options)


def loops(code: str) -> Iterator[Counter[str]]:
    """Instructions of each innermost loop, by name."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", code)
    instructions = [(int(address, 16), name, rest) for address, name, rest in lines]
    found = []
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    for first, last in found:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in found):
            yield Counter(name for address, name, _ in instructions if first <= address <= last)


def cost(loop: str, target: str, compiled: Any, warps: int, counts: Counter[str], per_special: int) -> Cost:
    """The cost of a loop in which each special-unit operation serves ``per_special`` elements."""
    elements = per_special * counts["MUFU"]

    def share(*names: str) -> float:
        return sum(counts[name] for name in names) / elements

    single, double = share("FFMA", "FMUL", "FADD"), share("FFMA2", "FMUL2", "FADD2")
    loads, stores = share("LDG"), share("STG")
    exchange = share("LDS", "STS", "LDSM", "STSM", "SHFL", "BAR")
    slots, special = counts.total() / elements, share("MUFU")
    registers = -(-ahead.usage(compiled, target).registers // 8) * 8
    programs = REGISTERS // (registers * 32 * warps)
    return Cost(
        loop=loop,
        target=target,
        slots=slots,
        special=special,
        multiply_adds=single + 2 * double,
        arithmetic=single + double,
        loads=loads,
        stores=stores,
        shared=exchange,
        other=slots - special - single - double - loads - stores - exchange,
        registers=registers,
        occupancy=min(1.0, programs * warps / WARPS[target]),
    )


LOOPS = {
    "forward: scores": "forward",
    "step: scores": "step of one",
    "backward: scores again": "pairs",
    "backward: gradients": "inputs",
}
"""Loops by the kind of tiles of their kernel."""
BACKWARD = ["forward: scores", "backward: scores again", "backward: gradients"]


def costs(target: str) -> list[Cost]:
    """The near loops of the forward and backward kernels, each in its first tiles, and that of the hardware's tanh."""
    compiled = compile_tanh(target)
    result = [
        cost("tanh.approx", target, compiled, 2, next(c for c in loops(ahead.disassembly(compiled)) if c["MUFU"]), 1)
    ]
    first: dict[str, ahead.Build] = {}
    for what in ahead.builds(target, ("float32",)):
        first.setdefault(what.kind, what)
    for name, kind in LOOPS.items():
        compiled = ahead.build(first[kind])
        special = [c for c in loops(ahead.disassembly(compiled)) if c["MUFU"]]
        # Loops of features that are too large for E F have two special operations an element; these have half a one.
        counts = max(special, key=lambda c: (c["FFMA"] + 2 * c["FFMA2"]) / c["MUFU"])
        result.append(cost(name, target, compiled, first[kind].warps, counts, 2))
    return result


def bound_us(case: Case, card: Card, found: dict[str, Cost]) -> float:
    """The time of a case at least: its loops at their bounds and its products at full rate, or its memory once."""
    pairs = case.batch * case.queries * case.keys
    names = {
        "forward": ["forward: scores"],
        "step": ["step: scores"],
        "scores": ["forward: scores"],
        "forward + backward": BACKWARD,
        "backward of the scores": ["backward: gradients"],
    }[case.kind]
    products = 0 if case.only_scores else 3 if case.differentiated else 1
    clocks = sum(case.elements / found[name].bound for name in names)
    clocks += products * pairs * case.values / MULTIPLY_ADDS[card.target]
    computing = clocks / (card.multiprocessors * card.clock * 1e9)
    return 1e6 * max(computing, minimal_bytes(case) / (card.bandwidth * 1e9))


def minimal_bytes(case: Case) -> int:
    """Every input and result once; a step reads F in float32 in place of the keys."""
    rows_q, rows_k = case.batch * case.queries, case.batch * case.keys
    results = rows_q * (case.keys if case.only_scores else case.values)
    numbers = rows_q * case.features + rows_k * (case.features + case.values) + results
    if case.differentiated:  # the gradient of each input, and that of the result
        numbers += rows_q * case.features + rows_k * (case.features + case.values) + results
    return numbers * case.dtype.itemsize


def show_costs(console: Console, found: list[Cost]) -> None:
    table = Table("loop", "target", "slots", "special", "multiply-adds", "their instr.", "loads", "stores",
                  "exchange", "other", "registers", "occupancy", "bound",
                  title="Instructions for a score element; bound in elements/clock/SM")  # fmt: skip
    for c in found:
        numbers = (c.slots, c.special, c.multiply_adds, c.arithmetic, c.loads, c.stores, c.shared, c.other)
        table.add_row(
            c.loop, c.target, *(f"{n:.2f}" for n in numbers), str(c.registers), f"{c.occupancy:.0%}", f"{c.bound:.1f}"
        )
    console.print(table)


def bounds(found: list[Cost]) -> dict[str, dict[str, float]]:
    """By case and card, the least time in microseconds."""
    by_target = {target: {c.loop: c for c in found if c.target == target} for target in {c.target for c in found}}
    cards = {name: card for name, card in CARDS.items() if card.target in by_target}
    # A forward of half types has the loop of float32.
    return {
        case.name: {name: bound_us(case, card, by_target[card.target]) for name, card in cards.items()}
        for case in CASES
    }


def show_bounds(console: Console, found: dict[str, dict[str, float]]) -> None:
    cards = list(next(iter(found.values())))
    if not cards:
        return
    table = Table("case", *(f"{card}, us" for card in cards), title="The least time by data sheet: not a measurement")
    for name, row in found.items():
        table.add_row(name, *(f"{row[card]:.3g}" for card in cards))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(WARPS), help="repeatable (default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    console = Console(width=150)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = [c for cost_of_target in pool.map(costs, arguments.target or WARPS) for c in cost_of_target]
    show_costs(console, found)
    least = bounds(found)
    show_bounds(console, least)
    if arguments.json:
        numbers = {"loops": [asdict(c) | {"bound": c.bound} for c in found], "least us": least}
        write_atomically(arguments.json, json.dumps(numbers, indent=1).encode())


if __name__ == "__main__":
    main()
