"""What the Triton kernels' inner loops cost on NVIDIA GPUs, by their machine code: no GPU needed, and nothing is timed.

    python benchmarks/gpu_cost.py [--target sm_90] [--json FILE]

Compiles the kernels, finds the innermost loops that compute reciprocals, and divides their instructions by the score
elements that a turn of the loop serves. The bound of a loop is what the scarcest of three resources allows a
multiprocessor in a clock: 16 special-unit operations, 128 issued instructions (4 schedulers of 32 lanes), and 128
multiply-adds, 64 on sm_80.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.compiler import ASTSource

from attnext.kernels import ahead

SPECIAL, ISSUED = 16, 128
MULTIPLY_ADDS = {"sm_80": 64, "sm_90": 128, "sm_100": 128, "sm_120": 128}
REGISTERS, WARPS = 65536, {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}
RATES = {"A100": ("sm_80", 108, 1.41), "H100 SXM": ("sm_90", 132, 1.98), "B200": ("sm_100", 148, 1.98)}
"""Multiprocessors and boost GHz; with the multiply-adds above, the published 19.5, 67 and 75 float32 TFLOPS."""
ELEMENTS = 16 * 128 * 256 * 256
"""Of the suite's forward case, (B, Tq, Tk, D) = (16, 128, 256, 256)."""


@dataclass(frozen=True)
class Cost:
    """A loop's instructions for each score element."""

    loop: str
    target: str
    special: float
    multiply_adds: float
    loads: float
    shared: float
    slots: float
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


def arithmetic(counts: Counter[str], *names: str) -> int:
    """Operations of these names; from sm_100 on, one instruction may do two."""
    return sum(counts[name] + 2 * counts[f"{name}2"] for name in names)


def cost(loop: str, target: str, compiled: Any, warps: int, counts: Counter[str], per_special: int) -> Cost:
    """The cost of a loop in which each special-unit operation serves ``per_special`` elements."""
    elements = per_special * counts["MUFU"]
    registers = -(-ahead.usage(compiled, target).registers // 8) * 8
    programs = REGISTERS // (registers * 32 * warps)
    return Cost(
        loop=loop,
        target=target,
        special=counts["MUFU"] / elements,
        multiply_adds=arithmetic(counts, "FFMA", "FMUL", "FADD") / elements,
        loads=counts["LDG"] / elements,
        shared=(counts["LDS"] + counts["LDSM"]) / elements,
        slots=counts.total() / elements,
        registers=registers,
        occupancy=min(1.0, programs * warps / WARPS[target]),
    )


def costs(target: str) -> list[Cost]:
    """The near loops of the forward and backward kernels, and that of the hardware's tanh."""
    plain = {what.label: what for what in ahead.builds(("float32",)) if not what.label.endswith("all options")}
    result = []
    compiled = compile_tanh(target)
    result.append(
        cost("tanh.approx", target, compiled, 2, next(c for c in loops(ahead.disassembly(compiled)) if c["MUFU"]), 1)
    )
    wanted = (
        ("forward", ("forward: score",)),
        ("backward, pairs", ("backward: score again",)),
        ("backward, inputs", ("backward: queries", "backward: keys and v")),
    )
    for label, names in wanted:
        what = plain[label]
        compiled = ahead.build(what, target)
        # The loop of features that are too large has two special operations an element; these have half a one.
        near = [c for c in loops(ahead.disassembly(compiled)) if c["MUFU"] and arithmetic(c, "FFMA") >= 2.5 * c["MUFU"]]
        # An unrolled loop is followed by one for the rest.
        longest = sorted(near, key=Counter.total, reverse=True)[: len(names)]
        for name, counts in zip(names, sorted(longest, key=Counter.total), strict=True):
            result.append(cost(name, target, compiled, what.warps, counts, 2))
    return result


def show(console: Console, found: list[Cost]) -> None:
    table = Table("loop", "target", "special", "multiply-adds", "loads", "shared", "slots", "registers", "occupancy",
                  "bound, elements/clock/SM")  # fmt: skip
    for c in found:
        numbers = (c.special, c.multiply_adds, c.loads, c.shared, c.slots)
        table.add_row(
            c.loop, c.target, *(f"{n:.2f}" for n in numbers), str(c.registers), f"{c.occupancy:.0%}", f"{c.bound:.1f}"
        )
    console.print(table)
    forward = {c.target: c for c in found if c.loop == "forward: score"}
    for card, (target, multiprocessors, clock) in RATES.items():
        if target in forward:
            ms = ELEMENTS / (forward[target].bound * multiprocessors * clock * 1e9) * 1e3
            console.print(
                f"{card}: scores of (16, 128, 256, 256) take {ms:.3f} ms at least, a bound and no measurement"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(WARPS), help="repeatable (default: all)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    console = Console(width=140)
    found = [c for target in arguments.target or WARPS for c in costs(target)]
    show(console, found)
    if arguments.json:
        rows = [asdict(c) | {"bound": c.bound} for c in found]
        with tempfile.NamedTemporaryFile("w", dir=arguments.json.parent, delete=False) as file:
            json.dump(rows, file, indent=1)
        Path(file.name).replace(arguments.json)


if __name__ == "__main__":
    main()
