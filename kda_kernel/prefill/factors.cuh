// The factor teams: everything of a chunk that does not depend on the state, by a warp for each tile of 16 tokens, in a
// cluster by two of them, for half of the channels each.
//
// Tokens i, j, channels d, G_i = sum of the log decays from the start of i's tile through i (base 2 here), G_C at the
// tile's end, total = exp(G_C). Inside a tile:
//   Kpre = k exp(G)         Qpre = q exp(G)         Ksuf = k exp(G_C - G)
//   Akk[i, j] = beta_i sum_d k_i k_j exp(G_i - G_j)   j <  i
//   Aqk[i, j] =        sum_d q_i k_j exp(G_i - G_j)   j <= i
// Each warp makes its products in one of two ways, both exact to rounding:
//   bounded   exp(G_i) and exp(-G_j) apart, where no exponent leaves fp32 and bf16 (scale_pairs, multiply_pairs)
//   tree      products of decays only, for any gate (decay_tree.cuh)
// Then the tiles are joined: between i of the second and j of the first the products are those of Kpre_i and Qpre_i with
// Ksuf_j, T_inv = (I + Akk)^-1 follows by tiles, and for the state of the chunk's start and end Kpre and Qpre of the second
// tile take the first's total, Ksuf of the first the second's.
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

// Per token the factor on q (tensor 0) or on k (1), with its norm: sums of squares are the diagonal of x x^T. `rows` are
// the tile's.
__device__ __forceinline__ void row_scales(uint32_t norms, uint32_t rows, int tensor, float scale, bool l2norm, int lane) {
  const float factor = tensor == 0 ? scale : 1.0f;
  const uint32_t place = norms + tensor * 4;
  if (!l2norm) {
    if (lane < kTile) store_shared_float(place + lane * 8, factor);
    return;
  }
  float squares[2][4] = {};  // [token group]: all tokens against the group's
#pragma unroll
  for (int block = 0; block < kHalves * kHalfBlocks; ++block) {
    uint32_t x[4];
    ldmatrix_x4(x, rows + block / kHalfBlocks * kHalfBytes + block_rows(block % kHalfBlocks, lane));
#pragma unroll
    for (int r = 0; r < 2; ++r) mma_bf16(squares[r], x, x[r], x[2 + r]);
  }
  if (on_diagonal(lane)) {
    const int x = diagonal_column(lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float square = x ? squares[r][2 * r + 1] : squares[r][2 * r];
      store_shared_float(place + (8 * r + lane / 4) * 8, factor * rsqrtf(square + kL2NormEpsilon));
    }
  }
}

// The address of token t's row, given that of token 0's: the swizzle moves a lane's unit with the token.
__device__ __forceinline__ uint32_t at_token(uint32_t first, int t) { return (first ^ t % 8 * 16) + t * kRowBytes; }

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
  if (valid < kTile) {
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= valid) G[t] = {0.0f, 0.0f};
    }
  }
  G[0] = {scale.output * G[0].x, scale.output * G[0].y};
#pragma unroll
  for (int t = 1; t < kTile; ++t) {
    G[t].x = fmaf(scale.output, G[t].x, G[t - 1].x);
    G[t].y = fmaf(scale.output, G[t].y, G[t - 1].y);
  }
}

// The bounded way: a lane holds a pair of channels for all tokens and replaces in place; `pair` is its place at token 0 in
// half a panel.
template <class S>
__device__ __forceinline__ void scale_pairs(const float2 (&G)[kTile], const TileFactors<S>& to, float2 total,
                                            uint32_t pair) {
  const uint32_t q = to.q() + pair, k_suf = to.k_suf() + pair;
  const uint32_t k_inverse = to.inverse() + pair, norms = to.norms();
  constexpr int kFromQToK = S::kK - S::kQ;
  constexpr int kAhead = 3;  // tokens whose loads are on their way
  uint32_t k_packed[kAhead], q_packed[kAhead];
  float2 norm[kAhead];  // q, k
  const auto load = [&](int t) {
    k_packed[t % kAhead] = load_shared(at_token(q, t) + kFromQToK);
    q_packed[t % kAhead] = load_shared(at_token(q, t));
    norm[t % kAhead] = load_shared_float2(norms + t * 8);
  };
#pragma unroll
  for (int t = 0; t < kAhead; ++t) load(t);
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    float2 k_t = unpack_bf16(k_packed[t % kAhead]), q_t = unpack_bf16(q_packed[t % kAhead]);
    const float2 norm_t = norm[t % kAhead];
    if (t + kAhead < kTile) load(t + kAhead);
    k_t = {k_t.x * norm_t.y, k_t.y * norm_t.y};
    q_t = {q_t.x * norm_t.x, q_t.y * norm_t.x};
    const float2 pre = {exp2_approx(G[t].x), exp2_approx(G[t].y)};
    const float2 inverse = {k_t.x * exp2_approx(-G[t].x), k_t.y * exp2_approx(-G[t].y)};
    store_shared(at_token(k_inverse, t), pack_bf16(inverse.x, inverse.y));
    store_shared(at_token(k_suf, t), pack_bf16(inverse.x * total.x, inverse.y * total.y));
    store_shared(at_token(q, t) + kFromQToK, pack_bf16(k_t.x * pre.x, k_t.y * pre.y));
    store_shared(at_token(q, t), pack_bf16(q_t.x * pre.x, q_t.y * pre.y));
  }
}

