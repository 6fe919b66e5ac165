// The decode kernel: a sequence's one or few tokens at one value head, or at a part of its values.
//
// A block reads its part of the state into registers, runs the tokens, and writes the part back; all else is small and
// hides behind that. Up to kGroup tokens at a time are prepared by one warp each (tokens.cuh) and then run by every
// warp on its own 16 values (recurrence.cuh). docs/decode.md says how the pieces fit.
#pragma once

#include <type_traits>

#include "decode/fused.cuh"
#include "decode/recurrence.cuh"
#include "decode/slots.cuh"
#include "decode/tile.cuh"
#include "decode/tokens.cuh"

namespace kda::decode {

constexpr int kMaxThreads = 32 * kWarpsPerHead;

// Registers for 16 warps an SM, 128 a thread: two heads' states, 128 KB of loads in flight in fp32. About 20 KB would
// keep 3 TB/s busy through 800 ns of latency; the rest covers the time that blocks spend starting, computing, storing.
constexpr int kHeadsPerSm = 2;

template <bool kFused>
using ParamsFor = std::conditional_t<kFused, FusedDecodeParams, DecodeParams>;

inline bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

inline bool rows_aligned(const TokenTensor& x) {
  return is_aligned(x.data, 16) && (x.batch_stride | x.token_stride | x.head_stride) % 8 == 0;
}

// Plain calls, the usual ones, have a kernel of their own, in which nothing but the state is loaded into registers once
// that is on its way: a warp that waits for any register may have to wait for the state as well.
inline bool is_plain(const DecodeParams& p) {
  return p.inputs_aligned && p.cu_seqlens.data == nullptr && p.slots_per_sequence == 0 && is_aligned(p.dt_bias, 16);
}

inline bool is_plain(const FusedDecodeParams& p) {
  return is_plain(static_cast<const DecodeParams&>(p)) && p.out_aligned && p.conv_state.packed &&
         packed_taps(p.conv_weight) && p.conv_bias.data == nullptr && rows_aligned(p.norm_gate) &&
         is_aligned(p.norm_weight.data, 16);
}

template <class Elem, bool kVFirst, bool kFused, bool kPlain>
struct DecodeBlock {
  using Params = ParamsFor<kFused>;
  using T = Tile<Elem, kVFirst>;

  struct Shared {
    SharedTokens group;
    SharedVector dt_bias[kFused ? kFusedWarps : kWarpsPerHead];  // for each warp
    std::conditional_t<kFused, SharedNorm, char> norm;
    std::conditional_t<kFused, SharedConv, char> conv;
    std::conditional_t<kFused, HeadExchange, char> exchange;
  };

  const Params& p;
  Shared& shared;
  const int index;  // of the sequence
  const int head;
  const int first_value;  // of the block
  const int warp, lane;
  Tokens tokens;

  static __device__ __forceinline__ float nan() { return __int_as_float(0x7fffffff); }
  __device__ __forceinline__ int warps() const { return blockDim.x / 32; }
  __device__ __forceinline__ int warp_value() const { return first_value + kWarpValues * warp; }

  // This lane's first piece of a slot's state.
  __device__ __forceinline__ Elem* lane_state(const StatePool& pool, int64_t slot) const {
    const int64_t head_offset = static_cast<int64_t>(head) * (kHeadDim * kHeadDim);
    return static_cast<Elem*>(pool.data) + slot * pool.slot_stride + head_offset + T::lane_offset(warp_value(), lane);
  }

  __device__ __forceinline__ __nv_bfloat16* out_row(const Tokens& tokens, int32_t token) const {
    auto* out = static_cast<__nv_bfloat16*>(const_cast<void*>(p.out.data));
    return out + row_offset(p.out, tokens, token, head);
  }

