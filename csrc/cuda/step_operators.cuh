// A step that sees its past: from tensors to launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "step.cuh"
#include "step_backward.cuh"
#include "step_gradients.cuh"
#include "tensors.cuh"

namespace attnext::cuda {
namespace {

// What an operator is given beside the query.
struct StepInputs {
  const Tensor &key, &value, &score_weight;
  const Optional &filters, &projection, &past, &second_past, &previous, &transition, &lengths, &mask, &window, &seed;
  double scale, dropout_p;
  int64_t rule;
};

// Checks the shape of something for each query, (B, Tq, n) or (B, n).
void check_step(const Optional& x, const char* name, const Tensor& query, int64_t n, ScalarType dtype) {
  if (!x) return;
  if (query.dim() == 2)
    check_tensor(*x, name, {query.size(0), n}, dtype);
  else
    check_tensor(*x, name, {query.size(0), query.size(1), n}, dtype);
}

void check_step_devices(const Tensor& query, const StepInputs& x, std::initializer_list<Named> others) {
  check_devices(query, {{"key", x.key},
                        {"value", x.value},
                        {"score_weight", x.score_weight},
                        {"filters", x.filters},
                        {"projection", x.projection},
                        {"past", x.past},
                        {"second_past", x.second_past},
                        {"previous", x.previous},
                        {"transition", x.transition},
                        {"lengths", x.lengths},
                        {"mask", x.mask},
                        {"window", x.window},
                        {"seed", x.seed}});
  check_devices(query, others);
}

// The inputs of a call, and the tensors that they live in.
template <class T>
struct StepCall : Call<T> {
  using Call<T>::problem, Call<T>::device;

  StepCall(const Tensor& query, const StepInputs& x)
      : Call<T>(query, x.key, x.lengths, x.mask, x.value.size(2)),
        score_weight(torch::stable::contiguous(x.score_weight)),
        filters(contiguous(x.filters)),
        projection(contiguous(x.projection)),
        window(contiguous(x.window)) {
    const ScalarType dtype = query.scalar_type();
    STD_TORCH_CHECK(x.rule >= 0 && x.rule <= int64_t(Rule::kForward), "attnext: there is no rule ", x.rule);
    STD_TORCH_CHECK(!x.mask || x.mask->dim() == 2, "attnext: mask of a step must have 2 dimensions");
    check_tensor(x.value, "value", {x.key.size(0), x.key.size(1), x.value.size(2)}, dtype);
    check_tensor(x.score_weight, "score_weight", {x.key.size(2)}, dtype);
    problem.query = rows_of<T>(query), problem.key = rows_of<T>(x.key), problem.scale = float(x.scale);
    this->drop(x.seed, x.dropout_p);
    step.rule = Rule(x.rule), step.value = rows_of<T>(x.value), step.score_weight = data_as<T>(score_weight);
    take_filters(query, x);
    take_slots(query, x);
    step.problem = problem;
  }

  void take_filters(const Tensor& query, const StepInputs& x) {
    STD_TORCH_CHECK(x.filters.has_value() == x.past.has_value() && (x.past || !(x.second_past || x.projection)),
                    "attnext: filters, and what goes with them, need a past");
    if (!x.filters) return;
    STD_TORCH_CHECK(x.filters->dim() == 3, "attnext: filters must have 3 dimensions");
    const int64_t count = x.projection ? x.filters->size(0) : problem.features, width = x.filters->size(2);
    const int channels = x.second_past ? 2 : 1;
    check_tensor(*x.filters, "filters", {count, channels, width}, query.scalar_type());
    STD_TORCH_CHECK(width % 2 == 1, "attnext: filters must have an odd width, got ", width);
    if (x.projection) check_tensor(*x.projection, "projection", {problem.features, count}, query.scalar_type());
    if (count == 0) return;  // as without any
    step.channels = channels, step.width = as_int(width, "the width of filters");
    step.filter_count = as_int(count, "the number of filters");
    step.filters = data_as<T>(*filters), step.projection = x.projection ? data_as<T>(*projection) : nullptr;
  }

  void take_slots(const Tensor& query, const StepInputs& x) {
    check_step(x.past, "past", query, problem.keys, ScalarType::Float);
    check_step(x.second_past, "second_past", query, problem.keys, ScalarType::Float);
    check_step(x.previous, "previous", query, problem.keys, ScalarType::Float);
    check_step(x.transition, "transition", query, 1, ScalarType::Float);
    check_step(x.window, "window", query, 2, ScalarType::Long);
    STD_TORCH_CHECK((step.rule == Rule::kForward) == x.previous.has_value(),
                    "attnext: forward attention needs previous, and nothing else takes it");
    STD_TORCH_CHECK(x.previous || !x.transition, "attnext: transition needs previous");
    step.past[0] = rows_of<float>(x.past), step.past[1] = rows_of<float>(x.second_past);
    step.previous = rows_of<float>(x.previous), step.transition = rows_of<float>(x.transition);
    step.window = window ? data_as<const int64_t>(*window) : nullptr;
  }

