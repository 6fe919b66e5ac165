// The factor warps: everything of a chunk that does not depend on the state, in one warp's registers.
//
// Tokens i, j of the chunk, channels d; a = exp(log decay). The decay tree (levels L = 1, 2, 4, 8) keeps per token
//   pre    the product of a from the start of the token's group through the token
//   suf    the product of a after the token to the end of its group
//   total  the product of a over the group
// and never divides: every factor is a product of numbers in (0, 1], so underflow is a correct zero. At level L the
// rows of the upper half of each group of 2L tokens meet the columns of its lower half:
//   Akk[i, j] = beta_i sum_d (k_i pre_i)_d (k_j suf_j)_d,      Aqk[i, j] = sum_d (q_i pre_i)_d (k_j suf_j)_d
//
// Fragment of a 16 x 16 block, element e = 4 h + 2 r + x of a lane: token lane / 4 + 8 r, channel 8 h + 2 (lane % 4) + x.
// Groups of up to 8 tokens are lanes 4, 8, 16 apart; the last level joins r = 0 and r = 1 inside the lane.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "prefill/load.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr int kLaneLevels = 3;            // L = 1, 2, 4 across lanes
constexpr int kChannelBlocks = kHeadDim / 16;
constexpr float kL2NormEpsilon = 1e-6f;  // x * rsqrt(sum x^2 + eps), the models' own

// Sums of the masked products. Rows 0-7 of an MMA carry k, rows 8-15 carry q, of the same eight tokens.
struct PairSums {
  float lane_level[kLaneLevels][2][4] = {};  // [level][r]: tokens of group r against each other
  float top[4] = {};                         // tokens 8-15 against tokens 0-7
  float diagonal[2] = {};                    // q_i . k_i, this lane's channels
};

