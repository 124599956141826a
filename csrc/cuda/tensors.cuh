// From tensors to problems, for all operators: what is checked, how keys are shared, and what a forward pass returns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "backward.cuh"
#include "forward.cuh"

namespace attnext::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#if defined(ATTNEXT_CUDA_ON_CPU)
struct Device {
  explicit Device(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int multiprocessors = 1;  // so that small problems have warps with several tiles
};
void check_launch(const char*, int64_t) {}
#else
// The device of a tensor as the current one, and its current stream.
struct Device {
  explicit Device(const Tensor& x) : guard(x.get_device_index()) {
    const int index = x.get_device_index();
    stream = static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(index).nativeHandle());
    const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    STD_TORCH_CHECK(error == cudaSuccess, "attnext: CUDA device ", index, ": ", cudaGetErrorString(error));
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int multiprocessors;
};
void check_launch(const char* kernel, int64_t blocks) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "attnext: launch of ", kernel, " with ", blocks,
                  " blocks failed: ", cudaGetErrorString(error));
}
#endif

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

// As a kernel's size, which is 32 bits; products of sizes are 64.
int as_int(int64_t n, const char* what) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int>::max(), "attnext: ", what, " is too large for the CUDA kernels: ", n);
  return int(n);
}

unsigned grid_of(int64_t blocks) { return unsigned(as_int(blocks, "the number of blocks")); }

// Calls work(T()) with the type of a tensor's numbers.
template <class Work>
auto with_type(const Tensor& x, const Work& work) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return work(__half());
    case ScalarType::BFloat16:
      return work(__nv_bfloat16());
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                      "attnext: the CUDA kernels take float32, float16 and bfloat16");
      return work(float());
  }
}

Tensor floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

Tensor empty_as(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t k = 0; k < x.dim(); ++k) sizes.push_back(x.size(k));
  return torch::stable::new_empty(x, sizes);
}

Tensor empty_by_query(const Tensor& query, int64_t n) {
  if (query.dim() == 2) return torch::stable::new_empty(query, {query.size(0), n});
  return torch::stable::new_empty(query, {query.size(0), query.size(1), n});
}

float* data_of(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

template <class T>
T* data_as(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A tensor of (B, n) is one row for each batch row.
template <class T>
Rows<T> rows_of(const Tensor& x) {
  const bool single = x.dim() == 2;
  return {data_as<T>(x), x.stride(0), single ? 0 : x.stride(1), x.stride(single ? 1 : 2)};
}

template <class T>
Rows<T> rows_of(const Optional& x) {
  return x ? rows_of<T>(*x) : Rows<T>{};
}

void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.dim() == int64_t(shape.size()), "attnext: ", name, " has ", x.dim(), " dimensions, needs ",
                  shape.size());
  int64_t k = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(x.size(k) == size, "attnext: ", name, " has size ", x.size(k), " in dimension ", k, ", needs ",
                    size);
    ++k;
  }
}

struct Named {
  const char* name;
  Optional x;
};

void check_devices(const Tensor& first, std::initializer_list<Named> others) {
  for (const auto& [name, x] : others)
    STD_TORCH_CHECK(!x || x->get_device_index() == first.get_device_index(), "attnext: ", name, " is on device ",
                    x->get_device_index(), ", the first argument on ", first.get_device_index());
}

void check_key(const Tensor& key) {
  STD_TORCH_CHECK(key.dim() == 3 && key.size(2) > 0, "attnext: key must be (B, Tk, D) with a D of at least 1");
}

void check_tensor(const Tensor& x, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(x.scalar_type() == dtype, "attnext: ", name, " has another dtype than the query asks for");
}

// The shape of a result: (B, Tq, n), or (B, n) for a query of (B, D).
void check_by_query(const Optional& x, const char* name, const Tensor& query, int64_t n) {
  if (!x) return;
  if (query.dim() == 2)
    check_tensor(*x, name, {query.size(0), n}, query.scalar_type());
  else
    check_tensor(*x, name, {query.size(0), query.size(1), n}, query.scalar_type());
}

