// Counts what steps read of their memory: numbers of a type that counts where
// it is read from. Prints what is not read exactly once, or read though it is
// beyond a row's length, and then "D + H numbers a key, or D" if there is
// nothing.
#include <cstdio>
#include <vector>

#include "cuda_on_cpu.h"

namespace attnext::cuda {

struct Counted {
  float x;
};

// What is read, and how often.
template <class T>
struct Memory {
  std::vector<T> numbers;
  std::vector<int> reads;

  T* allocate(int64_t count) {
    numbers.assign(size_t(count), T{1}), reads.assign(size_t(count), 0);
    return numbers.data();
  }
  void count(const void* address, size_t bytes) {
    const int64_t at = static_cast<const T*>(address) - numbers.data();
    if (at < 0 || at >= int64_t(numbers.size())) return;
    for (size_t n = 0; n < bytes / sizeof(T); ++n) ++reads[at + n];
  }
};

Memory<float> exp_keys;
Memory<Counted> keys, values;

template <class T>
T counted_ldg(const T* address) {
  exp_keys.count(address, sizeof(T));
  return *address;
}
void counted_copy(void* to, const void* from, size_t bytes) {
  keys.count(from, bytes), values.count(from, bytes);
  __pipeline_memcpy_async(to, from, bytes);
}

float to_float(const Counted& x) {
  keys.count(&x, sizeof x), values.count(&x, sizeof x);
  return x.x;
}
void load4(const Counted* x, float (&out)[4]) {
  for (int k = 0; k < 4; ++k) out[k] = to_float(x[k]);
}
void load_part(const Counted* x, float (&out)[4]) { load4(x, out); }
void store_part(Counted* x, const float (&v)[4]) {
  for (int k = 0; k < 4; ++k) x[k].x = v[k];
}

}  // namespace attnext::cuda

#define __ldg attnext::cuda::counted_ldg
#define __pipeline_memcpy_async attnext::cuda::counted_copy
#include "dot_backward.cuh"
#include "forward.cuh"

namespace attnext::cuda {

template <>
Counted from_float<Counted>(float x) {
  return {x};
}

const std::vector<int64_t> kLengths = {300, 0, 1, 129, 64};
constexpr int kKeys = 300;

int wrong(int count, int wanted, const char* what, int64_t b, int j, int n) {
  if (count == wanted) return 0;
  std::printf("%s %d of key %d in row %d: read %d times, not %d\n", what, n, j, int(b), count, wanted);
  return 1;
}

// Of rows (B, Tk, n): each number once up to a row's length.
int wrong_rows(const Memory<Counted>& memory, int columns, const char* what) {
  int found = 0;
  for (size_t at = 0; at < memory.reads.size(); ++at) {
    const int row = int(at) / columns, b = row / kKeys, j = row % kKeys;
    found += wrong(memory.reads[at], j < kLengths[b], what, b, j, int(at) % columns);
  }
  return found;
}

Problem<Counted> problem_of(int queries, int features, int columns) {
  Problem<Counted> p = {};
  p.batch = int(kLengths.size()), p.queries = queries, p.keys = kKeys, p.features = features, p.values = columns;
  p.key_rows = 3 * kKeyBlock, p.slots.lengths = kLengths.data();
  return p;
}

// A forward pass' results, and their parts, over `splits` shares of the keys.
struct Results {
  Results(const Problem<Counted>& p, int splits, int tile) {
    const size_t rows = size_t(p.batch) * p.queries;
    context.resize(rows * p.values), log_sum_exp.resize(rows), rest.resize(splits * rows * (p.values + 2));
    out.context = context.data(), out.log_sum_exp = log_sum_exp.data(), out.part = rest.data();
    out.part_max = out.part + splits * rows * p.values, out.part_sum = out.part_max + splits * rows;
    out.splits = splits, out.keys_each = (p.keys + splits * tile - 1) / (splits * tile) * tile;
  }

