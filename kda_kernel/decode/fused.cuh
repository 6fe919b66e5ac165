// What the fused step does before and after the recurrence: the short convolution of q, k and v, and the gated RMSNorm.
//
// Each channel of the convolution's state belongs to one thread, and every block of the head needs all of q and k. From
// compute capability 9.0 on a head's blocks are a cluster: each has the channels and the values of its part, and writes
// what the others need into their shared memory. Before, a head is one block.
#pragma once

#include "decode/slots.cuh"
#include "decode/tile.cuh"
#include "decode/tokens.cuh"

namespace kda::decode {

// Of a head; so many as warps_per_block() makes of one for the bare step.
constexpr int kClusterBlocks = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kFusedBlocks = kClusterBlocks;
#else
constexpr int kFusedBlocks = 1;
#endif

constexpr int kConvStreams = 3;  // q, k, v
constexpr int kFusedWarps = kWarpsPerHead / kFusedBlocks;
constexpr int kFusedThreads = 32 * kFusedWarps;
constexpr int kFusedValues = kWarpValues * kFusedWarps;  // of a block, and its channels of each stream
constexpr int kNormLanes = kFusedValues / kShare;

using SharedOwn = SharedPart<kFusedValues>;  // of the block's values or channels

struct SharedNorm {
  SharedOwn scale[kGroup];                           // weight * sigmoid(gate)
  SharedOwn output[kGroup];                          // of the recurrence; before it, the weight
  SharedPart<kWarpsPerHead> squares[kGroup];         // sums over each of the head's warps' outputs
};

// Of each channel of the block, as they lie in memory.
struct SharedConv {
  uint2 weight[kConvStreams * kFusedValues];
  uint2 window[kConvStreams * kFusedValues];
  SharedOwn input[kConvStreams];  // of the first token, bf16
};

// What a head's blocks tell each other: every thread sends one channel of q or k of each token to all of them, and
// every warp the squares of its outputs. Before 9.0 there is but one block, whose own barrier will do.
struct HeadExchange {
  uint64_t mixed_barrier, squares_barrier;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // At the block's start, and before it sends anything. Both by all threads.
  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      barrier_init(smem_address(&mixed_barrier), 1);
      barrier_init(smem_address(&squares_barrier), 1);
      fence_barrier_init();
    }
    cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void wait_for_blocks() { cluster_wait(); }

  // By one thread, for each group of tokens.
  __device__ __forceinline__ void expect(int tokens) {
    barrier_arrive_expecting(smem_address(&mixed_barrier), tokens * static_cast<int>(2 * kHeadDim * sizeof(float)));
    barrier_arrive_expecting(smem_address(&squares_barrier), tokens * static_cast<int>(kWarpsPerHead * sizeof(float)));
  }

  __device__ __forceinline__ void send_mixed(float& target, float x) {
#pragma unroll
    for (int block = 0; block < kFusedBlocks; ++block) {
      store_remote(block, smem_address(&target), x, smem_address(&mixed_barrier));
    }
  }
  // By a warp.
  __device__ __forceinline__ void send_squares(float& target, float sum, int lane) {
    if (lane < kFusedBlocks) store_remote(lane, smem_address(&target), sum, smem_address(&squares_barrier));
  }

  // For what has been sent of the group. The block's own results are waited for, too.
  __device__ __forceinline__ void wait_for_mixed(int group) { barrier_wait_for_cluster(smem_address(&mixed_barrier), group & 1); }
  __device__ __forceinline__ void wait_for_squares(int group) {
    __syncthreads();
    barrier_wait_for_cluster(smem_address(&squares_barrier), group & 1);
  }
#else
  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void wait_for_blocks() {}
  __device__ __forceinline__ void expect(int) {}
  __device__ __forceinline__ void send_mixed(float& target, float x) { target = x; }
  __device__ __forceinline__ void send_squares(float& target, float sum, int lane) {
    if (lane == 0) target = sum;
  }
  __device__ __forceinline__ void wait_for_mixed(int) { __syncthreads(); }
  __device__ __forceinline__ void wait_for_squares(int) { __syncthreads(); }
#endif
};

__device__ __forceinline__ void store_float(void* data, FloatKind dtype, int64_t offset, float x) {
  if (dtype == FloatKind::kFloat32) {
    static_cast<float*>(data)[offset] = x;
  } else {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(x);
  }
}

// Four neighbouring bf16 in eight aligned bytes.
__device__ __forceinline__ void unpack_taps(float (&x)[kConvTaps], uint2 taps) {
  const float2 old = unpack_bf16(taps.x), recent = unpack_bf16(taps.y);
  x[0] = old.x, x[1] = old.y, x[2] = recent.x, x[3] = recent.y;
}

__host__ __device__ __forceinline__ bool packed_taps(const Weights& x) {
  return x.dtype == FloatKind::kBFloat16 && reinterpret_cast<uintptr_t>(x.data) % sizeof(uint2) == 0;
}

