// Attention by dot products: from tensors to launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "dot.cuh"
#include "dot_backward.cuh"
#include "tensors.cuh"

namespace attnext::cuda {
namespace {

// Of a step's block at most: four of them fit the multiprocessors with most shared memory.
constexpr int64_t kDotShared = 40 << 10;
static_assert(kDotForwardShared <= 48 << 10);
constexpr int kSumThreads = 256;

// The inputs of a call; without a value the keys are the values.
template <class T>
struct DotCall : Call<T> {
  using Call<T>::problem, Call<T>::device;

  DotCall(const Tensor& query, const Tensor& key, const Optional& value, const Optional& lengths, const Optional& mask,
          double scale)
      : Call<T>(query, key, lengths, mask, value ? value->size(2) : key.size(2)),
        shared(!value),
        query(torch::stable::contiguous(query)),
        key(with_neighbouring_columns(key)),
        value(value ? with_neighbouring_columns(*value) : this->key) {
    problem.query = rows_of<T>(this->query), problem.key = rows_of<T>(this->key);
    problem.scale = float(scale);
  }

  // Calls work with how many queries the kernel of a step is for.
  template <class Work>
  void for_queries(const Work& work) const {
    if (problem.queries == 1)
      work(std::integral_constant<int, 1>());
    else
      work(std::integral_constant<int, kDotQueries>());
  }

  // How a step goes through its keys, with `columns` sums for each query and kDotKeys / `share` keys at a time if these
  // fit. False where not one key does, or where the queries are too many. `more` is read too.
  bool lay_out(int64_t columns, int share, const Rows<T>& more) {
    if (problem.queries > kDotQueries) return false;
    constexpr int64_t kVector = kPart<true, T>;
    const Rows<T> values = rows_of<T>(value);
    tile.aligned = problem.features % kVector == 0 && problem.values % kVector == 0;
    const Rows<T> all[] = {problem.query, problem.key, values, more};  // nvcc takes no list in a template's loop
    for (const Rows<T>& rows : all)
      tile.aligned = tile.aligned && rows.batch % kVector == 0 && rows.row % kVector == 0 &&
                     reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
    const int64_t longest = std::max(problem.features, problem.values);
    threads =
        int(std::clamp<int64_t>(round_up(divide_up(longest, tile.aligned ? kVector : 1), kWarp), kWarp, kThreads));
    const int64_t features = round_up(problem.features, kVector);
    const int64_t row = features + (shared ? 0 : round_up(problem.values, kVector)), totals = round_up(columns, 8);
    for_queries([&](auto number) {
      constexpr int kQ = decltype(number)::value;
      bytes = problem.queries * totals * int64_t(sizeof(float)) + DotBlock<T, kQ>::bytes_of_sums(threads / kWarp);
      const int64_t fitting = (kDotShared - bytes) / (2 * row * int64_t(sizeof(T)));
      tile.keys = int(std::clamp<int64_t>(fitting, 0, kDotKeys<kQ> / share));
      bytes += 2 * tile.keys * row * int64_t(sizeof(T));
    });
    if (tile.keys == 0) return false;
    tile.row = int(row), tile.values_at = shared ? 0 : int(features), tile.totals = int(totals);
    return true;
  }

