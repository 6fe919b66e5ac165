// What the kernels are given: pointers, shapes, strides and switches. Plain C++, no torch, no CUDA headers.
#pragma once

#include <cstdint>

namespace kda {

// The head dimension the kernels are built for: K == V == kHeadDim.
constexpr int kHeadDim = 128;

// A [B, T, H, D] tensor with a contiguous last dimension; strides in elements.
struct TokenTensor {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// How the log decay g_t comes in; the formulas stand in common/gate.cuh.
enum class GateKind : int { kPreActivated, kLowerBound, kSoftplus };

enum class FloatKind : int { kBFloat16, kFloat32 };

// A recurrent state [N, HV, V, K] (v_first) or [N, HV, K, V], contiguous; data may be null.
struct StateTensor {
  void* data;
  FloatKind dtype;
  bool v_first;
};

// Sequence boundaries [N + 1] in a packed batch; data is null for a padded batch.
struct SequenceBounds {
  const void* data;
  bool is_int64;
};

struct PrefillParams {
  TokenTensor q;     // [B, T, H, K]
  TokenTensor k;     // [B, T, H, K]
  TokenTensor v;     // [B, T, HV, V]
  TokenTensor g;     // [B, T, HV, K]
  TokenTensor beta;  // [B, T, HV]
  TokenTensor out;   // [B, T, HV, V], written
  FloatKind q_dtype;  // those of q, k and v are bf16 on a GPU
  FloatKind k_dtype;
  FloatKind v_dtype;  // and of out
  FloatKind g_dtype;
  FloatKind beta_dtype;

  const float* A_log;    // [HV], null: 0
  const float* dt_bias;  // [HV, K], null: 0
  StateTensor initial_state;
  StateTensor final_state;
  SequenceBounds cu_seqlens;

  int64_t num_sequences;  // N
  int64_t num_tokens;     // T
  int32_t num_heads;      // HV
  int32_t heads_per_qk;   // HV / H

  float scale;
  float lower_bound;
  GateKind gate;
  bool l2norm_qk;
  bool sigmoid_beta;
  bool neg_eigval;  // beta = 2 sigmoid(logit)

  bool inputs_aligned;  // every row of q, k, v, g starts at a multiple of 16 bytes
  bool out_aligned;     // every row of out does
};

}  // namespace kda
