// The factor warps: everything of a chunk that does not depend on the state, in one warp.
//
// Tokens i, j of the chunk, channels d, G_i = sum of the log decays up to token i (base 2 here):
//   Kpre = k exp(G)         Qpre = q exp(G)         Ksuf = k exp(G_C - G)         total = exp(G_C)
//   Akk[i, j] = beta_i sum_d k_i k_j exp(G_i - G_j)   j <  i         T_inv = (I + Akk)^-1
//   Aqk[i, j] =        sum_d q_i k_j exp(G_i - G_j)   j <= i
//
// Half the channels at a time, the pair products are made in one of two ways, both exact to rounding:
//   bounded   exp(G_i) and exp(-G_j) apart, where no exponent leaves fp32 and bf16 (scale_pairs, multiply_pairs)
//   tree      products of decays only, for any gate (decay_tree.cuh)
// The warp decides for each half of each chunk.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "prefill/decay_tree.cuh"
#include "prefill/load.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr float kL2NormEpsilon = 1e-6f;  // x * rsqrt(sum x^2 + eps), the models' own

// How far G_C may fall, in powers of 2, for the bounded way: k exp(-G) must not overflow (2^127) and q exp(G) must
// keep its bits (2^-126 and below lose them). Normalised k and q are at most 1 and leave room for lower_bound = -5 at
// every token, 16 * 5 / ln 2 = 115.4; for others the room is shared between the gate and the values.
constexpr float kBoundNormalised = -116.0f;
constexpr float kBoundRaw = -64.0f;

// The diagonal of an 8 x 8 product lies in the lanes whose row lane / 4 is one of their columns 2 (lane % 4) + x.
__device__ __forceinline__ bool on_diagonal(int lane) { return lane / 8 == lane % 4; }
__device__ __forceinline__ int diagonal_column(int lane) { return lane / 4 % 2; }

// Per token the factors on q and k, with their norms: sums of squares are the diagonals of k k^T and q q^T.
__device__ __forceinline__ void row_scales(uint32_t norms, uint32_t q_block, uint32_t k_block, float scale, bool l2norm,
                                           int lane) {
  if (!l2norm) {
    if (lane < kChunk) store_shared_float2(norms + lane * 8, scale, 1.0f);
    return;
  }
  float squares[2][2][4] = {};  // [q or k][token group]
#pragma unroll 4
  for (int block = 0; block < kChannelBlocks; ++block) {
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
      uint32_t x[4];
      ldmatrix_x4(x, (tensor == 0 ? q_block : k_block) + block * kBlockBytes);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Rows 0-7 and 8-15 of the operand are the same eight tokens: only the first half is read.
        const uint32_t rows[4] = {x[r], x[r], x[2 + r], x[2 + r]};
        mma_bf16(squares[tensor][r], rows, x[r], x[2 + r]);
      }
    }
  }
  if (on_diagonal(lane)) {
    const int x = diagonal_column(lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float q_square = x ? squares[0][r][1] : squares[0][r][0];
      const float k_square = x ? squares[1][r][1] : squares[1][r][0];
      store_shared_float2(norms + (8 * r + lane / 4) * 8, scale * rsqrtf(q_square + kL2NormEpsilon),
                          rsqrtf(k_square + kL2NormEpsilon));
    }
  }
}

// G of a lane's two channels after each token; tokens past the end change nothing.
template <GateKind kGate, class GElem>
__device__ __forceinline__ void accumulate_gate(float2 (&G)[kChunk], uint32_t gate, float2 bias, const GateScale& scale,
                                                int valid) {
  // All loads first: the tokens' activations then overlap, and only the sums form a chain.
  if constexpr (sizeof(GElem) == 2) {
    uint32_t packed[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t) packed[t] = load_shared(gate + t * 16);
#pragma unroll
    for (int t = 0; t < kChunk; ++t) G[t] = unpack_bf16(packed[t]);
  } else {
#pragma unroll
    for (int t = 0; t < kChunk; ++t) G[t] = load_shared_float2(gate + t * 32);
  }
#pragma unroll
  for (int t = 0; t < kChunk; ++t) {
    G[t].x = log2_decay<kGate>(G[t].x, bias.x, scale);
    G[t].y = log2_decay<kGate>(G[t].y, bias.y, scale);
  }
#pragma unroll
  for (int t = 1; t < kChunk; ++t) {
    G[t].x = t < valid ? G[t - 1].x + G[t].x : G[t - 1].x;
    G[t].y = t < valid ? G[t - 1].y + G[t].y : G[t - 1].y;
  }
}

