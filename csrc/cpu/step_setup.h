// A problem of a step of additive attention that sees its past.
#pragma once

#include "cpu/additive.h"

namespace attnext::cpu {

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

// What the tasks of a backward pass have added up, as gradients of score weight, filters and projection.
template <class T>
void write_sums(const Step<T>& s, const StepBackward<T>& g, const Tensor& score_weight, const Tensor& filters,
                const Tensor& projection) {
  const Problem<T>& p = s.problem;
  const int64_t row = s.padded_filters, places = s.channels * s.width * row;
  write({score_weight, 0, 1, 0, p.features, 1}, added(g.grad_weight, p.padded, g.tasks), p.padded, p.scale);
  const T* of_places = added(g.grad_filters, places, g.tasks);
  for (int64_t c = 0; c < s.channels; ++c)
    write({filters, c * s.width, s.width, 1, s.filter_count, s.channels * s.width}, of_places + c * s.width * row, row);
  if (s.projection)
    write({projection, 0, s.filter_count, 1, p.features, s.filter_count},
          added(g.grad_projection, s.filter_count * p.padded, g.tasks), p.padded);
}

}  // namespace attnext::cpu