  // Every step-th token's output from `first` on, in the block's values.
  __device__ void fill_output(const Tokens& tokens, int32_t first, int32_t step, float x) const {
    for (int64_t t = first; t < tokens.length; t += step) {
      for (int e = threadIdx.x; e < warps() * kWarpValues; e += blockDim.x) {
        out_row(tokens, static_cast<int32_t>(t))[first_value + e] = __float2bfloat16_rn(x);
      }
    }
  }

  __device__ void fill_final_state(float x) const {
    if (p.final_state.data == nullptr) return;
    typename T::Values s;
    T::fill(s, x);
    T::store(lane_state(p.final_state, index), s);
  }

  // What a call with invalid cu_seqlens gives: NaN in out and final_state. The blocks of a head share the tokens.
  __device__ void poison() const {
    const Tokens all{.batch = 0, .begin = 0, .length = static_cast<int32_t>(p.num_tokens)};
    fill_output(all, index, static_cast<int32_t>(p.num_sequences), nan());
    fill_final_state(nan());
  }

  // Keeps the state after a token, if that has a slot.
  __device__ __forceinline__ void keep(const typename T::Values& s, int64_t start, int32_t token, bool last) const {
    const int64_t slot = slot_after<kPlain>(p, index, start, token, last);
    const StatePool& pool = p.inplace ? p.initial_state : p.final_state;
    if (slot >= 0 && pool.data != nullptr) T::store(lane_state(pool, slot), s);
  }

  __device__ __forceinline__ int group_size(int32_t first) const { return min(kGroup, tokens.length - first); }

  // The first token of a group that this warp prepares. Of a fused step's warps the first half has more of the
  // convolution.
  __device__ __forceinline__ int warp_token() const { return kFused ? warp ^ (kFusedWarps / 2) : warp; }

  // A fused step's copies take so many instructions that the memory would wait for them: of the first half of its warps,
  // which have no part in a call of one token but the convolution's, the state is on its way first. That of the others
  // comes behind the copies, so that there is time for what is done with these.
  __device__ __forceinline__ bool loads_first() const { return kFused && kPlain && warp < kFusedWarps / 2; }

  // Opaque, so that nothing of a row's address is kept from token to token: the state has taken the registers.
  __device__ __forceinline__ Tokens opaque_tokens() const {
    Tokens here = tokens;
    here.batch = opaque(here.batch), here.begin = opaque(here.begin);
    return here;
  }

  __device__ __forceinline__ void stage(int t, int32_t first) const {
    const Tokens here = opaque_tokens();
    stage_token<kFused, kPlain>(p, shared.group, shared.dt_bias[warp], t, here, first + t, head, lane);
    if constexpr (kFused) stage_norm<kPlain>(p, shared.norm, t, here, first + t, head, first_value, lane);
  }

  // What the preparation of a group starts with, on its way to shared memory. Not to registers: a warp that waits for
  // a register in flight may have to wait for the state too.
  __device__ __forceinline__ void stage_group(const StartSlot& start, int32_t first) const {
    if (warp_token() < group_size(first)) stage(warp_token(), first);
    if constexpr (kFused) {
      if (first == 0 && tokens.length > 0 && start.kind == RowKind::kLive) {
        for_channels<kPlain>(p, head, first_value,
                             [&](const auto& channel) { channel.stage(shared.conv, tokens, start.slot); });
      }
    }
  }

  // The group's tokens into shared memory.
  __device__ __forceinline__ void prepare_group(int64_t start, int32_t first) {
    const int count = group_size(first);
    if constexpr (kFused) {
      cp_async_wait_all();
      __syncwarp();  // inputs come by other lanes' copies
      if (threadIdx.x == 0) shared.exchange.expect(count);
      for_channels<kPlain>(p, head, first_value, [&](const auto& channel) {
        convolve_channel<T>(channel, shared.conv, shared.exchange, shared.group, tokens, index, start, first, count);
      });
    }
    int t = warp_token();
#pragma unroll 1
    do {
      if (t < count) {
        prepare_decay<T>(p, shared.group, shared.dt_bias[warp], t, lane);
        if constexpr (kFused) prepare_norm(p, shared.norm, t, lane);
      }
      // only now, by all warps in their first round: what other threads convolve is on its way meanwhile
      if constexpr (kFused) {
        if (t < warps()) shared.exchange.wait_for_mixed(first / kGroup);
      }
      if (t < count) prepare_token<T, kFused>(p, shared.group, t, opaque_tokens(), first + t, head, lane);
      t += warps();
      if (t < count) stage(t, first);
    } while (t < count);
    __syncthreads();
  }

