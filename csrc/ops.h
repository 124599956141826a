// The CPU operators; their schemas stand in attnext/ops.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace attnext::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> additive_prepare(Tensor key, std::optional<Tensor> lengths, std::optional<Tensor> mask);

std::tuple<Tensor, Tensor, Tensor> additive_attention(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                                      std::optional<Tensor> exp_key, std::optional<Tensor> key_limit,
                                                      std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                                      std::optional<Tensor> seed, double scale, double dropout_p,
                                                      bool need_weights);

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_weights, Tensor query, Tensor key, Tensor value,
    Tensor score_weight, std::optional<Tensor> exp_key, std::optional<Tensor> key_limit, std::optional<Tensor> lengths,
    std::optional<Tensor> mask, std::optional<Tensor> seed, double scale, double dropout_p, Tensor context,
    Tensor weights, Tensor log_sum_exp);

// For the steps of one memory: also weights in the dtype of the arithmetic, before dropout; then the gradients of the
// query and the scores alone, and what the values take of each context.
std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_wide(
    Tensor query, Tensor key, Tensor value, Tensor score_weight, std::optional<Tensor> exp_key,
    std::optional<Tensor> key_limit, std::optional<Tensor> lengths, std::optional<Tensor> mask,
    std::optional<Tensor> seed, double scale, double dropout_p, bool need_weights);

std::tuple<Tensor, Tensor, Tensor> additive_attention_backward_query(
    std::optional<Tensor> grad_context, std::optional<Tensor> grad_weights, Tensor query, Tensor key, Tensor value,
    Tensor score_weight, std::optional<Tensor> exp_key, std::optional<Tensor> key_limit, std::optional<Tensor> lengths,
    std::optional<Tensor> mask, std::optional<Tensor> seed, double scale, double dropout_p, Tensor weights);

Tensor additive_scores(Tensor query, Tensor key, Tensor score_weight, std::optional<Tensor> lengths,
                       std::optional<Tensor> mask, double scale);

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor key, Tensor score_weight,
                                                            std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                                            double scale);

std::tuple<Tensor, Tensor, Tensor> dot_attention(Tensor query, Tensor key, std::optional<Tensor> value,
                                                 std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                                 std::optional<Tensor> seed, double scale, double dropout_p,
                                                 bool need_weights);

std::tuple<Tensor, Tensor, Tensor> dot_attention_backward(std::optional<Tensor> grad_context,
                                                          std::optional<Tensor> grad_weights, Tensor query, Tensor key,
                                                          std::optional<Tensor> value, std::optional<Tensor> lengths,
                                                          std::optional<Tensor> mask, std::optional<Tensor> seed,
                                                          double scale, double dropout_p, Tensor context,
                                                          Tensor weights, Tensor log_sum_exp);

std::tuple<Tensor, Tensor, Tensor, Tensor> dot_attention_wide(Tensor query, Tensor key, std::optional<Tensor> value,
                                                              std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                                              std::optional<Tensor> seed, double scale,
                                                              double dropout_p, bool need_weights);

std::tuple<Tensor, Tensor, Tensor> dot_attention_backward_query(std::optional<Tensor> grad_context,
                                                                std::optional<Tensor> grad_weights, Tensor query,
                                                                Tensor key, std::optional<Tensor> value,
                                                                std::optional<Tensor> lengths,
                                                                std::optional<Tensor> mask, std::optional<Tensor> seed,
                                                                double scale, double dropout_p, Tensor weights);

// A step that sees its past. Gradients are in the order of the tensors; of what isn't there they have no elements.
using StepResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// The same without those of key, which is added to a sum, and value, of which the last result says what each context
// took: without dropout the weights, and then it has no elements.
using StepResultsInto = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> additive_step(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                         std::optional<Tensor> filters, std::optional<Tensor> projection,
                                         std::optional<Tensor> past, std::optional<Tensor> second_past,
                                         std::optional<Tensor> previous, std::optional<Tensor> transition,
                                         std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                         std::optional<Tensor> window, std::optional<Tensor> seed, double scale,
                                         double dropout_p, int64_t rule);

StepResults additive_step_backward(std::optional<Tensor> grad_context, std::optional<Tensor> grad_weights, Tensor query,
                                   Tensor key, Tensor value, Tensor score_weight, std::optional<Tensor> filters,
                                   std::optional<Tensor> projection, std::optional<Tensor> past,
                                   std::optional<Tensor> second_past, std::optional<Tensor> previous,
                                   std::optional<Tensor> transition, std::optional<Tensor> lengths,
                                   std::optional<Tensor> mask, std::optional<Tensor> window, std::optional<Tensor> seed,
                                   double scale, double dropout_p, int64_t rule, Tensor weights);

