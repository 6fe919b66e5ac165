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

// What prefill and decode have in common.
struct AttentionParams {
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

// Every how many tokens of a sequence, from its start, prefill can keep the state.
constexpr int kIntermediateStep = 64;

struct PrefillParams : AttentionParams {
  StateTensor initial_state;
  StateTensor final_state;
  StateTensor intermediate_states;   // the states before tokens 0, 64, 128 ... of each sequence, one after another; null:
                                     // not wanted
  int64_t num_intermediate_states;   // room for these; more are not written
};

// Recurrent states in slots: slot i is [HV, V, K] (v_first) or [HV, K, V], contiguous, slot_stride * i elements behind
// data; data may be null.
struct StatePool {
  void* data;
  int64_t num_slots;
  int64_t slot_stride;
  FloatKind dtype;
  bool v_first;
};

// int32 or int64 [rows] or [rows, columns]; strides in elements; data may be null.
struct IndexTensor {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  bool is_int64;
};

struct DecodeParams : AttentionParams {
  StatePool initial_state;          // null: zeros
  StatePool final_state;            // N slots; null: not wanted
  IndexTensor state_indices;        // [N] or [N, slots_per_sequence]; null: sequence n has slot n of initial_state
  IndexTensor num_accepted_tokens;  // [N]; null: 1
  int64_t slots_per_sequence;       // T_max: the state after token t goes to slot state_indices[n, t]; 0: only the
                                    // state after the last token is kept
  bool inplace;                     // kept in initial_state, in its own slot unless slots_per_sequence says where
};

// [channels, kConvTaps], contiguous, or a vector; data may be null.
struct Weights {
  const void* data;
  FloatKind dtype;
};

constexpr int kConvTaps = 4;

// The short convolution's last inputs, the newest last: [slots, channels, width], width 3 or 4, strides in elements.
struct ConvState {
  void* data;
  int64_t slot_stride;
  int64_t channel_stride;
  int64_t tap_stride;
  int32_t width;
  FloatKind dtype;
  bool packed;  // bf16, width 4, and the taps of a channel are eight aligned bytes
};

// One decode step of a layer between its projections: q, k and v are the convolution's inputs, out is the norm's
// output. The channels of the convolution are those of q, of k and of v, HV * kHeadDim each.
struct FusedDecodeParams : DecodeParams {
  ConvState conv_state;  // in the slots of initial_state
  Weights conv_weight;
  Weights conv_bias;  // null: 0
  TokenTensor norm_gate;  // [B, T, HV, V] bf16
  Weights norm_weight;  // [V]
  float norm_epsilon;
};

}  // namespace kda