Slots slots_of(const Optional& lengths, const Optional& mask, int64_t batch, int64_t queries, int64_t keys) {
  Slots slots = {};
  if (lengths) {
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "attnext: lengths must be int64");
    check_shape(*lengths, "lengths", {batch});
    STD_TORCH_CHECK(batch < 2 || lengths->stride(0) == 1, "attnext: lengths must be contiguous");
    slots.lengths = data_as<const int64_t>(*lengths);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "attnext: mask must be bool");
    slots.mask = data_as<const bool>(*mask);
    slots.mask_batch = mask->stride(0);
    if (mask->dim() == 2) {
      check_shape(*mask, "mask", {batch, keys});
      slots.mask_key = mask->stride(1);
    } else {
      check_shape(*mask, "mask", {batch, queries, keys});
      slots.mask_query = mask->stride(1), slots.mask_key = mask->stride(2);
    }
  }
  return slots;
}

Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : Optional(); }

// A call's sizes, slots and dropout, and what these live in.
template <class T>
struct Call {
  Call(const Tensor& query, const Tensor& key, const Optional& lengths_given, const Optional& mask, int64_t values)
      : device(query), lengths(contiguous(lengths_given)) {
    check_key(key);
    const int64_t batch = key.size(0), keys = key.size(1), features = key.size(2);
    const int64_t queries = query.dim() == 2 ? 1 : query.size(1);
    if (query.dim() == 2)
      check_shape(query, "query", {batch, features});
    else
      check_shape(query, "query", {batch, queries, features});
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "attnext: the inputs differ in dtype");
    problem.slots = slots_of(lengths, mask, batch, queries, keys);
    problem.batch = as_int(batch, "the batch"), problem.queries = as_int(queries, "Tq");
    problem.keys = as_int(keys, "Tk"), problem.features = as_int(features, "D");
    problem.values = as_int(values, "H");
    problem.key_rows = as_int(round_up(std::max<int64_t>(keys, 1), kKeyBlock), "Tk");
  }

  void drop(const Optional& seed, double dropout_p) {
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "attnext: dropout_p must lie between 0 and 1, got ", dropout_p);
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed, "attnext: dropout needs a seed");
      check_tensor(*seed, "seed", {}, ScalarType::Long);
      const float gain = dropout_p < 1 ? float(1 / (1 - dropout_p)) : 0.0f;
      problem.dropout = {data_as<const int64_t>(*seed), uint64_t(dropout_p * 4294967296.0), gain};
    }
  }

  int64_t rows() const { return int64_t(problem.batch) * problem.queries; }

  Problem<T> problem = {};
  Device device;
  Optional lengths;
};

// Values whose columns are neighbours, and whether vector loads may be taken from them.
template <class T>
Rows<T> value_rows(const Tensor& value, bool& aligned) {
  const Rows<T> rows = rows_of<T>(value);
  const auto whole = [](int64_t n) { return n % 4 == 0; };
  aligned = whole(value.size(2)) && whole(rows.batch) && whole(rows.row) &&
            reinterpret_cast<uintptr_t>(rows.data) % (4 * sizeof(T)) == 0;
  return rows;
}

Tensor with_neighbouring_columns(const Tensor& value) {
  return value.size(2) < 2 || value.stride(2) == 1 ? value : torch::stable::contiguous(value);
}

constexpr int64_t kMaxSplits = 4096;

// Splits of the keys, each a multiple of `tile`, so that there are about as many warps as the device can hold.
template <class T>
void split_keys(Forward<T>& out, const Call<T>& call, int64_t warps, int64_t tile) {
  const int64_t tiles = std::max<int64_t>(1, divide_up(call.problem.keys, tile));
  const int64_t wanted = std::max<int64_t>(1, 16 * call.device.multiprocessors / std::max<int64_t>(1, warps));
  static_assert(kMaxSplits * sizeof(float) <= 32 << 10);  // combine keeps a factor for each in shared memory
  const int64_t each = divide_up(tiles, std::min({wanted, tiles, kMaxSplits}));
  out.splits = int(divide_up(tiles, each)), out.keys_each = as_int(each * tile, "Tk");
}

