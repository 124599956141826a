"""Plants single changes in the code, one at a time in a copy of it, and says which of them the tests nearest by notice.

    python tests/mutants.py [WORD ...]      only those whose file or change has one of these words

The chosen tests first have to pass as the code stands. A change of the CPU's kernels takes half a minute, one of
Python seconds, one of CUDA or Triton kernels one to three minutes, as these are run without a GPU. Exit code 1 where
more than one in twenty survives, or where a change no longer finds its place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from attnext import _extension

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


# Of the tests in a file those that hold kernels to the reference, without the compilers' and the budgets.
_CUDA = " ".join(
    f"test_cuda.py::{name}"
    for name in (
        "test_every_case_with_threads_in_any_order",
        "test_the_same_bits_with_threads_in_any_order",
        "test_a_step_that_sees_its_past",
        "test_what_a_gpu_is_asked[contract]",
        "test_no_access_out_of_bounds_and_no_race",
    )
)
_TRITON = "test_triton.py::test_every_case[float32]"
_KEYS = "test_triton.py::test_kernels_are_not_compiled_again_for_other_lengths"
_EXPONENTIALS = "test_triton.py::test_what_a_program_holds[exponentials]"
_CONTRACT, _TILES, _TUNING = (
    f"test_triton.py::test_what_a_program_holds[{name}]" for name in ("contract", "tiles", "tuning")
)

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
    Mutant("attnext/memory.py", 'limit.masked_fill(limit > _NORMAL[holding], float("inf"))', "limit", "test_held.py"),
    Mutant("attnext/recurrent/decoders.py", "in _checks.HALVES and not torch.is_grad_enabled()", "in _checks.HALVES",
           "test_held.py"),
    Mutant("attnext/pytrees.py", "key if shared else value", "value", "test_exported_steps.py"),
    Mutant("attnext/pytrees.py", "(lengths, mask) if bound else None", "None", "test_exported_steps.py"),
    # Arguments.
    Mutant("attnext/_checks.py", "0 <= min(values)", "-1 <= min(values)", "test_arguments.py"),
    Mutant("attnext/_checks.py", "max(values) <= keys", "max(values) <= keys + 1", "test_arguments.py"),
    Mutant("attnext/_checks.py", "abs(x) <= LARGEST", "abs(x) <= 2 * sys.float_info.max", "test_arguments.py"),
    Mutant("attnext/_checks.py", "not 0.0 <= x <= 1.0", "not 0.0 <= x <= 1.1", "test_arguments.py test_modules.py"),
    Mutant("attnext/_checks.py", " and not torch._C._functorch.is_batchedtensor(x)", "", "test_operators.py"),
    # Operators, and where torch's own attention serves.
    Mutant("attnext/ops.py", "x if x is None or x.dtype == torch.float64 else", "x if x is None else",
           "test_operators.py"),
    # The ways of dot products.
    Mutant("attnext/dot.py", "torch.compiler.is_exporting()", "False", "test_luong.py"),
    Mutant("attnext/dot.py", "not torch.compiler.is_compiling() and _checks.in_transforms()", "False", "test_luong.py"),
    Mutant("attnext/dot.py", " and values == features", "", "test_luong.py"),
    Mutant("attnext/dot.py", " or memory.mask is not None", "", "test_luong.py"),
    Mutant("attnext/dot.py", "[..., :1].isnan().any()", "[..., :1].isinf().any()", "test_luong.py"),
    Mutant("attnext/dot.py", "if queries * keys > _MOST_WEIGHTS:", "if False:", "test_luong.py"),
    Mutant("attnext/dot.py", "_SMALL_MEMORY if trains else 4 * _SMALL_MEMORY", "_SMALL_MEMORY", "test_luong.py"),
    Mutant("attnext/dot.py", 'if torch.is_autocast_enabled("cpu") or', "if", "test_luong.py"),
    Mutant("attnext/dot.py", "query.layout == key.layout == value.layout", "torch.strided", "test_arguments.py"),
    Mutant("attnext/dot.py", "scores * scale if scale != 1.0 and few else scores", "scores", "test_luong.py"),
    # Weights by other rules, and modules.
    Mutant("attnext/alignments.py", "mix <= limits.tiny / limits.eps", "mix <= 0.0", "test_alignments.py"),
    # Without it nothing changes: of up to 2^24 scores the rounding of the spread is far from that bound.
    Mutant("attnext/alignments.py", "min=0.5 / (count * count)", "min=2.0 / (count * count)", "test_alignments.py"),
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
    Mutant("attnext/seq2seq/together.py", "each.logsumexp(0)", "each.mean(0)", "test_together.py"),
    Mutant("attnext/seq2seq/training.py", " * bool(own)", "", "test_training.py test_runs.py"),
    Mutant("attnext/seq2seq/training.py", "9.0 / (self.progress.step + 10)", "0.0", "test_training.py"),
    Mutant("attnext/seq2seq/evaluation.py", "one), -len(one)) for one", "one), len(one)) for one",
           "test_evaluation.py"),
    Mutant("attnext/seq2seq/distributed.py", "if rank >= size:", "if rank > size:", "test_cli.py"),
    Mutant("attnext/seq2seq/model.py", "rounds_products(embedded.dtype)", "True", "test_model.py"),
    Mutant("attnext/verify.py", "if report.failures:", "if False:", "test_verify.py"),
    # The kernels for the CPU.
    Mutant("csrc/cpu/problem.h", "kSmallWeights = 32;", "kSmallWeights = 100000;", "test_kernels.py"),
    Mutant("csrc/cpu/problem.h", " + kKept * p.padded +", " +", "test_sanitized.py"),
    Mutant("csrc/cpu/problem.h", "return reverse ? steps - 1 - step : step;", "return step;", "test_recurrent.py"),
    Mutant("csrc/cpu/tensors.h", "data[b] >= 0 && data[b] <= keys", "data[b] <= keys", "test_operators.py"),
    Mutant("csrc/cpu/setup.h", "(kBackwardTasks + batch - 1)",
           "(int64_t(torch::stable::get_num_threads()) + batch - 1)", "test_kernels.py"),
    Mutant("csrc/cpu/setup.h", "uint64_t(dropout_p * 0x1p32)", "uint64_t(dropout_p * 0x1p31)", "test_kernels.py"),
    Mutant("csrc/cpu/setup.h", ", 4 * (queries + p.keys) / queries);", ", int64_t(1) << 40);", "test_kernels.py"),
    Mutant("csrc/cpu/additive.cpp", "(p.batch * p.queries + 1) * row_of(p.padded)",
           "p.batch * p.queries * row_of(p.padded)", "test_sanitized.py"),
    Mutant("csrc/cpu/additive.h", "if (counts) smallest = std::min(smallest, std::abs(w));", "", "test_kernels.py"),
    Mutant("csrc/cpu/additive.h", "std::isfinite(w) ? w : std::numeric_limits<T>::quiet_NaN()", "w", "test_kernels.py"),
    Mutant("csrc/cpu/gemm.h", "(j < nj ? j : nj - 1) * b_row", "j * b_row", "test_sanitized.py"),
    Mutant("csrc/cpu/rows.h", "stride == 1 && k + kLanes<T> <= n", "k + kLanes<T> <= n", "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", " && n == padded && !p.mask.data", " && n == padded",
           "test_nonfinite.py test_kernels.py"),
    Mutant("csrc/cpu/gemm.h", "for (; k < depth; ++k, b += step", "for (; k + 1 < depth; ++k, b += step",
           "test_kernels.py"),
    Mutant("csrc/cpu/gemm.h", "for (; h < size; h += W) part0", "for (; h + W < size; h += W) part0",
           "test_kernels.py"),
    Mutant("csrc/cpu/gemm.h", "if constexpr (N > 1) product_columns<T, I, N / 2>(p, row, column, end);", "",
           "test_kernels.py"),
    Mutant("csrc/cpu/gemm.h", "sum[k] = (part0 + part1) + (part2 + part3);", "sum[k] = part0 + (part2 + part3);",
           "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "for (int64_t j = nj; j < padded_keys; ++j) s[j] = kHidden<T>;", "",
           "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "const T shift = top == kHidden<T> ? T(0) : top;", "const T shift = top;",
           "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "exp<T>(x > Vec<T>{} ? Vec<T>{} : x)", "exp<T>(x)", "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "if (p.mask.query != 0) finite &= magnitude(row, padded) <= Limits<T>::largest;", "",
           "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "query_limit <= Limits<T>::max_argument && key_limit", "key_limit", "test_kernels.py"),
    Mutant("csrc/cpu/kernels.h", "mix(uint32_t(j0 + j))", "mix(uint32_t(j))", "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "y[j] == 0 ? T(0) : x[j] * y[j]", "x[j] * y[j]", "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "if (slot == 0) continue;", "", "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "for (int64_t j = t.nj; j < width; ++j) ds[j] = 0;", "", "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "if (g.grad_weights.data) delta[row] +=", "if (g.grad_weights.data) delta[row] =",
           "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "zero(tiles.grad_value, p.padded_values);", "", "test_kernels.py"),
    Mutant("csrc/cpu/gradients.h", "row / p.queries % p.head_count", "row % p.head_count", "test_kernels.py"),
    Mutant("csrc/cpu/dot.h", "finite_rows(p, query, row, t.ni, p.padded);", "true;", "test_kernels.py test_luong.py"),
    Mutant("csrc/cpu/dot.h", "finite_rows(p, grad_context, values_row, t.ni, p.padded_values);", "true;",
           "test_kernels.py test_luong.py"),
    Mutant("csrc/cpu/dot.h", "if (!p.shared) zero(tiles.grad_value, width * values_row);", "", "test_kernels.py"),
    Mutant("csrc/cpu/rows.h", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u", "test_kernels.py"),
    Mutant("csrc/cpu/rows.h", "0xfffu + ((bits >> 13) & 1u)", "0x1000u", "test_kernels.py"),
    Mutant("csrc/cpu/rows.h", "if (x != x) return 0x7fc0;", "", "test_step_kernels.py"),
    Mutant("csrc/cpu/rows.h", "bits < 0x38800000u", "bits < 0x38000000u", "test_kernels.py"),
    Mutant("csrc/cpu/rows.h", "bad |= !(size <= Limits<T>::largest);", "", "test_kernels.py"),
    Mutant("csrc/cpu/vec.h", "cap = 0x1p60f", "cap = 0x1p126f", "test_kernels.py"),
    Mutant("csrc/cpu/vec.h", "mantissa = 23, degree = 7", "mantissa = 23, degree = 6", "test_kernels.py"),
    Mutant("csrc/cpu/vec.h", "mantissa = 52, degree = 13", "mantissa = 52, degree = 12", "test_kernels.py"),
    Mutant("csrc/cpu/vec.h", "exp_low = -86.f", "exp_low = -80.f", "test_kernels.py"),
    Mutant("csrc/cpu/vec.h", "return r + r * (T(1) - x * r);", "return r;", "test_kernels.py test_recurrent.py"),
    Mutant("csrc/cpu/step.h", "if (!visible(p.mask, q.b, 0, j)) past[reach + j] = 0;", ";", "test_kernels.py"),
    Mutant("csrc/cpu/step.h", "shift = top < 0 ? top : T(0);", "shift = 0;", "test_step_kernels.py"),
    Mutant("csrc/cpu/step.h", "kept == 0 ? Vec<T>{} : kept * load", "kept * load", "test_step_kernels.py"),
    Mutant("csrc/cpu/step.h", "grad[j + o] += sums.spread[j]", "grad[j] += sums.spread[j]", "test_kernels.py"),
    Mutant("csrc/cpu/step.h", "t = at_least<T>(Vec<T>{} + low, at_most<T>(Vec<T>{} + high, t));",
           "t = at_most<T>(Vec<T>{} + high, t);", "test_kernels.py test_step_kernels.py"),
    Mutant("csrc/cpu/step.h", "window[0] < 0 ? 0 : window[0]", "window[0]", "test_kernels.py"),
    Mutant("csrc/cpu/step.h", "if (j >= length || !visible(p.mask, q.b, 0, j)) grad[j] = 0;",
           "if (j >= length) grad[j] = 0;", "test_kernels.py test_step_kernels.py"),
    Mutant("csrc/cpu/step.h", "!((*this)(j) <= least)", "(*this)(j) > 0", "test_step_kernels.py"),
    # Recurrent layers and decoders there.
    Mutant("csrc/cpu/recurrent.cpp", "(adds ? to[i * out.row + k] : 0.f) + ", "", "test_recurrent.py"),
    Mutant("csrc/cpu/recurrent.cpp", "sums[d].add(layer, d, at, of_gates.numbers, k > 0);",
           "sums[d].add(layer, d, at, of_gates.numbers, false);", "test_recurrent.py"),
    Mutant("csrc/cpu/recurrent.h", "r.size - unit, r.size - k < W", "W, r.size - k < W",
           "test_sanitized.py"),
    Mutant("csrc/cpu/recurrent.h", "const bool there = at.b < r.rows_at(at.step - 1);",
           "const bool there = at.step > 0;",
           "test_recurrent.py"),
    Mutant("csrc/cpu/recurrent.h", "if constexpr (U == Unit::kGru) grad += load(carried);", "", "test_recurrent.py"),
    Mutant("csrc/cpu/recurrent.h", "(row + first) % rows", "row", "test_recurrent.py"),
    Mutant("csrc/cpu/panels.h", "for (; k < depth; ++k, panel += N * W)", "for (; k + 1 < depth; ++k, panel += N * W)",
           "test_recurrent.py"),
    Mutant("csrc/cpu/panels.h", "l < rows ? from[l * row + k] : T(0)", "from[l * row + k]", "test_sanitized.py"),
    Mutant("csrc/cpu/panels.h", "c < columns ? from[line * m.row + c * m.column] : T(0)",
           "from[line * m.row + c * m.column]", "test_sanitized.py"),
    Mutant("csrc/cpu/panels.h", "if (rows >= W && n == W) {", "if (n == W) {", "test_sanitized.py"),
    Mutant("csrc/cpu/panels.h", "(L & H ? W + L : L + H)...", "(L & H ? W + L : L)...", "test_recurrent.py"),
    Mutant("csrc/cpu/kernels.h", "(j + (j + 1 < nj))", "(j + 1)", "test_sanitized.py"),
    Mutant("csrc/cpu/kernels.h", "out[l / 2 * out_row + j + l % 2]", "out[l % (W / 2) * out_row + j + l / (W / 2)]",
           "test_kernels.py"),
    Mutant("csrc/cpu/decoder.cpp", "if (best == last) open_", "if (false) open_", "test_decoder_steps.py"),
    Mutant("csrc/cpu/decoder.cpp", "symbols_[at_row - d_.rows] == last) return;", "symbols_[at_row] != last) return;",
           "test_decoder_steps.py"),
    Mutant("csrc/cpu/panels.h", "y *= load_part(x.factor + row * x.out_row + column + n * W, part(n));", "",
           "test_decoders.py"),
    Mutant("csrc/cpu/panels.h", "if (k0 == 0) {", "if (true) {", "test_recurrent.py"),
    Mutant("csrc/cpu/team.h", "      wait((step + 1) * parts_);\n", "", "test_recurrent.py"),
    Mutant("csrc/cpu/team.h", "done_.fetch_add(1, std::memory_order_acq_rel)",
           "done_.fetch_add(1, std::memory_order_relaxed)", "test_recurrent.py"),
    Mutant("csrc/cpu/activations.h", "const Exponential<T> e(within<T>(2 * x, Limits<T>::flat));",
           "const Exponential<T> e(2 * x);", "test_recurrent.py"),
    Mutant("csrc/cpu/step_attention.h", "uint64_t(seeds_[t])", "uint64_t(seeds_[0])", "test_decoders.py"),
    Mutant("csrc/cpu/step_attention.h", "cumulative[at + j] = before[j] + wide[at + j]",
           "cumulative[at + j] = wide[at + j]",
           "test_decoders.py"),
    Mutant("csrc/cpu/step_attention.h", "k == (x.past ? 1 : 0)", "k == 1", "test_decoders.py"),
    Mutant("csrc/cpu/decoder.h", "int64_t asking(int64_t t) const { return x.matrices.after ? t : t - 1; }",
           "int64_t asking(int64_t t) const { return t; }", "test_decoders.py"),
    Mutant("csrc/cpu/decoder.h", "rows % batch == 0", "true", "test_decoder_arguments.py"),
    Mutant("csrc/cpu/decoder.h", "outer - readout, readout", "0, readout", "test_decoders.py"),
    Mutant("csrc/cpu/decoder.cpp", "for (int64_t k = x_.choosing.first; k < V; ++k) sum",
           "for (int64_t k = 0; k < V; ++k) sum",
           "test_decoder_steps.py"),
    Mutant("csrc/cpu/decoder.cpp", "if (logits[k] > logits[best]) best = k;",
           "if (logits[k] >= logits[best]) best = k;",
           "test_decoder_steps.py"),
    Mutant("csrc/cpu/decoder.cpp", "previous_[b] >= 0 && previous_[b] < V", "previous_[b] < V",
           "test_decoder_steps.py test_decoder_arguments.py"),
    Mutant("csrc/cpu/decoder.cpp", "from.data[b * from.row + k] * mask[b * d_.size + k]", "from.data[b * from.row + k]",
           "test_decoders.py"),
    Mutant("csrc/cpu/scratch.cpp", "kKept = size_t(1) << 26", "kKept = size_t(1) << 40", "test_kernels.py"),
    Mutant("csrc/cpu/scratch.cpp", "m.used + bytes > m.chunks[m.chunk].size", "m.used > m.chunks[m.chunk].size",
           "test_kernels.py"),
    Mutant("csrc/cpu/instruction_set.cpp", "current().store(set, std::memory_order_relaxed);", "", "test_kernels.py"),
    # The kernels for CUDA, by their library on the CPU.
    Mutant("csrc/cuda/problem.cuh", "int(max(int64_t(0), min(lengths[b], int64_t(keys))))", "int(lengths[b])", _CUDA),
    Mutant("csrc/cuda/prepare.cuh", "shown ? limit : -1.0f", "shown ? limit : 0.0f", _CUDA),
    Mutant("csrc/cuda/prepare.cuh", "too_large > 0 ? -1.0f : (kFoldBits", "too_large > 2 ? -1.0f : (kFoldBits", _CUDA),
    Mutant("csrc/cuda/prepare.cuh", "  __syncthreads();\n  return x;", "  return x;", _CUDA),
    Mutant("csrc/cuda/scores.cuh", "__pipeline_wait_prior(1);", "__pipeline_wait_prior(2);", _CUDA),
    Mutant("csrc/cuda/scores.cuh", "    __syncthreads();\n  }\n  if (is_near", "  }\n  if (is_near", _CUDA),
    Mutant("csrc/cuda/scores.cuh", "q_limit + warp_max(k_limit)", "fmaxf(q_limit, warp_max(k_limit))", _CUDA),
    Mutant("csrc/cuda/products.cuh", "j0 + j < keys && h0 + c < columns", "j0 + j < keys", _CUDA),
    Mutant("csrc/cuda/forward.cuh", "inside && j < stop && p.slots", "inside && j <= stop && p.slots", _CUDA),
    Mutant("csrc/cuda/forward.cuh", "total[q] * shrink[q] + warp_sum(sum)", "total[q] + warp_sum(sum)", _CUDA),
    Mutant("csrc/cuda/forward.cuh", "if (kMasked && weight == 0) continue;", "", _CUDA),
    Mutant("csrc/cuda/forward.cuh", "  __syncwarp();\n}\n\n// The weights of a row", "}\n\n// The weights of a row",
           _CUDA),
    Mutant("csrc/cuda/forward.cuh", "float* factors = shared + kWarpsPerBlock;", "float* factors = shared;", _CUDA),
    Mutant("csrc/cuda/backward.cuh", "if (a != 0) total = fmaf(a,", "total = fmaf(a,", _CUDA),
    Mutant("csrc/cuda/backward.cuh", "out = g.add ? make_float2(out.x + sums.sum[k].x, out.y + sums.sum[k].y) :",
           "out =",
           _CUDA),
    Mutant("csrc/cuda/problem.cuh", "kLeastSlab = 128;", "kLeastSlab = 1;",
           "test_cuda.py::test_few_features_and_many_queries_take_few_launches"),
    Mutant("csrc/cuda/backward.cuh", "const bool in_slab = local + q < g.rows;", "const bool in_slab = true;", _CUDA),
    Mutant("csrc/cuda/backward.cuh", " || p.key_limit[b * p.key_rows + j0 + k] < 0;", ";", _CUDA),
    Mutant("csrc/cuda/dot.cuh", "    else\n      __pipeline_commit();  // of nothing\n", "", _CUDA),
    Mutant("csrc/cuda/dot.cuh", "if (weights[n] == 0 && p.slots.mask) continue;", "", _CUDA),
    Mutant("csrc/cuda/dot_backward.cuh", "factor = kept(p.dropout, row, j);", "factor = kept(p.dropout, row, i);",
           _CUDA),
    Mutant("csrc/cuda/step.cuh", "move * before(j - 1)", "move * before(j)", _CUDA),
    Mutant("csrc/cuda/step.cuh", "fminf(top, 0.0f) : top", "0.0f : top", _CUDA),
    Mutant("csrc/cuda/step_tile.cuh", "const bool seen = j >= 0 && j < p.slots", "const bool seen = j < p.slots",
           _CUDA),
    Mutant("csrc/cuda/step_tile.cuh", "  __syncthreads();  // what was there has been read\n  static_assert",
           "  static_assert", _CUDA),
    Mutant("csrc/cuda/step_gradients.cuh", "if (at.i > 0) for_each", "if (at.i > 1) for_each", _CUDA),
    Mutant("csrc/cuda/step_backward.cuh", "g.past_row - g.keys_each, count", "g.past_row, count", _CUDA),
    # The kernels in Triton, interpreted.
    Mutant("kernels/additive.py", "seen = seen & (j < tl.load(lengths + b))[None, :]", "seen = seen", _TRITON),
    Mutant("kernels/additive.py", "high, total * alpha + tl.sum(p, 1)", "high, total + tl.sum(p, 1)", _TRITON),
    Mutant("kernels/additive.py", "tl.load(summed, inside, 0.0) * alpha[:, None]", "tl.load(summed, inside, 0.0)",
           _TRITON),
    Mutant("kernels/additive.py", "product = tl.where(weight == 0, 0.0, product)", "product = product", _TRITON),
    Mutant("kernels/additive.py",
           "c += tl.load(part + at * H + h, h < H, 0.0) * tl.exp(tl.load(part_max + at) - shift)",
           "c += tl.load(part + at * H + h, h < H, 0.0)", _TRITON),
    Mutant("kernels/additive.py", "tl.where(whole, (BITS - spread) * HALF_LN2, -1.0)", "(BITS - spread) * HALF_LN2",
           _CONTRACT),
    Mutant("kernels/additive.py", "tl.max(tl.load(q_limit + i), 0) + ", "0 * tl.max(tl.load(q_limit + i), 0) + ",
           _CONTRACT),
    Mutant("kernels/gradients.py", "tl.where(a == 0, 0.0, a * g)", "a * g", _CONTRACT),
    Mutant("kernels/gradients.py", "        if add:\n            sum0", "        if False:\n            sum0", _TRITON),
    Mutant("kernels/gradients.py", "tl.load(ds_sum) + tl.sum(ds, 1)", "tl.sum(ds, 1)", _TRITON),
    Mutant("kernels/gradients.py", "hidden = (tl.load(k_limit + j) < 0)[:, None]", "hidden = (j < 0)[:, None]",
           _TRITON),
    Mutant("kernels/gradients.py", "p * (kept * dp - tl.load(delta", "p * kept * (dp - tl.load(delta", _TRITON),
    Mutant("kernels/dot.py", "    if HIDE:\n", "    if False:\n", _TRITON),
    Mutant("kernels/dot.py", "acc * alpha[:, None, None] + ", "acc + ", _TRITON),
    Mutant("kernels/dot.py", "(r < rows_of)[:, None] & (t < stop)[None, :]", "(r < rows_of)[:, None]", _TRITON),
    Mutant("kernels/steps.py", "here = (j >= 0) & (j < Tk)", "here = j < Tk", _TRITON),
    Mutant("kernels/steps.py", "(j < tl.load(window + 2 * row + 1))", "(j <= tl.load(window + 2 * row + 1))", _TRITON),
    Mutant("kernels/steps.py", "tl.where(hidden | (mix <= _least(ACC)), 0.0, e * mix)",
           "tl.where(hidden, 0.0, e * mix)",
           _CONTRACT),
    Mutant("kernels/steps.py", "(at >= 0) & (at < reach) & (j < Tk)", "(at >= 0) & (j < Tk)", _TILES),
    Mutant("kernels/launch.py", "k_rows // KEY_BLOCK, slab).zero_()", "k_rows // KEY_BLOCK, slab)", _TRITON),
    Mutant("kernels/launch.py", "return high, x - high", "return high, 0.0",
           "test_triton.py::test_every_case[float64]"),
    Mutant("kernels/launch.py", "HIDE=p.lengths is not None or p.mask is not None", "HIDE=p.mask is not None",
           _CONTRACT),
    Mutant("kernels/launch.py", "key_splits, int(number > 0), PLAIN", "key_splits, 0, PLAIN", _TRITON),
    Mutant("kernels/launch.py", '("ds_sums", "key_parts", "grad_value")', '("key_parts", "grad_value")', _TUNING),
    Mutant("kernels/launch.py", "not TUNED or torch.are_deterministic_algorithms_enabled()", "not TUNED", _TUNING),
    Mutant("kernels/launch.py", "group.get_world_size() > 1", "group.get_world_size() > 2", _TUNING),
    Mutant("kernels/launch.py", "call not in _choices and not _capturing()", "call not in _choices", _TUNING),
    Mutant("kernels/launch.py", "tuner.nargs = None", "pass", _TUNING),
    Mutant("kernels/launch_steps.py", "(p.batch * triton.cdiv(p.keys, meta[\"BK\"]), triton",
           "(p.batch, triton.cdiv(p.keys, meta[\"BK\"]), triton", _KEYS),
    Mutant("kernels/additive.py", '"out_first", "part_sum",', '"out_first",', _KEYS),
    Mutant("kernels/launch.py", "return min(p.queries, max(LEAST_SLAB,", "return min(p.queries, max(1,", _KEYS),
    Mutant("kernels/additive.py", "low = (x - high) * 2.884765625 +", "low = (x - high) * 2.88 +", _EXPONENTIALS),
    Mutant("kernels/gradients.py", "_exp_of_twice(k1)", "tl.exp(2 * k1)", _EXPONENTIALS),
    Mutant("kernels/launch_steps.py", "past_parts = torch.zeros(", "past_parts = torch.empty(", _TRITON),
    Mutant("kernels/launch_steps.py", "of_key, of_weight.sum(0)", "of_key, of_weight[0]", _TRITON),
    Mutant("kernels/tiles.py", '"forward": (_tiles(1, BM=2, BN=128, BH=128),),',
           '"forward": (_tiles(1, BM=8, BN=128, BH=128),),',
           "test_triton.py::test_kernels_compile_for_every_target_and_spill_nothing"),
    Mutant("kernels/tiles.py", '"pairs": (_tiles(1, BM=32, BN=128),)', '"pairs": (_tiles(1, BM=32, BN=64),)', _TRITON),
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
    (folder / "attnext" / "kernels").symlink_to(folder / "kernels")


class Extension:
    """The C++ extension of the copy, as fast to build as it can be: hardly optimised, for two instruction sets.

    These are the widest that the machine has and the portable one, whose vectors differ most. Only objects whose
    sources see a change are built anew, and afterwards all are those from before it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        module = _extension.load()
        assert module is not None, _extension.status().reason
        widest = module.instruction_sets()[0].rpartition("-")[2]
        for file in (folder / "csrc/cpu").glob("isa_v*.cpp"):
            if file.stem != f"isa_{widest}":
                file.unlink()
        choice = folder / "csrc/cpu/instruction_set.cpp"
        kept = "&kPortable" if widest == "portable" else f"&k{widest.upper()}, &kPortable"
        choice.write_text(choice.read_text().replace("&kV4, &kV3, &kPortable", kept))
        if not self._build():
            sys.exit("the extension can't be built")
        self._kept = folder / "built"
        self._keep(folder, self._kept)

    def build(self, changed: Path) -> bool:
        """Whether it can be built with a change of this file."""
        for path in (self.folder / "build").rglob("*.o"):
            # The build takes an object for old if any header is newer than it.
            source = self.folder / "csrc" / str(path).rpartition("/csrc/")[2].removesuffix(".o")
            if changed not in self._seen_by(source):
                os.utime(path, (changed.stat().st_mtime + 1,) * 2)
        return self._build()

    def restore(self) -> None:
        self._keep(self._kept, self.folder)

    def _build(self) -> bool:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = os.environ | {"ATTNEXT_CPU": "1", "ATTNEXT_CUDA": "0", "CXXFLAGS": "-O1"}
        return (
            subprocess.run(command, cwd=self.folder, capture_output=True, check=False, env=environment).returncode == 0
        )

    def _seen_by(self, source: Path) -> set[Path]:
        """The file and what it includes, and what that includes, of the project's own."""
        found, coming = set(), [source]
        while coming:
            file = coming.pop()
            if file not in found and file.is_file():
                found.add(file)
                names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
                coming += [self.folder / "csrc" / name for name in names]
        return found

    @staticmethod
    def _keep(of: Path, to: Path) -> None:
        """Copies what a build leaves, with the times of its files."""
        shutil.rmtree(to / "build", ignore_errors=True)
        shutil.copytree(of / "build", to / "build", copy_function=shutil.copy2)
        (to / "attnext").mkdir(exist_ok=True)
        for built in (of / "attnext").glob("_C.*.so"):
            shutil.copy2(built, to / "attnext")