template <class S>
__device__ __forceinline__ void park(const PairSums& sums, const TileFactors<S>& to, int lane) {
  store_shared_float4(to.parking(0, lane), sums.group[0]);
  store_shared_float4(to.parking(1, lane), sums.group[1]);
  store_shared_float4(to.parking(2, lane), sums.across);
}

template <class S>
__device__ __forceinline__ void add_parked(PairSums& sums, const TileFactors<S>& to, int lane) {
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

// Where a lane finds its row of the A operand of a pair product in half a panel: k and q of the same eight tokens, columns
// 0-7, then 8-15.
template <class S>
__device__ __forceinline__ uint32_t pair_rows(const TileFactors<S>& to, int half, int lane) {
  return (lane / 8 % 2 ? to.q_tile() : to.k_tile()) + half * kHalfBytes + swizzled(lane % 8, lane / 16);
}

// Products inside a tile over half the channels: [Kpre; Qpre] of eight tokens against k exp(-G) of eight.
template <class S>
__device__ __forceinline__ void multiply_pairs(PairSums& sums, const TileFactors<S>& to, int lane) {
  const uint32_t rows = pair_rows(to, to.half, lane);
#pragma unroll
  for (int block = 0; block < kHalfBlocks; ++block) {
    uint32_t low[4], high[4], b[4];
    ldmatrix_x4(low, rows ^ block * 32);
    ldmatrix_x4(high, (rows ^ block * 32) + kGroupRows);
    ldmatrix_x4(b, to.inverse() + block_rows(block, lane));
    mma_bf16(sums.group[0], low, b[0], b[2]);
    mma_bf16(sums.group[1], high, b[1], b[3]);
    mma_bf16(sums.across, high, b[0], b[2]);
  }
}

// Aqk to its tile in bf16; Akk, transposed, to the scratch in fp32.
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
    store_shared(aqk + 4 * lane + r * (kPairUnit + kPairGroup), pack_bf16(qk[0], qk[1]));
  }
  store_shared(aqk + 4 * lane + kPairGroup, pack_bf16(sums.across[2], sums.across[3]));
  store_shared(aqk + 4 * lane + kPairUnit, 0);
}

// T_inv = (I + Akk)^-1 of a tile by forward substitution in fp32, a column per lane (twice over the warp). The unit
// diagonal stays out of the bf16 tile: the state warps add that part in fp32.
__device__ __forceinline__ void invert(uint32_t t_inv, uint32_t akk, int lane) {
  const int column = lane % kTile;
  float x[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int i = 0; i < kTile - 1; ++i) {
#pragma unroll
    for (int four = (i + 1) / 4; four < kTile / 4; ++four) {
      const float4 below = load_shared_float4(akk + (i * kScratchRow + 4 * four) * 4);
      const float values[4] = {below.x, below.y, below.z, below.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * four + j > i) x[4 * four + j] -= values[j] * x[i];
      }
    }
  }
  if (lane < kTile) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const float value = i == column ? 0.0f : x[i];
      store_shared_u16(t_inv + column / 8 * kPairUnit + i * 16 + column % 8 * 2,
                       __bfloat16_as_ushort(__float2bfloat16_rn(value)));
    }
  }
}

// Products of the second tile's tokens with the first's: [row group][column group] of eight tokens, elements as PairSums'.
using CrossSums = float[2][2][4];

