// The CPU operators of additive attention.
#include <tuple>

#include "cpu/additive.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

template <class T>
std::tuple<Tensor, Tensor> prepare_as(const Tensor& key, const Optional& lengths, const Optional& mask) {
  check_rank(key, "key", 3);
  const int64_t batch = key.size(0), keys = key.size(1), features = key.size(2),
                padded = round_up(features, kFeatureBlock);
  Tensor exp_key = empty({batch, keys, padded}, arithmetic_dtype<T>());
  Tensor limit = empty({batch, keys}, arithmetic_dtype<T>());
  Optional kept;
  STD_TORCH_CHECK(!mask || mask->dim() == 2, "attnext: mask must have 2 dimensions");
  exponentials<T>(rows_of(key), batch, keys, features, padded, lengths_of(lengths, batch, keys, kept),
                  mask_of(mask, batch, 1, keys), static_cast<T*>(exp_key.data_ptr()), padded,
                  static_cast<T*>(limit.data_ptr()));
  return {exp_key, limit};
}

template <class T>
WideAttention attention_as(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
                           const Optional& exp_key, const Optional& key_limit, const Optional& lengths,
                           const Optional& mask, const Optional& seed, double scale, double dropout_p,
                           bool need_weights, bool need_wide) {
  AdditiveSetup<T> setup(query, key, &value, score_weight, exp_key, key_limit, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  return attend(setup, query, need_weights, need_wide, kernels_of<T>().forward);
}

template <class T>
Tensor scores_as(const Tensor& query, const Tensor& key, const Tensor& score_weight, const Optional& lengths,
                 const Optional& mask, double scale) {
  const bool one = query.dim() == 2 || query.size(1) == 1;
  AdditiveSetup<T> setup(query, key, nullptr, score_weight, {}, {}, lengths, mask, scale, /*makes_exponentials=*/!one);
  const Problem<T>& p = setup.problem;
  Tensor result = empty(by_query(query, p.keys), dtype_of(query));
  const Scores<T> s{p, rows_of(result)};
  const auto kernel = one ? kernels_of<T>().query_scores : kernels_of<T>().scores;
  parallel(setup.query_tasks(), setup.elements(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(one ? step_scratch(Step<T>{p}) : forward_scratch(p, false));
    for (int64_t task = begin; task < end; ++task) kernel(s, task, memory);
  });
  return result;
}

// The backward pass of attention and of scores: E of the queries, and the gradient of the score weight.
template <class T>
struct AdditiveGradients : Gradients<T> {
  AdditiveGradients(AdditiveSetup<T>& setup, const Tensor& query, const Tensor& key, const Tensor* value,
                    const Tensor& score_weight)
      : Gradients<T>(setup, query, key, value), grad_weight(empty(Shape(score_weight), dtype_of(score_weight))) {
    const Problem<T>& p = setup.problem;
    T* exp_query = setup.scratch.template take<T>((p.batch * p.queries + 1) * row_of(p.padded));
    T* query_limit = setup.scratch.template take<T>(p.batch * p.queries);
    exponentials<T>(p.query, p.batch, p.queries, p.features, p.padded, nullptr, {}, exp_query, row_of(p.padded),
                    query_limit);
    g.query = exp_query, g.query_limit = query_limit;
  }

  void run() {
    g.grad_weight = this->setup.scratch.template take<T>(g.problem.batch * g.splits * g.problem.padded);
    Gradients<T>::run(kernels_of<T>().backward);
    finish_weight();
  }

  // Adds the tasks' sums in their order, those of the rows that share a score weight.
  void finish_weight() {
    const Problem<T>& p = g.problem;
    with_type(type_of(grad_weight), [&](auto stored) {
      auto* result = static_cast<decltype(stored)*>(grad_weight.data_ptr());
      for (int64_t h = 0; h < p.head_count; ++h)
        for (int64_t d = 0; d < p.features; ++d) {
          double sum = 0;
          for (int64_t b = h; b < p.batch; b += p.head_count)
            for (int64_t split = 0; split < g.splits; ++split)
              sum += double(g.grad_weight[(b * g.splits + split) * p.padded + d]);
          result[h * p.features + d] = rounded<decltype(stored)>(sum * double(p.scale));
        }
    });
  }

  using Gradients<T>::g;
  Tensor grad_weight;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_as(const Outputs& outputs, const Tensor& query,
                                                                 const Tensor& key, const Tensor& value,
                                                                 const Tensor& score_weight, const Optional& exp_key,
                                                                 const Optional& key_limit, const Optional& lengths,
                                                                 const Optional& mask, const Optional& seed,
                                                                 double scale, double dropout_p) {
  AdditiveSetup<T> setup(query, key, &value, score_weight, exp_key, key_limit, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  AdditiveGradients<T> gradients(setup, query, key, &value, score_weight);
  gradients.take(query, outputs);
  gradients.run();
  return {gradients.grad_query, gradients.grad_key, gradients.grad_value, gradients.grad_weight};
}

template <class T>
Attention query_backward_as(const Optional& grad_context, const Optional& grad_weights, const Tensor& query,
                            const Tensor& key, const Tensor& value, const Tensor& score_weight, const Optional& exp_key,
                            const Optional& key_limit, const Optional& lengths, const Optional& mask,
                            const Optional& seed, double scale, double dropout_p, const Tensor& weights) {
  AdditiveSetup<T> setup(query, key, &value, score_weight, exp_key, key_limit, lengths, mask, scale,
                         /*makes_exponentials=*/false);
  setup.set_dropout(dropout_p, seed);
  return query_gradients(setup, query, grad_context, grad_weights, weights, kernels_of<T>().query_backward);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> scores_backward_as(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& score_weight, const Optional& lengths,
                                                      const Optional& mask, double scale) {
  AdditiveSetup<T> setup(query, key, nullptr, score_weight, {}, {}, lengths, mask, scale);
  check_shape(grad, "grad", by_query(query, setup.problem.keys));
  AdditiveGradients<T> gradients(setup, query, key, nullptr, score_weight);
  gradients.g.grad_weights = rows_of(grad);
  gradients.run();
  return {gradients.grad_query, gradients.grad_key, gradients.grad_weight};
}

}  // namespace

std::tuple<Tensor, Tensor> additive_prepare(Tensor key, Optional lengths, Optional mask) {
  return is_double(key) ? prepare_as<double>(key, lengths, mask) : prepare_as<float>(key, lengths, mask);
}

std::tuple<Tensor, Tensor, Tensor> additive_attention(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                                      Optional exp_key, Optional key_limit, Optional lengths,
                                                      Optional mask, Optional seed, double scale, double dropout_p,
                                                      bool need_weights) {
  const auto run = is_double(query) ? attention_as<double> : attention_as<float>;
  auto [context, weights, log_sum_exp, wide] = run(query, key, value, score_weight, exp_key, key_limit, lengths, mask,
                                                   seed, scale, dropout_p, need_weights, false);
  return {context, weights, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Optional grad_context, Optional grad_weights, Tensor query, Tensor key, Tensor value, Tensor score_weight,
    Optional exp_key, Optional key_limit, Optional lengths, Optional mask, Optional seed, double scale,
    double dropout_p, Tensor context, Tensor weights, Tensor log_sum_exp) {
  const auto run = is_double(query) ? attention_backward_as<double> : attention_backward_as<float>;
  return run({grad_context, grad_weights, context, weights, log_sum_exp}, query, key, value, score_weight, exp_key,
             key_limit, lengths, mask, seed, scale, dropout_p);
}

WideAttention additive_attention_wide(Tensor query, Tensor key, Tensor value, Tensor score_weight, Optional exp_key,
                                      Optional key_limit, Optional lengths, Optional mask, Optional seed, double scale,
                                      double dropout_p, bool need_weights) {
  const auto run = is_double(query) ? attention_as<double> : attention_as<float>;
  return run(query, key, value, score_weight, exp_key, key_limit, lengths, mask, seed, scale, dropout_p, need_weights,
             true);
}

Attention additive_attention_backward_query(Optional grad_context, Optional grad_weights, Tensor query, Tensor key,
                                            Tensor value, Tensor score_weight, Optional exp_key, Optional key_limit,
                                            Optional lengths, Optional mask, Optional seed, double scale,
                                            double dropout_p, Tensor weights) {
  const auto run = is_double(query) ? query_backward_as<double> : query_backward_as<float>;
  return run(grad_context, grad_weights, query, key, value, score_weight, exp_key, key_limit, lengths, mask, seed,
             scale, dropout_p, weights);
}

Tensor additive_scores(Tensor query, Tensor key, Tensor score_weight, Optional lengths, Optional mask, double scale) {
  const auto run = is_double(query) ? scores_as<double> : scores_as<float>;
  return run(query, key, score_weight, lengths, mask, scale);
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor key, Tensor score_weight,
                                                            Optional lengths, Optional mask, double scale) {
  const auto run = is_double(query) ? scores_backward_as<double> : scores_backward_as<float>;
  return run(grad, query, key, score_weight, lengths, mask, scale);
}

}  // namespace attnext::cpu
