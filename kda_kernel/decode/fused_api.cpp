#include "decode/fused_api.h"

#include "backend.h"
#include "decode_arguments.h"

namespace kda {
namespace {

constexpr int64_t kStreams = 3;  // q, k, v

void check_float(const Tensor& x, const char* name, int32_t device) {
  check_device(x, name, device);
  check_dtype(x, name, {ScalarType::BFloat16, ScalarType::Float});
}

void check_vector(const Tensor& x, const char* name, int64_t size, int32_t device) {
  check_float(x, name, device);
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.numel() == size, name, ": expected ", size, " elements, got shape ", bracketed(x.sizes()));
}

Weights weights(const Tensor* x) {
  if (!x) return {.data = nullptr, .dtype = FloatKind::kFloat32};
  return {.data = x->data_ptr(), .dtype = float_kind(*x)};
}

void check_conv_state(const Tensor& x, int64_t slots, int64_t channels, int32_t device) {
  check_float(x, "conv_state", device);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == slots && x.size(1) == channels &&
                      (x.size(2) == kConvTaps - 1 || x.size(2) == kConvTaps),
                  "conv_state: expected shape [slots of recurrent_state, 3 * HV * 128, 3 or 4] = [", slots, ", ",
                  channels, ", 3 or 4], got ", bracketed(x.sizes()));
  check_no_overlap(x, "conv_state");
}

ConvState conv_state_params(const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 8 == 0 && (x.size(0) <= 1 || x.stride(0) % 4 == 0) &&
                       x.stride(1) % 4 == 0 && x.stride(2) == 1;
  return {.data = x.data_ptr(),
          .slot_stride = x.stride(0),
          .channel_stride = x.stride(1),
          .tap_stride = x.stride(2),
          .width = static_cast<int32_t>(x.size(2)),
          .dtype = float_kind(x),
          .packed = aligned && x.size(2) == kConvTaps && x.scalar_type() == ScalarType::BFloat16};
}

}  // namespace
}  // namespace kda

void kda_fused_decode(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                      const kda::Tensor& beta, const kda::Tensor& gate, const std::optional<kda::Tensor>& A_log,
                      const std::optional<kda::Tensor>& dt_bias, kda::Tensor& conv_state, kda::Tensor& recurrent_state,
                      const kda::Tensor& conv_weight, const std::optional<kda::Tensor>& conv_bias,
                      const kda::Tensor& norm_weight, kda::Tensor& out, double scale, double norm_eps,
                      std::optional<double> lower_bound, int64_t flags, const std::optional<kda::Tensor>& state_indices,
                      const std::optional<kda::Tensor>& num_accepted_tokens,
                      const std::optional<kda::Tensor>& cu_seqlens) {
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
  const StateArguments states{.name = "recurrent_state",
                              .initial_state = &recurrent_state,
                              .state_indices = pointer(state_indices),
                              .num_accepted_tokens = pointer(num_accepted_tokens),
                              .final_state = nullptr,
                              .state_v_first = arguments.has(STATE_V_FIRST),
                              .inplace = true};
  const Sizes sizes = check_attention(arguments);
  const int32_t device = q.get_device_index();
  STD_TORCH_CHECK(sizes.H == sizes.HV, "v: expected as many heads as q (a head's convolution state is one block's), "
                  "got H = ", sizes.H, ", HV = ", sizes.HV);
  check_decode(arguments, states, sizes);
  const int64_t channels = kStreams * sizes.HV * kHeadDim;
  check_conv_state(conv_state, recurrent_state.size(0), channels, device);
  check_vector(conv_weight, "conv_weight", channels * kConvTaps, device);
  if (conv_bias) check_vector(*conv_bias, "conv_bias", channels, device);
  check_vector(norm_weight, "norm_weight", kHeadDim, device);
  check_device(gate, "gate", device);
  check_dtype(gate, "gate", {ScalarType::BFloat16});
  check_shape(gate, "gate", "[B, T, HV, V]", {sizes.B, sizes.T, sizes.HV, kHeadDim});
  check_last_dim_contiguous(gate, "gate");
  check_apart(out, "out", gate, "gate");
  check_apart(out, "out", conv_state, "conv_state");
  check_apart(conv_state, "conv_state", recurrent_state, "recurrent_state");
  STD_TORCH_CHECK(norm_eps >= 0.0, "norm_eps: expected a number >= 0, got ", norm_eps);
  if (sizes.N == 0) return;

  FusedDecodeParams params{decode_params(arguments, states, sizes)};
  params.conv_state = conv_state_params(conv_state);
  params.conv_weight = weights(&conv_weight);
  params.conv_bias = weights(pointer(conv_bias));
  params.norm_gate = token_tensor(gate);
  params.norm_weight = weights(&norm_weight);
  params.norm_epsilon = static_cast<float>(norm_eps);
  run_fused_decode(params, device);
}
