#include "api.h"
#include "backend.h"
#include "decode_arguments.h"

void kda_decode(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                const kda::Tensor& beta, const std::optional<kda::Tensor>& A_log,
                const std::optional<kda::Tensor>& dt_bias, std::optional<kda::Tensor>& initial_state,
                const std::optional<kda::Tensor>& state_indices, const std::optional<kda::Tensor>& num_accepted_tokens,
                const std::optional<kda::Tensor>& cu_seqlens, kda::Tensor& out, std::optional<kda::Tensor>& final_state,
                double scale, std::optional<double> lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel,
                bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first, bool inplace) {
  using namespace kda;
  const AttentionArguments arguments{.q = q,
                                     .k = k,
                                     .v = v,
                                     .g = g,
                                     .beta = beta,
                                     .A_log = A_log,
                                     .dt_bias = dt_bias,
                                     .cu_seqlens = cu_seqlens,
                                     .out = out,
                                     .scale = scale,
                                     .lower_bound = lower_bound,
                                     .use_gate_in_kernel = use_gate_in_kernel,
                                     .use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel,
                                     .use_beta_sigmoid_in_kernel = use_beta_sigmoid_in_kernel,
                                     .allow_neg_eigval = allow_neg_eigval};
  const StateArguments states{.name = "initial_state",
                              .initial_state = pointer(initial_state),
                              .state_indices = pointer(state_indices),
                              .num_accepted_tokens = pointer(num_accepted_tokens),
                              .final_state = pointer(final_state),
                              .state_v_first = state_v_first,
                              .inplace = inplace};
  const Sizes sizes = check_attention(arguments);
  check_decode(arguments, states, sizes);
  if (sizes.N == 0) return;
  run_decode(decode_params(arguments, states, sizes), q.get_device_index());
}