def tested(folder: Path, tests: Iterable[str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += [f"tests/{name}" for name in tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment,
        timeout=_SECONDS if options else None,
    )  # fmt: skip


def is_noticed(mutant: Mutant, folder: Path, extension: Extension | None) -> bool:
    """Whether a test fails, or the process, or nothing can be built."""
    file = folder / mutant.file
    before, times = file.read_text(), file.stat()
    file.write_text(before.replace(mutant.old, mutant.new))
    compiled = extension if file.suffix in _COMPILED else None
    try:
        if compiled and not compiled.build(file):
            return True
        code = tested(folder, mutant.tests.split(), "-x").returncode
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(before)
        os.utime(file, (times.st_atime, times.st_mtime))
        if compiled:
            compiled.restore()
    # Beside failed tests: 4 and 5 are pytest's for tests that it doesn't find, below 0 are signals.
    return code not in (0, 4, 5)


def main(words: list[str]) -> int:
    console = Console()
    chosen = [one for one in MUTANTS if not words or any(word in str(one) for word in words)]
    lost = [one for one in chosen if (ROOT / one.file).read_text().count(one.old) != 1]
    chosen = [one for one in chosen if one not in lost]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        extension = Extension(folder) if any(Path(one.file).suffix in _COMPILED for one in chosen) else None
        # A test that fails anyway would notice everything.
        before = tested(folder, sorted({test for one in chosen for test in one.tests.split()}))
        if before.returncode:
            console.print(before.stdout[-3000:], markup=False, highlight=False)
            return 1
        for one in track(chosen, "Planting", console=console, transient=True):
            began = time.monotonic()
            if is_noticed(one, folder, extension):
                said = f"noticed after {time.monotonic() - began:.0f} s: {one}"
            else:
                survivors.append(one)
                said = f"SURVIVED {one}: {one.tests}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
    for one in lost:
        console.print(f"LOST {one}: it does not stand there once", markup=False, highlight=False, soft_wrap=True)
    noticed = len(chosen) - len(survivors)
    console.print(f"{noticed} of {len(chosen)} changes were noticed")
    return int(bool(lost) or noticed < _NOTICED * len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