template <class S>
__device__ __forceinline__ void multiply_cross(CrossSums& sums, const TileFactors<S>& to, int lane) {
#pragma unroll 1
  for (int half = 0; half < kHalves; ++half) {
    const uint32_t rows = pair_rows(to, half, lane);
    const uint32_t columns = to.slot + S::kKsuf + half * S::kKsufHalf;
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) {
      uint32_t a[2][4], b[4];
      ldmatrix_x4(a[0], rows ^ block * 32);
      ldmatrix_x4(a[1], (rows ^ block * 32) + kGroupRows);
      ldmatrix_x4(b, columns + block_rows(block, lane));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) mma_bf16(sums[r][c], a[r], b[c], b[2 + c]);
      }
    }
  }
}

// A tile's rows of a panel times the other tile's decays: a lane takes a unit, lane % 16 over both halves, of every second
// token.
__device__ __forceinline__ void scale_rows(uint32_t rows, int half_stride, uint32_t total, int lane) {
  const uint32_t first = rows + lane % 16 / 8 * half_stride + swizzled(lane / 16, lane % 8);
  float2 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = load_shared_float2(total + total_offset(8 * (lane % 16) + 2 * i));
#pragma unroll
  for (int begin = 0; begin < kTile; begin += 8) {
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = load_shared_uint4(at_token(first, begin + 2 * i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 value = unpack_bf16(words[w]);
        words[w] = pack_bf16(value.x * pairs[w].x, value.y * pairs[w].y);
      }
      store_shared_uint4(at_token(first, begin + 2 * i), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The second tile against the first: Aqk, and the block of T_inv below the tiles' own inverses T_0 and T_1,
//   -T_1 (Akk T_0) = -(M + (T_1 - I) M),   M = Akk + Akk (T_0 - I),
// where what the unit diagonals give stays in fp32.
template <class S>
__device__ __forceinline__ void join_inverses(const CrossSums& sums, float beta, uint32_t slot, int lane) {
  uint32_t a[4], first[4], second[4];
  float m[2][4], t[2][4];  // [column group]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float beta_row = __shfl_sync(~0u, beta, 8 * r + lane / 4);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      m[c][2 * r] = beta_row * sums[r][c][0];
      m[c][2 * r + 1] = beta_row * sums[r][c][1];
      a[2 * c + r] = pack_bf16(m[c][2 * r], m[c][2 * r + 1]);
      store_shared(slot + S::kAqk + kPairTile + c * kPairUnit + r * kPairGroup + 4 * lane,
                   pack_bf16(sums[r][c][2], sums[r][c][3]));
    }
  }
  ldmatrix_x4_trans(first, slot + S::kTInv + pair_block_rows(lane));
  ldmatrix_x4(second, slot + S::kTInv + kPairDiagonal + pair_block_rows(lane));
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    mma_bf16(m[c], a, first[2 * c], first[2 * c + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) t[c][e] = m[c][e];
    mma_bf16(t[c], second, movmatrix_trans(pack_bf16(m[c][0], m[c][1])), movmatrix_trans(pack_bf16(m[c][2], m[c][3])));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store_shared(slot + S::kTInv + kPairTile + c * kPairUnit + r * kPairGroup + 4 * lane,
                   pack_bf16(-t[c][2 * r], -t[c][2 * r + 1]));
    }
  }
}

// Half the channels of a tile for themselves: q, k, g in the slot become Qpre, Kpre, Ksuf, the decays go to the scratch, the
// products are returned. `meet` is called once the warp has read q, k and g.
template <GateKind kGate, class S, class Meet>
__device__ __forceinline__ PairSums build_half(const PrefillParams& p, const TileFactors<S>& to, uint32_t bias,
                                               uint32_t gate, int valid, int lane, Meet meet) {
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
  const float2 log2_total = G[kTile - 1];
  if (__all_sync(~0u, log2_total.x >= bound && log2_total.y >= bound)) {
    const float2 total = {exp2_approx(log2_total.x), exp2_approx(log2_total.y)};
    store_shared_float2(to.total(to.tile) + total_offset(channel), total.x, total.y);
    scale_pairs(G, to, total, pair);
    __syncwarp();
    multiply_pairs(sums, to, lane);
  } else {
    decay_tree<kGate, S>(sums, to, bias + to.half * kHalfChannels * 4, gate_scale, valid, lane);
  }
  return sums;
}

// Aqk of a tile in its place, T_inv of a tile in its place, from the products of both halves of the channels.
template <class S>
__device__ __forceinline__ void finish_tile(PairSums& sums, const TileFactors<S>& to, float beta, int lane) {
  add_parked(sums, to, lane);
  __syncwarp();  // every lane has its sums: Aqk takes their place
  store_pairs(sums, beta, to.aqk(), to.akk(), lane);
  if (lane < kTile) store_shared_float(to.beta() + lane * 4, beta);
  __syncwarp();
  invert(to.t_inv(), to.akk(), lane);
}

// The three panels that take the other tile's decays.
enum Rescaled { kFirstKsuf, kSecondQ, kSecondK };

template <class S>
__device__ __forceinline__ void rescale(Rescaled what, const TileFactors<S>& to, int lane) {
  const uint32_t rows = what == kFirstKsuf ? S::kKsuf : (what == kSecondQ ? S::kQ : S::kK) + kTileRows;
  scale_rows(to.slot + rows, what == kFirstKsuf ? S::kKsufHalf : kHalfBytes, to.total(what == kFirstKsuf ? 1 : 0), lane);
}

// The decays of the whole chunk.
template <class S>
__device__ __forceinline__ void join_totals(const TileFactors<S>& to, int lane) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 64; ++i) {
    const uint32_t place = total_offset(2 * (lane + 32 * i));
    const float2 first = load_shared_float2(to.total(0) + place), second = load_shared_float2(to.total(1) + place);
    store_shared_float2(to.slot + S::kTotal + place, first.x * second.x, first.y * second.y);
  }
}

