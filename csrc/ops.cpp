// Registers the kernels with the operators that attnext/ops.py defines.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(attnext, CPU, m) {
  using namespace attnext::cpu;
  m.impl("additive_prepare_cpu", TORCH_BOX(&additive_prepare));
  m.impl("additive_attention_cpu", TORCH_BOX(&additive_attention));
  m.impl("additive_attention_backward_cpu", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_attention_wide_cpu", TORCH_BOX(&additive_attention_wide));
  m.impl("additive_attention_backward_query_cpu", TORCH_BOX(&additive_attention_backward_query));
  m.impl("additive_scores_cpu", TORCH_BOX(&additive_scores));
  m.impl("additive_scores_backward_cpu", TORCH_BOX(&additive_scores_backward));
  m.impl("additive_step_cpu", TORCH_BOX(&additive_step));
  m.impl("additive_step_backward_cpu", TORCH_BOX(&additive_step_backward));
  m.impl("additive_step_backward_into_cpu", TORCH_BOX(&additive_step_backward_into));
  m.impl("dot_attention_cpu", TORCH_BOX(&dot_attention));
  m.impl("dot_attention_backward_cpu", TORCH_BOX(&dot_attention_backward));
  m.impl("dot_attention_wide_cpu", TORCH_BOX(&dot_attention_wide));
  m.impl("dot_attention_backward_query_cpu", TORCH_BOX(&dot_attention_backward_query));
  m.impl("recurrent_layer_cpu", TORCH_BOX(&recurrent_layer));
  m.impl("recurrent_layer_backward_cpu", TORCH_BOX(&recurrent_layer_backward));
  m.impl("attentive_decoder_cpu", TORCH_BOX(&attentive_decoder));
  m.impl("attentive_decoder_backward_cpu", TORCH_BOX(&attentive_decoder_backward));
  m.impl("attentive_decoder_pack_cpu", TORCH_BOX(&attentive_decoder_pack));
}
