#include "layer/api.h"

#include <cmath>

#include "arguments.h"
#include "backend.h"
#include "checks.h"
#include "layer/layer_params.h"

namespace kda {
namespace {

constexpr int64_t kMinWidth = 2;
constexpr int64_t kMaxWidth = 4;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension

ChannelTensor channel_tensor(const Tensor& x) {
  return {.data = x.data_ptr(), .batch_stride = x.stride(0), .token_stride = x.stride(1), .channels = x.size(2)};
}

ConvInputs conv_state(const std::optional<Tensor>& x) {
  if (!x) return {};
  return {.data = x->data_ptr(),
          .sequence_stride = x->stride(0),
          .channel_stride = x->stride(1),
          .column_stride = x->stride(2),
          .columns = x->size(2)};
}

bool starts_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0; }

// The floating tensor that decides the others' dtype.
void check_main_dtype(const Tensor& x, const char* name) {
  if constexpr (kServesCpu) {
    check_dtype(x, name, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    check_dtype(x, name, {ScalarType::BFloat16});
  }
}

void check_conv_state(const std::optional<Tensor>& state, const char* name, int64_t N, int64_t C, int64_t min_columns,
                      const Tensor& q) {
  if (!state) return;
  check_device(*state, name, q.get_device_index());
  STD_TORCH_CHECK(state->scalar_type() == q.scalar_type(), name, ": expected the dtype of q, ",
                  dtype_name(q.scalar_type()), ", got ", dtype_name(state->scalar_type()));
  const bool fits = state->dim() == 3 && state->size(0) == N && state->size(1) == C && state->size(2) >= min_columns;
  STD_TORCH_CHECK(fits, name, ": expected shape [N, C, S] = [", N, ", ", C, ", at least ", min_columns, "], got ",
                  bracketed(state->sizes()));
}

// q, k, v [B, T, C_i] and where their convolutions go.
void check_channel_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_out, const Tensor& k_out,
                           const Tensor& v_out) {
  struct Named {
    const Tensor& tensor;
    const char* name;
    const Tensor& out;
    const char* out_name;
  };
  for (const Named& x : {Named{q, "q", q_out, "q_out"}, {k, "k", k_out, "k_out"}, {v, "v", v_out, "v_out"}}) {
    STD_TORCH_CHECK(x.tensor.dim() == 3, x.name, ": expected shape [B, T, C], got ", bracketed(x.tensor.sizes()));
    check_shape(x.tensor, x.name, "[B, T, C]", {q.size(0), q.size(1), x.tensor.size(2)});
    STD_TORCH_CHECK(x.tensor.size(2) % kChannelVector == 0, x.name, ": expected a number of channels divisible by ",
                    kChannelVector, ", got ", x.tensor.size(2));
    check_shape(x.out, x.out_name, "[B, T, C]", {q.size(0), q.size(1), x.tensor.size(2)});
    for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{x.tensor, x.name}, {x.out, x.out_name}}) {
      check_device(tensor, name, q.get_device_index());
      check_main_dtype(tensor, name);
      STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), name, ": expected the dtype of q, ",
                      dtype_name(q.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
      check_last_dim_contiguous(tensor, name);
    }
    check_no_overlap(x.out, x.out_name);
  }
}

}  // namespace
}  // namespace kda