  Forward<Counted> out = {};
  std::vector<Counted> context;
  std::vector<float> log_sum_exp, rest;
};

// Reads of F and of the values by a step; the number of wrong ones.
template <int kQ>
int wrong_reads(int queries, int columns, bool aligned, int splits) {
  Problem<Counted> p = problem_of(queries, 48, columns);
  p.pairs = p.features / 2, p.query_rows = kQueryBlock;
  const std::vector<float> queries_e(size_t(p.batch) * p.features * p.query_rows, 1);
  std::vector<float> weights(Weights::numbers(p.pairs), 1);
  weights[1] = 20;  // the limit: all tiles are near
  const std::vector<float> limits(size_t(p.batch) * p.key_rows, 0);
  p.weights = {weights.data(), p.pairs, 1};
  p.exp_query = queries_e.data(), p.query_limit = p.key_limit = limits.data();
  p.exp_key = exp_keys.allocate(int64_t(p.batch) * p.features * p.key_rows);
  Results results(p, splits, kStepTile);
  Forward<Counted>& out = results.out;
  out.value = {values.allocate(int64_t(p.batch) * p.keys * columns), int64_t(p.keys) * columns, columns, 1};
  out.aligned = aligned;
  const unsigned blocks = (p.batch * splits + kWarpsPerBlock - 1) / kWarpsPerBlock;
  ATTNEXT_LAUNCH((step<Counted, kQ>), blocks, kThreads, kStepShared<kQ>, nullptr, p, out);

  int found = wrong_rows(values, columns, "column");
  for (int64_t b = 0; b < p.batch; ++b) {
    const int tiles_end = int((kLengths[b] + kStepTile - 1) / kStepTile) * kStepTile;
    for (int j = 0; j < p.key_rows; ++j)
      for (int d = 0; d < p.features; ++d) {
        const int64_t at = ((b * p.pairs + d / 2) * p.key_rows + j) * 2 + d % 2;
        found += wrong(exp_keys.reads[at], j < tiles_end, "feature", b, j, d);
      }
  }
  return found;
}

// Reads of the keys and of the values, 0 columns where these are the keys, by a
// step of dot products and by the gradients of one.
template <int kQ>
int wrong_dot_reads(int queries, int features, int columns, bool aligned, int splits) {
  const bool shared = columns == 0;
  Problem<Counted> p = problem_of(queries, features, shared ? features : columns);
  const auto rows = [&](Counted* x, int count, int n) { return Rows<Counted>{x, int64_t(count) * n, n, 1}; };
  std::vector<Counted> query(size_t(p.batch) * queries * features), grads(size_t(p.batch) * queries * p.values);
  p.query = rows(query.data(), queries, features);
  const auto allocate = [&] {
    p.key = rows(keys.allocate(int64_t(p.batch) * p.keys * features), p.keys, features);
    return shared ? p.key : rows(values.allocate(int64_t(p.batch) * p.keys * columns), p.keys, columns);
  };
  const auto wrong_now = [&] {
    return wrong_rows(keys, features, "feature") + (shared ? 0 : wrong_rows(values, columns, "column"));
  };
  const auto padded = [](int n) { return (n + 7) / 8 * 8; };
  constexpr int kWarps = 2, kTile = kDotKeys<kQ>;
  DotTile tile = {aligned, kTile, padded(features) + padded(columns), shared ? 0 : padded(features), padded(512)};
  const int bytes = 4 * (queries * tile.totals + 2 * kTile * tile.row) + DotBlock<Counted, kQ>::bytes_of_sums(kWarps);
  Results results(p, splits, kTile);
  results.out.value = allocate();
  ATTNEXT_LAUNCH((dot_step<Counted, kQ>), p.batch * splits, kWarp * kWarps, bytes, nullptr, p, results.out, tile);
  int found = wrong_now();

  std::vector<Counted> of_key(keys.numbers.size()), of_value(values.numbers.size());
  std::vector<float> of_query(splits * query.size()), delta(size_t(p.batch) * queries);
  Backward<Counted> g = {};
  g.value = allocate(), g.grad_context = rows(grads.data(), queries, p.values);
  g.log_sum_exp = results.log_sum_exp.data(), g.delta = delta.data();
  const DotGradients<Counted> to = {shared,          of_key.data(), of_value.data(),       nullptr, nullptr,
                                    of_query.data(), splits,        results.out.keys_each, true};
  tile.keys = kTile / 2;
  ATTNEXT_LAUNCH((dot_step_gradients<Counted, kQ>), p.batch * splits, kWarp * kWarps, bytes, nullptr, p, g, to, tile);
  return found + wrong_now();
}

}  // namespace attnext::cuda

int main() {
  using namespace attnext::cuda;
  int found = wrong_reads<1>(1, 72, true, 1) + wrong_reads<1>(1, 7, false, 3) + wrong_reads<4>(3, 260, true, 2);
  found += wrong_dot_reads<1>(1, 264, 0, true, 1) + wrong_dot_reads<1>(1, 7, 0, false, 3);
  found += wrong_dot_reads<8>(5, 48, 0, true, 2) + wrong_dot_reads<8>(2, 20, 72, true, 1);
  if (!found) std::puts("D + H numbers a key, or D");
  return found != 0;
}
