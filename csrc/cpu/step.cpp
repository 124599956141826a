// The CPU operators of a step of additive attention that sees its past.
#include <tuple>

#include "cpu/score_weight.h"
#include "cpu/setup.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

// A matrix of numbers, with strides in elements.
struct Matrix {
  const Tensor& tensor;
  int64_t offset, rows, row, columns, column;
};

// As rows of T, padded with zeros.
template <class T>
void read(const Matrix& x, int64_t padded, T* out) {
  with_type(type_of(x.tensor), [&](auto stored) {
    const auto* data = static_cast<const decltype(stored)*>(x.tensor.data_ptr()) + x.offset;
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t k = 0; k < padded; ++k)
        out[i * padded + k] = k < x.columns ? T(data[i * x.row + k * x.column]) : T(0);
  });
}

// The sums of so many tasks, of size numbers each, added to those of the first in their order.
template <class T>
const T* added(T* sums, int64_t size, int64_t tasks) {
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[task * size + k];
  return sums;
}

// Padded rows of T, times a factor, as a matrix of a new tensor.
template <class T>
void write(const Matrix& x, const T* rows, int64_t padded, T factor = 1) {
  with_type(type_of(x.tensor), [&](auto stored) {
    auto* data = static_cast<decltype(stored)*>(x.tensor.data_ptr()) + x.offset;
    for (int64_t k = 0; k < x.columns; ++k)
      for (int64_t i = 0; i < x.rows; ++i)
        data[i * x.row + k * x.column] = rounded<decltype(stored)>(double(rows[i * padded + k] * factor));
  });
}

// What an operator is given beside the query.
struct StepInputs {
  const Tensor &key, &value, &score_weight;
  const Optional &filters, &projection, &past, &second_past, &previous, &transition, &lengths, &mask, &window, &seed;
  double scale, dropout_p;
  int64_t rule;
};

template <class T>
struct StepSetup : Setup<T> {
  StepSetup(const Tensor& query, const StepInputs& x)
      : Setup<T>(query, x.key, &x.value, x.lengths, x.mask, x.scale, kFeatureBlock) {
    STD_TORCH_CHECK(x.score_weight.dim() == 1, "attnext: score_weight of a step must have 1 dimension");
    STD_TORCH_CHECK(!x.mask || x.mask->dim() == 2, "attnext: mask of a step must have 2 dimensions");
    STD_TORCH_CHECK(x.rule >= 0 && x.rule <= int64_t(Rule::kForward), "attnext: there is no rule ", x.rule);
    take_score_weight<T>(*this, x.score_weight, query, x.scale);
    problem.v = problem.heads[0];
    this->set_dropout(x.dropout_p, x.seed);
    step.rule = Rule(x.rule);
    take_filters(query, x);
    take_projection(query, x.projection);
    take_past(query, x);
    step.problem = problem;
  }

  void take_filters(const Tensor& query, const StepInputs& x) {
    STD_TORCH_CHECK(x.filters.has_value() == x.past.has_value() && (x.past || !(x.second_past || x.projection)),
                    "attnext: filters, and what goes with them, need a past");
    if (!x.filters) return;
    const Tensor& filters = *x.filters;
    check_rank(filters, "filters", 3);
    step.channels = x.second_past ? 2 : 1, step.width = filters.size(2);
    step.filter_count = x.projection ? filters.size(0) : problem.features;
    check_shape(filters, "filters", {step.filter_count, step.channels, step.width});
    STD_TORCH_CHECK(step.width % 2 == 1, "attnext: filters must have an odd width, got ", step.width);
    check_dtype(filters, query);
    step.padded_filters = x.projection ? round_up(step.filter_count, kValueBlock) : problem.padded;
    step.padded_width = round_up(step.width, kValueBlock);
    T* by_place = scratch.template take<T>(step.channels * step.width * step.padded_filters);
    for (int64_t c = 0; c < step.channels; ++c)
      read({filters, c * filters.stride(1), step.width, filters.stride(2), step.filter_count, filters.stride(0)},
           step.padded_filters, by_place + c * step.width * step.padded_filters);
    step.filters = by_place;
  }

  void take_projection(const Tensor& query, const Optional& x) {
    if (!x) return;
    check_shape(*x, "projection", {problem.features, step.filter_count});
    check_dtype(*x, query);
    T* rows = scratch.template take<T>(step.filter_count * problem.padded);
    read({*x, 0, step.filter_count, x->stride(1), problem.features, x->stride(0)}, problem.padded, rows);
    step.projection = rows;
  }

  Rows take(const Optional& x, const char* name, const Shape& shape) {
    if (!x) return {};
    check_shape(*x, name, shape);
    STD_TORCH_CHECK(dtype_of(*x) == arithmetic_dtype<T>(), "attnext: ", name, " must be in the arithmetic's dtype");
    return rows_of(*x);
  }

