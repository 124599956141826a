// What the calls of all scores have in common: a problem made of tensors, the results of a forward pass, and the
// bookkeeping of a backward pass.
#pragma once

#include <tuple>

#include "cpu/tensors.h"

namespace attnext::cpu {

// Before anything is read: query, key and value fit together.
inline void check_inputs(const Tensor& query, const Tensor& key, const Tensor* value) {
  check_rank(key, "key", 3);
  const int64_t batch = key.size(0), keys = key.size(1);
  STD_TORCH_CHECK(query.dim() == 2 || query.dim() == 3, "attnext: query has ", query.dim(),
                  " dimensions, needs 2 or 3");
  STD_TORCH_CHECK(query.size(0) == batch, "attnext: query has batch size ", query.size(0), ", key ", batch);
  check_shape(query, "query", by_query(query, key.size(2)));
  check_shape(key, "key", {batch, keys, key.size(2)});
  check_memory(key, "key", query);
  if (!value) return;
  check_rank(*value, "value", 3);
  check_shape(*value, "value", {batch, keys, value->size(2)});
  check_memory(*value, "value", query);
}

template <class T>
struct Setup {
  Setup(const Tensor& query, const Tensor& key, const Tensor* value, const Optional& lengths, const Optional& mask,
        double scale, int64_t feature_block) {
    check_inputs(query, key, value);
    problem.batch = key.size(0), problem.queries = query.dim() == 2 ? 1 : query.size(1), problem.keys = key.size(1);
    problem.features = key.size(2), problem.padded = round_up(problem.features, feature_block);
    problem.values = value ? value->size(2) : 0;
    problem.padded_values = round_up(problem.values, kValueBlock);
    problem.query = rows_of(query), problem.key = rows_of(key);
    if (value) problem.value = rows_of(*value);
    problem.scale = T(scale);
    problem.lengths = lengths_of(lengths, problem.batch, problem.keys, contiguous_lengths);
    problem.mask = mask_of(mask, problem.batch, problem.queries, problem.keys);
    problem.keep_scale = 1;
  }

  void set_dropout(double dropout_p, const Optional& seed) {
    STD_TORCH_CHECK(dropout_p >= 0. && dropout_p <= 1., "attnext: dropout_p must be between 0 and 1, got ", dropout_p);
    if (dropout_p == 0.) return;
    STD_TORCH_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "attnext: dropout needs a seed, one int64 on the CPU");
    problem.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    problem.keep_threshold = uint64_t(dropout_p * 0x1p32);
    problem.keep_scale = dropout_p < 1. ? T(1. / (1. - dropout_p)) : T(0);
  }

  int64_t query_tasks() const { return problem.batch * ((problem.queries + kQueryBlock - 1) / kQueryBlock); }
  int64_t elements() const {
    return problem.batch * problem.queries * problem.keys * (problem.padded + problem.padded_values);
  }

  Scratch scratch;
  Problem<T> problem{};
  Optional contiguous_lengths;
};

// Of dot products; keys that are the values come as no value.
template <class T>
struct DotSetup : Setup<T> {
  DotSetup(const Tensor& query, const Tensor& key, const Optional& value, const Optional& lengths, const Optional& mask,
           double scale)
      : Setup<T>(query, key, value ? &*value : &key, lengths, mask, scale, kValueBlock) {
    this->problem.shared = !value;
  }
};

using Attention = std::tuple<Tensor, Tensor, Tensor>;  // context, weights, log_sum_exp
using WideAttention = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Runs a forward kernel over the blocks of queries. The last result, where it is asked for, are the weights before
// dropout in the arithmetic's dtype.
template <class T>
WideAttention attend(const Setup<T>& setup, const Tensor& query, bool need_weights, bool need_wide,
                     void (*forward)(const Forward<T>&, int64_t task, T* scratch)) {
  const Problem<T>& p = setup.problem;
  const int32_t dtype = dtype_of(query);
  Tensor context = empty(by_query(query, p.values), dtype);
  Tensor weights = empty(need_weights ? by_query(query, p.keys) : Shape{0}, dtype);
  Tensor log_sum_exp = empty({p.batch, p.queries}, arithmetic_dtype<T>()), wide;
  if (need_wide) wide = empty(by_query(query, p.keys), arithmetic_dtype<T>());
  const Forward<T> f{p, rows_of(context), need_weights ? rows_of(weights) : Rows{},
                     need_wide ? static_cast<T*>(wide.data_ptr()) : nullptr, static_cast<T*>(log_sum_exp.data_ptr())};
  parallel(setup.query_tasks(), setup.elements(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(forward_scratch(p, need_weights || need_wide));
    for (int64_t task = begin; task < end; ++task) forward(f, task, memory);
  });
  return {context, weights, log_sum_exp, wide};
}

// The outputs of a forward pass and what comes in for them.
struct Outputs {
  const Optional &grad_context, &grad_weights;
  const Tensor &context, &weights, &log_sum_exp;
};