  bool shared;
  Tensor query, key, value;
  DotTile tile = {};
  int threads = 0;
  int64_t bytes = 0;
};

template <class T>
void launch_dot_step(const DotCall<T>& call, const Forward<T>& out) {
  const unsigned blocks = grid_of(int64_t(call.problem.batch) * out.splits);
  call.for_queries([&](auto number) {
    ATTNEXT_LAUNCH((dot_step<T, decltype(number)::value>), blocks, call.threads, int(call.bytes), call.device.stream,
                   call.problem, out, call.tile);
  });
  check_launch("dot_step", blocks);
}

template <class T>
void launch_dot_forward(const DotCall<T>& call, const Forward<T>& out) {
  const Problem<T>& p = call.problem;
  const dim3 grid(grid_of(p.batch * divide_up(p.queries, kQueryBlock)), unsigned(out.splits));
  ATTNEXT_LAUNCH((dot_forward<T>), grid, kThreads, kDotForwardShared, call.device.stream, p, out);
  check_launch("dot_forward", int64_t(grid.x) * grid.y);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> attend_by_dot(DotCall<T>& call, const Tensor& query, bool need_weights) {
  const Problem<T>& p = call.problem;
  Forward<T> out = {};
  out.value = value_rows<T>(call.value, out.aligned);
  if (call.lay_out(p.values, 1, {})) {
    split_keys(out, call, int64_t(p.batch) * (call.threads / kWarp), call.tile.keys);
    return attend(call, query, out, false, need_weights, [&](const Forward<T>& all) { launch_dot_step(call, all); });
  }
  split_keys(out, call, p.batch * divide_up(p.queries, kQueryBlock) * kWarpsPerBlock, kKeyBlock);
  return attend(call, query, out, out.keys_each > kKeyBlock, need_weights,
                [&](const Forward<T>& all) { launch_dot_forward(call, all); });
}

// Splits of the keys for the gradient of the queries, whose parts have no more numbers than about four times the
// gradients.
template <class T>
void split_gradients(DotGradients<T>& to, const DotCall<T>& call, int64_t warps, int64_t tile) {
  const Problem<T>& p = call.problem;
  const int64_t tiles = divide_up(p.keys, tile), most = 2 * (int64_t(p.queries) + p.keys) / p.queries;
  const int64_t wanted = std::max<int64_t>(1, 16 * call.device.multiprocessors / warps);
  const int64_t each = divide_up(tiles, std::min({wanted, tiles, most}));
  to.query_splits = int(divide_up(tiles, each)), to.keys_each = as_int(each * tile, "Tk");
}

template <class T>
void launch_step_gradients(const DotCall<T>& call, const Backward<T>& g, const DotGradients<T>& to) {
  const unsigned blocks = grid_of(int64_t(call.problem.batch) * to.query_splits);
  call.for_queries([&](auto number) {
    ATTNEXT_LAUNCH((dot_step_gradients<T, decltype(number)::value>), blocks, call.threads, int(call.bytes),
                   call.device.stream, call.problem, g, to, call.tile);
  });
  check_launch("dot_step_gradients", blocks);
}

// Slab by slab of the queries, as in `gradients`.
template <class T>
void launch_slabs(const DotCall<T>& call, Backward<T> g, DotGradients<T> to) {
  const Problem<T>& p = call.problem;
  g.slab = slab_of(p, int64_t(p.features) + (call.shared ? 0 : p.values));
  Tensor ds = floats(call.key, {p.batch, g.slab, p.key_rows}),
         weights = floats(call.key, {p.batch, g.slab, p.key_rows});
  const bool several = p.queries > g.slab;
  Tensor key_sums = floats(call.key, {several ? p.batch : 0, p.keys, p.features});
  Tensor value_sums = floats(call.key, {several && !call.shared ? p.batch : 0, p.keys, p.values});
  g.ds = data_of(ds), g.probabilities = data_of(weights);
  to.key_sums = data_of(key_sums), to.value_sums = data_of(value_sums);
  const int64_t feature_tiles = divide_up(p.features, kValueColumns);
  const int64_t value_tiles = call.shared ? 0 : divide_up(p.values, kValueColumns);
  for (g.first = 0; g.first < p.queries; g.first += g.slab) {
    g.rows = std::min(g.slab, p.queries - g.first), g.add = g.first > 0, to.last = g.first + g.rows == p.queries;
    const int64_t tiles = int64_t(p.batch) * (p.key_rows / kKeyBlock) * divide_up(g.rows, kQueryBlock);
    ATTNEXT_LAUNCH((dot_score_gradients<T>), grid_of(tiles), kThreads, int(sizeof(ProductStage)), call.device.stream, p,
                   g);
    check_launch("dot_score_gradients", tiles);
    const int64_t key_tiles = divide_up(p.keys, kGradientKeys);
    const int64_t query_tiles = divide_up(g.rows, kGradientKeys) * to.query_splits;
    const int64_t each = (query_tiles + key_tiles) * feature_tiles + key_tiles * value_tiles;
    const int64_t blocks = divide_up(p.batch * int64_t(as_int(each, "Tk")), kWarpsPerBlock);
    ATTNEXT_LAUNCH((dot_input_gradients<T>), grid_of(blocks), kThreads, 0, call.device.stream, p, g, to);
    check_launch("dot_input_gradients", blocks);
  }
}

// Of query and key, and of a value that is not the key.
template <class T>
std::tuple<Tensor, Tensor, Tensor> dot_gradients(DotCall<T>& call, const Backward<T>& g, const Tensor& query) {
  const Problem<T>& p = call.problem;
  Tensor of_query = empty_as(query), of_key = empty_as(call.key);
  Tensor of_value = call.shared ? torch::stable::new_empty(query, {0}) : empty_as(call.value);
  if (call.rows() == 0 || p.keys == 0) {
    torch::stable::zero_(of_query), torch::stable::zero_(of_key), torch::stable::zero_(of_value);
    return {of_query, of_key, of_value};
  }
  DotGradients<T> to = {};
  to.shared = call.shared, to.key = data_as<T>(of_key), to.value = data_as<T>(of_value);
  const bool few = call.lay_out(p.features, 2, g.grad_context);
  const int64_t warps = few ? int64_t(p.batch) * (call.threads / kWarp)
                            : p.batch * divide_up(p.queries, kGradientKeys) * divide_up(p.features, kValueColumns);
  split_gradients(to, call, warps, few ? call.tile.keys : 4 * kGradientKeys);
  Tensor parts = floats(query, {to.query_splits, call.rows(), p.features});
  to.query_parts = data_of(parts);
  if (few)
    launch_step_gradients(call, g, to);
  else
    launch_slabs(call, g, to);
  const int64_t numbers = call.rows() * p.features, blocks = divide_up(numbers, kSumThreads);
  ATTNEXT_LAUNCH((add_parts<T>), grid_of(blocks), kSumThreads, 0, call.device.stream, data_of(parts),
                 data_as<T>(of_query), to.query_splits, numbers);
  check_launch("add_parts", blocks);
  return {of_query, of_key, of_value};
}

// Columns of the values, whose shape is checked.
int64_t check_dot_value(const Tensor& query, const Tensor& key, const Optional& value) {
  check_key(key);
  if (!value) return key.size(2);
  STD_TORCH_CHECK(value->dim() == 3, "attnext: value has ", value->dim(), " dimensions, needs 3");
  check_tensor(*value, "value", {key.size(0), key.size(1), value->size(2)}, query.scalar_type());
  return value->size(2);
}

std::tuple<Tensor, Tensor, Tensor> dot_attention(Tensor query, Tensor key, Optional value, Optional lengths,
                                                 Optional mask, Optional seed, double scale, double dropout_p,
                                                 bool need_weights) {
  check_devices(query, {{"key", key}, {"value", value}, {"lengths", lengths}, {"mask", mask}, {"seed", seed}});
  check_dot_value(query, key, value);
  return with_type(query, [&](auto number) {
    DotCall<decltype(number)> call(query, key, value, lengths, mask, scale);
    call.drop(seed, dropout_p);
    return attend_by_dot(call, query, need_weights);
  });
}

std::tuple<Tensor, Tensor, Tensor> dot_attention_backward(Optional grad_context, Optional grad_weights, Tensor query,
                                                          Tensor key, Optional value, Optional lengths, Optional mask,
                                                          Optional seed, double scale, double dropout_p, Tensor context,
                                                          Tensor weights, Tensor log_sum_exp) {
  check_devices(query, {{"grad_context", grad_context},
                        {"grad_weights", grad_weights},
                        {"key", key},
                        {"value", value},
                        {"lengths", lengths},
                        {"mask", mask},
                        {"seed", seed},
                        {"context", context},
                        {"weights", weights},
                        {"log_sum_exp", log_sum_exp}});
  const int64_t values = check_dot_value(query, key, value);
  check_incoming(query, key, values, grad_context, grad_weights, context, weights, log_sum_exp);
  return with_type(query, [&](auto number) {
    using T = decltype(number);
    DotCall<T> call(query, key, value, lengths, mask, scale);
    call.drop(seed, dropout_p);
    const Incoming incoming(context, weights, log_sum_exp);
    const Optional grads = contiguous(values > 0 ? grad_context : Optional());
    Backward<T> g = incoming.template gradients_of<T>();
    g.value = rows_of<T>(call.value), g.grad_context = rows_of<T>(grads), g.grad_weights = rows_of<T>(grad_weights);
    launch_row_sums(call, g);
    return dot_gradients(call, g, query);
  });
}

}  // namespace
}  // namespace attnext::cuda
