#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

// D = 128. q, k [B, T, H, D], v, out [B, T, HV, D] bf16; g [B, T, HV, D], beta [B, T, HV] bf16 or fp32;
// A_log [HV], dt_bias [HV, D] fp32; states [N, HV, K, V], or [N, HV, V, K] with state_v_first, fp32 or bf16;
// cu_seqlens [N + 1] int32 or int64. `portable` asks for the portable kernel where a faster one exists, for tests and
// measurements. On a CPU q, k, v and out may be fp32 too, with out in v's dtype.
STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "kda_prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, float scale, "
      "float? lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, "
      "bool allow_neg_eigval, bool state_v_first, bool portable=False) -> ()");
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#endif
  ops.impl("kda_prefill", TORCH_BOX(&kda_prefill));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
