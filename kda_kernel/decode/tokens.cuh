// What the recurrence needs of a token, prepared by one warp for the whole block: the decay of each channel, k and q
// after their normalisation (q with the scale), v, beta, and q . k.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "decode/slots.cuh"
#include "params.h"

namespace kda::decode {

// So many tokens are prepared at a time; a block of four warps has two for each of them.
constexpr int kGroup = 8;

constexpr int kFours = kHeadDim / 4;
constexpr int kShare = kHeadDim / 32;  // a lane's channels of a token: lane, lane + 32, ...
constexpr float kNormEpsilon = 1e-6f;

using Share = float[kShare];

// A vector of one token in shared memory; those over K in the order of Tile::place_of_four.
union SharedVector {
  float4 fours[kFours];
  float values[kHeadDim];
};

struct SharedTokens {
  SharedVector decay[kGroup];
  SharedVector key[kGroup];
  SharedVector query[kGroup];
  SharedVector value[kGroup];
  float beta[kGroup];
  float query_key[kGroup];
};

// Where channel k stands in a vector over K.
template <class Tile>
__device__ __forceinline__ int place_of(int k) {
  return Tile::place_of_four(k / 4) * 4 + k % 4;
}

__device__ __forceinline__ float load_float(const void* data, FloatKind dtype, int64_t offset) {
  return dtype == FloatKind::kFloat32 ? static_cast<const float*>(data)[offset]
                                      : __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
}

// Element by element, so that a row may start anywhere: a token is read by one warp alone.
__device__ __forceinline__ void load_share(Share& share, const TokenTensor& x, FloatKind dtype,
                                           const Tokens& tokens, int32_t token, int head, int lane) {
  const int64_t offset = row_offset(x, tokens, token, head) + lane;
#pragma unroll
  for (int m = 0; m < kShare; ++m) share[m] = load_float(x.data, dtype, offset + 32 * m);
}

__device__ __forceinline__ float dot(const Share& x, const Share& y) {
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < kShare; ++m) sum = fmaf(x[m], y[m], sum);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

template <GateKind kGate>
__device__ __forceinline__ void activate_gate(Share& g, const DecodeParams& p, int head, int lane) {
  const GateScale scale = make_gate_scale<kGate>(p.A_log ? p.A_log[head] : 0.0f, p.lower_bound);
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    const float bias = p.dt_bias ? p.dt_bias[head * kHeadDim + lane + 32 * m] : 0.0f;
    g[m] = exp2_approx(log2_decay<kGate>(g[m], bias * scale.input, scale));
  }
}

// From the gate's input to the decay.
__device__ __forceinline__ void activate_gate(Share& g, const DecodeParams& p, int head, int lane) {
  switch (p.gate) {
    case GateKind::kLowerBound:
      return activate_gate<GateKind::kLowerBound>(g, p, head, lane);
    case GateKind::kSoftplus:
      return activate_gate<GateKind::kSoftplus>(g, p, head, lane);
    case GateKind::kPreActivated:
      return activate_gate<GateKind::kPreActivated>(g, p, head, lane);
  }
}

template <class Tile>
__device__ __forceinline__ void store_share(SharedVector& target, const Share& share, int lane) {
#pragma unroll
  for (int m = 0; m < kShare; ++m) target.values[place_of<Tile>(lane + 32 * m)] = share[m];
}

// Token `t` of the group, by a warp. With kInShared q, k and v stand in `group` already, v for good.
template <class Tile, bool kInShared>
__device__ __forceinline__ void prepare_token(const DecodeParams& p, SharedTokens& group, int t,
                                              const Tokens& tokens, int32_t token, int head, int lane) {
  Share q, k, g;
  load_share(g, p.g, p.g_dtype, tokens, token, head, lane);
  const float beta = load_float(p.beta.data, p.beta_dtype, row_offset(p.beta, tokens, token, head));
  if constexpr (kInShared) {
#pragma unroll
    for (int m = 0; m < kShare; ++m) {
      q[m] = group.query[t].values[place_of<Tile>(lane + 32 * m)];
      k[m] = group.key[t].values[place_of<Tile>(lane + 32 * m)];
    }
  } else {
    Share v;
    load_share(q, p.q, FloatKind::kBFloat16, tokens, token, head / p.heads_per_qk, lane);
    load_share(k, p.k, FloatKind::kBFloat16, tokens, token, head / p.heads_per_qk, lane);
    load_share(v, p.v, FloatKind::kBFloat16, tokens, token, head, lane);
#pragma unroll
    for (int m = 0; m < kShare; ++m) group.value[t].values[lane + 32 * m] = v[m];
  }

  float query_factor = p.scale, key_factor = 1.0f;
  if (p.l2norm_qk) {
    query_factor *= rsqrtf(dot(q, q) + kNormEpsilon);
    key_factor = rsqrtf(dot(k, k) + kNormEpsilon);
  }
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    q[m] *= query_factor;
    k[m] *= key_factor;
  }
  const float query_key = dot(q, k);
  store_share<Tile>(group.query[t], q, lane);
  store_share<Tile>(group.key[t], k, lane);
  activate_gate(g, p, head, lane);
  store_share<Tile>(group.decay[t], g, lane);
  if (lane == 0) {
    group.beta[t] = activate_beta(beta, p.sigmoid_beta, p.neg_eigval);
    group.query_key[t] = query_key;
  }
}

}  // namespace kda::decode