__device__ __forceinline__ void unpack_block(float (&x)[8], const uint32_t (&packed)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = unpack_bf16(packed[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void scale_and_pack(uint32_t (&packed)[4], const float (&x)[8], const float (&factor)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed[i] = pack_bf16(x[2 * i] * factor[2 * i], x[2 * i + 1] * factor[2 * i + 1]);
  }
}

// Per token: the factor that normalises its row, 1 / |x|, summed over the row's 128 channels in fp32.
__device__ __forceinline__ void row_norms(float (&q_scale)[2], float (&k_scale)[2], uint32_t q_block,
                                          uint32_t k_block) {
  float q_sum[2] = {}, k_sum[2] = {};
#pragma unroll 2
  for (int block = 0; block < kChannelBlocks; ++block) {
    uint32_t packed[4];
    float x[8];
    ldmatrix_x4(packed, q_block + block * kBlockBytes);
    unpack_block(x, packed);
#pragma unroll
    for (int e = 0; e < 8; ++e) q_sum[(e >> 1) & 1] += x[e] * x[e];
    ldmatrix_x4(packed, k_block + block * kBlockBytes);
    unpack_block(x, packed);
#pragma unroll
    for (int e = 0; e < 8; ++e) k_sum[(e >> 1) & 1] += x[e] * x[e];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      q_sum[r] += __shfl_xor_sync(~0u, q_sum[r], lanes);
      k_sum[r] += __shfl_xor_sync(~0u, k_sum[r], lanes);
    }
    q_scale[r] *= rsqrtf(q_sum[r] + kL2NormEpsilon);
    k_scale[r] *= rsqrtf(k_sum[r] + kL2NormEpsilon);
  }
}

// One level across lanes: the masked MMAs of both groups of eight tokens, then the two halves merge.
__device__ __forceinline__ void lane_level(PairSums& sums, int level, const float (&q)[8], const float (&k)[8],
                                           float (&pre)[8], float (&suf)[8], float (&total)[8], bool upper) {
  float factor[8];
  uint32_t q_rows[4], k_rows[4];
#pragma unroll
  for (int e = 0; e < 8; ++e) factor[e] = upper ? pre[e] : suf[e];
  scale_and_pack(q_rows, q, factor);
  scale_and_pack(k_rows, k, factor);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t rows[4] = {k_rows[r], q_rows[r], k_rows[2 + r], q_rows[2 + r]};
    mma_bf16(sums.lane_level[level][r], rows, k_rows[r], k_rows[2 + r]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float other = __shfl_xor_sync(~0u, total[e], 4 << level);
    if (upper) {
      pre[e] *= other;
    } else {
      suf[e] *= other;
    }
    total[e] *= other;
  }
}

// The last level, tokens 8-15 against 0-7; leaves pre = exp(G_i), suf = exp(G_C - G_j) and the chunk's total.
__device__ __forceinline__ void top_level(PairSums& sums, const float (&q)[8], const float (&k)[8], float (&pre)[8],
                                          float (&suf)[8], float (&total)[8]) {
  uint32_t rows[4], columns[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = 4 * h, high = 4 * h + 2;
    rows[2 * h] = pack_bf16(k[high] * pre[high], k[high + 1] * pre[high + 1]);
    rows[2 * h + 1] = pack_bf16(q[high] * pre[high], q[high + 1] * pre[high + 1]);
    columns[h] = pack_bf16(k[low] * suf[low], k[low + 1] * suf[low + 1]);
  }
  mma_bf16(sums.top, rows, columns[0], columns[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int low = 4 * h + x, high = 4 * h + 2 + x;
      pre[high] *= total[low];
      suf[low] *= total[high];
      total[low] *= total[high];
    }
  }
}

// The pair (row lane / 4, columns 2 (lane % 4) and the next) of group r's 8 x 8 block, from the level at which the
// two tokens part: the highest bit in which their numbers differ. `part` 0 is k against k, 1 is q against k.
__device__ __forceinline__ float pair_in_group(const PairSums& sums, int r, int part, int x, int row, int column) {
  const int differ = row ^ column, e = 2 * part + x;
  return differ & 4 ? sums.lane_level[2][r][e] : differ & 2 ? sums.lane_level[1][r][e] : sums.lane_level[0][r][e];
}

// Aqk to its tile in bf16; Akk, transposed, to the warp's scratch in fp32.
__device__ __forceinline__ void store_pairs(const PairSums& sums, float beta, uint32_t aqk, uint32_t scratch,
                                            int lane) {
  const int row = lane / 4, pair = 2 * (lane % 4);
  float diagonal[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    diagonal[r] = sums.diagonal[r];
    diagonal[r] += __shfl_xor_sync(~0u, diagonal[r], 1);
    diagonal[r] += __shfl_xor_sync(~0u, diagonal[r], 2);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int base = 8 * r;
    const float beta_row = __shfl_sync(~0u, beta, base + row);
    float qk[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int column = pair + x;
      float kk = column < row ? beta_row * pair_in_group(sums, r, 0, x, row, column) : 0.0f;
      qk[x] = column < row ? pair_in_group(sums, r, 1, x, row, column) : column == row ? diagonal[r] : 0.0f;
      store_shared_float(scratch + ((base + column) * kScratchRow + base + row) * 4, kk);
      if (r == 1) store_shared_float(scratch + (column * kScratchRow + 8 + row) * 4, beta_row * sums.top[x]);
    }
    store_shared(aqk + 4 * lane + r * (kUnitBytes + kHalfUnitBytes), pack_bf16(qk[0], qk[1]));
  }
  store_shared(aqk + 4 * lane + kHalfUnitBytes, pack_bf16(sums.top[2], sums.top[3]));
  store_shared(aqk + 4 * lane + kUnitBytes, 0);
}

// T_inv = (I + Akk)^-1 by forward substitution in fp32, a column per lane (twice over the warp). The unit diagonal
// stays out of the bf16 tile: the state warps add that part in fp32.
__device__ __forceinline__ void invert(uint32_t t_inv, uint32_t scratch, int lane) {
  const int column = lane % kChunk;
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk - 1; ++i) {
#pragma unroll
    for (int four = (i + 1) / 4; four < kChunk / 4; ++four) {
      const float4 below = load_shared_float4(scratch + (i * kScratchRow + 4 * four) * 4);
      const float akk[4] = {below.x, below.y, below.z, below.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j > i) x[4 * four + j] -= akk[j] * x[i];
      }
    }
  }
  if (lane < kChunk) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float value = i == column ? 0.0f : x[i];
      store_shared_u16(t_inv + column / 8 * kUnitBytes + i * 16 + column % 8 * 2,
                       __bfloat16_as_ushort(__float2bfloat16_rn(value)));
    }
  }
}

// The gate's block of a chunk: decays a of eight elements, 1 for tokens past the end.
template <GateKind kGate, class GElem>
__device__ __forceinline__ void decay_block(float (&a)[8], uint32_t g_block, int block, uint32_t bias,
                                            const GateScale& scale, int valid, int lane) {
  float g[8];
  if constexpr (sizeof(GElem) == 2) {
    uint32_t packed[4];
    ldmatrix_x4(packed, g_block + block * kBlockBytes);
    unpack_block(g, packed);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i / 2, r = i % 2;
      float2 pair = load_shared_float2(g_block + 2 * (block * kBlockBytes + h * kUnitBytes + r * kHalfUnitBytes));
      g[2 * i] = pair.x;
      g[2 * i + 1] = pair.y;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float2 b = {0.0f, 0.0f};
    if constexpr (kGate != GateKind::kPreActivated) {
      b = load_shared_float2(bias + (16 * block + 8 * h + 2 * (lane % 4)) * 4);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a[4 * h + 2 * r] = decay<kGate>(g[4 * h + 2 * r], b.x, scale);
      a[4 * h + 2 * r + 1] = decay<kGate>(g[4 * h + 2 * r + 1], b.y, scale);
    }
  }
  if (valid < kChunk) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (lane / 4 + 8 * ((e >> 1) & 1) >= valid) a[e] = 1.0f;
    }
  }
}

