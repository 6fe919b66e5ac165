#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

// D = 128. q, k [B, T, H, D], v, out [B, T, HV, D] bf16; g [B, T, HV, D], beta [B, T, HV] bf16 or fp32;
// A_log [HV], dt_bias [HV, D] fp32; states [N, HV, K, V], or [N, HV, V, K] with state_v_first, fp32 or bf16;
// cu_seqlens [N + 1] int32 or int64. `flags` is a sum of those in kda_kernel/flags.h; prefill's default is what fwd
// does: gate, L2 norm and sigmoid in the kernel, V-first states. On a CPU q, k, v and out may be fp32 too, with out in
// v's dtype. Each argument takes torch's dispatcher time: rare ones come last and have defaults.
STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "kda_prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, float scale, "
      "float? lower_bound, int flags=23, Tensor(c!)? intermediate_states=None) -> ()");
  // The operators that `chunk_kda` and `fused_recurrent_kda` call. They copy what kda_prefill refuses for how it lies, and
  // A_log and dt_bias in another dtype. A scale of None is 128 ** -0.5. Those that end in "new" allocate both results,
  // o, contiguous, and the final state in fp32, and also copy a bf16 or strided initial_state.
  ops.def(
      "kda_prefill_new(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, int flags, float? lower_bound=None, float? scale=None, Tensor? cu_seqlens=None) "
      "-> (Tensor, Tensor)");
  ops.def(
      "kda_decode_new(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, int flags, float? lower_bound=None, float? scale=None, Tensor? cu_seqlens=None) "
      "-> (Tensor, Tensor)");
  // Without `out` it allocates o, contiguous, and returns it; with `out` it returns None (torch.compile takes no operator
  // that writes into its arguments and says that it returns Tensor?). state_indices [N] or [N, T_max], num_accepted_tokens
  // [N] int32 or int64; with state_indices, initial_state is [slots, HV, ...], contiguous but for the first dimension.
  // docs/decode.md says which slots are read and written.
  ops.def(
      "kda_decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor(a!)? initial_state, int flags, float? lower_bound=None, Tensor(b!)? out=None, "
      "Tensor? state_indices=None, float? scale=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, "
      "Tensor(c!)? final_state=None) -> Tensor");
#if !defined(CPU_KERNEL)
  // H = HV. gate as v; conv_state [N or slots, 3 * HV * D, 3 or 4], conv_weight [3 * HV * D, 4], conv_bias
  // [3 * HV * D], norm_weight [D] bf16 or fp32; recurrent_state as kda_decode's initial_state.
  ops.def(
      "kda_fused_decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor gate, Tensor? A_log, "
      "Tensor? dt_bias, Tensor(a!) conv_state, Tensor(b!) recurrent_state, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor norm_weight, Tensor(c!) out, float scale, float norm_eps, float? lower_bound, int flags, "
      "Tensor? state_indices=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None) -> ()");
#endif

  // q|k|v have C channels together: q, k, v and the results [B, T, C_i] bf16 (on a CPU fp32, too), weight [C, W] and
  // bias [C] bf16 or fp32, states [N, C, S] in q's dtype with S >= W - 1 in initial_state: the inputs before the first
  // token, and the last ones. Both states may be one tensor.
  ops.def(
      "kda_short_conv(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!) v_out, Tensor(d!)? final_state) -> ()");

  // x, gate, out [B, T, HV, 128] bf16 (on a CPU fp32, too), weight [128] bf16 or fp32; out may be x or gate.
  ops.def("gated_rms_norm(Tensor x, Tensor gate, Tensor weight, Tensor(a!) out, float eps, bool silu=False) -> ()");
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#endif
  ops.impl("kda_prefill", TORCH_BOX(&kda_prefill));
  ops.impl("kda_decode", TORCH_BOX(&kda_decode));
  ops.impl("kda_prefill_new", TORCH_BOX(&kda_prefill_new));
  ops.impl("kda_decode_new", TORCH_BOX(&kda_decode_new));
#if !defined(CPU_KERNEL)
  ops.impl("kda_fused_decode", TORCH_BOX(&kda_fused_decode));
#endif
  ops.impl("kda_short_conv", TORCH_BOX(&kda_short_conv));
  ops.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
