// The CUDA operators: from tensors to launches. Shapes and dtypes have been checked in Python; what would read or write
// outside a tensor is checked again here, as compiled graphs come straight to this place. Nothing waits for the device,
// and no size depends on what is on it: a call can be captured into a graph.
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/library.h>

#include "backward.cuh"
#include "dot_operators.cuh"
#include "forward.cuh"
#include "prepare.cuh"
#include "step_operators.cuh"
#include "tensors.cuh"

namespace attnext::cuda {
namespace {

int64_t pairs_of(int64_t features) { return round_up(divide_up(std::max<int64_t>(features, 1), 2), kPairChunk); }

// Rows' exponentials: with weights times c; `out` and `by_row` where they are wanted.
template <class T>
void launch_exponentials(const Device& device, const Tensor& x, const Slots& slots, int64_t padded,
                         const Weights& weights, float* out, float* by_row, float* limits) {
  const bool single = x.dim() == 2;
  const int64_t batch = x.size(0), rows = single ? 1 : x.size(1), features = x.size(single ? 1 : 2);
  const int64_t blocks = batch * divide_up(padded, kTransposed);
  if (blocks == 0) return;
  ATTNEXT_LAUNCH((exponentials<T>), grid_of(blocks), kExponentialThreads, kExponentialShared, device.stream,
                 rows_of<T>(x), slots, as_int(rows, "the number of rows"), as_int(features, "the size of a row"),
                 int(pairs_of(features)), as_int(padded, "the number of rows"), weights, out, by_row, limits);
  check_launch("exponentials", blocks);
}

// F and its limits. A mask by slot hides no key from all queries.
std::tuple<Tensor, Tensor> prepare_keys(const Device& device, const Tensor& key, Slots slots, bool by_slot) {
  if (by_slot) slots.mask = nullptr;
  const int64_t batch = key.size(0), rows = round_up(std::max<int64_t>(key.size(1), 1), kKeyBlock);
  Tensor out = floats(key, {batch, pairs_of(key.size(2)), rows, 2}), limits = floats(key, {batch, rows});
  with_type(key, [&](auto number) {
    launch_exponentials<decltype(number)>(device, key, slots, rows, Weights{}, data_of(out), nullptr, data_of(limits));
  });
  return {out, limits};
}

// The inputs of a call, with their exponentials and folded weight, and the tensors that these live in.
template <class T>
struct Setup : Call<T> {
  using Call<T>::problem, Call<T>::device;