// Half the channels: a lane holds a pair of channels for all tokens and replaces in place; the addresses are those of its
// pair at the first token.
__device__ __forceinline__ void scale_pairs(const float2 (&G)[kChunk], uint32_t q, uint32_t k, uint32_t k_suf,
                                            uint32_t k_inverse, uint32_t norms) {
  const float2 total = {exp2_approx(G[kChunk - 1].x), exp2_approx(G[kChunk - 1].y)};
  constexpr int kBatch = 4;  // tokens whose loads and exponentials overlap
#pragma unroll
  for (int first = 0; first < kChunk; first += kBatch) {
    uint32_t k_packed[kBatch], q_packed[kBatch];
    float4 norm[kBatch / 2];  // of two tokens: q, k, q, k
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      k_packed[i] = load_shared(k + (first + i) * 16);
      q_packed[i] = load_shared(q + (first + i) * 16);
      if (i % 2 == 0) norm[i / 2] = load_shared_float4(norms + (first + i) * 8);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int t = first + i;
      const float q_norm = i % 2 ? norm[i / 2].z : norm[i / 2].x, k_norm = i % 2 ? norm[i / 2].w : norm[i / 2].y;
      float2 k_t = unpack_bf16(k_packed[i]), q_t = unpack_bf16(q_packed[i]);
      k_t = {k_t.x * k_norm, k_t.y * k_norm};
      q_t = {q_t.x * q_norm, q_t.y * q_norm};
      const float2 pre = {exp2_approx(G[t].x), exp2_approx(G[t].y)};
      const float2 inverse = {k_t.x * exp2_approx(-G[t].x), k_t.y * exp2_approx(-G[t].y)};
      k_packed[i] = pack_bf16(k_t.x * pre.x, k_t.y * pre.y);
      q_packed[i] = pack_bf16(q_t.x * pre.x, q_t.y * pre.y);
      store_shared(k_inverse + t * 16, pack_bf16(inverse.x, inverse.y));
      store_shared(k_suf + t * 16, pack_bf16(inverse.x * total.x, inverse.y * total.y));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      store_shared(k + (first + i) * 16, k_packed[i]);
      store_shared(q + (first + i) * 16, q_packed[i]);
    }
  }
}

// The products over half the channels: [Kpre; Qpre] of eight tokens against k exp(-G) of eight.
__device__ __forceinline__ void multiply_pairs(PairSums& sums, uint32_t q, uint32_t k, uint32_t k_inverse, int lane) {
  // Matrices of the A operand: k and q of the same tokens, columns 0-7, then columns 8-15.
  const uint32_t rows = (lane / 8 % 2 ? q : k) + lane / 16 * kUnitBytes + lane % 8 * 16;
  const uint32_t columns = k_inverse + ldmatrix_lane_offset(lane);
#pragma unroll
  for (int block = 0; block < kChannelBlocks / 2; ++block) {
    uint32_t low[4], high[4], b[4];
    ldmatrix_x4(low, rows + block * kBlockBytes);
    ldmatrix_x4(high, rows + block * kBlockBytes + kHalfUnitBytes);
    ldmatrix_x4(b, columns + block * kBlockBytes);
    mma_bf16(sums.group[0], low, b[0], b[2]);
    mma_bf16(sums.group[1], high, b[1], b[3]);
    mma_bf16(sums.across, high, b[0], b[2]);
  }
}

// Aqk to its tile in bf16; Akk, transposed, to the warp's scratch in fp32.
__device__ __forceinline__ void store_pairs(const PairSums& sums, float beta, uint32_t aqk, uint32_t akk, int lane) {
  const int row = lane / 4, pair = 2 * (lane % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float beta_row = __shfl_sync(~0u, beta, 8 * r + row);
    float qk[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int column = pair + x;
      qk[x] = column <= row ? sums.group[r][2 + x] : 0.0f;
      store_shared_float(akk + ((8 * r + column) * kScratchRow + 8 * r + row) * 4,
                         column < row ? beta_row * sums.group[r][x] : 0.0f);
      if (r == 1) store_shared_float(akk + (column * kScratchRow + 8 + row) * 4, beta_row * sums.across[x]);
    }
    store_shared(aqk + 4 * lane + r * (kUnitBytes + kHalfUnitBytes), pack_bf16(qk[0], qk[1]));
  }
  store_shared(aqk + 4 * lane + kHalfUnitBytes, pack_bf16(sums.across[2], sums.across[3]));
  store_shared(aqk + 4 * lane + kUnitBytes, 0);
}