  __device__ __forceinline__ void run_group(typename T::Values& s, int64_t start, int32_t first) {
    const int count = group_size(first);
    const int value = warp_value() + Recurrence<T>::output_value(lane);
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      const float o = Recurrence<T>::step(s, shared.group, t, warp_value(), lane);
      const bool has_output = Recurrence<T>::has_output(lane);
      if constexpr (kFused) {
        const int warp_of_head = warp_value() / kWarpValues;
        keep_output(shared.norm, shared.exchange, t, o, has_output, value - first_value, warp_of_head, lane);
      } else if (has_output) {
        out_row(tokens, first + t)[value] = __float2bfloat16_rn(o);
      }
      keep(s, start, first + t, first + t + 1 == tokens.length);
    }
    if constexpr (kFused) {
      shared.exchange.wait_for_squares(first / kGroup);
      for (int t = warp; t < count; t += warps()) {
        write_norm<kPlain>(p, shared.norm, t, tokens, first + t, head, first_value, lane);
      }
    }
  }

  __device__ __forceinline__ void run() {
    if constexpr (kFused) shared.exchange.begin();
    tokens = find_tokens(p, index);
    const StartSlot start = start_slot(p, index);
    const bool loads = start.kind == RowKind::kLive && p.initial_state.data != nullptr;
    typename T::Values s;
    if (!loads) T::fill(s, 0.0f);
    if (loads && loads_first()) T::load(s, lane_state(p.initial_state, start.slot));
    stage_group(start, 0);
    if (loads && !loads_first()) T::load(s, lane_state(p.initial_state, start.slot));
    if constexpr (kFused) shared.exchange.wait_for_blocks();

    if (!kPlain && p.cu_seqlens.data != nullptr && !sequences_valid(p.cu_seqlens, p.num_sequences, p.num_tokens)) {
      poison();
      return;
    }
    const bool live = start.kind == RowKind::kLive &&
                      (kPlain || p.slots_per_sequence == 0 || token_slots_valid(p, index, tokens.length));
    if (!live) {
      const float x = start.kind == RowKind::kPadding ? 0.0f : nan();
      fill_output(tokens, 0, 1, x);
      fill_final_state(x);
      return;
    }

    if (tokens.length == 0) {
      T::unpack(s);
      if (!p.inplace) keep(s, start.slot, 0, true);
      return;
    }
    for (int32_t first = 0; first < tokens.length; first += kGroup) {
      if (first > 0) {
        __syncthreads();  // the group before has been read
        stage_group(start, first);
      }
      prepare_group(start.slot, first);
      if (first == 0) T::unpack(s);
      run_group(s, start.slot, first);
    }
  }
};

template <class Elem, bool kVFirst, bool kFused, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, kHeadsPerSm)
    kda_decode_kernel(const __grid_constant__ ParamsFor<kFused> p) {
  using Block = DecodeBlock<Elem, kVFirst, kFused, kPlain>;
  const int64_t index = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if (index >= p.num_sequences) return;
  const unsigned first_value = blockIdx.x * (blockDim.x / 32 * kWarpValues);  // of [HV, V]
  Block block{.p = p,
              .shared = block_shared<typename Block::Shared>(),
              .index = static_cast<int>(index),
              .head = static_cast<int>(first_value / kHeadDim),
              .first_value = static_cast<int>(first_value % kHeadDim),
              .warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0),  // uniform to the compiler
              .lane = static_cast<int>(threadIdx.x % 32),
              .tokens = {}};
  block.run();
}

}  // namespace kda::decode