  Setup(const Tensor& query, const Tensor& key, const Tensor& score_weight, Optional exp_key, Optional key_limit,
        const Optional& lengths, const Optional& mask, double scale, int64_t values, bool backward)
      : Call<T>(query, key, lengths, mask, values) {
    const int64_t batch = problem.batch, features = problem.features;
    STD_TORCH_CHECK(score_weight.scalar_type() == query.scalar_type(), "attnext: the inputs differ in dtype");
    problem.query = rows_of<T>(query), problem.key = rows_of<T>(key);
    problem.pairs = as_int(pairs_of(features), "D");
    problem.query_rows = as_int(round_up(std::max<int64_t>(problem.queries, 1), kQueryBlock), "Tq");
    take_score_weight(score_weight, scale);
    const int64_t pairs = problem.pairs, rows = problem.query_rows;
    exp_query = floats(query, {batch, pairs, rows, 2}), query_limit = floats(query, {batch, rows});
    if (backward) exp_query_by_row = floats(query, {batch, rows, pairs, 2});
    launch_exponentials<T>(device, query, Slots{}, rows, problem.weights, data_of(exp_query),
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

  void take_score_weight(const Tensor& score_weight, double scale) {
    const bool one = score_weight.dim() == 1;
    const int64_t heads = one ? 1 : score_weight.size(0), features = problem.features;
    if (one)
      check_shape(score_weight, "score_weight", {features});
    else
      check_shape(score_weight, "score_weight", {heads, features});
    STD_TORCH_CHECK(heads > 0 && problem.batch % heads == 0, "attnext: score_weight has ", heads,
                    " rows, of which the batch, ", problem.batch, ", must be a multiple");
    folded = floats(score_weight, {heads, Weights::numbers(problem.pairs)});
    problem.weights = {data_of(folded), problem.pairs, as_int(heads, "the number of heads")};
    ATTNEXT_LAUNCH((fold_weight<T>), unsigned(heads), kFoldThreads, kFoldThreads / kWarp * int(sizeof(float)),
                   device.stream, data_as<T>(score_weight), one ? 0 : score_weight.stride(0),
                   score_weight.stride(one ? 0 : 1), problem.features, problem.pairs, scale, data_of(folded));
    check_launch("fold_weight", heads);
  }

  Tensor folded, exp_query, exp_query_by_row, query_limit, exp_key, key_limit;
};

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
void launch_sum(const Setup<T>& setup, const Tensor& parts, const Tensor& out, int splits, int each) {
  const Problem<T>& p = setup.problem;
  const int64_t rows = int64_t(p.batch) * each, blocks = divide_up(rows * p.features, kFoldThreads);
  ATTNEXT_LAUNCH((sum_parts<T>), grid_of(blocks), kFoldThreads, 0, setup.device.stream, data_of(parts), p.weights,
                 data_as<T>(out), splits, rows, each, p.features);
  check_launch("sum_parts", blocks);
}

// The gradients of query, key, value and score weight, slab by slab of the queries.
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
  g.slab = slab_of(p, int64_t(p.features) + p.values);
  const int64_t slabs = divide_up(p.queries, g.slab);
  share_gradients(g, setup, slabs);
  const int64_t splits = g.row_splits * g.key_splits, key_tiles = p.key_rows / kKeyBlock;
  Tensor ds = floats(query, {p.batch, g.slab, p.key_rows});
  Tensor probabilities = floats(query, {g.from_scores ? 0 : p.batch, g.slab, p.key_rows});
  const int64_t sums = key_tiles * (g.slab / kQueryBlock) * kWarpsPerBlock, sum_rows = slabs * p.batch;
  Tensor ds_sums = torch::stable::new_zeros(query, {sum_rows, sums}, ScalarType::Float);
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
    g.ds_sums = data_of(ds_sums) + n * p.batch * sums;
    g.weight_parts = data_of(weight_parts) + n * splits * p.batch * p.pairs * 2;
    const int64_t tiles = p.batch * key_tiles * divide_up(g.rows, kQueryBlock);
    ATTNEXT_LAUNCH((score_gradients<T>), grid_of(tiles), kThreads, int(sizeof(PairStage)), stream, p, g);
    check_launch("score_gradients", tiles);
    const int64_t blocks = divide_up(programs, kWarpsPerBlock);
    ATTNEXT_LAUNCH((input_gradients<T>), grid_of(blocks), kThreads, 0, stream, p, g);
    check_launch("input_gradients", blocks);
  }
  Tensor grad_query = empty_as(query), grad_key = empty_as(key), grad_weight = empty_as(score_weight);
  launch_sum(setup, query_parts, grad_query, g.key_splits, p.queries);
  launch_sum(setup, key_parts, grad_key, g.row_splits, p.keys);
  const dim3 grid(unsigned(p.weights.heads), unsigned(divide_up(p.features, kWarp)));
  ATTNEXT_LAUNCH((weight_gradient<T>), grid, kWeightThreads, kWeightThreads * int(sizeof(float)), stream,
                 data_of(ds_sums), sum_rows, sums, data_of(weight_parts), slabs * splits * p.batch, scale,
                 data_as<T>(grad_weight), p.features, p.pairs);
  check_launch("weight_gradient", int64_t(grid.x) * grid.y);
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
    Forward<T> out = {};
    out.value = value_rows<T>(values, out.aligned);
    choose_splits(setup, out);
    const bool several = out.keys_each > (setup.problem.queries <= kFewQueries ? kStepTile : kKeyBlock);
    return attend(setup, query, out, several, need_weights, [&](const Forward<T>& all) { launch_forward(setup, all); });
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
  check_incoming(query, key, value.size(2), grad_context, grad_weights, context, weights, log_sum_exp);
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    Setup<T> setup(query, key, score_weight, exp_key, key_limit, lengths, mask, scale, value.size(2), true);
    setup.drop(seed, dropout_p);
    const Tensor values = with_neighbouring_columns(value);
    const Incoming incoming(context, weights, log_sum_exp);
    Backward<T> g = incoming.template gradients_of<T>();
    g.value = rows_of<T>(values), g.grad_context = value.size(2) > 0 ? rows_of<T>(grad_context) : Rows<T>{};
    g.grad_weights = rows_of<T>(grad_weights);
    launch_row_sums(setup, g);
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
  m.impl("additive_step_cuda", TORCH_BOX(&additive_step));
  m.impl("additive_step_backward_cuda", TORCH_BOX(&additive_step_backward));
  m.impl("dot_attention_cuda", TORCH_BOX(&dot_attention));
  m.impl("dot_attention_backward_cuda", TORCH_BOX(&dot_attention_backward));
}