// Channel `c` of a block's: its part of q's, of k's and of v's. What lies packed is staged in shared memory, ahead of
// the state.
template <bool kPlain>
struct ConvChannel {
  const FusedDecodeParams& p;
  const int c, stream;
  const int own, d;       // of the stream, in the block's part and in the head
  const int64_t channel;  // of [3, HV, 128]
  const int head;

  __device__ __forceinline__ ConvChannel(const FusedDecodeParams& p, int head, int first_value, int c)
      : p(p),
        c(c),
        stream(c / kFusedValues),
        own(c % kFusedValues),
        d(first_value + own),
        channel((static_cast<int64_t>(stream) * p.num_heads + head) * kHeadDim + d),
        head(head) {}

  __device__ __forceinline__ const __nv_bfloat16* input_address(Tokens tokens, int32_t token) const {
    tokens.batch = opaque(tokens.batch), tokens.begin = opaque(tokens.begin);  // as in DecodeBlock::opaque_tokens()
    const TokenTensor& x = stream == 0 ? p.q : stream == 1 ? p.k : p.v;
    return static_cast<const __nv_bfloat16*>(x.data) + row_offset(x, tokens, token, head) + d;
  }
  __device__ __forceinline__ float input(const Tokens& tokens, int32_t token) const {
    return __bfloat162float(*input_address(tokens, token));
  }

  __device__ __forceinline__ int64_t state_offset(int64_t slot) const {
    return slot * p.conv_state.slot_stride + channel * p.conv_state.channel_stride;
  }

  // For the first group: of the inputs every fourth lane brings four, where they are aligned.
  __device__ __forceinline__ void stage(SharedConv& shared, const Tokens& tokens, int64_t start) const {
    const __nv_bfloat16* const source = input_address(tokens, 0);
    const bool aligned = kPlain || reinterpret_cast<uintptr_t>(source - d % 4) % sizeof(uint2) == 0;
    if (!aligned) {
      shared.input[stream].packed_values[own] = *source;
    } else if (d % 4 == 0) {
      cp_async<8>(&shared.input[stream].packed_fours[own / 4], source);
    }
    if (kPlain || packed_taps(p.conv_weight)) {
      cp_async<8>(&shared.weight[c], static_cast<const __nv_bfloat16*>(p.conv_weight.data) + channel * kConvTaps);
    }
    if (kPlain || p.conv_state.packed) {
      cp_async<8>(&shared.window[c], static_cast<const __nv_bfloat16*>(p.conv_state.data) + state_offset(start));
    }
  }

  __device__ __forceinline__ void weights(float (&weight)[kConvTaps], const SharedConv& shared) const {
    if (kPlain || packed_taps(p.conv_weight)) {
      unpack_taps(weight, shared.weight[c]);
    } else {
#pragma unroll
      for (int j = 0; j < kConvTaps; ++j) {
        weight[j] = load_float(p.conv_weight.data, p.conv_weight.dtype, channel * kConvTaps + j);
      }
    }
  }

  // The inputs before token `first`; the oldest of four is only there to be forgotten.
  __device__ __forceinline__ void window_before(float (&window)[kConvTaps], const SharedConv& shared,
                                                const Tokens& tokens, int64_t start, int32_t first) const {
    const ConvState& state = p.conv_state;
    if (first == 0 && (kPlain || state.packed)) return unpack_taps(window, shared.window[c]);
    window[0] = 0.0f;
#pragma unroll
    for (int j = 1; j < kConvTaps; ++j) {
      const int64_t offset = state_offset(start) + (state.width - kConvTaps + j) * state.tap_stride;
      window[j] = first == 0 ? load_float(state.data, state.dtype, offset) : input(tokens, first - kConvTaps + j);
    }
  }

  __device__ __forceinline__ void keep_window(const float (&window)[kConvTaps], int64_t slot) const {
    const ConvState& state = p.conv_state;
    if (kPlain || state.packed) {
      const uint2 taps = make_uint2(pack_bf16(window[0], window[1]), pack_bf16(window[2], window[3]));
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(state.data) + state_offset(slot)) = taps;
    } else {
#pragma unroll
      for (int j = 0; j < kConvTaps; ++j) {
        const int32_t tap = state.width - kConvTaps + j;
        if (tap >= 0) store_float(state.data, state.dtype, state_offset(slot) + tap * state.tap_stride, window[j]);
      }
    }
  }
};

// Calls f for the thread's channels: threadIdx.x, threadIdx.x + kFusedThreads, ... of the block's.
template <bool kPlain, class F>
__device__ __forceinline__ void for_channels(const FusedDecodeParams& p, int head, int first_value, F f) {
#pragma unroll 1
  for (int c = threadIdx.x; c < kConvStreams * kFusedValues; c += kFusedThreads) {
    f(ConvChannel<kPlain>(p, head, first_value, c));
  }
}

// silu(weight . window + bias)
__device__ __forceinline__ float conv_output(const float (&weight)[kConvTaps], const float (&window)[kConvTaps],
                                             float bias) {
  float y = bias;
#pragma unroll
  for (int j = 0; j < kConvTaps; ++j) y = fmaf(weight[j], window[j], y);
  return y * sigmoid(y);
}

