// What the fused step does before and after the recurrence: the short convolution of q, k and v, and the gated RMSNorm.
// A block has a whole head here, so each channel of the convolution's state belongs to one thread.
#pragma once

#include "decode/slots.cuh"
#include "decode/tokens.cuh"

namespace kda::decode {

constexpr int kConvStreams = 3;  // q, k, v

struct SharedNorm {
  SharedVector scale[kGroup];   // weight * sigmoid(gate)
  SharedVector output[kGroup];  // of the recurrence
};

__device__ __forceinline__ void store_float(void* data, FloatKind dtype, int64_t offset, float x) {
  if (dtype == FloatKind::kFloat32) {
    static_cast<float*>(data)[offset] = x;
  } else {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(x);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x)); }

// A channel of the convolution; window[kConvTaps - 1] is its newest input.
struct ConvChannel {
  float weight[kConvTaps];
  float bias;
  float window[kConvTaps];

  __device__ __forceinline__ void load_weight(const FusedDecodeParams& p, int64_t channel) {
#pragma unroll
    for (int j = 0; j < kConvTaps; ++j) {
      weight[j] = load_float(p.conv_weight.data, p.conv_weight.dtype, channel * kConvTaps + j);
    }
    bias = p.conv_bias.data ? load_float(p.conv_bias.data, p.conv_bias.dtype, channel) : 0.0f;
  }

  // The inputs before the first token; the oldest of four is only there to be forgotten.
  __device__ __forceinline__ void load_window(const ConvState& state, int64_t offset) {
    if (state.packed) {
      const uint2 taps = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(state.data) + offset);
      const float2 old = unpack_bf16(taps.x), recent = unpack_bf16(taps.y);
      window[1] = old.y, window[2] = recent.x, window[3] = recent.y;
      return;
    }
#pragma unroll
    for (int j = 1; j < kConvTaps; ++j) {
      window[j] = load_float(state.data, state.dtype, offset + (state.width - kConvTaps + j) * state.tap_stride);
    }
  }

  __device__ __forceinline__ void store_window(const ConvState& state, int64_t offset) const {
    if (state.packed) {
      const uint2 taps = make_uint2(pack_bf16(window[0], window[1]), pack_bf16(window[2], window[3]));
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(state.data) + offset) = taps;
      return;
    }
#pragma unroll
    for (int j = 0; j < kConvTaps; ++j) {
      const int32_t tap = state.width - kConvTaps + j;
      if (tap >= 0) store_float(state.data, state.dtype, offset + tap * state.tap_stride, window[j]);
    }
  }

  __device__ __forceinline__ void push(float x) {
#pragma unroll
    for (int j = 0; j + 1 < kConvTaps; ++j) window[j] = window[j + 1];
    window[kConvTaps - 1] = x;
  }

  // silu(weight . window + bias)
  __device__ __forceinline__ float output() const {
    float y = bias;
#pragma unroll
    for (int j = 0; j < kConvTaps; ++j) y = fmaf(weight[j], window[j], y);
    return y * sigmoid(y);
  }
};

// The convolution of a group of tokens into `group`, and its state after each token that keeps one. Channels are dealt
// out to the block's threads; called by all of them.
template <class Tile>
__device__ __forceinline__ void convolve_group(const FusedDecodeParams& p, SharedTokens& group, const Tokens& tokens,
                                               int index, int64_t start, int head, int32_t first, int count) {
#pragma unroll 1
  for (int c = threadIdx.x; c < kConvStreams * kHeadDim; c += blockDim.x) {
    const int stream = c / kHeadDim, d = c % kHeadDim;
    const TokenTensor& x = stream == 0 ? p.q : stream == 1 ? p.k : p.v;
    SharedVector* const output = stream == 0 ? group.query : stream == 1 ? group.key : group.value;
    const int place = stream < 2 ? place_of<Tile>(d) : d;
    const int64_t channel = (static_cast<int64_t>(stream) * p.num_heads + head) * kHeadDim + d;
    const auto input = [&](int32_t token) {
      Tokens here = tokens;  // opaque, as in the kernel's prepare_group()
      asm volatile("" : "+r"(here.batch), "+r"(here.begin));
      return load_float(x.data, FloatKind::kBFloat16, row_offset(x, here, token, head) + d);
    };

    ConvChannel conv;
    const int64_t state_offset = channel * p.conv_state.channel_stride;
    if (first == 0) {
      conv.load_window(p.conv_state, start * p.conv_state.slot_stride + state_offset);
    } else {
#pragma unroll
      for (int j = 1; j < kConvTaps; ++j) conv.window[j] = input(first - kConvTaps + j);
    }
    conv.load_weight(p, channel);

#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      conv.push(input(first + t));
      output[t].values[place] = conv.output();
      const int64_t slot = slot_after(p, index, start, first + t, first + t + 1 == tokens.length);
      if (slot >= 0) conv.store_window(p.conv_state, slot * p.conv_state.slot_stride + state_offset);
    }
  }
}

// Token `t` of the group, by a warp.
__device__ __forceinline__ void prepare_norm(const FusedDecodeParams& p, SharedNorm& norm, int t,
                                             const Tokens& tokens, int32_t token, int head, int lane) {
  Share gate;
  load_share(gate, p.norm_gate, FloatKind::kBFloat16, tokens, token, head, lane);
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    const float weight = load_float(p.norm_weight.data, p.norm_weight.dtype, lane + 32 * m);
    norm.scale[t].values[lane + 32 * m] = weight * sigmoid(gate[m]);
  }
}

// out = o * rsqrt(mean(o^2) + epsilon) * weight * sigmoid(gate) of token `t` of the group, by a warp.
__device__ __forceinline__ void write_norm(const FusedDecodeParams& p, const SharedNorm& norm, int t,
                                           const Tokens& tokens, int32_t token, int head, int lane) {
  Share o;
#pragma unroll
  for (int m = 0; m < kShare; ++m) o[m] = norm.output[t].values[lane + 32 * m];
  const float factor = rsqrtf(dot(o, o) * (1.0f / kHeadDim) + p.norm_epsilon);
  const int64_t offset = row_offset(p.out, tokens, token, head) + lane;
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    const float y = o[m] * factor * norm.scale[t].values[lane + 32 * m];
    store_float(const_cast<void*>(p.out.data), FloatKind::kBFloat16, offset + 32 * m, y);
  }
}

}  // namespace kda::decode