// What the tiles need of each other, in two steps with a meeting between them. With four warps the second halves' have the
// products between the tiles and what follows from them. (That they also rescale while the first halves' invert was slower.)
template <class S, class Team>
__device__ __forceinline__ void join(PairSums& sums, const TileFactors<S>& to, float beta, int lane, const Team& team) {
  CrossSums cross = {};
  if constexpr (S::kWholeTiles) {
    finish_tile(sums, to, beta, lane);
    if (to.tile == 1) multiply_cross(cross, to, lane);
    team.meet();  // the products between the tiles are made, and T_inv of both
    if (to.tile == 1) join_inverses<S>(cross, beta, to.slot, lane);
#pragma unroll 1
    for (int what = kFirstKsuf; what <= kSecondK; ++what) {
      if ((what == kSecondK) == (to.tile == 1)) rescale(static_cast<Rescaled>(what), to, opaque(lane));
    }
    if (to.tile == 0) join_totals(to, lane);
  } else {
    if (to.half == 0) {
      finish_tile(sums, to, beta, lane);
    } else if (to.tile == 1) {
      multiply_cross(cross, to, lane);
    }
    team.meet();  // the same
    if (to.half == 1 && to.tile == 1) {
      join_inverses<S>(cross, beta, to.slot, lane);
      return;
    }
    rescale(to.half == 1 ? kSecondQ : to.tile == 1 ? kSecondK : kFirstKsuf, to, lane);
    if (to.half == 0 && to.tile == 0) join_totals(to, lane);
  }
}

// The bits of a token's beta, and what they mean: apart, because the load takes a while and the value is needed late.
__device__ __forceinline__ uint32_t load_beta_bits(const PrefillParams& p, const Source& beta, int token) {
  const char* place = beta.rows + token * beta.stride;
  return p.beta_dtype == FloatKind::kFloat32 ? *reinterpret_cast<const uint32_t*>(place)
                                             : *reinterpret_cast<const uint16_t*>(place);
}

__device__ __forceinline__ float beta_value(const PrefillParams& p, uint32_t bits) {
  const float beta = __uint_as_float(p.beta_dtype == FloatKind::kFloat32 ? bits : bits << 16);
  return activate_beta(beta, p.sigmoid_beta, p.neg_eigval);
}

// A chunk's factors on their way to the other CTAs that hold rows of S: those that the join leaves as they are, Qpre and
// Kpre of the first tile and Ksuf of the second, while it goes on, and all others after it.
enum Pieces { kEarlyPieces, kLatePieces };

template <class S>
__device__ __forceinline__ void copy_pieces(uint32_t slot, uint32_t factors_ready, Pieces which, int rank, int lane) {
  constexpr int kLanes = S::kPieces / 2;  // each copies a tile of Q, K or Ksuf, half of the channels
  const int panel = lane / kHalves, half = lane % kHalves, tile = (panel == 2) ^ (which == kLatePieces);
  uint32_t place = slot + (panel == 0 ? S::kQ : panel == 1 ? S::kK : S::kKsuf) +
                   half * (panel == 2 ? S::kKsufHalf : kHalfBytes) + tile * kTileRows;
  int bytes = kTileRows;
  if (lane == kLanes) {
    place = slot + S::kTInv;
    bytes = S::kRestBytes;
  }
  if (lane < kLanes + (which == kLatePieces)) {
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      if (part != rank) copy_to_remote(part, place, bytes, factors_ready);
    }
  }
  __syncwarp();
}

