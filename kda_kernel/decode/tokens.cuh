// What the recurrence needs of a token, prepared by one warp for the whole block: the decay of each channel, k and q
// after their normalisation (q with the scale), v, beta, and q . k.
#pragma once

#include "common/ptx.cuh"
#include "decode/slots.cuh"
#include "params.h"

namespace kda::decode {

// So many tokens are prepared at a time; a block of four warps has two for each of them.
constexpr int kGroup = 8;

constexpr int kFours = kHeadDim / 4;
constexpr int kShare = kHeadDim / 32;  // a lane's channels of a token: kShare * lane and those behind it
constexpr float kNormEpsilon = 1e-6f;

using Share = float[kShare];

// A vector of one token in shared memory, or a part of it; those over K in the order of Tile::place_of_four.
template <int kSize>
union SharedPart {
  float4 fours[kSize / 4];
  float values[kSize];
  uint2 packed_fours[kSize / 4];  // as loaded, where that is in bf16
  __nv_bfloat16 packed_values[kSize];
};
using SharedVector = SharedPart<kHeadDim>;

struct SharedTokens {
  SharedVector decay[kGroup];
  SharedVector key[kGroup];
  SharedVector query[kGroup];
  SharedVector value[kGroup];
  uint32_t beta_word[kGroup];
  uint32_t A_log_word[kGroup];
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

template <class Vector>
__device__ __forceinline__ void store_share(Vector& target, const Share& x, int four) {
  target.fours[four] = make_float4(x[0], x[1], x[2], x[3]);
}

template <class Vector>
__device__ __forceinline__ void read_share(Share& x, const Vector& source, int four) {
  const float4 y = source.fours[four];
  x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

// Brings a lane's share of a row to where the same lane finds it after cp_async_wait_all(): shared memory, since the
// state on its way has taken the registers. A row may start anywhere, but only an aligned one is not waited for here;
// `aligned`: known to be one.
template <class Vector>
__device__ __forceinline__ void stage_share(Vector& target, const void* data, FloatKind dtype, int64_t offset, int lane,
                                            bool aligned) {
  if (dtype == FloatKind::kFloat32) {
    const float* const source = static_cast<const float*>(data) + offset + kShare * lane;
    const bool on_sixteen = reinterpret_cast<uintptr_t>(source) % sizeof(float4) == 0;
    if (aligned || on_sixteen) return cp_async<16>(&target.fours[lane], source);
#pragma unroll
    for (int m = 0; m < kShare; ++m) target.values[kShare * lane + m] = source[m];
  } else {
    const auto* const source = static_cast<const __nv_bfloat16*>(data) + offset + kShare * lane;
    if (aligned || reinterpret_cast<uintptr_t>(source) % sizeof(uint2) == 0) {
      return cp_async<8>(&target.packed_fours[lane], source);
    }
#pragma unroll
    for (int m = 0; m < kShare; ++m) target.packed_values[kShare * lane + m] = source[m];
  }
}

template <class Vector>
__device__ __forceinline__ void read_staged(Share& x, const Vector& source, FloatKind dtype, int lane) {
  if (dtype == FloatKind::kFloat32) return read_share(x, source, lane);
  const uint2 y = source.packed_fours[lane];
  const float2 low = unpack_bf16(y.x), high = unpack_bf16(y.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

// Brings the word that holds a number; from_word() takes the number out. No allocation begins inside a word, but one may
// end there: without `goes_on`, what lies behind the number is not touched, and the number is waited for.
__device__ __forceinline__ void stage_word(uint32_t& target, const void* data, FloatKind dtype, int64_t offset,
                                           bool goes_on) {
  const int size = dtype == FloatKind::kFloat32 ? 4 : 2;
  const char* const source = static_cast<const char*>(data) + offset * size;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(source) % 4);
  if (before + size == 4 || goes_on) return cp_async<4>(&target, source - before);
  target = *reinterpret_cast<const uint16_t*>(source);
}

__device__ __forceinline__ float from_word(uint32_t word, const void* data, FloatKind dtype, int64_t offset) {
  if (dtype == FloatKind::kFloat32) return __uint_as_float(word);
  const bool high = reinterpret_cast<uintptr_t>(static_cast<const __nv_bfloat16*>(data) + offset) % 4 != 0;
  const float2 pair = unpack_bf16(word);
  return high ? pair.y : pair.x;
}

// Token `t` of the group, by a warp, which gets the head's dt_bias too. With kInShared q, k and v come from elsewhere.
template <bool kInShared, bool kAligned>
__device__ __forceinline__ void stage_token(const DecodeParams& p, SharedTokens& group, SharedVector& dt_bias, int t,
                                            const Tokens& tokens, int32_t token, int head, int lane) {
  if constexpr (!kInShared) {
    const int qk_head = head / p.heads_per_qk;
    stage_share(group.query[t], p.q.data, FloatKind::kBFloat16, row_offset(p.q, tokens, token, qk_head), lane,
                kAligned);
    stage_share(group.key[t], p.k.data, FloatKind::kBFloat16, row_offset(p.k, tokens, token, qk_head), lane,
                kAligned);
    stage_share(group.value[t], p.v.data, FloatKind::kBFloat16, row_offset(p.v, tokens, token, head), lane,
                kAligned);
  }
  stage_share(group.decay[t], p.g.data, p.g_dtype, row_offset(p.g, tokens, token, head), lane, kAligned);
  if (p.dt_bias) stage_share(dt_bias, p.dt_bias, FloatKind::kFloat32, head * kHeadDim, lane, kAligned);
  if (lane == 0) {
    const bool goes_on = p.beta.head_stride == 1 && head + 1 < p.num_heads;
    stage_word(group.beta_word[t], p.beta.data, p.beta_dtype, row_offset(p.beta, tokens, token, head), goes_on);
    if (p.A_log) stage_word(group.A_log_word[t], p.A_log, FloatKind::kFloat32, head, true);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

__device__ __forceinline__ float dot(const Share& x, const Share& y) {
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < kShare; ++m) sum = fmaf(x[m], y[m], sum);
  return warp_sum(sum);
}

// Prefill's approximations (common/gate.cuh) will not do here: an error in the decay that leans to one side is one for
// each step of a slow decay's memory, and 2^-26 of it would outweigh all rounding of a float32 state.
__device__ __forceinline__ float sigmoid(float x) { return __frcp_rn(1.0f + expf(-x)); }

// The identity above 20: exp(-20) is below half an ulp of 20.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// exp(x) to half an ulp where a decay is slow.
__device__ __forceinline__ float decay(float log_decay) {
  return log_decay > -0.5f ? 1.0f + expm1f(log_decay) : expf(log_decay);
}

// From the gate's input to the decay.
__device__ __forceinline__ void activate_gate(Share& g, const Share& dt_bias, float A_log, GateKind kind,
                                              float lower_bound) {
  const float rate = kind == GateKind::kPreActivated ? 1.0f : expf(A_log);
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    float log_decay = g[m];
    if (kind == GateKind::kLowerBound) {
      log_decay = lower_bound * sigmoid(rate * (g[m] + dt_bias[m]));
    } else if (kind == GateKind::kSoftplus) {
      log_decay = -rate * softplus(g[m] + dt_bias[m]);
    }
    g[m] = decay(log_decay);
  }
}

__device__ __forceinline__ float activate_beta(float beta, bool apply_sigmoid, bool neg_eigval) {
  if (!apply_sigmoid) return beta;
  return neg_eigval ? 2.0f * sigmoid(beta) : sigmoid(beta);
}

// The decay of token `t` of the group, by the warp that staged the token; first of all.
template <class Tile>
__device__ __forceinline__ void prepare_decay(const DecodeParams& p, SharedTokens& group, const SharedVector& bias,
                                              int t, int lane) {
  Share g, dt_bias = {};
  cp_async_wait_all();
  __syncwarp();
  read_staged(g, group.decay[t], p.g_dtype, lane);
  if (p.dt_bias) read_staged(dt_bias, bias, FloatKind::kFloat32, lane);
  const float A_log = p.A_log ? __uint_as_float(group.A_log_word[t]) : 0.0f;
  activate_gate(g, dt_bias, A_log, p.gate, p.lower_bound);
  __syncwarp();  // all have read what is overwritten now
  store_share(group.decay[t], g, Tile::place_of_four(lane));
}

// The rest, by the same warp. With kInShared q, k and v stand in `group` already, v for good.
template <class Tile, bool kInShared>
__device__ __forceinline__ void prepare_token(const DecodeParams& p, SharedTokens& group, int t,
                                              const Tokens& tokens, int32_t token, int head, int lane) {
  const int four = Tile::place_of_four(lane);
  Share q, k;
  if constexpr (kInShared) {
    read_share(q, group.query[t], four);
    read_share(k, group.key[t], four);
    __syncwarp();
  } else {
    Share v;
    read_staged(q, group.query[t], FloatKind::kBFloat16, lane);
    read_staged(k, group.key[t], FloatKind::kBFloat16, lane);
    read_staged(v, group.value[t], FloatKind::kBFloat16, lane);
    __syncwarp();
    store_share(group.value[t], v, lane);
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
  store_share(group.query[t], q, four);
  store_share(group.key[t], k, four);
  if (lane == 0) {
    const int64_t offset = row_offset(p.beta, tokens, token, head);
    const float beta = from_word(group.beta_word[t], p.beta.data, p.beta_dtype, offset);
    group.beta[t] = activate_beta(beta, p.sigmoid_beta, p.neg_eigval);
    group.query_key[t] = query_key;
  }
}

}  // namespace kda::decode
