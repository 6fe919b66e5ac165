#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

namespace kda {
namespace {

constexpr double kMinLowerBound = -5.0;
constexpr double kDefaultScale = 0.08838834764831845;  // kHeadDim ** -0.5

Sizes check_token_tensors(const AttentionArguments& x) {
  const Tensor &q = x.q, &k = x.k, &v = x.v, &g = x.g, &beta = x.beta, &out = x.out;
  check_defined(q, "q");
  check_defined(v, "v");
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
  for (const Named& named : {Named{q, "q", kServesCpu}, {k, "k", kServesCpu}, {v, "v", kServesCpu},
                             {g, "g", true}, {beta, "beta", true}, {out, "out", kServesCpu}}) {
    check_device(named.tensor, named.name, device);
    if (named.fp32_allowed) {
      check_dtype(named.tensor, named.name, {ScalarType::BFloat16, ScalarType::Float});
    } else {
      check_dtype(named.tensor, named.name, {ScalarType::BFloat16});
    }
    if (named.tensor.dim() == 4) check_last_dim_contiguous(named.tensor, named.name);
  }
  STD_TORCH_CHECK(out.scalar_type() == v.scalar_type(), "out: expected the dtype of v, ", dtype_name(v.scalar_type()),
                  ", got ", dtype_name(out.scalar_type()));
  check_no_overlap(out, "out");
  if (x.cu_seqlens) s.N = check_cu_seqlens(*x.cu_seqlens, s.B, s.T, device);
  return s;
}

void check_gate(const AttentionArguments& x, int64_t HV, int32_t device) {
  const std::optional<Tensor>&A_log = x.A_log, &dt_bias = x.dt_bias;
  const std::optional<double> lower_bound = x.lower_bound;
  STD_TORCH_CHECK(!lower_bound || (*lower_bound >= kMinLowerBound && *lower_bound <= 0.0),
                  "lower_bound: expected a value in [-5, 0], got ", lower_bound.value_or(0.0));
  STD_TORCH_CHECK(!x.has(USE_GATE_IN_KERNEL) || lower_bound || A_log,
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

torch::stable::Tensor stable(const Tensor& x) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &handle));
  return torch::stable::Tensor(handle);
}

Tensor own(const torch::stable::Tensor& x) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &handle));
  return Tensor(handle);
}

void make_rows_dense(Tensor& x) {
  const bool dense = !x.defined() || x.dim() == 0 || x.stride(x.dim() - 1) == 1 || x.is_contiguous();
  if (!dense) x = own(torch::stable::contiguous(stable(x)));
}

void make_dense(std::optional<Tensor>& x) {
  if (x && x->defined() && !x->is_contiguous()) x = own(torch::stable::contiguous(stable(*x)));
}

void make_dense_fp32(std::optional<Tensor>& x) {
  if (x && x->defined() && x->scalar_type() != ScalarType::Float) {
    x = own(torch::stable::to(stable(*x), ScalarType::Float));
  }
  make_dense(x);
}

const Tensor& new_output(std::optional<Tensor>& out, const Tensor& v) {
  check_defined(v, "v");
  STD_TORCH_CHECK(v.dim() == 4, "v: expected shape [B, T, HV, 128], got ", bracketed(v.sizes()));
  return out.emplace(Tensor::empty({v.size(0), v.size(1), v.size(2), v.size(3)}, v.dtype(), v));
}

}  // namespace

Call::Call(Tensor& q, Tensor& k, Tensor& v, Tensor& g, const Tensor& beta, std::optional<Tensor>& A_log,
           std::optional<Tensor>& dt_bias, int64_t flags, std::optional<double> lower_bound,
           std::optional<double> scale, std::optional<Tensor>& cu_seqlens, std::optional<Tensor>& out)
    : makes_out(!out),
      arguments{.q = q,
                .k = k,
                .v = v,
                .g = g,
                .beta = beta,
                .A_log = A_log,
                .dt_bias = dt_bias,
                .cu_seqlens = cu_seqlens,
                .out = out ? *out : new_output(out, v),
                .scale = scale.value_or(kDefaultScale),
                .lower_bound = lower_bound,
                .flags = flags} {
  for (Tensor* x : {&q, &k, &v, &g}) make_rows_dense(*x);
  make_dense_fp32(A_log);
  make_dense_fp32(dt_bias);
  make_dense(cu_seqlens);
}

