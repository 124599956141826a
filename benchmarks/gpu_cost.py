"""What the GPU kernels' inner loops cost on NVIDIA GPUs, by their machine code: no GPU needed, and nothing is timed.

    python benchmarks/gpu_cost.py [--target sm_90] [--json FILE]

Compiles the Triton kernels, takes the CUDA kernels out of the installed extension where it has them, finds the
innermost loops that compute reciprocals, and divides their instructions by the score elements that a turn serves. The
bound of a loop is what the scarcest of three resources allows a multiprocessor in a clock: 16 special-unit operations,
128 issued instructions (4 schedulers of 32 lanes), and 128 multiply-adds, 64 on sm_80. From these and the cards'
published rates follows the time that each case of ``attnext bench`` must take at least: a bound, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
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

from attnext import _extension
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
    family: str
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
    vector_bytes: float
    """That loads of 16 bytes a lane bring from memory."""
    registers: int
    occupancy: float

    @property
    def bound(self) -> float:
        """Elements a clock and multiprocessor, at most."""
        arithmetic = MULTIPLY_ADDS[self.target] / self.multiply_adds
        special = SPECIAL / self.special if self.special else arithmetic
        return min(special, ISSUED / self.slots, arithmetic)


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


def loops(code: str, *, outer: bool = False) -> Iterator[Counter[str]]:
    """Instructions of each innermost loop, by name; some kinds that matter have a longer one.

    Or of the loops around others, without those.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", code)
    instructions = [(int(address, 16), _kind(name, rest), rest) for address, name, rest in lines]
    found = []
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    for first, last in found:
        inside = [(a, b) for a, b in found if first <= a and b <= last and (a, b) != (first, last)]
        if bool(inside) == outer:
            yield Counter(
                name
                for address, name, _ in instructions
                if first <= address <= last and not any(a <= address <= b for a, b in inside)
            )


def _kind(name: str, rest: str) -> str:
    if name == "MUFU" and rest.startswith(".EX2"):
        return "MUFU.EX2"
    return "LDG.128" if name == "LDG" and ".128" in rest.split()[0] else name


def near_loop(code: str) -> Counter[str]:
    """The loop of folded scores, or of their gradients: the others with reciprocals have exponentials too."""
    near = [c for c in loops(code) if c["MUFU"] and not c["MUFU.EX2"]]
    return max(near, key=lambda c: (c["MUFU"], c.total()))


