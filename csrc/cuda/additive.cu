// The CUDA operators: from tensors to launches. Shapes and dtypes have been checked in Python; what would read or write
// outside a tensor is checked again here, as compiled graphs come straight to this place. Nothing waits for the device,
// and no size depends on what is on it: a call can be captured into a graph.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "backward.cuh"
#include "forward.cuh"
#include "prepare.cuh"

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

int64_t pairs_of(int64_t features) { return round_up(divide_up(std::max<int64_t>(features, 1), 2), kPairChunk); }

// Rows' exponentials: with `fold` times c; `out` and `by_row` where they are wanted.
template <class T>
void launch_exponentials(const Device& device, const Tensor& x, const Slots& slots, int64_t padded, const float* fold,
                         float* out, float* by_row, float* limits) {
  const bool single = x.dim() == 2;
  const int64_t batch = x.size(0), rows = single ? 1 : x.size(1), features = x.size(single ? 1 : 2);
  const int64_t blocks = batch * divide_up(padded, kTransposed);
  if (blocks == 0) return;
  ATTNEXT_LAUNCH((exponentials<T>), grid_of(blocks), kExponentialThreads, kExponentialShared, device.stream,
                 rows_of<T>(x), slots, as_int(rows, "the number of rows"), as_int(features, "the size of a row"),
                 int(pairs_of(features)), as_int(padded, "the number of rows"), fold, out, by_row, limits);
  check_launch("exponentials", blocks);
}

// F and its limits. A mask by slot hides no key from all queries.
std::tuple<Tensor, Tensor> prepare_keys(const Device& device, const Tensor& key, Slots slots, bool by_slot) {
  if (by_slot) slots.mask = nullptr;
  const int64_t batch = key.size(0), rows = round_up(std::max<int64_t>(key.size(1), 1), kKeyBlock);
  Tensor out = floats(key, {batch, pairs_of(key.size(2)), rows, 2}), limits = floats(key, {batch, rows});
  with_type(key, [&](auto number) {
    launch_exponentials<decltype(number)>(device, key, slots, rows, nullptr, data_of(out), nullptr, data_of(limits));
  });
  return {out, limits};
}

