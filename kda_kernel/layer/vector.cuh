// Eight channels of a token, 16 bytes of bf16, and what the operators around the delta rule do with them.
#pragma once

#include <cuda_bf16.h>

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "layer/layer_params.h"

namespace kda::layer {

struct Floats {
  float at[kChannelVector];
};

// kAligned: `source` is a multiple of 16 bytes.
template <bool kAligned>
__device__ __forceinline__ uint4 load_raw(const __nv_bfloat16* source) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(source);
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(source);
    auto pair = [&](int i) { return bits[i] | static_cast<uint32_t>(bits[i + 1]) << 16; };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
}

__device__ __forceinline__ Floats to_floats(uint4 raw) {
  const float2 x = unpack_bf16(raw.x), y = unpack_bf16(raw.y), z = unpack_bf16(raw.z), w = unpack_bf16(raw.w);
  return {x.x, x.y, y.x, y.y, z.x, z.y, w.x, w.y};
}

template <bool kAligned>
__device__ __forceinline__ void store(__nv_bfloat16* target, const Floats& x) {
  const uint4 raw = make_uint4(pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]),
                               pack_bf16(x.at[6], x.at[7]));
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(target) = raw;
  } else {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    auto* bits = reinterpret_cast<uint16_t*>(target);
#pragma unroll
    for (int i = 0; i < kChannelVector; ++i) bits[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
}

// Eight numbers of either dtype from `index` on; kAligned: they start at a multiple of 16 bytes.
template <bool kAligned>
__device__ __forceinline__ Floats load_as(FloatKind dtype, const void* data, int64_t index) {
  if (dtype == FloatKind::kBFloat16) {
    return to_floats(load_raw<kAligned>(static_cast<const __nv_bfloat16*>(data) + index));
  }
  const float* source = static_cast<const float*>(data) + index;
  Floats x;
  if constexpr (kAligned) {
    const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
    x = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  } else {
#pragma unroll
    for (int i = 0; i < kChannelVector; ++i) x.at[i] = source[i];
  }
  return x;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x)); }

}  // namespace kda::layer