// One chunk: slot holds q, k, g on entry and Qpre, Kpre, Ksuf, T_inv, Aqk, total, beta on return.
template <GateKind kGate, class GElem>
__device__ __forceinline__ void build_factors(const PrefillParams& p, uint32_t slot, uint32_t scratch, uint32_t bias,
                                              const GateScale& gate_scale, float beta, int valid, int lane) {
  using S = Slot<GElem>;
  const uint32_t lane_block = slot + ldmatrix_lane_offset(lane);
  const uint32_t g_block = S::kGateInPlace ? lane_block + S::kG : slot + S::kG + 8 * lane;

  float q_scale[2] = {p.scale, p.scale}, k_scale[2] = {1.0f, 1.0f};
  if (p.l2norm_qk) row_norms(q_scale, k_scale, lane_block + S::kQ, lane_block + S::kK);

  PairSums sums;
#pragma unroll 1
  for (int block = 0; block < kChannelBlocks; ++block) {
    uint32_t packed[4];
    float q[8], k[8], pre[8], suf[8], total[8];
    ldmatrix_x4(packed, lane_block + S::kQ + block * kBlockBytes);
    unpack_block(q, packed);
    ldmatrix_x4(packed, lane_block + S::kK + block * kBlockBytes);
    unpack_block(k, packed);
    decay_block<kGate, GElem>(pre, g_block, block, bias, gate_scale, valid, lane);
    __syncwarp();  // the block is in registers: its room in the slot may be written
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int r = (e >> 1) & 1;
      q[e] *= q_scale[r];
      k[e] *= k_scale[r];
      sums.diagonal[r] += q[e] * k[e];
      suf[e] = 1.0f;
      total[e] = pre[e];
    }
#pragma unroll
    for (int level = 0; level < kLaneLevels; ++level) {
      lane_level(sums, level, q, k, pre, suf, total, (lane >> (2 + level)) & 1);
    }
    top_level(sums, q, k, pre, suf, total);

    uint32_t q_pre[4], k_pre[4], k_suf[4];
    scale_and_pack(q_pre, q, pre);
    scale_and_pack(k_pre, k, pre);
    scale_and_pack(k_suf, k, suf);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t matrix = slot + 4 * lane + block * kBlockBytes + h * kUnitBytes + r * kHalfUnitBytes;
        store_shared(matrix + S::kQ, q_pre[2 * h + r]);
        store_shared(matrix + S::kK, k_pre[2 * h + r]);
        store_shared(matrix + S::kKsuf, k_suf[2 * h + r]);
      }
      if (lane < 4) {
        store_shared_float2(slot + S::kTotal + (16 * block + 8 * h + 2 * lane) * 4, total[4 * h], total[4 * h + 1]);
      }
    }
  }
  store_pairs(sums, beta, slot + S::kAqk, scratch, lane);
  if (lane < kChunk) store_shared_float(slot + S::kBeta + lane * 4, beta);
  __syncwarp();
  invert(slot + S::kTInv, scratch, lane);
}

__device__ __forceinline__ float load_beta(const PrefillParams& p, int64_t offset) {
  float beta = p.beta_dtype == FloatKind::kFloat32 ? static_cast<const float*>(p.beta.data)[offset]
                                                   : __bfloat162float(static_cast<const __nv_bfloat16*>(p.beta.data)[offset]);
  return activate_beta(beta, p.sigmoid_beta, p.neg_eigval);
}

// kAsyncProxy: the state warps read the factors through the async proxy (wgmma), which ordinary stores reach only
// past a fence of each writing lane.
template <GateKind kGate, bool kAsyncProxy, class GElem>
__device__ void factor_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence, int head,
                            const GateScale& gate_scale, int warp) {
  const int lane = threadIdx.x % 32;
  const int64_t beta_row = sequence.batch * p.beta.batch_stride + sequence.begin * p.beta.token_stride +
                           head * p.beta.head_stride;
  RingPosition ring{.slot = 0, .parity = 0};
  ring.advance(warp, shared.num_slots);
  for (int token = warp * kChunk; token < sequence.length; token += kFactorWarps * kChunk) {
    const int valid = min(sequence.length - token, kChunk);
    // Read before the wait: the latency hides behind it.
    const float beta = lane < valid ? load_beta(p, beta_row + (token + lane) * p.beta.token_stride) : 0.0f;
    barrier_wait(shared.raw_ready(ring.slot), ring.parity);
    build_factors<kGate, GElem>(p, shared.slot(ring.slot), shared.scratch(warp), shared.bias(), gate_scale, beta, valid,
                                lane);
    if constexpr (kAsyncProxy) fence_proxy_async();
    __syncwarp();  // the slot is whole
    if (lane == 0) barrier_arrive(shared.factors_ready(ring.slot));
    ring.advance(kFactorWarps, shared.num_slots);
  }
}

}  // namespace kda::prefill