// The inputs of a call, with their exponentials and folded weight, and the tensors that these live in.
template <class T>
struct Setup {
  Setup(const Tensor& query, const Tensor& key, const Tensor& score_weight, Optional exp_key, Optional key_limit,
        const Optional& lengths_given, const Optional& mask, double scale, int64_t values, bool backward)
      : device(query), lengths(contiguous(lengths_given)) {
    check_key(key);
    const int64_t batch = key.size(0), keys = key.size(1), features = key.size(2);
    const int64_t queries = query.dim() == 2 ? 1 : query.size(1);
    if (query.dim() == 2)
      check_shape(query, "query", {batch, features});
    else
      check_shape(query, "query", {batch, queries, features});
    check_shape(key, "key", {batch, keys, features});
    check_shape(score_weight, "score_weight", {features});
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && score_weight.scalar_type() == query.scalar_type(),
                    "attnext: the inputs differ in dtype");
    problem.query = rows_of<T>(query), problem.key = rows_of<T>(key);
    problem.slots = slots_of(lengths, mask, batch, queries, keys);
    problem.batch = as_int(batch, "the batch"), problem.queries = as_int(queries, "Tq");
    problem.keys = as_int(keys, "Tk"), problem.features = as_int(features, "D");
    problem.values = as_int(values, "H");
    problem.pairs = as_int(pairs_of(features), "D");
    problem.query_rows = as_int(round_up(std::max<int64_t>(queries, 1), kQueryBlock), "Tq");
    problem.key_rows = as_int(round_up(std::max<int64_t>(keys, 1), kKeyBlock), "Tk");
    fold(score_weight, scale);
    const int64_t pairs = problem.pairs, rows = problem.query_rows;
    exp_query = floats(query, {batch, pairs, rows, 2}), query_limit = floats(query, {batch, rows});
    if (backward) exp_query_by_row = floats(query, {batch, rows, pairs, 2});
    launch_exponentials<T>(device, query, Slots{}, rows, problem.weights.fold, data_of(exp_query),
                           backward ? data_of(exp_query_by_row) : nullptr, data_of(query_limit));
    if (!exp_key || !key_limit)
      std::tie(this->exp_key, this->key_limit) = prepare_keys(device, key, problem.slots, mask && mask->dim() == 3);
    else
      this->exp_key = *exp_key, this->key_limit = *key_limit;
    check_tensor(this->exp_key, "exp_key", {batch, pairs, problem.key_rows, 2}, ScalarType::Float);
    check_tensor(this->key_limit, "key_limit", {batch, problem.key_rows}, ScalarType::Float);
    STD_TORCH_CHECK(this->exp_key.is_contiguous() && this->key_limit.is_contiguous() &&
                        reinterpret_cast<uintptr_t>(this->exp_key.data_ptr()) % 16 == 0,
                    "attnext: exp_key and key_limit must be contiguous, and exp_key begin at a multiple of 16 bytes");
    problem.exp_query = data_of(exp_query), problem.query_limit = data_of(query_limit);
    problem.exp_key = data_of(this->exp_key), problem.key_limit = data_of(this->key_limit);
  }

  void fold(const Tensor& score_weight, double scale) {
    const int64_t pairs = problem.pairs;
    folded = floats(score_weight, {6 * pairs + 3});
    float* at = data_of(folded);
    problem.weights = {at, at + 2 * pairs, at + 4 * pairs, at + 6 * pairs};
    ATTNEXT_LAUNCH((fold_weight<T>), 1, kFoldThreads, kFoldThreads / kWarp * int(sizeof(float)), device.stream,
                   data_as<T>(score_weight), score_weight.stride(0), problem.features, problem.pairs, scale, at);
    check_launch("fold_weight", 1);
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
  Tensor folded, exp_query, exp_query_by_row, query_limit, exp_key, key_limit;
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
void split_keys(Forward<T>& out, const Setup<T>& setup, int64_t warps, int64_t tile) {
  const int64_t tiles = std::max<int64_t>(1, divide_up(setup.problem.keys, tile));
  const int64_t wanted = std::max<int64_t>(1, 16 * setup.device.multiprocessors / std::max<int64_t>(1, warps));
  static_assert(kMaxSplits * sizeof(float) <= 32 << 10);  // combine keeps a factor for each in shared memory
  const int64_t each = divide_up(tiles, std::min({wanted, tiles, kMaxSplits}));
  out.splits = int(divide_up(tiles, each)), out.keys_each = as_int(each * tile, "Tk");
}

constexpr int kFewQueries = 4;
// What a block may have without asking.
static_assert(kForwardShared <= 48 << 10 && kStepShared<kFewQueries> <= 48 << 10 && sizeof(PairStage) <= 48 << 10);

template <class T>
void launch_forward(const Setup<T>& setup, const Forward<T>& out) {
  const Problem<T>& p = setup.problem;
  const cudaStream_t stream = setup.device.stream;
  if (p.queries <= kFewQueries) {
    const dim3 grid(grid_of(divide_up(int64_t(p.batch) * out.splits, kWarpsPerBlock)));
    if (p.queries == 1)
      ATTNEXT_LAUNCH((step<T, 1>), grid, kThreads, kStepShared<1>, stream, p, out);
    else
      ATTNEXT_LAUNCH((step<T, kFewQueries>), grid, kThreads, kStepShared<kFewQueries>, stream, p, out);
    check_launch("step", int64_t(grid.x) * grid.y);
  } else {
    const dim3 grid(grid_of(p.batch * divide_up(p.queries, kQueryBlock)), unsigned(out.splits));
    ATTNEXT_LAUNCH((forward<T>), grid, kThreads, kForwardShared, stream, p, out);
    check_launch("forward", int64_t(grid.x) * grid.y);
  }
}

template <class T>
void choose_splits(const Setup<T>& setup, Forward<T>& out) {
  const Problem<T>& p = setup.problem;
  const bool few = p.queries <= kFewQueries;
  const int64_t warps = few ? p.batch : p.batch * divide_up(p.queries, kQueryBlock) * kWarpsPerBlock;
  split_keys(out, setup, warps, few ? kStepTile : kKeyBlock);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> attend(Setup<T>& setup, const Tensor& query, const Tensor& value,
                                          bool need_weights) {
  const Problem<T>& p = setup.problem;
  Tensor context = empty_by_query(query, p.values), lse = floats(query, {p.batch, p.queries});
  Tensor weights = need_weights ? empty_by_query(query, p.keys) : torch::stable::new_empty(query, {0});
  Forward<T> out = {};
  out.value = value_rows<T>(value, out.aligned);
  choose_splits(setup, out);
  const bool split = out.splits > 1;
  const bool several = split || out.keys_each > (p.queries <= kFewQueries ? kStepTile : kKeyBlock);
  Tensor part = floats(query, {several ? out.splits : 0, setup.rows(), p.values});
  Tensor sums = floats(query, {2, split ? out.splits : 0, setup.rows()});
  Tensor raw = need_weights && sizeof(T) != sizeof(float) ? floats(query, {setup.rows(), p.keys}) : weights;
  out.context = data_as<T>(context), out.log_sum_exp = data_of(lse), out.part = data_of(part);
  out.part_max = data_of(sums), out.part_sum = data_of(sums) + int64_t(out.splits) * setup.rows();
  if (need_weights) out.weights = data_as<T>(weights), out.raw = data_of(raw);
  if (setup.rows() > 0) {
    launch_forward(setup, out);
    if (split) {
      const dim3 grid(grid_of(setup.rows()), unsigned(std::max<int64_t>(1, divide_up(p.values, kThreads))));
      const int shared = (kWarpsPerBlock + out.splits) * int(sizeof(float));
      ATTNEXT_LAUNCH((combine<T>), grid, kThreads, shared, setup.device.stream, p, out);
      check_launch("combine", int64_t(grid.x) * grid.y);
    }
  }
  return {context, weights, lse};
}

// How the gradients of query, key and score weight are shared: programs for queries and for keys, enough to fill the
// device. Their partial sums never have more than about four times the numbers of the gradients.
template <class T>
void share_gradients(Backward<T>& g, const Setup<T>& setup, int64_t slabs) {
  const Problem<T>& p = setup.problem;
  const int64_t queries = p.queries, keys = p.keys;
  const int64_t both = 2 * (queries + keys) * p.features / (2 * p.pairs);  // the parts' features are padded
  const int64_t warps = p.batch * divide_up(p.pairs, kWarp);
  const int64_t wanted = std::max<int64_t>(1, 16 * setup.device.multiprocessors / warps);
  const int64_t of_keys = std::min({wanted, divide_up(keys, 2 * kGradientKeys), std::max<int64_t>(1, both / queries)});
  const int64_t of_rows = std::min({divide_up(wanted, of_keys), divide_up(divide_up(queries, slabs), 2 * kGradientKeys),
                                    std::max<int64_t>(1, both / keys)});
  g.keys_each = as_int(round_up(divide_up(keys, of_keys), kGradientKeys), "Tk");
  g.key_splits = int(divide_up(keys, g.keys_each));
  g.rows_each = int(divide_up(std::min<int64_t>(g.slab, queries), of_rows));
  g.row_splits = int(of_rows);
}

template <class T>
void launch_sum(const Setup<T>& setup, const Tensor& parts, const Tensor& out, int splits, int64_t rows) {
  const Problem<T>& p = setup.problem;
  const int64_t blocks = divide_up(rows * p.features, kFoldThreads);
  ATTNEXT_LAUNCH((sum_parts<T>), grid_of(blocks), kFoldThreads, 0, setup.device.stream, data_of(parts), p.weights.times,
                 data_as<T>(out), splits, rows, p.features, p.pairs);
  check_launch("sum_parts", blocks);
}

// The gradients of query, key, value and score weight. ds and p of a slab of queries stand between the two launches:
// never more of them than about four times the numbers of the gradients.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Setup<T>& setup, Backward<T> g, const Tensor& query,
                                                     const Tensor& key, const Tensor& value, const Tensor& score_weight,
                                                     double scale) {
  const Problem<T>& p = setup.problem;
  const cudaStream_t stream = setup.device.stream;
  if (setup.rows() == 0 || p.keys == 0) {
    const auto zeros = [](const Tensor& x) {
      Tensor result = empty_as(x);
      return torch::stable::zero_(result);
    };
    return {zeros(query), zeros(key), zeros(value), zeros(score_weight)};
  }
  const int64_t numbers = std::max<int64_t>(1, 2 * (int64_t(p.features) + p.values));
  g.slab = int(round_up(std::min<int64_t>(p.queries, numbers), kQueryBlock));
  const int64_t slabs = divide_up(p.queries, g.slab);
  share_gradients(g, setup, slabs);
  const int64_t splits = g.row_splits * g.key_splits, key_tiles = p.key_rows / kKeyBlock;
  Tensor ds = floats(query, {p.batch, g.slab, p.key_rows});
  Tensor probabilities = floats(query, {g.from_scores ? 0 : p.batch, g.slab, p.key_rows});
  const int64_t sums = p.batch * key_tiles * (g.slab / kQueryBlock) * kWarpsPerBlock;
  Tensor ds_sums = torch::stable::new_zeros(query, {slabs, sums}, ScalarType::Float);
  Tensor query_parts = floats(query, {g.key_splits, p.batch, p.queries, p.pairs, 2});
  Tensor key_parts = floats(query, {g.row_splits, p.batch, p.keys, p.pairs, 2});
  Tensor weight_parts = floats(query, {slabs, splits, p.batch, p.pairs, 2});
  Tensor value_grad = floats(query, {p.batch, p.keys, p.values});
  if (!g.grad_context.data) torch::stable::zero_(value_grad);
  g.ds = data_of(ds), g.probabilities = data_of(probabilities), g.value_grad = data_of(value_grad);
  g.query_parts = data_of(query_parts), g.key_parts = data_of(key_parts);
  g.exp_query_by_row = data_of(setup.exp_query_by_row);
  const int64_t value_tiles = g.grad_context.data ? divide_up(p.values, kValueColumns) : 0;
  const int64_t programs =
      p.batch * (splits * divide_up(p.pairs, kWarp) + divide_up(p.keys, kGradientKeys) * value_tiles);
  for (int64_t n = 0; n < slabs; ++n) {
    g.first = int(n * g.slab), g.rows = std::min(g.slab, p.queries - g.first), g.add = n > 0;
    g.ds_sums = data_of(ds_sums) + n * sums;
    g.weight_parts = data_of(weight_parts) + n * splits * p.batch * p.pairs * 2;
    const int64_t tiles = p.batch * key_tiles * divide_up(g.rows, kQueryBlock);
    ATTNEXT_LAUNCH((score_gradients<T>), grid_of(tiles), kThreads, int(sizeof(PairStage)), stream, p, g);
    check_launch("score_gradients", tiles);
    const int64_t blocks = divide_up(programs, kWarpsPerBlock);
    ATTNEXT_LAUNCH((input_gradients<T>), grid_of(blocks), kThreads, 0, stream, p, g);
    check_launch("input_gradients", blocks);
  }
  Tensor grad_query = empty_as(query), grad_key = empty_as(key), grad_weight = empty_as(score_weight);
  launch_sum(setup, query_parts, grad_query, g.key_splits, setup.rows());
  launch_sum(setup, key_parts, grad_key, g.row_splits, int64_t(p.batch) * p.keys);
  const int64_t blocks = divide_up(p.features, kWarp);
  ATTNEXT_LAUNCH((weight_gradient<T>), grid_of(blocks), kWeightThreads, kWeightThreads * int(sizeof(float)), stream,
                 data_of(ds_sums), slabs * sums, data_of(weight_parts), slabs * splits * p.batch, scale,
                 data_as<T>(grad_weight), p.features, p.pairs);
  check_launch("weight_gradient", blocks);
  return {grad_query, grad_key, torch::stable::to(value_grad, value.scalar_type()), grad_weight};
}

std::tuple<Tensor, Tensor> additive_prepare(Tensor key, Optional lengths, Optional mask) {
  check_key(key);
  STD_TORCH_CHECK(!mask || mask->dim() == 2, "attnext: a memory's mask must be (B, Tk)");
  check_devices(key, {{"lengths", lengths}, {"mask", mask}});
  const Device device(key);
  lengths = contiguous(lengths);
  return prepare_keys(device, key, slots_of(lengths, mask, key.size(0), 1, key.size(1)), false);
}

std::tuple<Tensor, Tensor, Tensor> additive_attention(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                                      Optional exp_key, Optional key_limit, Optional lengths,
                                                      Optional mask, Optional seed, double scale, double dropout_p,
                                                      bool need_weights) {
  check_devices(query, {{"key", key},
                        {"value", value},
                        {"score_weight", score_weight},
                        {"exp_key", exp_key},
                        {"key_limit", key_limit},
                        {"lengths", lengths},
                        {"mask", mask},
                        {"seed", seed}});
  check_tensor(value, "value", {key.size(0), key.size(1), value.size(2)}, query.scalar_type());
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    Setup<T> setup(query, key, score_weight, exp_key, key_limit, lengths, mask, scale, value.size(2), false);
    setup.drop(seed, dropout_p);
    const Tensor values = with_neighbouring_columns(value);
    return attend(setup, query, values, need_weights);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Optional grad_context, Optional grad_weights, Tensor query, Tensor key, Tensor value, Tensor score_weight,
    Optional exp_key, Optional key_limit, Optional lengths, Optional mask, Optional seed, double scale,
    double dropout_p, Tensor context, Tensor weights, Tensor log_sum_exp) {
  check_devices(query, {{"grad_context", grad_context},
                        {"grad_weights", grad_weights},
                        {"key", key},
                        {"value", value},
                        {"score_weight", score_weight},
                        {"exp_key", exp_key},
                        {"key_limit", key_limit},
                        {"lengths", lengths},
                        {"mask", mask},
                        {"seed", seed},
                        {"context", context},
                        {"weights", weights},
                        {"log_sum_exp", log_sum_exp}});
  check_tensor(value, "value", {key.size(0), key.size(1), value.size(2)}, query.scalar_type());
  check_by_query(grad_context, "grad_context", query, value.size(2));
  check_by_query(grad_weights, "grad_weights", query, key.size(1));
  check_by_query(context, "context", query, value.size(2));
  if (grad_weights) check_by_query(weights, "weights", query, key.size(1));
  check_tensor(log_sum_exp, "log_sum_exp", {query.size(0), query.dim() == 2 ? 1 : query.size(1)}, ScalarType::Float);
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    Setup<T> setup(query, key, score_weight, exp_key, key_limit, lengths, mask, scale, value.size(2), true);
    setup.drop(seed, dropout_p);
    const Problem<T>& p = setup.problem;
    const Tensor values = with_neighbouring_columns(value), contexts = torch::stable::contiguous(context),
                 all_weights = torch::stable::contiguous(weights), lse = torch::stable::contiguous(log_sum_exp),
                 delta = floats(query, {p.batch, p.queries});
    Backward<T> g = {};
    g.value = rows_of<T>(values), g.grad_context = p.values > 0 ? rows_of<T>(grad_context) : Rows<T>{};
    g.grad_weights = rows_of<T>(grad_weights);
    g.context = data_as<T>(contexts), g.weights = data_as<T>(all_weights);
    g.log_sum_exp = data_of(lse), g.delta = data_of(delta);
    if (setup.rows() > 0) {
      const int64_t blocks = divide_up(setup.rows(), kWarpsPerBlock);
      ATTNEXT_LAUNCH((row_sums<T>), grid_of(blocks), kThreads, 0, setup.device.stream, p, g);
      check_launch("row_sums", blocks);
    }
    return gradients(setup, g, query, key, value, score_weight, scale);
  });
}