StepResultsInto additive_step_backward_into(std::optional<Tensor> grad_context, std::optional<Tensor> grad_weights,
                                            Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                            std::optional<Tensor> filters, std::optional<Tensor> projection,
                                            std::optional<Tensor> past, std::optional<Tensor> second_past,
                                            std::optional<Tensor> previous, std::optional<Tensor> transition,
                                            std::optional<Tensor> lengths, std::optional<Tensor> mask,
                                            std::optional<Tensor> window, std::optional<Tensor> seed, double scale,
                                            double dropout_p, int64_t rule, Tensor weights, Tensor sum_key);

// A layer of gated units, or of LSTM units where there is a cell; `half` rounds products over all steps, and their
// factors, to bfloat16. Output, last hidden states and cells, and what the backward pass needs: the gates of each
// direction, and the inner states.
using LayerResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// The gradients of x, of the first hidden states and cells, and of the parameters; those that are not wanted are empty.
using LayerBackward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LayerResults recurrent_layer(Tensor x, Tensor hidden, std::optional<Tensor> cell, Tensor batch_sizes, Tensor w_input,
                             Tensor w_hidden, std::optional<Tensor> b_input, std::optional<Tensor> b_hidden,
                             std::optional<Tensor> reverse_w_input, std::optional<Tensor> reverse_w_hidden,
                             std::optional<Tensor> reverse_b_input, std::optional<Tensor> reverse_b_hidden, bool half,
                             bool keep);

LayerBackward recurrent_layer_backward(std::optional<Tensor> grad_output, std::optional<Tensor> grad_hidden,
                                       std::optional<Tensor> grad_cell, Tensor x, Tensor hidden,
                                       std::optional<Tensor> cell, Tensor batch_sizes, Tensor w_input, Tensor w_hidden,
                                       std::optional<Tensor> b_input, std::optional<Tensor> b_hidden,
                                       std::optional<Tensor> reverse_w_input, std::optional<Tensor> reverse_w_hidden,
                                       std::optional<Tensor> reverse_b_input, std::optional<Tensor> reverse_b_hidden,
                                       bool half, Tensor gates, Tensor reverse_gates, Tensor inner, int64_t wanted);

// A decoder: recurrent layers that attend a memory at every step; arguments and results are told in
// attnext/recurrent/_operators.py. `gates` and `feeds` are what the inputs add, and become what the backward pass
// needs.
using Tensors = std::vector<Tensor>;

Tensors attentive_decoder(Tensor gates, std::optional<Tensor> feeds, Tensors w_hidden, Tensors w_below, Tensors b_input,
                          Tensors b_hidden, Tensors masks, std::optional<Tensor> w_outer, std::optional<Tensor> w_query,
                          std::optional<Tensor> b_query, std::optional<Tensor> w_readout, Tensor hidden,
                          std::optional<Tensor> cell, std::optional<Tensor> context, std::optional<Tensor> feed,
                          Tensor key, std::optional<Tensor> value, std::optional<Tensor> score_weight,
                          std::optional<Tensor> exp_key, std::optional<Tensor> key_limit, std::optional<Tensor> lengths,
                          std::optional<Tensor> mask, std::optional<Tensor> filters, std::optional<Tensor> projection,
                          std::optional<Tensor> past, std::optional<Tensor> cumulative, std::optional<Tensor> seeds,
                          std::optional<Tensor> packed, std::optional<Tensor> w_output, std::optional<Tensor> b_output,
                          std::optional<Tensor> table_gates, std::optional<Tensor> table_feeds,
                          std::optional<Tensor> previous, int64_t first_choice, int64_t end_choice, double scale,
                          double dropout_p, int64_t score, int64_t rule, bool after, bool feeds_vector, bool projected,
                          bool need_weights, bool keep);

Tensors attentive_decoder_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_contexts, std::optional<Tensor> grad_weights,
    std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_cell, std::optional<Tensor> grad_feeds, Tensors kept,
    Tensor gates, std::optional<Tensor> feeds, Tensors w_hidden, Tensors w_below, Tensors b_input, Tensors b_hidden,
    Tensors masks, std::optional<Tensor> w_outer, std::optional<Tensor> w_query, std::optional<Tensor> b_query,
    std::optional<Tensor> w_readout, Tensor hidden, std::optional<Tensor> cell, std::optional<Tensor> context,
    std::optional<Tensor> feed, Tensor key, std::optional<Tensor> value, std::optional<Tensor> score_weight,
    std::optional<Tensor> exp_key, std::optional<Tensor> key_limit, std::optional<Tensor> lengths,
    std::optional<Tensor> mask, std::optional<Tensor> filters, std::optional<Tensor> projection,
    std::optional<Tensor> past, std::optional<Tensor> cumulative, std::optional<Tensor> seeds, double scale,
    double dropout_p, int64_t score, int64_t rule, bool after, bool feeds_vector);

// The matrices of the forward pass as its steps read them, to be made once for many calls.
Tensor attentive_decoder_pack(Tensors w_hidden, Tensors w_below, std::optional<Tensor> w_outer,
                              std::optional<Tensor> w_query, std::optional<Tensor> w_readout,
                              std::optional<Tensor> w_output, int64_t values, bool lstm, bool after, bool feeds_vector);

}  // namespace attnext::cpu
