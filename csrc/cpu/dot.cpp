// The CPU operators of attention by dot products. Keys that are the values come as no value.
#include <tuple>

#include "cpu/setup.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

template <class T>
WideAttention attention_as(const Tensor& query, const Tensor& key, const Optional& value, const Optional& lengths,
                           const Optional& mask, const Optional& seed, double scale, double dropout_p,
                           bool need_weights, bool need_wide) {
  DotSetup<T> setup(query, key, value, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  return attend(setup, query, need_weights, need_wide, kernels_of<T>().dot_forward);
}

template <class T>
Attention query_backward_as(const Optional& grad_context, const Optional& grad_weights, const Tensor& query,
                            const Tensor& key, const Optional& value, const Optional& lengths, const Optional& mask,
                            const Optional& seed, double scale, double dropout_p, const Tensor& weights) {
  DotSetup<T> setup(query, key, value, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  return query_gradients(setup, query, grad_context, grad_weights, weights, kernels_of<T>().dot_query_backward);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> attention_backward_as(const Outputs& outputs, const Tensor& query, const Tensor& key,
                                                         const Optional& value, const Optional& lengths,
                                                         const Optional& mask, const Optional& seed, double scale,
                                                         double dropout_p) {
  DotSetup<T> setup(query, key, value, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  Gradients<T> gradients(setup, query, key, value ? &*value : nullptr);
  gradients.take(query, outputs);
  const Problem<T>& p = setup.problem;
  T* scaled = setup.scratch.template take<T>(gradients.rows() * row_of(p.padded));
  T* gain = setup.scratch.template take<T>(p.padded);
  std::fill(gain, gain + p.padded, p.scale);
  const auto& kernels = kernels_of<T>();
  parallel(gradients.rows(), gradients.rows() * p.padded,
           [&](int64_t begin, int64_t end) { kernels.dot_queries(p, begin, end, scaled); });
  const ScoreWeight<T> one{nullptr, gain};
  gradients.g.problem.heads = &one, gradients.g.problem.head_count = 1;
  gradients.g.query = scaled;
  gradients.run(kernels.dot_backward);
  return {gradients.grad_query, gradients.grad_key, gradients.grad_value};
}

}  // namespace

Attention dot_attention(Tensor query, Tensor key, Optional value, Optional lengths, Optional mask, Optional seed,
                        double scale, double dropout_p, bool need_weights) {
  const auto run = is_double(query) ? attention_as<double> : attention_as<float>;
  auto [context, weights, log_sum_exp, wide] =
      run(query, key, value, lengths, mask, seed, scale, dropout_p, need_weights, false);
  return {context, weights, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor> dot_attention_backward(Optional grad_context, Optional grad_weights, Tensor query,
                                                          Tensor key, Optional value, Optional lengths, Optional mask,
                                                          Optional seed, double scale, double dropout_p, Tensor context,
                                                          Tensor weights, Tensor log_sum_exp) {
  const auto run = is_double(query) ? attention_backward_as<double> : attention_backward_as<float>;
  return run({grad_context, grad_weights, context, weights, log_sum_exp}, query, key, value, lengths, mask, seed, scale,
             dropout_p);
}

WideAttention dot_attention_wide(Tensor query, Tensor key, Optional value, Optional lengths, Optional mask,
                                 Optional seed, double scale, double dropout_p, bool need_weights) {
  const auto run = is_double(query) ? attention_as<double> : attention_as<float>;
  return run(query, key, value, lengths, mask, seed, scale, dropout_p, need_weights, true);
}

Attention dot_attention_backward_query(Optional grad_context, Optional grad_weights, Tensor query, Tensor key,
                                       Optional value, Optional lengths, Optional mask, Optional seed, double scale,
                                       double dropout_p, Tensor weights) {
  const auto run = is_double(query) ? query_backward_as<double> : query_backward_as<float>;
  return run(grad_context, grad_weights, query, key, value, lengths, mask, seed, scale, dropout_p, weights);
}

}  // namespace attnext::cpu