// The backward pass of any score: its tasks, the gradients of the inputs, and partial sums for the queries.
template <class T>
struct Gradients {
  Gradients(Setup<T>& setup, const Tensor& query, const Tensor& key, const Tensor* value)
      : setup(setup),
        grad_query(empty(Shape(query), dtype_of(query))),
        grad_key(empty(Shape(key), dtype_of(key))),
        grad_value(empty(value ? Shape(*value) : Shape{0}, dtype_of(value ? *value : query))) {
    const Problem<T>& p = setup.problem;
    g.problem = p;
    // Few batch rows are split by keys, each part with its own sums for the queries, as long as those stay small beside
    // the gradients themselves.
    const int64_t batch = std::max<int64_t>(p.batch, 1), queries = std::max<int64_t>(p.queries, 1);
    const int64_t wanted = std::min((kBackwardTasks + batch - 1) / batch, 4 * (queries + p.keys) / queries);
    const int64_t tiles = std::max<int64_t>(1, (p.keys + kGradKeyTile - 1) / kGradKeyTile);
    const int64_t tiles_each = (tiles + wanted - 1) / wanted;
    g.split_keys = tiles_each * kGradKeyTile;
    g.splits = (tiles + tiles_each - 1) / tiles_each;
    g.from_scores = true;
    g.grad_key = rows_of(grad_key);
    if (value) g.grad_value = rows_of(grad_value);
  }

  // What comes in for context and weights, as the kernels take it.
  void take(const Tensor& query, const Outputs& outputs) {
    const Problem<T>& p = g.problem;
    check_shape(outputs.context, "context", by_query(query, p.values));
    check_shape(outputs.log_sum_exp, "log_sum_exp", {p.batch, p.queries});
    STD_TORCH_CHECK(dtype_of(outputs.log_sum_exp) == arithmetic_dtype<T>() && outputs.log_sum_exp.is_contiguous(),
                    "attnext: log_sum_exp is not as the forward pass made it");
    if (outputs.grad_context) check_shape(*outputs.grad_context, "grad_context", by_query(query, p.values));
    if (outputs.grad_weights) {
      check_shape(*outputs.grad_weights, "grad_weights", by_query(query, p.keys));
      check_shape(outputs.weights, "weights", by_query(query, p.keys));
    }
    T* padded_grad = setup.scratch.template take<T>(rows() * row_of(p.padded_values));
    T* delta = setup.scratch.template take<T>(rows());
    g.from_scores = false;
    g.grad_weights = rows_of(outputs.grad_weights);
    g.grad_context = outputs.grad_context ? padded_grad : nullptr, g.delta = delta;
    g.log_sum_exp = static_cast<const T*>(outputs.log_sum_exp.data_ptr());
    const Rows context = rows_of(outputs.context), grad_context = rows_of(outputs.grad_context);
    const Rows weights = outputs.grad_weights ? rows_of(outputs.weights) : Rows{};
    const auto& kernels = kernels_of<T>();
    parallel(rows(), rows() * p.padded_values, [&](int64_t begin, int64_t end) {
      kernels.delta(g, context, grad_context, weights, padded_grad, delta, begin, end);
    });
  }

  void run(void (*backward)(const Backward<T>&, int64_t task, T* scratch)) {
    const Problem<T>& p = g.problem;
    const auto& kernels = kernels_of<T>();
    g.grad_query = setup.scratch.template take<T>(g.splits * rows() * row_of(p.padded));
    parallel(p.batch * g.splits, 3 * setup.elements(), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      T* memory = scratch.take<T>(backward_scratch(p));
      for (int64_t task = begin; task < end; ++task) backward(g, task, memory);
    });
    const Rows out = rows_of(grad_query);
    parallel(rows(), rows() * p.padded * g.splits, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      kernels.finish_query(g, out, scratch.take<T>(p.padded), begin, end);
    });
  }

  int64_t rows() const { return g.problem.batch * g.problem.queries; }

  Setup<T>& setup;
  Backward<T> g{};
  Tensor grad_query, grad_key, grad_value;
};

// The gradients of queries and of their scores alone, (B, Tq, Tk) in the arithmetic's dtype, and what the values take
// of each context. The gradients of keys and values are of those of many steps, and are made at the end of all.
template <class T>
Attention query_gradients(const Setup<T>& setup, const Tensor& query, const Optional& grad_context,
                          const Optional& grad_weights, const Tensor& wide,
                          void (*backward)(const StepBackward<T>&, int64_t task, T* scratch)) {
  const Problem<T>& p = setup.problem;
  const Shape slots = by_query(query, p.keys);
  const int32_t dtype = arithmetic_dtype<T>();
  check_shape(wide, "wide", slots);
  STD_TORCH_CHECK(dtype_of(wide) == dtype && wide.is_contiguous(), "attnext: wide is not as the forward pass made it");
  if (grad_context) check_shape(*grad_context, "grad_context", by_query(query, p.values));
  if (grad_weights) check_shape(*grad_weights, "grad_weights", slots);
  Tensor grad_query = empty(Shape(query), dtype_of(query)), ds = empty(slots, dtype), kept = empty(slots, dtype);
  StepBackward<T> g{};
  g.step.problem = p;
  g.weights = static_cast<const T*>(wide.data_ptr()), g.drops_weights = true;
  g.grad_context = rows_of(grad_context), g.grad_weights = rows_of(grad_weights), g.grad_query = rows_of(grad_query);
  g.ds = static_cast<T*>(ds.data_ptr()), g.kept = static_cast<T*>(kept.data_ptr());
  parallel(p.batch * p.queries, 2 * setup.elements(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(query_backward_scratch(g.step));
    for (int64_t task = begin; task < end; ++task) backward(g, task, memory);
  });
  return {grad_query, ds, kept};
}

inline bool is_double(const Tensor& x) { return dtype_of(x) == kDoubleDtype; }

}  // namespace attnext::cpu
