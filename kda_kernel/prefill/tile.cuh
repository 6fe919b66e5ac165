// A tile of 16 tokens for itself: its norms, decays and products, and the inverse of its triangular system. (factors.cuh has
// the formulas.)
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "prefill/decay_tree.cuh"
#include "prefill/segments.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr float kL2NormEpsilon = 1e-6f;  // x * rsqrt(sum x^2 + eps), the models' own

// How far G_C may fall, in powers of 2, for the bounded way: k exp(-G) must not overflow (2^127) and q exp(G) must
// keep its bits (2^-126 and below lose them). Normalised k and q are at most 1 and leave room for lower_bound = -5 at
// every token, 16 * 5 / ln 2 = 115.4; for others the room is shared between the gate and the values.
constexpr float kBoundNormalised = -116.0f;
constexpr float kBoundRaw = -64.0f;

// The diagonal of an 8 x 8 product lies in the lanes whose row lane / 4 is one of their columns 2 (lane % 4) + x.
__device__ __forceinline__ bool on_diagonal(uint32_t lane) { return lane / 8 == lane % 4; }
__device__ __forceinline__ int diagonal_column(uint32_t lane) { return lane / 4 % 2; }

// Per token the factor on q (tensor 0) or on k (1), with its norm: sums of squares are the diagonal of x x^T. `rows` are
// the tile's.
__device__ __forceinline__ void row_scales(uint32_t norms, uint32_t rows, int tensor, float scale, bool l2norm, uint32_t lane) {
  const float factor = tensor == 0 ? scale : 1.0f;
  const uint32_t place = norms + tensor * 4;
  if (!l2norm) {
    if (lane < kTile) store_shared_float(place + lane * 8, factor);
    return;
  }
  float squares[2][2][4] = {};  // [unit of a block][token group]: all tokens against the group's, in four chains of MMAs
#pragma unroll
  for (int block = 0; block < kHalves * kHalfBlocks; ++block) {
    uint32_t x[4];
    ldmatrix_x4(x, rows + block / kHalfBlocks * kHalfBytes + block_rows(block % kHalfBlocks, lane));
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
      for (int r = 0; r < 2; ++r) mma_bf16_half(squares[unit][r], x[2 * unit], x[2 * unit + 1], x[2 * unit + r]);
    }
  }
  if (on_diagonal(lane)) {
    const int column = diagonal_column(lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float square[2];
#pragma unroll
      for (int x = 0; x < 2; ++x) square[x] = squares[0][r][2 * r + x] + squares[1][r][2 * r + x];
      const float normalise = rsqrt_approx((column ? square[1] : square[0]) + kL2NormEpsilon);
      store_shared_float(place + (8 * r + lane / 4) * 8, factor * normalise);
    }
  }
}

// G of a lane's two channels after each token; tokens past the end change nothing. `gate` is their place at token 0.
template <GateKind kGate, class S>
__device__ __forceinline__ void accumulate_gate(float2 (&G)[kTile], uint32_t gate, float2 bias, const GateScale& scale,
                                                int valid) {
  // All loads first: the tokens' activations then overlap, and only the sums form a chain.
  if constexpr (sizeof(typename S::GElem) == 2) {
    uint32_t packed[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) packed[t] = load_shared(at_token(gate, t));
#pragma unroll
    for (int t = 0; t < kTile; ++t) G[t] = unpack_bf16(packed[t]);
  } else {
#pragma unroll
    for (int t = 0; t < kTile; ++t) G[t] = load_shared_float2(at_token(gate, t));
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    G[t].x = activate_gate<kGate>(G[t].x, bias.x, scale);
    G[t].y = activate_gate<kGate>(G[t].y, bias.y, scale);
  }
  G[0] = {scale.output * G[0].x, scale.output * G[0].y};
#pragma unroll
  for (int t = 1; t < kTile; ++t) {
    G[t].x = fmaf(scale.output, G[t].x, G[t - 1].x);
    G[t].y = fmaf(scale.output, G[t].y, G[t - 1].y);
  }
  if (valid < kTile) {
    asm volatile("" ::: "memory");  // a branch for the last tile alone, instead of selections in all of them
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= valid) G[t] = t == 0 ? float2{0.0f, 0.0f} : G[t - 1];
    }
  }
}