  void take_past(const Tensor& query, const StepInputs& x) {
    const Shape slots = by_query(query, problem.keys);
    step.past[0] = take(x.past, "past", slots), step.past[1] = take(x.second_past, "second_past", slots);
    step.previous = take(x.previous, "previous", slots);
    step.transition = take(x.transition, "transition", by_query(query, 1));
    STD_TORCH_CHECK((step.rule == Rule::kForward) == x.previous.has_value(),
                    "attnext: forward attention needs previous, and nothing else takes it");
    STD_TORCH_CHECK(x.previous || !x.transition, "attnext: transition needs previous");
    if (!x.window) return;
    check_shape(*x.window, "window", by_query(query, 2));
    STD_TORCH_CHECK(x.window->scalar_type() == ScalarType::Long, "attnext: window must be int64");
    window = torch::stable::contiguous(*x.window);
    step.window = static_cast<const int64_t*>(window->data_ptr());
  }

  // Filters and L the other way round, as the backward pass multiplies by them.
  void transpose(const StepInputs& x) {
    if (x.projection) {
      T* rows = scratch.template take<T>(problem.padded * step.padded_filters);
      std::fill(rows + problem.features * step.padded_filters, rows + problem.padded * step.padded_filters, T(0));
      read({*x.projection, 0, problem.features, x.projection->stride(0), step.filter_count, x.projection->stride(1)},
           step.padded_filters, rows);
      step.projection_by_feature = rows;
    }
    if (step.width <= kFewPlaces) return;
    T* rows = scratch.template take<T>(step.channels * step.filter_count * step.padded_width);
    for (int64_t c = 0; c < step.channels; ++c)
      read({*x.filters, c * x.filters->stride(1), step.filter_count, x.filters->stride(0), step.width,
            x.filters->stride(2)},
           step.padded_width, rows + c * step.filter_count * step.padded_width);
    step.filters_by_count = rows;
  }

  // Multiply-adds, an exponential counted as a dozen.
  int64_t work() const {
    const int64_t features = step.channels * step.width * step.filter_count;
    const int64_t projected = step.projection ? step.filter_count * problem.padded : 0;
    return problem.batch * problem.queries * problem.keys *
           (features + projected + 12 * problem.padded + problem.padded_values);
  }

  Step<T> step{};
  Optional window;
  using Setup<T>::problem;
  using Setup<T>::scratch;
};

template <class T>
std::tuple<Tensor, Tensor> step_as(const Tensor& query, const StepInputs& x) {
  StepSetup<T> setup(query, x);
  const Problem<T>& p = setup.problem;
  Tensor context = empty(by_query(query, p.values), dtype_of(query));
  Tensor weights = empty(by_query(query, p.keys), arithmetic_dtype<T>());
  const StepForward<T> f{setup.step, rows_of(context), static_cast<T*>(weights.data_ptr())};
  parallel(p.batch * p.queries, setup.work(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(step_scratch(f.step));
    for (int64_t task = begin; task < end; ++task) kernels_of<T>().step(f, task, memory);
  });
  return {context, weights};
}

template <class T>
struct StepGradients {
  StepGradients(const Tensor& query, const StepInputs& inputs, const Optional& grad_context,
                const Optional& grad_weights, const Tensor& weights, const Tensor* sum_key)
      : setup(query, inputs), inputs(inputs) {
    setup.transpose(inputs);
    const Problem<T>& p = setup.problem;
    check_shape(weights, "weights", by_query(query, p.keys));
    STD_TORCH_CHECK(dtype_of(weights) == wide && weights.is_contiguous(),
                    "attnext: weights are not as the forward pass made them");
    if (grad_context) check_shape(*grad_context, "grad_context", by_query(query, p.values));
    g.step = setup.step, g.tasks = std::clamp<int64_t>(p.batch, 1, kBackwardTasks);
    g.weights = static_cast<const T*>(weights.data_ptr());
    g.grad_context = rows_of(grad_context);
    g.grad_weights = setup.take(grad_weights, "grad_weights", Shape(weights));
    g.grad_query = output(of_query, query);
    of_score_weight = empty(Shape(inputs.score_weight), dtype_of(query));
    of_filters = empty(inputs.filters ? Shape(*inputs.filters) : Shape{0}, dtype_of(query));
    of_projection = empty(inputs.projection ? Shape(*inputs.projection) : Shape{0}, dtype_of(query));
    g.grad_past[0] = output(of_past, inputs.past), g.grad_past[1] = output(of_second_past, inputs.second_past);
    g.grad_previous = output(of_previous, inputs.previous);
    g.grad_transition = output(of_transition, inputs.transition);
    g.adds = sum_key != nullptr;
    if (sum_key) {
      check_shape(*sum_key, "sum_key", Shape(inputs.key));
      STD_TORCH_CHECK(dtype_of(*sum_key) == wide && sum_key->is_contiguous(),
                      "attnext: sum_key must be contiguous, in the dtype of the arithmetic");
      g.grad_key = rows_of(*sum_key);
      if (inputs.dropout_p > 0.) kept = empty(Shape(weights), wide), g.kept = static_cast<T*>(kept.data_ptr());
    } else {
      g.grad_key = output(of_key, inputs.key), g.grad_value = output(of_value, inputs.value);
    }
  }

