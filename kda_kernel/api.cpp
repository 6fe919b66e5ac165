#include "api.h"

#include "arguments.h"
#include "backend.h"

namespace kda {
namespace {

StateTensor state_tensor(const std::optional<Tensor>& x, bool v_first) {
  if (!x) return {.data = nullptr, .dtype = FloatKind::kFloat32, .v_first = v_first};
  return {.data = x->data_ptr(), .dtype = float_kind(*x), .v_first = v_first};
}

void check_state(const std::optional<Tensor>& state, const char* name, bool v_first, int64_t sequences, int64_t heads,
                 int32_t device) {
  if (!state) return;
  check_device(*state, name, device);
  check_dtype(*state, name, {ScalarType::Float, ScalarType::BFloat16});
  check_shape(*state, name, v_first ? "[N, HV, V, K]" : "[N, HV, K, V]", {sequences, heads, kHeadDim, kHeadDim});
  check_contiguous(*state, name);
}

// [B, NT, HV, ...]; the number of a pack's states depends on cu_seqlens, whose values only the device sees.
void check_intermediate_states(const std::optional<Tensor>& states, bool v_first, const Sizes& sizes, bool packed,
                               int32_t device) {
  if (!states) return;
  const char* name = "intermediate_states";
  check_device(*states, name, device);
  check_dtype(*states, name, {ScalarType::BFloat16});
  STD_TORCH_CHECK(states->dim() == 5, name, ": expected 5 dimensions, got shape ", bracketed(states->sizes()));
  const int64_t count = packed ? states->size(1) : (sizes.T + kIntermediateStep - 1) / kIntermediateStep;
  check_shape(*states, name, v_first ? "[B, NT, HV, V, K]" : "[B, NT, HV, K, V]",
              {sizes.B, count, sizes.HV, kHeadDim, kHeadDim});
  check_contiguous(*states, name);
}

void prefill(const AttentionArguments& x, const Sizes& sizes, const std::optional<Tensor>& initial_state,
             const std::optional<Tensor>& final_state, const std::optional<Tensor>& intermediate_states) {
  const int32_t device = x.q.get_device_index();
  const bool state_v_first = x.has(STATE_V_FIRST);
  check_state(initial_state, "initial_state", state_v_first, sizes.N, sizes.HV, device);
  check_state(final_state, "final_state", state_v_first, sizes.N, sizes.HV, device);
  check_state_dtypes(pointer(initial_state), pointer(final_state));
  check_intermediate_states(intermediate_states, state_v_first, sizes, x.cu_seqlens.has_value(), device);
  if (sizes.N == 0) return;
  PrefillParams params{attention_params(x, sizes)};
  params.initial_state = state_tensor(initial_state, state_v_first);
  params.final_state = state_tensor(final_state, state_v_first);
  params.intermediate_states = state_tensor(intermediate_states, state_v_first);
  params.num_intermediate_states = intermediate_states ? intermediate_states->size(0) * intermediate_states->size(1) : 0;
  run_prefill(params, device, x.has(PORTABLE));
}

}  // namespace
}  // namespace kda

void kda_prefill(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                 const kda::Tensor& beta, const std::optional<kda::Tensor>& A_log,
                 const std::optional<kda::Tensor>& dt_bias, const std::optional<kda::Tensor>& initial_state,
                 const std::optional<kda::Tensor>& cu_seqlens, kda::Tensor& out,
                 std::optional<kda::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                 int64_t flags, std::optional<kda::Tensor>& intermediate_states) {
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
  prefill(arguments, check_attention(arguments, PORTABLE), initial_state, final_state, intermediate_states);
}

kda::Results kda_prefill_new(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                             std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                             std::optional<kda::Tensor>& initial_state, int64_t flags,
                             std::optional<double> lower_bound, std::optional<double> scale,
                             std::optional<kda::Tensor>& cu_seqlens) {
  using namespace kda;
  std::optional<Tensor> out;
  const Call call(q, k, v, g, beta, A_log, dt_bias, flags, lower_bound, scale, cu_seqlens, out);
  make_dense_state(initial_state);
  const Sizes sizes = check_attention(call.arguments);
  std::optional<Tensor> final_state = new_final_state(sizes, v);
  prefill(call.arguments, sizes, initial_state, final_state, std::nullopt);
  return {out->release(), final_state->release()};
}