// A channel of a group of tokens into `group`, and its state after each token that keeps one.
template <class Tile, bool kPlain>
__device__ __forceinline__ void convolve_channel(const ConvChannel<kPlain>& conv, const SharedConv& shared,
                                                 HeadExchange& exchange, SharedTokens& group, const Tokens& tokens,
                                                 int index, int64_t start, int32_t first, int count) {
  const FusedDecodeParams& p = conv.p;
  SharedVector* const output = conv.stream == 0 ? group.query : conv.stream == 1 ? group.key : group.value;
  const int place = conv.stream < 2 ? place_of<Tile>(conv.d) : conv.d;
  float next = first == 0 ? __bfloat162float(shared.input[conv.stream].packed_values[conv.own])
                          : conv.input(tokens, first);
  float weight[kConvTaps], window[kConvTaps];
  conv.weights(weight, shared);
  conv.window_before(window, shared, tokens, start, first);
  const float bias = !kPlain && p.conv_bias.data ? load_float(p.conv_bias.data, p.conv_bias.dtype, conv.channel) : 0.0f;

#pragma unroll 1
  for (int t = 0; t < count; ++t) {
#pragma unroll
    for (int j = 0; j + 1 < kConvTaps; ++j) window[j] = window[j + 1];
    window[kConvTaps - 1] = next;
    if (t + 1 < count) next = conv.input(tokens, first + t + 1);
    const float y = conv_output(weight, window, bias);
    if (conv.stream < 2) {
      exchange.send_mixed(output[t].values[place], y);
    } else {
      output[t].values[place] = y;
    }
    const int64_t slot = slot_after<kPlain>(p, index, start, first + t, first + t + 1 == tokens.length);
    if (slot >= 0) conv.keep_window(window, slot);
  }
}

// The gated norm of token `t` of the group in the block's values, by a warp.
template <bool kAligned>
__device__ __forceinline__ void stage_norm(const FusedDecodeParams& p, SharedNorm& norm, int t, const Tokens& tokens,
                                           int32_t token, int head, int first_value, int lane) {
  if (lane >= kNormLanes) return;
  const int64_t gate = row_offset(p.norm_gate, tokens, token, head) + first_value;
  stage_share(norm.scale[t], p.norm_gate.data, FloatKind::kBFloat16, gate, lane, kAligned);
  stage_share(norm.output[t], p.norm_weight.data, p.norm_weight.dtype, first_value, lane, kAligned);
}

__device__ __forceinline__ void prepare_norm(const FusedDecodeParams& p, SharedNorm& norm, int t, int lane) {
  Share gate = {}, weight = {}, scale;
  if (lane < kNormLanes) {
    read_staged(gate, norm.scale[t], FloatKind::kBFloat16, lane);
    read_staged(weight, norm.output[t], p.norm_weight.dtype, lane);
  }
  __syncwarp();  // all have read what is overwritten now
#pragma unroll
  for (int m = 0; m < kShare; ++m) scale[m] = weight[m] * sigmoid(gate[m]);
  if (lane < kNormLanes) store_share(norm.scale[t], scale, lane);
}

// An output of the recurrence, from the lanes that have one, and the sum of its warp's squares for all blocks.
__device__ __forceinline__ void keep_output(SharedNorm& norm, HeadExchange& exchange, int t, float o, bool has_output,
                                            int own_value, int warp_of_head, int lane) {
  if (has_output) norm.output[t].values[own_value] = o;
  const float sum = warp_sum(has_output ? o * o : 0.0f);
  exchange.send_squares(norm.squares[t].values[warp_of_head], sum, lane);
}

// out = o * rsqrt(mean(o^2) + epsilon) * weight * sigmoid(gate) of token `t` of the group, by a warp.
template <bool kPlain>
__device__ __forceinline__ void write_norm(const FusedDecodeParams& p, const SharedNorm& norm, int t,
                                           const Tokens& tokens, int32_t token, int head, int first_value, int lane) {
  if (lane >= kNormLanes) return;
  Share o, scale;
  read_share(o, norm.output[t], lane);
  read_share(scale, norm.scale[t], lane);
  float squares = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarpsPerHead; ++w) squares += norm.squares[t].values[w];
  const float factor = rsqrtf(squares * (1.0f / kHeadDim) + p.norm_epsilon);
  auto* const out = static_cast<__nv_bfloat16*>(const_cast<void*>(p.out.data)) +
                    row_offset(p.out, tokens, token, head) + first_value;
#pragma unroll
  for (int m = 0; m < kShare; ++m) o[m] *= factor * scale[m];
  if (kPlain || p.out_aligned) {
    reinterpret_cast<uint2*>(out)[lane] = make_uint2(pack_bf16(o[0], o[1]), pack_bf16(o[2], o[3]));
  } else {
#pragma unroll
    for (int m = 0; m < kShare; ++m) out[kShare * lane + m] = __float2bfloat16_rn(o[m]);
  }
}

}  // namespace kda::decode
