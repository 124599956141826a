"""Plants single changes in the code, one at a time in a copy of it, and says which of them the tests nearest by notice.

    python tests/mutants.py [WORD ...]      only those whose file or change has one of these words

What is compiled is compiled anew, which takes a minute each; a change of Python takes seconds. Exit code 1 where more
than one in twenty survives, or where a change no longer finds its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
_COMPILED = (".cpp", ".h")
_NOTICED = 0.95
_SECONDS = 600


class Mutant(NamedTuple):
    """A change: one place of a file, and the tests that should fail."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"


MUTANTS = [
    # The memory and its steps.
    Mutant("attnext/steps.py", "else a + b.to(dtype)", "else a", "test_steps.py"),
    Mutant("attnext/steps.py", "and a.scale == b.scale", "", "test_steps.py test_prepare.py"),
    Mutant("attnext/steps.py", "and a.mask is b.mask", "", "test_steps.py test_memory.py"),
    Mutant("attnext/steps.py", "masked_fill((weights == 0).all(-1, keepdim=True), 0.0)", "clone()", "test_steps.py"),
    Mutant("attnext/memory.py", "else self.mask & by_row", "else by_row", "test_memory.py"),
    Mutant("attnext/memory.py", "self.lengths.minimum(by_row)", "self.lengths.maximum(by_row)", "test_memory.py"),
    Mutant("attnext/memory.py", "slots=(lengths, mask), cleared=False", "slots=(lengths, mask)", "test_memory.py"),
    Mutant("attnext/memory.py", "* self.heads + of_heads", "* self.heads + 0 * of_heads",
           "test_memory.py test_luong.py"),
    Mutant("attnext/memory.py", "if self.slots is not None and (", "if False and (", "test_memory.py"),
    Mutant("attnext/memory.py", '| {"steps": None}', "", "test_memory.py test_steps.py"),
    Mutant("attnext/pytrees.py", "key if shared else value", "value", "test_exported_steps.py"),
    Mutant("attnext/pytrees.py", "(lengths, mask) if bound else None", "None", "test_exported_steps.py"),
    # Arguments.
    Mutant("attnext/_checks.py", "0 <= min(values)", "-1 <= min(values)", "test_arguments.py"),
    Mutant("attnext/_checks.py", "max(values) <= keys", "max(values) <= keys + 1", "test_arguments.py"),
    Mutant("attnext/_checks.py", "abs(x) <= _LARGEST", "abs(x) <= 2 * sys.float_info.max", "test_arguments.py"),
    Mutant("attnext/_checks.py", "not 0.0 <= x <= 1.0", "not 0.0 <= x <= 1.1", "test_arguments.py test_modules.py"),
    Mutant("attnext/_checks.py", " and not torch._C._functorch.is_batchedtensor(x)", "", "test_operators.py"),
    # Weights by other rules, and modules.
    Mutant("attnext/alignments.py", "mix <= limits.tiny / limits.eps", "mix <= 0.0", "test_alignments.py"),
    Mutant("attnext/alignments.py", "stop, go_on = wide.sigmoid(), (-wide).sigmoid()",
           "stop, go_on = wide.sigmoid(), 1 - wide.sigmoid()", "test_alignments.py"),
    Mutant("attnext/attention/base.py", "        _renew(self)\n", "", "test_modules.py"),
    Mutant("attnext/attention/pooling.py", "self.dropout if self.training else 0.0", "self.dropout", "test_pooling.py"),
    Mutant("attnext/attention/local.py", "position + (reach + 1)", "position + reach", "test_past_attention.py"),
    Mutant("attnext/attention/local.py", "torch.minimum(past.position, lengths - 1)", "past.position",
           "test_past_attention.py"),
    Mutant("attnext/attention/monotonic.py", "self.hard and not self.training", "self.hard", "test_past_attention.py"),
    Mutant("attnext/attention/onward.py", "_replace(transition=transition)", "_replace(transition=1 - transition)",
           "test_past_attention.py"),
    Mutant("attnext/attention/heads.py", "self._by_head(weights).mean(1)", "self._by_head(weights).sum(1)",
           "test_luong.py test_modules.py"),
    Mutant("attnext/backends/__init__.py", "        _setting.forced = before\n", "        pass\n", "test_backends.py"),
    Mutant("attnext/backends/__init__.py", "class _Setting(threading.local)", "class _Setting", "test_backends.py"),
    # Recurrent layers and decoders.
    Mutant("attnext/recurrent/modules.py", "_permuted(x, input.unsorted_indices)", "_permuted(x, input.sorted_indices)",
           "test_recurrent.py"),
    Mutant("attnext/recurrent/modules.py", "if k and self.dropout", "if self.dropout", "test_recurrent.py"),
    Mutant("attnext/recurrent/modules.py", "batch, half)\n        return output.to", "batch)\n        return output.to",
           "test_recurrent.py"),
    Mutant("attnext/recurrent/_gradients.py", "torch.cat((first.unsqueeze(0), x[:-1]))", "x", "test_decoders.py"),
    Mutant("attnext/recurrent/_gradients.py", "(biases[size : 3 * size], biases[:size])",
           "(biases[: 2 * size], biases[:size])", "test_decoders.py"),
    Mutant("attnext/recurrent/cases.py", "_error(x, y, case)", "0.0 * _error(x, y, case)", "test_verify_recurrent.py"),
    # The reference model and its commands.
    Mutant("attnext/seq2seq/lexicon.py", "min((_leading_numbers", "max((_leading_numbers", "test_data.py"),
    Mutant("attnext/seq2seq/lexicon.py", "if not (first and _is_header", "if not (_is_header", "test_data.py"),
    Mutant("attnext/seq2seq/lexicon.py", " and 0.0 <= float(last) <= 1.0", "", "test_data.py"),
    Mutant("attnext/seq2seq/lexicon.py", '_COMMENT = ("#", ";;")', '_COMMENT = ("#",)', "test_data.py"),
    Mutant("attnext/seq2seq/data.py", "len(self) - 1 - beyond", "len(self) - 1", "test_data.py"),
    Mutant("attnext/seq2seq/lines.py", '"utf-8-sig"', '"utf-8"', "test_cli.py"),
    Mutant("attnext/seq2seq/checkpoint.py", '"[0-9a-f]{64}"', '".*"', "test_checkpoint.py"),
    Mutant("attnext/seq2seq/checkpoint.py", "hexdigest() != digest:", "hexdigest() is None:", "test_checkpoint.py"),
    Mutant("attnext/seq2seq/checkpoint.py", "tensors[name].is_floating_point() !=", "False and 0 !=",
           "test_checkpoint.py"),
    Mutant("attnext/seq2seq/session.py", "        del before[_HANG_UP]\n", "        pass\n", "test_runs.py"),
    Mutant("attnext/seq2seq/session.py", ">= self.trainer.config.patience", "> self.trainer.config.patience",
           "test_runs.py"),
    Mutant("attnext/seq2seq/search.py", "clamp(min=longest) + 10", "clamp(min=longest) + 9", "test_search.py"),
    Mutant("attnext/seq2seq/search.py", "cut = self.limits[self.rows] <= steps", "cut = self.limits[self.rows] < steps",
           "test_search.py"),
    Mutant("attnext/seq2seq/search.py", "key=lambda one: -one.score", "key=lambda one: one.score", "test_search.py"),
    Mutant("attnext/seq2seq/together.py", " - math.log(len(each))", "", "test_together.py"),
    Mutant("attnext/seq2seq/training.py", " * bool(own)", "", "test_training.py test_runs.py"),
    Mutant("attnext/seq2seq/training.py", "9.0 / (self.progress.step + 10)", "0.0", "test_training.py"),
    Mutant("attnext/seq2seq/evaluation.py", "one), -len(one)) for one", "one), len(one)) for one",
           "test_evaluation.py"),
    Mutant("attnext/seq2seq/distributed.py", "if rank >= size:", "if rank > size:", "test_cli.py"),
    Mutant("attnext/seq2seq/model.py", "rounds_products(embedded.dtype)", "True", "test_model.py"),
    Mutant("attnext/verify.py", "if report.failures:", "if False:", "test_verify.py"),
    # Compiled.
    Mutant("csrc/cpu/problem.h", "kSmallWeights = 32;", "kSmallWeights = 100000;", "test_kernels.py"),
    Mutant("csrc/cpu/tensors.h", "data[b] >= 0 && data[b] <= keys", "data[b] <= keys", "test_operators.py"),
    Mutant("csrc/cpu/recurrent.cpp", "(adds ? to[i * out.row + k] : 0.f) + ", "", "test_recurrent.py"),
    Mutant("csrc/cpu/recurrent.cpp", "sums[d].add(layer, d, at, of_gates.numbers, k > 0);",
           "sums[d].add(layer, d, at, of_gates.numbers, false);", "test_recurrent.py"),
]  # fmt: skip


