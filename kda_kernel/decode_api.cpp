#include "api.h"
#include "backend.h"
#include "decode_arguments.h"

void kda_decode(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
                const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
                std::optional<torch::stable::Tensor>& initial_state,
                const std::optional<torch::stable::Tensor>& state_indices,
                const std::optional<torch::stable::Tensor>& num_accepted_tokens,
                const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out,
                std::optional<torch::stable::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel,
                bool allow_neg_eigval, bool state_v_first, bool inplace) {
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
                              .initial_state = initial_state,
                              .state_indices = state_indices,
                              .num_accepted_tokens = num_accepted_tokens,
                              .final_state = final_state,
                              .state_v_first = state_v_first,
                              .inplace = inplace};
  const Sizes sizes = check_attention(arguments);
  check_decode(arguments, states, sizes);
  if (sizes.N == 0) return;
  run_decode(decode_params(arguments, states, sizes), q.get_device_index());
}