// The bounded way: a lane holds a pair of channels for all tokens and replaces in place; `pair` is its place at token 0 in
// half a panel. Eight tokens' code, twice: unrolled over the tile, it would be a tenth of what has to fit in the instruction
// cache. (Registers cannot be indexed: G moves up by eight.)
template <class S>
__device__ __forceinline__ void scale_pairs(float2 (&G)[kTile], const TileFactors<S>& to, float2 total, uint32_t pair) {
  constexpr int kFromQToK = S::kK - S::kQ;
  constexpr int kStep = 8;
  constexpr int kAhead = 3;  // tokens whose loads are on their way
  uint32_t q = to.q(), k_suf = to.k_suf(), k_inverse = to.inverse(), norms = to.norms();
#pragma unroll 1
  for (int first = 0; first < kTile; first += kStep) {
    uint32_t k_packed[kAhead], q_packed[kAhead];
    float2 norm[kAhead];  // q, k
    const auto load = [&](int t) {
      k_packed[t % kAhead] = load_shared(q + at_token(pair, t) + kFromQToK);
      q_packed[t % kAhead] = load_shared(q + at_token(pair, t));
      norm[t % kAhead] = load_shared_float2(norms + t * 8);
    };
#pragma unroll
    for (int t = 0; t < kAhead; ++t) load(t);
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      float2 k_t = unpack_bf16(k_packed[t % kAhead]), q_t = unpack_bf16(q_packed[t % kAhead]);
      const float2 norm_t = norm[t % kAhead];
      if (t + kAhead < kStep) load(t + kAhead);
      k_t = {k_t.x * norm_t.y, k_t.y * norm_t.y};
      q_t = {q_t.x * norm_t.x, q_t.y * norm_t.x};
      const float2 pre = {exp2_approx(G[t].x), exp2_approx(G[t].y)};
      const float2 inverse = {k_t.x * exp2_approx(-G[t].x), k_t.y * exp2_approx(-G[t].y)};
      const uint32_t place = at_token(pair, t);
      store_shared(k_inverse + place, pack_bf16(inverse.x, inverse.y));
      store_shared(k_suf + place, pack_bf16(inverse.x * total.x, inverse.y * total.y));
      store_shared(q + place + kFromQToK, pack_bf16(k_t.x * pre.x, k_t.y * pre.y));
      store_shared(q + place, pack_bf16(q_t.x * pre.x, q_t.y * pre.y));
    }
#pragma unroll
    for (int t = 0; t + kStep < kTile; ++t) G[t] = G[t + kStep];
    q += kStep * kRowBytes, k_suf += kStep * kRowBytes, k_inverse += kStep * kRowBytes, norms += kStep * 8;
  }
}

template <class S>
__device__ __forceinline__ void park(const PairSums& sums, const TileFactors<S>& to, uint32_t lane) {
  store_shared_float4(to.parking(0, lane), sums.group[0]);
  store_shared_float4(to.parking(1, lane), sums.group[1]);
  store_shared_float4(to.parking(2, lane), sums.across);
}

template <class S>
__device__ __forceinline__ void add_parked(PairSums& sums, const TileFactors<S>& to, uint32_t lane) {
#pragma unroll
  for (int piece = 0; piece < 3; ++piece) {
    const float4 x = load_shared_float4(to.parking(piece, lane));
    float(&sum)[4] = piece < 2 ? sums.group[piece] : sums.across;
    sum[0] += x.x;
    sum[1] += x.y;
    sum[2] += x.z;
    sum[3] += x.w;
  }
}

