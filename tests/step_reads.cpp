// Counts what a step reads of its memory: F by __ldg, and values of a type that counts as it is read. Prints what is
// not read exactly once, or read though it is beyond a row's length, and then "D + H numbers a key" if there is
// nothing.
#include <cstdio>
#include <vector>

#include "cuda_on_cpu.h"

namespace attnext::cuda {

std::vector<float> exp_keys;
std::vector<int> reads_of_f, reads_of_values;

template <class T>
T counted_ldg(const T* address) {
  const float* first = reinterpret_cast<const float*>(address);
  const int64_t at = first - exp_keys.data();
  if (at >= 0 && at < int64_t(exp_keys.size()))
    for (size_t n = 0; n < sizeof(T) / sizeof(float); ++n) ++reads_of_f[at + n];
  return *address;
}

struct Counted {
  int at;  // in reads_of_values
};
float to_float(Counted x) {
  ++reads_of_values[x.at];
  return 0;
}
void load4(const Counted* x, float (&out)[4]) {
  for (int k = 0; k < 4; ++k) out[k] = to_float(x[k]);
}

}  // namespace attnext::cuda

#define __ldg attnext::cuda::counted_ldg
#include "forward.cuh"

namespace attnext::cuda {

template <>
Counted from_float<Counted>(float) {
  return {0};
}

int wrong(int count, int wanted, const char* what, int64_t b, int j, int n) {
  if (count == wanted) return 0;
  std::printf("%s %d of key %d in row %d: read %d times, not %d\n", what, n, j, int(b), count, wanted);
  return 1;
}

// Reads of F and of the values by a step over `splits` shares of the keys; the number of wrong ones.
template <int kQ>
int wrong_reads(int queries, int values, bool aligned, int splits) {
  const std::vector<int64_t> lengths = {300, 0, 1, 129, 64};
  Problem<Counted> p = {};
  p.batch = int(lengths.size()), p.queries = queries, p.keys = 300, p.features = 48, p.values = values;
  p.pairs = p.features / 2, p.query_rows = kQueryBlock, p.key_rows = 3 * kKeyBlock;
  p.slots.lengths = lengths.data();
  const float numbers[] = {1, 20, 0};  // the weight's limits: all tiles are near
  const std::vector<float> queries_e(size_t(p.batch) * p.features * p.query_rows, 1), weights(3 * p.features, 1);
  const std::vector<float> limits(size_t(p.batch) * p.key_rows, 0);
  p.weights = {weights.data(), &weights[p.features], &weights[2 * p.features], numbers};
  p.exp_query = queries_e.data(), p.query_limit = p.key_limit = limits.data();
  exp_keys.assign(size_t(p.batch) * p.features * p.key_rows, 1), p.exp_key = exp_keys.data();
  reads_of_f.assign(exp_keys.size(), 0);
  std::vector<Counted> of_values(size_t(p.batch) * p.keys * values);
  for (size_t n = 0; n < of_values.size(); ++n) of_values[n].at = int(n);
  reads_of_values.assign(of_values.size(), 0);

  Forward<Counted> out = {};
  out.value = {of_values.data(), int64_t(p.keys) * values, values, 1}, out.aligned = aligned;
  out.splits = splits, out.keys_each = (p.keys + splits * kStepTile - 1) / (splits * kStepTile) * kStepTile;
  std::vector<float> rest(size_t(splits) * p.batch * queries * (values + 2));
  out.part = rest.data(), out.part_max = out.part + size_t(splits) * p.batch * queries * values;
  out.part_sum = out.part_max + splits * p.batch * queries;
  std::vector<Counted> context(size_t(p.batch) * queries * values);
  std::vector<float> log_sum_exp(size_t(p.batch) * queries);
  out.context = context.data(), out.log_sum_exp = log_sum_exp.data();
  const unsigned blocks = (p.batch * splits + kWarpsPerBlock - 1) / kWarpsPerBlock;
  ATTNEXT_LAUNCH((step<Counted, kQ>), blocks, kThreads, kStepShared<kQ>, nullptr, p, out);

  int found = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int tiles_end = int((lengths[b] + kStepTile - 1) / kStepTile) * kStepTile;
    for (int j = 0; j < p.key_rows; ++j)
      for (int d = 0; d < p.features; ++d) {
        const int64_t at = ((b * p.pairs + d / 2) * p.key_rows + j) * 2 + d % 2;
        found += wrong(reads_of_f[at], j < tiles_end, "feature", b, j, d);
      }
    for (int j = 0; j < p.keys; ++j)
      for (int h = 0; h < values; ++h)
        found += wrong(reads_of_values[(b * p.keys + j) * values + h], j < lengths[b], "column", b, j, h);
  }
  return found;
}

}  // namespace attnext::cuda

int main() {
  using namespace attnext::cuda;
  const int found = wrong_reads<1>(1, 72, true, 1) + wrong_reads<1>(1, 7, false, 3) + wrong_reads<4>(3, 260, true, 2);
  if (!found) std::puts("D + H numbers a key");
  return found != 0;
}