template <class S>
struct Team {
  int index;

  __device__ __forceinline__ void meet() const { named_barrier_sync(1 + index, 32 * S::kTeamWarps); }
};

// kAsyncProxy: the state warps read the factors through the async proxy (wgmma), which ordinary stores reach only
// past a fence of each writing lane.
template <GateKind kGate, bool kAsyncProxy, class S>
__device__ void factor_role(const PrefillParams& p, const SharedMap<S>& shared, int length, int rank, int warp) {
  const int warp_lane = opaque(threadIdx.x % 32);
  const Team<S> team{.index = warp / S::kTeamWarps};
  if (team.index >= shared.ring.num_teams) return;
  const int num_ctas = S::kCluster ? shared.num_ctas : 1;
  const int first = team.index * num_ctas + rank, step = shared.ring.num_teams * num_ctas;  // chunks
  RingPosition ring{.slot = 0, .parity = 0}, raw = ring;
  ring.advance(first, shared.ring.num_slots);
  raw.advance(team.index, shared.ring.num_slots);
  for (int chunk = first * kChunk; chunk < length; chunk += step * kChunk) {
    const int lane = opaque(warp_lane);
    TileFactors<S> to{.slot = shared.slot(ring.slot),
                      .scratch = shared.scratch(team.index),
                      .tile = S::kWholeTiles ? warp % kTiles : warp % S::kTeamWarps / kHalves,
                      .half = S::kWholeTiles ? 1 : warp % kHalves};
    const int token = chunk + to.tile * kTile, valid = max(0, min(length - token, kTile));
    const uint32_t beta_bits =
        lane < valid ? load_beta_bits(p, Source::load(shared.beta()), token + lane) : 0;
    barrier_wait(shared.raw_ready(raw.slot), raw.parity);
    await_reuse(shared, ring);  // not sooner: of several phases to come a parity cannot tell which
    const uint32_t ready = shared.factors_ready(ring.slot);

    PairSums sums;
    if constexpr (S::kWholeTiles) {
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        row_scales(to.norms(), tensor == 0 ? to.q_tile() : to.k_tile(), tensor, p.scale, p.l2norm_qk, lane);
      }
      // The second half first: its sums wait in shared memory, where the first's are added. The team's other warp may still
      // join the last chunk, with both tiles' totals.
#pragma unroll 1
      for (;; --to.half) {
        sums = build_half<kGate>(p, to, shared.bias(), shared.gate(), valid, opaque(lane), [&] {
          if (to.half == 1) {
            team.meet();
          } else {
            __syncwarp();
          }
        });
        if (to.half == 0) break;
        __syncwarp();
        park(sums, to, opaque(lane));
      }
    } else {
      row_scales(to.norms(), to.half == 0 ? to.q_tile() : to.k_tile(), to.half, p.scale, p.l2norm_qk, lane);
      sums = build_half<kGate>(p, to, shared.bias(), shared.gate(), valid, lane, [&] { team.meet(); });
      if (to.half == 1) {
        __syncwarp();
        park(sums, to, lane);
      }
    }
    if constexpr (S::kCluster) fence_proxy_async();  // for the early copies
    team.meet();  // all of Kpre, Qpre, Ksuf stands, and the second half's sums
    if constexpr (S::kCluster) {
      if (to.tile == 0 && to.half == 1) copy_pieces<S>(to.slot, ready, kEarlyPieces, rank, lane);
    }
    join(sums, to, lane < valid ? beta_value(p, beta_bits) : 0.0f, opaque(lane), team);
    if constexpr (kAsyncProxy) fence_proxy_async();
    if constexpr (S::kCluster) {
      team.meet();  // all of it stands
      if (warp % S::kTeamWarps == 0) copy_pieces<S>(to.slot, ready, kLatePieces, rank, lane);
    }
    barrier_arrive(ready);
    ring.advance(step, shared.ring.num_slots);
    raw.advance(shared.ring.num_teams, shared.ring.num_slots);
  }
}

}  // namespace kda::prefill