  Rows output(Tensor& gradient, const Optional& x) {
    gradient = empty(x ? Shape(*x) : Shape{0}, x ? dtype_of(*x) : dtype_of(inputs.key));
    return x ? rows_of(gradient) : Rows{};
  }

  void run() {
    const Step<T>& s = g.step;
    const Problem<T>& p = s.problem;
    const int64_t filters = s.channels * s.width * s.padded_filters;
    const int64_t projection = s.projection ? s.filter_count * p.padded : 0;
    g.grad_weight = setup.scratch.template take<T>(g.tasks * p.padded);
    g.grad_filters = setup.scratch.template take<T>(g.tasks * filters);
    g.grad_projection = setup.scratch.template take<T>(g.tasks * projection);
    parallel(g.tasks, 3 * setup.work(), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      T* memory = scratch.take<T>(step_backward_scratch(s));
      for (int64_t task = begin; task < end; ++task) kernels_of<T>().step_backward(g, task, memory);
    });
    write({of_score_weight, 0, 1, 0, p.features, 1}, added(g.grad_weight, p.padded, g.tasks), p.padded, p.scale);
    const T* of_places = added(g.grad_filters, filters, g.tasks);
    for (int64_t c = 0; c < s.channels; ++c)
      write({of_filters, c * s.width, s.width, 1, s.filter_count, s.channels * s.width},
            of_places + c * s.width * s.padded_filters, s.padded_filters);
    if (s.projection)
      write({of_projection, 0, s.filter_count, 1, p.features, s.filter_count},
            added(g.grad_projection, projection, g.tasks), p.padded);
  }

  StepSetup<T> setup;
  const StepInputs& inputs;
  StepBackward<T> g{};
  const int32_t wide = arithmetic_dtype<T>();
  Tensor of_query, of_key, of_value, of_score_weight, of_filters, of_projection, of_past, of_second_past, of_previous,
      of_transition;
  Tensor kept = empty({0}, wide);
};

template <class T>
StepResults step_backward_as(const Tensor& query, const StepInputs& x, const Optional& grad_context,
                             const Optional& grad_weights, const Tensor& weights) {
  StepGradients<T> g(query, x, grad_context, grad_weights, weights, nullptr);
  g.run();
  return {g.of_query,      g.of_key,  g.of_value,       g.of_score_weight, g.of_filters,
          g.of_projection, g.of_past, g.of_second_past, g.of_previous,     g.of_transition};
}

template <class T>
StepResultsInto step_backward_into_as(const Tensor& query, const StepInputs& x, const Optional& grad_context,
                                      const Optional& grad_weights, const Tensor& weights, const Tensor& sum_key) {
  StepGradients<T> g(query, x, grad_context, grad_weights, weights, &sum_key);
  g.run();
  return {g.of_query,       g.of_score_weight, g.of_filters,    g.of_projection, g.of_past,
          g.of_second_past, g.of_previous,     g.of_transition, g.kept};
}

}  // namespace

std::tuple<Tensor, Tensor> additive_step(Tensor query, Tensor key, Tensor value, Tensor score_weight, Optional filters,
                                         Optional projection, Optional past, Optional second_past, Optional previous,
                                         Optional transition, Optional lengths, Optional mask, Optional window,
                                         Optional seed, double scale, double dropout_p, int64_t rule) {
  const auto run = is_double(query) ? step_as<double> : step_as<float>;
  return run(query, {key, value, score_weight, filters, projection, past, second_past, previous, transition, lengths,
                     mask, window, seed, scale, dropout_p, rule});
}

StepResults additive_step_backward(Optional grad_context, Optional grad_weights, Tensor query, Tensor key, Tensor value,
                                   Tensor score_weight, Optional filters, Optional projection, Optional past,
                                   Optional second_past, Optional previous, Optional transition, Optional lengths,
                                   Optional mask, Optional window, Optional seed, double scale, double dropout_p,
                                   int64_t rule, Tensor weights) {
  const auto run = is_double(query) ? step_backward_as<double> : step_backward_as<float>;
  return run(query,
             {key, value, score_weight, filters, projection, past, second_past, previous, transition, lengths, mask,
              window, seed, scale, dropout_p, rule},
             grad_context, grad_weights, weights);
}

StepResultsInto additive_step_backward_into(Optional grad_context, Optional grad_weights, Tensor query, Tensor key,
                                            Tensor value, Tensor score_weight, Optional filters, Optional projection,
                                            Optional past, Optional second_past, Optional previous, Optional transition,
                                            Optional lengths, Optional mask, Optional window, Optional seed,
                                            double scale, double dropout_p, int64_t rule, Tensor weights,
                                            Tensor sum_key) {
  const auto run = is_double(query) ? step_backward_into_as<double> : step_backward_into_as<float>;
  return run(query,
             {key, value, score_weight, filters, projection, past, second_past, previous, transition, lengths, mask,
              window, seed, scale, dropout_p, rule},
             grad_context, grad_weights, weights, sum_key);
}

}  // namespace attnext::cpu
