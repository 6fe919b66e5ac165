// What the operators around the delta rule are given. Plain C++, no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "params.h"

namespace kda {

// Channels that a thread takes at a time, 16 bytes of bf16: the channels of q, of k and of v are multiples of it.
constexpr int kChannelVector = 8;

// A [B, T, C] tensor with a contiguous last dimension; strides in elements.
struct ChannelTensor {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t channels;
};

// The inputs before (or up to) some token, oldest first, [N, C, columns] in the dtype of x, any strides; data may be
// null: zeros.
struct ConvInputs {
  void* data;
  int64_t sequence_stride;
  int64_t channel_stride;
  int64_t column_stride;
  int64_t columns;
};

// y_t = SiLU(bias + sum_j weight[:, j] x_{t - (width - 1) + j}), channel by channel of q|k|v.
struct ShortConvParams {
  ChannelTensor x[3];  // q, k, v
  ChannelTensor y[3];  // the same of the results
  const void* weight;  // [C, width], contiguous
  const void* bias;    // [C], null: 0
  FloatKind dtype;     // of x and y; bf16 on a GPU
  FloatKind weight_dtype;
  FloatKind bias_dtype;
  ConvInputs initial_state;
  ConvInputs final_state;  // may be initial_state itself
  SequenceBounds cu_seqlens;

  int64_t num_sequences;  // N
  int64_t num_rows;       // B
  int64_t num_tokens;     // T
  int32_t width;          // taps, 2 to 4
  bool aligned;           // every row of x and y, weight and bias start at a multiple of 16 bytes
};

// out = x rsqrt(mean(x^2) + eps) weight act(gate) over the last dimension, kHeadDim; act is the sigmoid or SiLU.
struct GatedNormParams {
  TokenTensor x;
  TokenTensor gate;
  TokenTensor out;
  const void* weight;  // [kHeadDim]
  FloatKind dtype;     // of x, gate and out; bf16 on a GPU
  FloatKind weight_dtype;
  int64_t num_rows;  // B
  int64_t num_tokens;
  int64_t num_heads;
  float eps;
  bool silu;
  bool aligned;  // every row of x, gate and out, and weight, start at a multiple of 16 bytes
};

}  // namespace kda