def copied(folder: Path) -> None:
    """The files that git knows, and what was built of them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for built in (*(ROOT / "attnext").glob("_C.*.so"), ROOT / "attnext" / "_build.json"):
        shutil.copy(built, folder / "attnext")
    shutil.copytree(ROOT / "build", folder / "build", copy_function=shutil.copy2)
    (folder / "attnext" / "kernels").symlink_to(folder / "kernels")


def build(folder: Path) -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"ATTNEXT_CPU": "1", "ATTNEXT_CUDA": "0"}
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, env=environment).returncode == 0


def is_noticed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails, or nothing can be built."""
    file = folder / mutant.file
    before = file.read_text()
    compiled = file.suffix in _COMPILED
    file.write_text(before.replace(mutant.old, mutant.new))
    try:
        if compiled and not build(folder):
            return True
        tests = [f"tests/{name}" for name in mutant.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, env=environment, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(before)
        if compiled:
            build(folder)
    return done.returncode == 1


def main(words: list[str]) -> int:
    console = Console()
    chosen = [one for one in MUTANTS if not words or any(word in str(one) for word in words)]
    lost = [one for one in chosen if (ROOT / one.file).read_text().count(one.old) != 1]
    chosen = [one for one in chosen if one not in lost]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        planted = track(chosen, "Planting", console=console, transient=True)
        survivors = [mutant for mutant in planted if not is_noticed(mutant, folder)]
    for one in survivors:
        console.print(f"SURVIVED {one}: {one.tests}", markup=False, highlight=False, soft_wrap=True)
    for one in lost:
        console.print(f"LOST {one}: it does not stand there once", markup=False, highlight=False, soft_wrap=True)
    noticed = len(chosen) - len(survivors)
    console.print(f"{noticed} of {len(chosen)} changes were noticed")
    return int(bool(lost) or noticed < _NOTICED * len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