void kda_short_conv(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& weight,
                    const std::optional<kda::Tensor>& bias, const std::optional<kda::Tensor>& initial_state,
                    const std::optional<kda::Tensor>& cu_seqlens, kda::Tensor& q_out, kda::Tensor& k_out,
                    kda::Tensor& v_out, std::optional<kda::Tensor>& final_state) {
  using namespace kda;
  check_channel_tensors(q, k, v, q_out, k_out, v_out);
  const int32_t device = q.get_device_index();
  const int64_t B = q.size(0), T = q.size(1), C = q.size(2) + k.size(2) + v.size(2);
  const bool weight_fits =
      weight.dim() == 2 && weight.size(0) == C && weight.size(1) >= kMinWidth && weight.size(1) <= kMaxWidth;
  STD_TORCH_CHECK(weight_fits, "weight: expected shape [C, W] = [", C, ", ", kMinWidth, " to ", kMaxWidth, "], got ",
                  bracketed(weight.sizes()));
  check_device(weight, "weight", device);
  check_dtype(weight, "weight", {ScalarType::BFloat16, ScalarType::Float});
  check_contiguous(weight, "weight");
  if (bias) {
    check_device(*bias, "bias", device);
    check_dtype(*bias, "bias", {ScalarType::BFloat16, ScalarType::Float});
    check_shape(*bias, "bias", "[C]", {C});
    check_contiguous(*bias, "bias");
  }
  const int64_t N = cu_seqlens ? check_cu_seqlens(*cu_seqlens, B, T, device) : B;
  check_conv_state(initial_state, "initial_state", N, C, weight.size(1) - 1, q);
  check_conv_state(final_state, "final_state", N, C, 1, q);
  if (final_state) check_no_overlap(*final_state, "final_state");
  STD_TORCH_CHECK(B * T <= kMaxBlocks, "q: expected fewer than 2^31 tokens, got B = ", B, ", T = ", T);
  if (N == 0 || C == 0) return;

  const ShortConvParams params{
      .x = {channel_tensor(q), channel_tensor(k), channel_tensor(v)},
      .y = {channel_tensor(q_out), channel_tensor(k_out), channel_tensor(v_out)},
      .weight = weight.data_ptr(),
      .bias = bias ? bias->data_ptr() : nullptr,
      .dtype = float_kind(q),
      .weight_dtype = float_kind(weight),
      .bias_dtype = bias ? float_kind(*bias) : FloatKind::kFloat32,
      .initial_state = conv_state(initial_state),
      .final_state = conv_state(final_state),
      .cu_seqlens = {.data = cu_seqlens ? cu_seqlens->data_ptr() : nullptr,
                     .is_int64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long},
      .num_sequences = N,
      .num_rows = B,
      .num_tokens = T,
      .width = static_cast<int32_t>(weight.size(1)),
      .aligned = rows_aligned(q) && rows_aligned(k) && rows_aligned(v) && rows_aligned(q_out) && rows_aligned(k_out) &&
                 rows_aligned(v_out) && starts_aligned(weight) && (!bias || starts_aligned(*bias))};
  run_short_conv(params, device);
}

void gated_rms_norm(const kda::Tensor& x, const kda::Tensor& gate, const kda::Tensor& weight, kda::Tensor& out,
                    double eps, bool silu) {
  using namespace kda;
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == kHeadDim, "x: expected shape [B, T, HV, 128], got ",
                  bracketed(x.sizes()));
  const int32_t device = x.get_device_index();
  struct Named {
    const Tensor& tensor;
    const char* name;
  };
  for (const auto& [tensor, name] : {Named{x, "x"}, {gate, "gate"}, {out, "out"}}) {
    check_device(tensor, name, device, "x");
    check_main_dtype(tensor, name);
    STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, ",
                    dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
    check_shape(tensor, name, "[B, T, HV, 128]", {x.size(0), x.size(1), x.size(2), kHeadDim});
    check_last_dim_contiguous(tensor, name);
  }
  check_no_overlap(out, "out");
  check_device(weight, "weight", device, "x");
  check_dtype(weight, "weight", {ScalarType::BFloat16, ScalarType::Float});
  check_shape(weight, "weight", "[128]", {kHeadDim});
  check_contiguous(weight, "weight");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0.0, "eps: expected a finite number, not negative, got ", eps);
  STD_TORCH_CHECK(x.size(0) * x.size(1) * x.size(2) <= kMaxBlocks, "x: expected fewer than 2^31 rows, got shape ",
                  bracketed(x.sizes()));
  if (x.numel() == 0) return;

  const GatedNormParams params{.x = token_tensor(x),
                               .gate = token_tensor(gate),
                               .out = token_tensor(out),
                               .weight = weight.data_ptr(),
                               .dtype = float_kind(x),
                               .weight_dtype = float_kind(weight),
                               .num_rows = x.size(0),
                               .num_tokens = x.size(1),
                               .num_heads = x.size(2),
                               .eps = static_cast<float>(eps),
                               .silu = silu,
                               .aligned = rows_aligned(x) && rows_aligned(gate) && rows_aligned(out) &&
                                          starts_aligned(weight)};
  run_gated_norm(params, device);
}