// Products inside a tile over half the channels: [Kpre; Qpre] of eight tokens against k exp(-G) of eight.
template <class S>
__device__ __forceinline__ void multiply_pairs(PairSums& sums, const TileFactors<S>& to, uint32_t lane) {
  const uint32_t rows = pair_rows(to, to.half, lane);
#pragma unroll
  for (int block = 0; block < kHalfBlocks; ++block) {
    uint32_t low[4], high[4], b[4];
    ldmatrix_x4(low, rows ^ block * 32);
    ldmatrix_x4(high, (rows ^ block * 32) + kGroupRows);
    ldmatrix_x4(b, to.inverse() + block_columns(block, lane));
    mma_bf16(sums.group[0], low, b[0], b[1]);
    mma_bf16(sums.group[1], high, b[2], b[3]);
    mma_bf16(sums.across, high, b[0], b[1]);
  }
}

// Aqk to its tile in bf16; -Akk of each eight tokens against themselves to the scratch in fp32. `beta` is that of the lane's
// rows, lane / 4 of either eight.
__device__ __forceinline__ void store_pairs(const PairSums& sums, const float (&beta)[2], uint32_t aqk, uint32_t akk,
                                            uint32_t lane) {
  const uint32_t row = lane / 4, pair = 2 * (lane % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float qk[2], kk[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      qk[x] = pair + x <= row ? sums.group[r][2 + x] : 0.0f;
      kk[x] = pair + x < row ? -beta[r] * sums.group[r][x] : 0.0f;
    }
    store_shared_float2(akk + r * kAkkBlock + (row * kAkkRow + pair) * 4, kk[0], kk[1]);
    store_shared(aqk + 4 * lane + r * (kPairUnit + kPairGroup), pack_bf16(qk[0], qk[1]));
  }
  store_shared(aqk + 4 * lane + kPairGroup, pack_bf16(sums.across[2], sums.across[3]));
  store_shared(aqk + 4 * lane + kPairUnit, 0);
}

// (I + Akk)^-1 = I + X of eight tokens against themselves, of both eights at once, by substitution in fp32, a row per lane
// (twice over the warp): with A = -Akk, X = A + X A, x_j = a_j + sum_{i > j} x_i A[i, j]. The unit diagonal stays out of the
// bf16 result: whoever multiplies by it adds that part in fp32.
__device__ __forceinline__ void invert_eights(uint32_t t_inv, uint32_t akk, uint32_t lane) {
  constexpr int kSize = kTile / 2;
  const uint32_t block = lane / kSize % 2, row = lane % kSize, rows = akk + block * kAkkBlock;
  const auto load_four = [&](uint32_t row, int four, float (&a)[4]) {
    const float4 x = load_shared_float4(rows + (row * kAkkRow + 4 * four) * 4);
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
  };
  float x[kSize / 4][4];
#pragma unroll
  for (int four = 0; four < kSize / 4; ++four) load_four(row, four, x[four]);
#pragma unroll
  for (int i = kSize - 1; i > 0; --i) {
#pragma unroll
    for (int four = 0; 4 * four < i; ++four) {
      float a[4];
      load_four(i, four, a);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j < i) x[four][j] += x[i / 4][i % 4] * a[j];
      }
    }
  }
  if (lane < kTile) {
    const auto pack = [&](int i) { return pack_bf16(x[i / 4][i % 4], x[i / 4][i % 4 + 1]); };
    store_shared_uint4(t_inv + block * (kPairUnit + kPairGroup) + row * 16, make_uint4(pack(0), pack(2), pack(4), pack(6)));
  }
}

// The second eight tokens against the first: with T_0 and T_1 their own inverses,
//   -T_1 (Akk T_0) = -(M + (T_1 - I) M),   M = Akk + Akk (T_0 - I),
// where what the unit diagonals give stays in fp32. `akk` is the lane's pair of Akk.
__device__ __forceinline__ void join_eights(uint32_t t_inv, float2 akk, uint32_t lane) {
  const uint32_t place = t_inv + 4 * lane;
  float m[4] = {akk.x, akk.y, 0.0f, 0.0f};
  mma_bf16_half(m, pack_bf16(akk.x, akk.y), 0, movmatrix_trans(load_shared(place)));
  float t[4] = {m[0], m[1], 0.0f, 0.0f};
  mma_bf16_half(t, load_shared(place + kPairUnit + kPairGroup), 0, movmatrix_trans(pack_bf16(m[0], m[1])));
  store_shared(place + kPairGroup, pack_bf16(-t[0], -t[1]));
  store_shared(place + kPairUnit, 0);
}

