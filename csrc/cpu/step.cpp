// The CPU operators of a step of additive attention that sees its past.
#include <tuple>

#include "cpu/step_setup.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

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
    write_sums(s, g, of_score_weight, of_filters, of_projection);
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