// T_inv = (I + Akk)^-1 by forward substitution in fp32, a column per lane (twice over the warp). The unit diagonal
// stays out of the bf16 tile: the state warps add that part in fp32.
__device__ __forceinline__ void invert(uint32_t t_inv, uint32_t akk, int lane) {
  const int column = lane % kChunk;
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk - 1; ++i) {
#pragma unroll
    for (int four = (i + 1) / 4; four < kChunk / 4; ++four) {
      const float4 below = load_shared_float4(akk + (i * kScratchRow + 4 * four) * 4);
      const float values[4] = {below.x, below.y, below.z, below.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j > i) x[4 * four + j] -= values[j] * x[i];
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

// One chunk: slot holds q, k, g on entry and Qpre, Kpre, Ksuf, T_inv, Aqk, total, beta on return.
template <GateKind kGate, class GElem>
__device__ __forceinline__ void build_factors(const PrefillParams& p, uint32_t slot, uint32_t scratch, uint32_t bias,
                                              const GateScale& gate_scale, float beta, int valid, int lane) {
  using S = Slot<GElem>;
  const uint32_t norms = scratch + kNormOffset;
  row_scales(norms, slot + S::kQ + ldmatrix_lane_offset(lane), slot + S::kK + ldmatrix_lane_offset(lane), p.scale,
             p.l2norm_qk, lane);
  __syncwarp();

  const float bound = p.l2norm_qk ? kBoundNormalised : kBoundRaw;
  PairSums sums;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint32_t tile = half * kHalfTileBytes, pair = lane / 4 * kUnitBytes + lane % 4 * 4;
    const int channel = half * kHeadDim / 2 + 2 * lane;
    float2 G[kChunk];
    accumulate_gate<kGate, GElem>(G, slot + S::kG + S::kGateScale * (tile + pair),
                                  load_shared_float2(bias + channel * 4), gate_scale, valid);
    const float2 log2_total = G[kChunk - 1];
    if (__all_sync(~0u, log2_total.x >= bound && log2_total.y >= bound)) {
      scale_pairs(G, slot + S::kQ + tile + pair, slot + S::kK + tile + pair, slot + S::kKsuf + tile + pair,
                  scratch + pair, norms);
      store_shared_float2(slot + S::kTotal + total_offset(channel), exp2_approx(log2_total.x),
                          exp2_approx(log2_total.y));
      __syncwarp();
      multiply_pairs(sums, slot + S::kQ + tile, slot + S::kK + tile, scratch, lane);
    } else {
      decay_tree<kGate, GElem>(sums, slot, half, bias, norms, gate_scale, valid, lane);
    }
    __syncwarp();  // the scratch may be written again
  }
  store_pairs(sums, beta, slot + S::kAqk, scratch, lane);
  if (lane < kChunk) store_shared_float(slot + S::kBeta + lane * 4, beta);
  __syncwarp();
  invert(slot + S::kTInv, scratch, lane);
}

// The bits of an element of beta, and what they mean: apart, so that the load has a chunk's time to arrive.
__device__ __forceinline__ uint32_t load_beta_bits(const PrefillParams& p, int64_t offset) {
  return p.beta_dtype == FloatKind::kFloat32 ? static_cast<const uint32_t*>(p.beta.data)[offset]
                                             : static_cast<const uint16_t*>(p.beta.data)[offset];
}

__device__ __forceinline__ float beta_value(const PrefillParams& p, uint32_t bits) {
  const float beta = __uint_as_float(p.beta_dtype == FloatKind::kFloat32 ? bits : bits << 16);
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
  // Beta of this lane's token, a chunk ahead of its use: global memory is far.
  const auto read_beta = [&](int token) {
    return lane < kChunk && token + lane < sequence.length
               ? load_beta_bits(p, beta_row + (token + lane) * p.beta.token_stride)
               : 0u;
  };
  uint32_t next_beta = read_beta(warp * kChunk);
  RingPosition ring{.slot = 0, .parity = 0};
  ring.advance(warp, shared.num_slots);
  for (int token = warp * kChunk; token < sequence.length; token += kFactorWarps * kChunk) {
    const int valid = min(sequence.length - token, kChunk);
    const float beta = lane < valid ? beta_value(p, next_beta) : 0.0f;
    next_beta = read_beta(token + kFactorWarps * kChunk);
    await_reuse(shared, ring);
    barrier_wait(shared.raw_ready(ring.slot), ring.parity);
    build_factors<kGate, GElem>(p, shared.slot(ring.slot), shared.scratch(warp), shared.bias(), gate_scale, beta, valid,
                                lane);
    if constexpr (kAsyncProxy) fence_proxy_async();
    barrier_arrive(shared.factors_ready(ring.slot));
    __syncwarp();  // the scratch may be written again
    ring.advance(kFactorWarps, shared.num_slots);
  }
}

}  // namespace kda::prefill
