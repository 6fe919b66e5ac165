#include "api.h"

#include <cmath>

#include "backend.h"
#include "checks.h"
#include "params.h"

namespace kda {
namespace {

constexpr double kMinLowerBound = -5.0;

FloatKind float_kind(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? FloatKind::kFloat32 : FloatKind::kBFloat16;
}

// [B, T, heads, D] or, without the last dimension, [B, T, heads].
TokenTensor token_tensor(const Tensor& x) {
  return {.data = x.data_ptr(),
          .batch_stride = x.stride(0),
          .token_stride = x.stride(1),
          .head_stride = x.stride(2)};
}

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

struct Sizes {
  int64_t B, T, H, HV, N;
};

Sizes check_token_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                          const Tensor& out, const std::optional<Tensor>& cu_seqlens) {
  STD_TORCH_CHECK(q.dim() == 4, "q: expected shape [B, T, H, 128], got ", bracketed(q.sizes()));
  STD_TORCH_CHECK(v.dim() == 4, "v: expected shape [B, T, HV, 128], got ", bracketed(v.sizes()));
  const int32_t device = q.get_device_index();
  Sizes s{.B = q.size(0), .T = q.size(1), .H = q.size(2), .HV = v.size(2), .N = q.size(0)};
  STD_TORCH_CHECK(q.size(3) == kHeadDim, "q: expected K = 128, got K = ", q.size(3));
  STD_TORCH_CHECK(v.size(3) == kHeadDim, "v: expected V = 128, got V = ", v.size(3));
  STD_TORCH_CHECK(s.H > 0 && s.HV > 0 && s.HV % s.H == 0, "v: expected HV to be a positive multiple of H = ", s.H,
                  ", got HV = ", s.HV);
  check_shape(k, "k", "[B, T, H, K]", {s.B, s.T, s.H, kHeadDim});
  check_shape(v, "v", "[B, T, HV, V]", {s.B, s.T, s.HV, kHeadDim});
  check_shape(g, "g", "[B, T, HV, K]", {s.B, s.T, s.HV, kHeadDim});
  check_shape(beta, "beta", "[B, T, HV]", {s.B, s.T, s.HV});
  check_shape(out, "out", "[B, T, HV, V]", {s.B, s.T, s.HV, kHeadDim});
  struct Named {
    const Tensor& tensor;
    const char* name;
    bool fp32_allowed;
  };
  for (const Named& x : {Named{q, "q", kServesCpu}, {k, "k", kServesCpu}, {v, "v", kServesCpu}, {g, "g", true},
                         {beta, "beta", true}, {out, "out", kServesCpu}}) {
    check_device(x.tensor, x.name, device);
    if (x.fp32_allowed) {
      check_dtype(x.tensor, x.name, {ScalarType::BFloat16, ScalarType::Float});
    } else {
      check_dtype(x.tensor, x.name, {ScalarType::BFloat16});
    }
    if (x.tensor.dim() == 4) check_last_dim_contiguous(x.tensor, x.name);
  }
  STD_TORCH_CHECK(out.scalar_type() == v.scalar_type(), "out: expected the dtype of v, ", dtype_name(v.scalar_type()),
                  ", got ", dtype_name(out.scalar_type()));
  check_no_overlap(out, "out");
  if (cu_seqlens) {
    check_device(*cu_seqlens, "cu_seqlens", device);
    check_dtype(*cu_seqlens, "cu_seqlens", {ScalarType::Int, ScalarType::Long});
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, "cu_seqlens: expected shape [N + 1], got ",
                    bracketed(cu_seqlens->sizes()));
    check_contiguous(*cu_seqlens, "cu_seqlens");
    STD_TORCH_CHECK(s.B == 1, "cu_seqlens: expected packed sequences with B = 1, got B = ", s.B);
    s.N = cu_seqlens->numel() - 1;
    STD_TORCH_CHECK(s.N > 0 || s.T == 0, "cu_seqlens: expected at least one sequence for T = ", s.T, " tokens, got none");
  }
  return s;
}