def cost(
    loop: str, family: str, target: str, counts: Counter[str], registers: int, warps: int, per_special: int = 2
) -> Cost:
    """The cost of a loop in which each special-unit operation but exponentials serves ``per_special`` elements.

    Without one, as in the products of a step that sees its past, a multiply-add is an element.
    """
    elements = per_special * counts["MUFU"] or counts["FFMA"]

    def share(*names: str) -> float:
        return sum(counts[name] for name in names) / elements

    single, double = share("FFMA", "FMUL", "FADD"), share("FFMA2", "FMUL2", "FADD2")
    loads, stores = share("LDG", "LDG.128", "LDGSTS"), share("STG")
    exchange = share("LDS", "STS", "LDSM", "STSM", "SHFL", "BAR")
    slots, special = counts.total() / elements, share("MUFU", "MUFU.EX2")
    registers = -(-registers // 8) * 8
    programs = REGISTERS // (registers * 32 * warps)
    return Cost(
        loop=loop,
        family=family,
        target=target,
        slots=slots,
        special=special,
        multiply_adds=single + 2 * double,
        arithmetic=single + double,
        loads=loads,
        stores=stores,
        shared=exchange,
        other=slots - special - single - double - loads - stores - exchange,
        vector_bytes=16 * share("LDG.128"),
        registers=registers,
        occupancy=min(1.0, programs * warps / WARPS[target]),
    )


LOOPS = {
    "forward: scores": "forward",
    "step: scores": "step of one",
    "backward: scores again": "pairs",
    "backward: gradients": "inputs",
}
"""Loops by the kind of tiles of their Triton kernel."""
PAST = {"past: {}": "past: scores", "past: {}, backward": "past, backward: sums"}
"""The Triton kernels of a step that sees its past, with 32 filters, by their label: products of places with filters,
and the loop over features, with the product by the projection inside it."""
CUDA_LOOPS = {
    "forward: scores": "7forwardIfE",
    "step: scores": "4stepIfLi1E",
    "backward: scores again": "15score_gradientsIfE",
    "backward: gradients": "15input_gradientsIfE",
}
"""The same in the CUDA kernels, by what is in the name of the function in float32."""
CUDA_PAST = {"past: {}": "11step_scoresIfE", "past: {}, backward": "20step_input_gradientsIfE"}
"""The CUDA kernels of a step that sees its past: the loop over features, without the products that it goes around, and
the two of these that have most to do, of places and of filters."""
CUDA_WARPS = 4
BACKWARD = ["forward: scores", "backward: scores again", "backward: gradients"]
PUBLISHED = (
    "NVIDIA's GNMT kernels (v0.7, scores only, float32): 27.5 instructions forward, 34.5 backward, counted by hand"
)


def costs(target: str) -> list[Cost]:
    """The near loops of the forward and backward kernels, each in its first tiles, and that of the hardware's tanh."""
    compiled = compile_tanh(target)
    counts = next(c for c in loops(ahead.disassembly(compiled)) if c["MUFU"])
    result = [cost("tanh.approx", "Triton", target, counts, ahead.usage(compiled, target).registers, 2, 1)]
    builds = list(ahead.builds(target, ("float32",)))
    for name, kind in LOOPS.items():
        what = next(b for b in builds if b.kind == kind)
        compiled = ahead.build(what)
        counts, registers = near_loop(ahead.disassembly(compiled)), ahead.usage(compiled, target).registers
        result.append(cost(name, "Triton", target, counts, registers, what.warps))
    for name, label in PAST.items():
        what = next(b for b in builds if b.label.startswith(f"{label} ("))
        compiled = ahead.build(what)
        registers = ahead.usage(compiled, target).registers
        innermost = list(loops(ahead.disassembly(compiled)))
        features = max((c for c in innermost if not c["MUFU"]), key=lambda c: c["FFMA"])
        sums = max((c for c in innermost if c["MUFU.EX2"]), key=Counter.total)
        result.append(cost(name.format("features"), "Triton", target, features, registers, what.warps))
        result.append(cost(name.format("sums"), "Triton", target, sums, registers, what.warps, 1))
    resources, code = cuda_resources(target), cuda_code(target)
    for name, part in CUDA_LOOPS.items() if resources else ():
        (function,) = (f for f in resources if part in f)
        counts = near_loop(code[function])
        result.append(cost(name, "CUDA", target, counts, resources[function].registers, CUDA_WARPS))
    for name, part in CUDA_PAST.items() if resources else ():
        (function,) = (f for f in resources if part in f)
        for what, counts in past_loops(code[function]).items():
            registers = resources[function].registers
            result.append(cost(name.format(what), "CUDA", target, counts, registers, CUDA_WARPS))
    return result


def past_loops(code: str) -> dict[str, Counter[str]]:
    """Of a kernel of a step that sees its past: filters are laid over 8 keys and 8 places at a time, which is the
    longest loop, the columns of the projection multiplied in turns of 4 filters by 8 keys and 2 columns."""
    products = [c for c in loops(code) if c["FFMA"] and not c["MUFU"]]
    return {
        "sums": next(c for c in loops(code, outer=True) if c["MUFU.EX2"]),
        "features": max(products, key=lambda c: c["FFMA"]),
        "projection": next(c for c in products if c["FFMA"] == 4 * 8 * 2),
    }


def _cuobjdump(target: str, option: str) -> str:
    """Of the installed extension's CUDA kernels for a target; empty without any."""
    module = _extension.load()
    number = f"{target[3:-1]}.{target[-1]}"
    if module is None or number not in re.split(r"[ +]", module.build_info().get("cuda", "")):
        return ""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), option, "-arch", target, str(module.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_code(target: str) -> dict[str, str]:
    """The machine code of each CUDA kernel."""
    parts = re.split(r"\n\s*Function : ", _cuobjdump(target, "-sass"))[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def cuda_resources(target: str) -> dict[str, ahead.Usage]:
    """Registers, spilled bytes and static shared memory of each CUDA kernel."""
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _cuobjdump(target, "--dump-resource-usage"),
    )
    return {
        name: ahead.Usage(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


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
    table = Table("loop", "family", "target", "slots", "special", "multiply-\nadds", "their\ninstr.", "loads", "stores",
                  "exchange", "other", "registers", "occu-\npancy", "bound",
                  title="Instructions for a score element; bound in elements/clock/SM")  # fmt: skip
    for c in found:
        numbers = (c.slots, c.special, c.multiply_adds, c.arithmetic, c.loads, c.stores, c.shared, c.other)
        cells = (*(f"{n:.2f}" for n in numbers), str(c.registers), f"{c.occupancy:.0%}", f"{c.bound:.1f}")
        table.add_row(c.loop, c.family, c.target, *cells)
    console.print(table)
    console.print(PUBLISHED)


def show_resources(console: Console, targets: list[str]) -> None:
    """What the CUDA kernels take on each target."""
    table = Table("CUDA kernels", "functions", "registers at most", "spilled bytes")
    for target in targets:
        if found := cuda_resources(target).values():
            most = max(usage.registers for usage in found)
            table.add_row(target, str(len(found)), str(most), str(sum(usage.spilled for usage in found)))
    if table.row_count:
        console.print(table)
    else:
        console.print("The installed extension has no CUDA kernels (attnext info says why).")


def bounds(found: list[Cost]) -> dict[str, dict[str, float]]:
    """By case, and by card and family, the least time in microseconds; half types have the loops of float32."""
    columns = {}
    for name, card in CARDS.items():
        for family in ("Triton", "CUDA"):
            loops_of = {c.loop: c for c in found if (c.target, c.family) == (card.target, family)}
            if loops_of:
                columns[f"{name}, {family}"] = (card, loops_of)
    return {
        case.name: {column: bound_us(case, card, loops_of) for column, (card, loops_of) in columns.items()}
        for case in CASES
    }


def show_bounds(console: Console, found: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(found.values())))
    if not columns:
        return
    table = Table("case", *columns, title="The least time in microseconds by data sheet: not a measurement")
    for name, row in found.items():
        table.add_row(name, *(f"{row[column]:.3g}" for column in columns))
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
    show_resources(console, arguments.target or list(WARPS))
    least = bounds(found)
    show_bounds(console, least)
    if arguments.json:
        numbers = {"loops": [asdict(c) | {"bound": c.bound} for c in found], "least us": least}
        write_atomically(arguments.json, json.dumps(numbers, indent=1).encode())


if __name__ == "__main__":
    main()