  Tensor slots(const Tensor& query) const { return floats(query, {problem.batch, problem.queries, problem.keys}); }

  Step<T> step = {};
  Tensor score_weight;
  Optional filters, projection, window;
};

// What a block may have without asking.
constexpr int kMostTile = TileStage::kWindow + kMaxFilters * (kStageRow + kKeyRow);
static_assert((kMostTile + GradientStage::kAlways + GradientStage::kSums) * sizeof(float) <= 48 << 10);

template <class T>
void launch_step_scores(const StepCall<T>& call, const Tensor& scores) {
  const Problem<T>& p = call.problem;
  const int64_t blocks = call.rows() * divide_up(p.keys, kTileKeys);
  if (blocks == 0) return;
  const int shared = TileStage::numbers(call.step) * int(sizeof(float));
  ATTNEXT_LAUNCH((step_scores<T>), grid_of(blocks), kThreads, shared, call.device.stream, call.step, data_of(scores));
  check_launch("step_scores", blocks);
}

template <class T>
std::tuple<Tensor, Tensor> step_as(const Tensor& query, const StepInputs& x) {
  const StepCall<T> call(query, x);
  const Problem<T>& p = call.problem;
  Tensor context = empty_by_query(query, p.values), scores = call.slots(query);
  Tensor weights = query.dim() == 2 ? floats(query, {p.batch, p.keys}) : call.slots(query);
  launch_step_scores(call, scores);
  if (call.rows() > 0) {
    const dim3 grid(grid_of(call.rows()), unsigned(std::max<int64_t>(1, divide_up(p.values, kContextColumns))));
    ATTNEXT_LAUNCH((step_context<T>), grid, kContextThreads, kContextShared, call.device.stream, call.step,
                   data_of(scores), data_of(weights), data_as<T>(context));
    check_launch("step_context", int64_t(grid.x) * grid.y);
  }
  return {context, weights};
}

using StepResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients, and what stands between the launches that make them.
template <class T>
struct StepGradients {
  StepGradients(const Tensor& query, const StepInputs& x, const Optional& grad_context, const Optional& grad_weights,
                const Tensor& weights)
      : call(query, x), query(query), weights(torch::stable::contiguous(weights)) {
    const Problem<T>& p = call.problem;
    check_step(weights, "weights", query, p.keys, ScalarType::Float);
    check_step(grad_context, "grad_context", query, p.values, query.scalar_type());
    check_step(grad_weights, "grad_weights", query, p.keys, ScalarType::Float);
    g.weights = data_of(this->weights);
    g.grad_context = rows_of<T>(p.values > 0 ? grad_context : Optional());
    g.grad_weights = rows_of<float>(grad_weights);
    g.query = output<T>(of_query, query), g.key = output<T>(of_key, x.key), g.value = output<T>(of_value, x.value);
    g.score_weight = output<T>(of_score_weight, x.score_weight);
    g.filters = output<T>(of_filters, x.filters), g.projection = output<T>(of_projection, x.projection);
    g.past[0] = output<float>(of_past, x.past), g.past[1] = output<float>(of_second_past, x.second_past);
    g.previous = output<float>(of_previous, x.previous), g.transition = output<float>(of_transition, x.transition);
  }

  template <class Number>
  Number* output(Tensor& gradient, const Optional& x) {
    gradient = x ? empty_as(*x) : torch::stable::new_empty(query, {0});
    return data_as<Number>(gradient);
  }

  // How rows and keys are shared: by enough programs to fill the device, but so that the parts of the queries' gradient
  // and those of the pasts' have about as many numbers as all gradients at most, and those of the model's twice that.
  void share() {
    const Problem<T>& p = call.problem;
    const int64_t features = p.features, filter_count = call.step.filter_count;
    const int64_t channels = call.step.channels, width = call.step.width;
    const int64_t by_row = p.keys * (features + p.values), by_query = p.queries * features;
    g.model_row = features + filter_count * channels * width + (call.step.projection ? features * filter_count : 0);
    const int64_t gradients = p.batch * (by_row + by_query) + g.model_row, rows_of_model = 2 * gradients / g.model_row;
    const int64_t tiles = divide_up(p.keys, kTileKeys), wanted = 4 * int64_t(call.device.multiprocessors);
    const int64_t splits = std::min({tiles, divide_up(wanted, p.batch), rows_of_model, 1 + by_row / by_query,
                                     1 + by_row / std::max<int64_t>(1, p.queries * channels * width)});
    g.keys_each = as_int(divide_up(tiles, splits) * kTileKeys, "Tk"), g.splits = int(divide_up(p.keys, g.keys_each));
    g.rows_each =
        int(std::min<int64_t>(p.batch, divide_up(int64_t(p.batch) * g.splits, std::min(wanted, rows_of_model))));
    g.programs = as_int(divide_up(p.batch, g.rows_each) * g.splits, "the number of blocks");
    g.past_row = g.keys_each + round_up(width, kPlaceUnit);
  }

  static void zero(std::initializer_list<Tensor*> gradients) {
    for (Tensor* x : gradients)
      if (x->numel() > 0) torch::stable::zero_(*x);
  }