// Context, weights and log-sum-exp. launch(out) is of the first kernel, which shares the keys as `out` has it; with
// `several`, it has sums that are not the last.
template <class T, class Launch>
std::tuple<Tensor, Tensor, Tensor> attend(const Call<T>& call, const Tensor& query, Forward<T> out, bool several,
                                          bool need_weights, const Launch& launch) {
  const Problem<T>& p = call.problem;
  Tensor context = empty_by_query(query, p.values), lse = floats(query, {p.batch, p.queries});
  Tensor weights = need_weights ? empty_by_query(query, p.keys) : torch::stable::new_empty(query, {0});
  const bool split = out.splits > 1;
  Tensor part = floats(query, {split || several ? out.splits : 0, call.rows(), p.values});
  Tensor sums = floats(query, {2, split ? out.splits : 0, call.rows()});
  Tensor raw = need_weights && sizeof(T) != sizeof(float) ? floats(query, {call.rows(), p.keys}) : weights;
  out.context = data_as<T>(context), out.log_sum_exp = data_of(lse), out.part = data_of(part);
  out.part_max = data_of(sums), out.part_sum = data_of(sums) + int64_t(out.splits) * call.rows();
  if (need_weights) out.weights = data_as<T>(weights), out.raw = data_of(raw);
  if (call.rows() > 0) {
    launch(out);
    if (split) {
      const dim3 grid(grid_of(call.rows()), unsigned(std::max<int64_t>(1, divide_up(p.values, kThreads))));
      const int shared = (kWarpsPerBlock + out.splits) * int(sizeof(float));
      ATTNEXT_LAUNCH((combine<T>), grid, kThreads, shared, call.device.stream, p, out);
      check_launch("combine", int64_t(grid.x) * grid.y);
    }
  }
  return {context, weights, lse};
}

// Queries whose ds and p stand between two launches: never more of these than about four times the numbers of the
// gradients, or those of as many queries as make few launches.
template <class T>
int slab_of(const Problem<T>& p, int64_t numbers) {
  const int64_t most = std::max<int64_t>(kLeastSlab, 2 * numbers);
  return int(round_up(std::min<int64_t>(p.queries, most), kQueryBlock));
}

template <class T>
void launch_row_sums(const Call<T>& call, const Backward<T>& g) {
  if (call.rows() == 0) return;
  const int64_t blocks = divide_up(call.rows(), kWarpsPerBlock);
  ATTNEXT_LAUNCH((row_sums<T>), grid_of(blocks), kThreads, 0, call.device.stream, call.problem, g);
  check_launch("row_sums", blocks);
}

void check_incoming(const Tensor& query, const Tensor& key, int64_t values, const Optional& grad_context,
                    const Optional& grad_weights, const Tensor& context, const Tensor& weights,
                    const Tensor& log_sum_exp) {
  check_by_query(grad_context, "grad_context", query, values);
  check_by_query(grad_weights, "grad_weights", query, key.size(1));
  check_by_query(context, "context", query, values);
  if (grad_weights) check_by_query(weights, "weights", query, key.size(1));
  check_tensor(log_sum_exp, "log_sum_exp", {query.size(0), query.dim() == 2 ? 1 : query.size(1)}, ScalarType::Float);
}

// What backward has from forward, and delta, which row_sums makes of it.
struct Incoming {
  Incoming(const Tensor& context, const Tensor& weights, const Tensor& log_sum_exp)
      : context(torch::stable::contiguous(context)),
        weights(torch::stable::contiguous(weights)),
        log_sum_exp(torch::stable::contiguous(log_sum_exp)),
        delta(floats(log_sum_exp, {log_sum_exp.size(0), log_sum_exp.size(1)})) {}

  template <class T>
  Backward<T> gradients_of() const {
    Backward<T> g = {};
    g.context = data_as<T>(context), g.weights = data_as<T>(weights);
    g.log_sum_exp = data_of(log_sum_exp), g.delta = data_of(delta);
    return g;
  }

  Tensor context, weights, log_sum_exp, delta;
};

}  // namespace
}  // namespace attnext::cuda
