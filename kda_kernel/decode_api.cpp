#include "api.h"
#include "backend.h"
#include "decode_arguments.h"

void kda_decode(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                const kda::Tensor& beta, const std::optional<kda::Tensor>& A_log,
                const std::optional<kda::Tensor>& dt_bias, std::optional<kda::Tensor>& initial_state, kda::Tensor& out,
                double scale, std::optional<double> lower_bound, int64_t flags,
                std::optional<kda::Tensor>& final_state, const std::optional<kda::Tensor>& state_indices,
                const std::optional<kda::Tensor>& num_accepted_tokens, const std::optional<kda::Tensor>& cu_seqlens) {
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
                                     .flags = flags};
  const StateArguments states{.name = "initial_state",
                              .initial_state = pointer(initial_state),
                              .state_indices = pointer(state_indices),
                              .num_accepted_tokens = pointer(num_accepted_tokens),
                              .final_state = pointer(final_state),
                              .state_v_first = arguments.has(STATE_V_FIRST),
                              .inplace = arguments.has(INPLACE)};
  const Sizes sizes = check_attention(arguments, INPLACE);
  check_decode(arguments, states, sizes);
  if (sizes.N == 0) return;
  run_decode(decode_params(arguments, states, sizes), q.get_device_index());
}