void check_gate(const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
                std::optional<double> lower_bound, bool use_gate_in_kernel, int64_t HV, int32_t device) {
  STD_TORCH_CHECK(!lower_bound || (*lower_bound >= kMinLowerBound && *lower_bound <= 0.0),
                  "lower_bound: expected a value in [-5, 0], got ", lower_bound.value_or(0.0));
  STD_TORCH_CHECK(!use_gate_in_kernel || lower_bound || A_log,
                  "A_log: expected a tensor [HV] for the softplus gate (use_gate_in_kernel without lower_bound), got None");
  if (A_log) {
    check_device(*A_log, "A_log", device);
    check_dtype(*A_log, "A_log", {ScalarType::Float});
    check_contiguous(*A_log, "A_log");
    STD_TORCH_CHECK(A_log->numel() == HV, "A_log: expected HV = ", HV, " elements, got shape ", bracketed(A_log->sizes()));
  }
  if (dt_bias) {
    check_device(*dt_bias, "dt_bias", device);
    check_dtype(*dt_bias, "dt_bias", {ScalarType::Float});
    check_contiguous(*dt_bias, "dt_bias");
    STD_TORCH_CHECK(dt_bias->numel() == HV * kHeadDim, "dt_bias: expected HV * K = ", HV * kHeadDim,
                    " elements, got shape ", bracketed(dt_bias->sizes()));
  }
}

}  // namespace
}  // namespace kda

void kda_prefill(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                 const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
                 const std::optional<torch::stable::Tensor>& A_log,
                 const std::optional<torch::stable::Tensor>& dt_bias,
                 const std::optional<torch::stable::Tensor>& initial_state,
                 const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out,
                 std::optional<torch::stable::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                 bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel,
                 bool allow_neg_eigval, bool state_v_first, bool portable) {
  using namespace kda;
  const Sizes sizes = check_token_tensors(q, k, v, g, beta, out, cu_seqlens);
  const int32_t device = q.get_device_index();
  check_gate(A_log, dt_bias, lower_bound, use_gate_in_kernel, sizes.HV, device);
  check_state(initial_state, "initial_state", state_v_first, sizes.N, sizes.HV, device);
  check_state(final_state, "final_state", state_v_first, sizes.N, sizes.HV, device);
  STD_TORCH_CHECK(!initial_state || !final_state || initial_state->scalar_type() == final_state->scalar_type(),
                  "final_state: expected the dtype of initial_state, ", dtype_name(initial_state->scalar_type()),
                  ", got ", dtype_name(final_state->scalar_type()));
  STD_TORCH_CHECK(sizes.T < (int64_t{1} << 31), "q: expected fewer than 2^31 tokens, got T = ", sizes.T);
  STD_TORCH_CHECK(std::isfinite(scale), "scale: expected a finite number, got ", scale);
  STD_TORCH_CHECK(sizes.N * sizes.HV < (int64_t{1} << 31), "q: expected fewer than 2^31 (sequence, head) pairs, got N = ",
                  sizes.N, ", HV = ", sizes.HV);
  if (sizes.N == 0) return;

  const GateKind gate = !use_gate_in_kernel ? GateKind::kPreActivated
                        : lower_bound       ? GateKind::kLowerBound
                                            : GateKind::kSoftplus;
  const PrefillParams params{
      .q = token_tensor(q),
      .k = token_tensor(k),
      .v = token_tensor(v),
      .g = token_tensor(g),
      .beta = token_tensor(beta),
      .out = token_tensor(out),
      .q_dtype = float_kind(q),
      .k_dtype = float_kind(k),
      .v_dtype = float_kind(v),
      .g_dtype = float_kind(g),
      .beta_dtype = float_kind(beta),
      .A_log = A_log ? static_cast<const float*>(A_log->data_ptr()) : nullptr,
      .dt_bias = dt_bias ? static_cast<const float*>(dt_bias->data_ptr()) : nullptr,
      .initial_state = state_tensor(initial_state, state_v_first),
      .final_state = state_tensor(final_state, state_v_first),
      .cu_seqlens = {.data = cu_seqlens ? cu_seqlens->data_ptr() : nullptr,
                     .is_int64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long},
      .num_sequences = sizes.N,
      .num_tokens = sizes.T,
      .num_heads = static_cast<int32_t>(sizes.HV),
      .heads_per_qk = static_cast<int32_t>(sizes.HV / sizes.H),
      .scale = static_cast<float>(scale),
      .lower_bound = static_cast<float>(lower_bound.value_or(0.0)),
      .gate = gate,
      .l2norm_qk = use_qk_l2norm_in_kernel,
      .sigmoid_beta = use_beta_sigmoid_in_kernel,
      .neg_eigval = allow_neg_eigval,
      .inputs_aligned = rows_aligned(q) && rows_aligned(k) && rows_aligned(v) && rows_aligned(g),
      .out_aligned = rows_aligned(out)};
  run_prefill(params, device, portable);
}