  StepResults run() {
    if (call.rows() == 0 || call.problem.keys == 0)
      zero({&of_query, &of_key, &of_value, &of_score_weight, &of_filters, &of_projection, &of_past, &of_second_past,
            &of_previous, &of_transition});
    else
      launch();
    // What may be given without a part in the result.
    if (call.step.rule != Rule::kForward) zero({&of_previous, &of_transition});
    if (call.step.channels == 0) zero({&of_past, &of_second_past});
    return {of_query,      of_key,  of_value,       of_score_weight, of_filters,
            of_projection, of_past, of_second_past, of_previous,     of_transition};
  }

  void launch() {
    const Problem<T>& p = call.problem;
    const cudaStream_t stream = call.device.stream;
    const int64_t rows = call.rows(), slots = rows * p.keys;
    share();
    Tensor of_slots = floats(query, {3, slots}), scores = floats(query, {0});
    g.dp = data_of(of_slots), g.kept = g.dp + slots, g.ds = g.kept + slots;
    if (call.step.rule == Rule::kSigmoid) scores = call.slots(query), launch_step_scores(call, scores);
    g.scores = data_of(scores);
    const int64_t blocks = divide_up(p.batch * divide_up(p.keys, kValueKeys), kWarpsPerBlock);
    ATTNEXT_LAUNCH((step_value_gradients<T>), grid_of(blocks), kThreads, 0, stream, call.step, g);
    check_launch("step_value_gradients", blocks);
    ATTNEXT_LAUNCH((step_score_gradients<T>), grid_of(rows), kThreads, kWarpsPerBlock * int(sizeof(float)), stream,
                   call.step, g);
    check_launch("step_score_gradients", rows);
    launch_sums();
  }

  void launch_sums() {
    const Problem<T>& p = call.problem;
    const cudaStream_t stream = call.device.stream;
    const int64_t rows = call.rows(), channels = call.step.channels;
    const bool apart = sizeof(T) != sizeof(float) && p.queries > 1;
    Tensor key_sums = apart ? floats(query, {p.batch, p.keys, p.features}) : of_key;
    Tensor query_parts = floats(query, {g.splits, rows, p.features});
    Tensor past_parts = floats(query, {g.splits, rows, channels, g.past_row});
    Tensor model_parts = floats(query, {g.programs, g.model_row});
    g.key_sums = data_of(key_sums), g.query_parts = data_of(query_parts);
    g.past_parts = data_of(past_parts), g.model_parts = data_of(model_parts);
    const int shared = GradientStage::numbers(call.step) * int(sizeof(float));
    ATTNEXT_LAUNCH((step_input_gradients<T>), grid_of(g.programs), kThreads, shared, stream, call.step, g);
    check_launch("step_input_gradients", g.programs);
    const int64_t numbers = rows * p.features + g.model_row + channels * rows * p.keys;
    const int64_t blocks = divide_up(numbers, kWarp);
    ATTNEXT_LAUNCH((step_totals<T>), grid_of(blocks), kTotalThreads, kTotalThreads * int(sizeof(float)), stream,
                   call.step, g, numbers);
    check_launch("step_totals", blocks);
  }

  StepCall<T> call;
  const Tensor& query;
  Tensor weights;
  StepBackward<T> g = {};
  Tensor of_query, of_key, of_value, of_score_weight, of_filters, of_projection, of_past, of_second_past, of_previous,
      of_transition;
};

std::tuple<Tensor, Tensor> additive_step(Tensor query, Tensor key, Tensor value, Tensor score_weight, Optional filters,
                                         Optional projection, Optional past, Optional second_past, Optional previous,
                                         Optional transition, Optional lengths, Optional mask, Optional window,
                                         Optional seed, double scale, double dropout_p, int64_t rule) {
  const StepInputs inputs = {key,        value,   score_weight, filters, projection, past,  second_past, previous,
                             transition, lengths, mask,         window,  seed,       scale, dropout_p,   rule};
  check_step_devices(query, inputs, {});
  return with_type(query, [&](auto number) { return step_as<decltype(number)>(query, inputs); });
}

StepResults additive_step_backward(Optional grad_context, Optional grad_weights, Tensor query, Tensor key, Tensor value,
                                   Tensor score_weight, Optional filters, Optional projection, Optional past,
                                   Optional second_past, Optional previous, Optional transition, Optional lengths,
                                   Optional mask, Optional window, Optional seed, double scale, double dropout_p,
                                   int64_t rule, Tensor weights) {
  const StepInputs inputs = {key,        value,   score_weight, filters, projection, past,  second_past, previous,
                             transition, lengths, mask,         window,  seed,       scale, dropout_p,   rule};
  check_step_devices(query, inputs,
                     {{"grad_context", grad_context}, {"grad_weights", grad_weights}, {"weights", weights}});
  return with_type(query, [&](auto number) {
    return StepGradients<decltype(number)>(query, inputs, grad_context, grad_weights, weights).run();
  });
}

}  // namespace
}  // namespace attnext::cuda
