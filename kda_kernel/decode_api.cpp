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

kda::Result kda_decode(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                       std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                       std::optional<kda::Tensor>& initial_state, int64_t flags, std::optional<double> lower_bound,
                       std::optional<kda::Tensor>& out, const std::optional<kda::Tensor>& state_indices,
                       std::optional<double> scale, const std::optional<kda::Tensor>& num_accepted_tokens,
                       std::optional<kda::Tensor>& cu_seqlens, std::optional<kda::Tensor>& final_state) {
  using namespace kda;
  const Call call(q, k, v, g, beta, A_log, dt_bias, flags, lower_bound, scale, cu_seqlens, out);
  const StateArguments states{.name = "initial_state",
                              .initial_state = pointer(initial_state),
                              .state_indices = pointer(state_indices),
                              .num_accepted_tokens = pointer(num_accepted_tokens),
                              .final_state = pointer(final_state),
                              .state_v_first = call.arguments.has(STATE_V_FIRST),
                              .inplace = call.arguments.has(INPLACE)};
  decode(call.arguments, states, check_attention(call.arguments, INPLACE));
  return call.makes_out ? out->release() : Tensor::undefined();
}

kda::Results kda_decode_new(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                            std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                            std::optional<kda::Tensor>& initial_state, int64_t flags,
                            std::optional<double> lower_bound, std::optional<double> scale,
                            std::optional<kda::Tensor>& cu_seqlens) {
  using namespace kda;
  std::optional<Tensor> out;
  const Call call(q, k, v, g, beta, A_log, dt_bias, flags, lower_bound, scale, cu_seqlens, out);
  make_dense_state(initial_state);
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
  return {out->release(), final_state.release()};
}