// Half the channels of a tile for themselves: q, k, g in the slot become Qpre, Kpre, Ksuf, the decays go to the scratch, the
// products are returned. `meet` is called once the warp has read q, k and g.
template <GateKind kGate, class S, class Meet>
__device__ __forceinline__ PairSums build_half(const PrefillParams& p, const TileFactors<S>& to, uint32_t bias,
                                               uint32_t gate, int valid, uint32_t lane, Meet meet) {
  const float bound = p.l2norm_qk ? kBoundNormalised : kBoundRaw;
  const int channel = to.half * kHalfChannels + 2 * lane;
  // The lane's pair of channels in its first row: fp32 rows hold half as many.
  const uint32_t pair = lane / 4 * 16 + lane % 4 * 4;
  const uint32_t gate_pair = sizeof(typename S::GElem) == 2 ? pair : lane / 16 * kHalfBytes + lane % 16 * 8;
  const float2 scale = load_shared_float2(gate);
  const GateScale gate_scale{.input = scale.x, .output = scale.y};
  float2 G[kTile];
  accumulate_gate<kGate, S>(G, to.gate() + gate_pair, load_shared_float2(bias + channel * 4), gate_scale, valid);
  meet();  // the norms stand, q and k have been read for them; every lane has its gate; the scratch may be written
  PairSums sums;
  const bool bounded = __all_sync(~0u, G[kTile - 1].x >= bound && G[kTile - 1].y >= bound);
  constexpr bool kHasResets = kGate != GateKind::kLowerBound;  // a bound that lets them be is none; then the tree does
  uint32_t resets = 0;
  if (!bounded && !(kHasResets && cut_at_resets(G, resets, bound))) {
    decay_tree<kGate, S>(sums, to, bias + to.half * kHalfChannels * 4, gate_scale, valid, lane);
    return sums;
  }
  const uint32_t total_place = to.total(to.tile) + total_offset(channel);
  const float2 total = {exp2_approx(G[kTile - 1].x), exp2_approx(G[kTile - 1].y)};
  store_shared_float2(total_place, total.x, total.y);
  scale_pairs(G, to, total, pair);
  __syncwarp();
  const uint32_t common = bounded || !kHasResets ? 0 : common_resets(resets);
  if (bounded || !kHasResets || common != 0) {
    multiply_pairs(sums, to, lane);
    if (kHasResets && common != 0) {
      keep_inside_segments(sums, common, opaque(lane));
      __syncwarp();
      clear_across_tokens(to, common, pair, total_place);
    }
  } else {
    multiply_segments(sums, to, resets, opaque(lane));
    __syncwarp();
    clear_across_resets(to, resets, pair, total_place);
  }
  return sums;
}

// Aqk of a tile in its place, T_inv = (I + Akk)^-1 of a tile in its place, from the products of both halves of the channels.
template <class S>
__device__ __forceinline__ void finish_tile(PairSums& sums, const TileFactors<S>& to, float beta, uint32_t lane) {
  const float beta_rows[2] = {__shfl_sync(~0u, beta, lane / 4), __shfl_sync(~0u, beta, 8 + lane / 4)};
  store_pairs(sums, beta_rows, to.aqk(), to.akk(), lane);
  if (lane < kTile) store_shared_float(to.beta() + lane * 4, beta);
  __syncwarp();
  invert_eights(to.t_inv(), to.akk(), lane);
  __syncwarp();
  join_eights(to.t_inv(), {beta_rows[1] * sums.across[0], beta_rows[1] * sums.across[1]}, lane);
}

}  // namespace kda::prefill