void make_dense_state(std::optional<Tensor>& initial_state) {
  const bool bf16 = initial_state && initial_state->defined() && initial_state->scalar_type() == ScalarType::BFloat16;
  bf16 ? make_dense_fp32(initial_state) : make_dense(initial_state);
}

Tensor new_final_state(const Sizes& sizes, const Tensor& v) {
  return Tensor::empty({sizes.N, sizes.HV, kHeadDim, kHeadDim}, aoti_torch_dtype_float32(), v);
}

Sizes check_attention(const AttentionArguments& x, int64_t extra_flags) {
  const int64_t allowed = kAttentionFlags | extra_flags;
  STD_TORCH_CHECK((x.flags & ~allowed) == 0, "flags: expected a sum of those in flags.h, at most ", allowed, ", got ",
                  x.flags);
  const Sizes sizes = check_token_tensors(x);
  check_gate(x, sizes.HV, x.q.get_device_index());
  STD_TORCH_CHECK(sizes.T < (int64_t{1} << 31), "q: expected fewer than 2^31 tokens, got T = ", sizes.T);
  STD_TORCH_CHECK(std::isfinite(x.scale), "scale: expected a finite number, got ", x.scale);
  STD_TORCH_CHECK(sizes.N * sizes.HV < (int64_t{1} << 31), "q: expected fewer than 2^31 (sequence, head) pairs, got N = ",
                  sizes.N, ", HV = ", sizes.HV);
  return sizes;
}

AttentionParams attention_params(const AttentionArguments& x, const Sizes& sizes) {
  const GateKind gate = !x.has(USE_GATE_IN_KERNEL) ? GateKind::kPreActivated
                        : x.lower_bound            ? GateKind::kLowerBound
                                                   : GateKind::kSoftplus;
  return {.q = token_tensor(x.q),
          .k = token_tensor(x.k),
          .v = token_tensor(x.v),
          .g = token_tensor(x.g),
          .beta = token_tensor(x.beta),
          .out = token_tensor(x.out),
          .q_dtype = float_kind(x.q),
          .k_dtype = float_kind(x.k),
          .v_dtype = float_kind(x.v),
          .g_dtype = float_kind(x.g),
          .beta_dtype = float_kind(x.beta),
          .A_log = x.A_log ? static_cast<const float*>(x.A_log->data_ptr()) : nullptr,
          .dt_bias = x.dt_bias ? static_cast<const float*>(x.dt_bias->data_ptr()) : nullptr,
          .cu_seqlens = {.data = x.cu_seqlens ? x.cu_seqlens->data_ptr() : nullptr,
                         .is_int64 = x.cu_seqlens && x.cu_seqlens->scalar_type() == ScalarType::Long},
          .num_sequences = sizes.N,
          .num_tokens = sizes.T,
          .num_heads = static_cast<int32_t>(sizes.HV),
          .heads_per_qk = static_cast<int32_t>(sizes.HV / sizes.H),
          .scale = static_cast<float>(x.scale),
          .lower_bound = static_cast<float>(x.lower_bound.value_or(0.0)),
          .gate = gate,
          .l2norm_qk = x.has(USE_QK_L2NORM_IN_KERNEL),
          .sigmoid_beta = x.has(USE_BETA_SIGMOID_IN_KERNEL),
          .neg_eigval = x.has(ALLOW_NEG_EIGVAL),
          .inputs_aligned = rows_aligned(x.q) && rows_aligned(x.k) && rows_aligned(x.v) && rows_aligned(x.g),
          .out_aligned = rows_aligned(x.out)};
}

}  // namespace kda