Tensor additive_scores(Tensor query, Tensor key, Tensor score_weight, Optional lengths, Optional mask, double scale) {
  check_devices(query, {{"key", key}, {"score_weight", score_weight}, {"lengths", lengths}, {"mask", mask}});
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    Setup<T> setup(query, key, score_weight, {}, {}, lengths, mask, scale, 0, false);
    Tensor scores = empty_by_query(query, setup.problem.keys);
    Forward<T> out = {};
    choose_splits(setup, out);
    out.scores = data_as<T>(scores);
    if (scores.numel() > 0) launch_forward(setup, out);
    return scores;
  });
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor key, Tensor score_weight,
                                                            Optional lengths, Optional mask, double scale) {
  check_devices(query,
                {{"grad", grad}, {"key", key}, {"score_weight", score_weight}, {"lengths", lengths}, {"mask", mask}});
  check_by_query(grad, "grad", query, key.size(1));
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    Setup<T> setup(query, key, score_weight, {}, {}, lengths, mask, scale, 0, true);
    Backward<T> g = {};
    g.from_scores = true, g.grad_weights = rows_of<T>(grad);
    const Tensor nothing = torch::stable::new_empty(key, {key.size(0), key.size(1), 0});
    auto [of_query, of_key, of_value, of_weight] = gradients(setup, g, query, key, nothing, score_weight, scale);
    return std::tuple(of_query, of_key, of_weight);
  });
}

}  // namespace
}  // namespace attnext::cuda

#if !defined(ATTNEXT_CUDA_ON_CPU)
namespace attnext::cuda {

std::pair<int, int> driver_and_runtime() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

}  // namespace attnext::cuda
#endif

#if defined(ATTNEXT_CUDA_ON_CPU)
STABLE_TORCH_LIBRARY_IMPL(attnext, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(attnext, CUDA, m) {
#endif
  using namespace attnext::cuda;
  m.impl("additive_prepare_cuda", TORCH_BOX(&additive_prepare));
  m.impl("additive_attention_cuda", TORCH_BOX(&additive_attention));
  m.impl("additive_attention_backward_cuda", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_scores_cuda", TORCH_BOX(&additive_scores));
  m.impl("additive_scores_backward_cuda", TORCH_BOX(&additive_scores_backward));
}
