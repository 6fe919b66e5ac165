#include "api.h"
#include "backend.h"
#include "decode_arguments.h"

namespace kda {
namespace {

void decode(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes) {
  check_decode(x, states, sizes);
  if (sizes.N == 0) return;
  run_decode(decode_params(x, states, sizes), x.q.get_device_index());
}

}  // namespace
}  // namespace kda

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
  decode(arguments, states, check_attention(arguments, INPLACE));
}

kda::Results kda_decode_new(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                            std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                            std::optional<kda::Tensor>& initial_state, int64_t flags,
                            std::optional<double> lower_bound, std::optional<double> scale,
                            std::optional<kda::Tensor>& cu_seqlens) {
  using namespace kda;
  NewCall call(q, k, v, g, beta, A_log, dt_bias, initial_state, flags, lower_bound, scale, cu_seqlens);
  const Sizes sizes = check_attention(call.arguments);
  Tensor final_state = new_final_state(sizes, v);
  const StateArguments states{.name = "initial_state",
                              .initial_state = pointer(initial_state),
                              .state_indices = nullptr,
                              .num_accepted_tokens = nullptr,
                              .final_state = &final_state,
                              .state_v_first = call.arguments.has(STATE_V_FIRST),
                              .inplace = false};
  decode(call.arguments, states, sizes);
  return {call.out.release(), final_state.release()};
}
