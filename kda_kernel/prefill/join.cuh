// The two tiles of a chunk, each prepared for itself, made into one. (factors.cuh has the formulas.)
#pragma once

#include "common/ptx.cuh"
#include "prefill/decay_tree.cuh"
#include "prefill/tile.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// Products of the second tile's tokens with the first's: [row group][column group] of eight tokens, elements as PairSums'.
using CrossSums = float[2][2][4];

template <class S>
__device__ __forceinline__ void multiply_cross(CrossSums& sums, const TileFactors<S>& to, uint32_t lane) {
#pragma unroll 1
  for (int half = 0; half < kHalves; ++half) {
    const uint32_t rows = pair_rows(to, half, lane);
    const uint32_t columns = to.slot + S::kKsuf + half * S::kKsufHalf;
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) {
      uint32_t a[2][4], b[4];
      ldmatrix_x4(a[0], rows ^ block * 32);
      ldmatrix_x4(a[1], (rows ^ block * 32) + kGroupRows);
      ldmatrix_x4(b, columns + block_columns(block, lane));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) mma_bf16(sums[r][c], a[r], b[2 * c], b[2 * c + 1]);
      }
    }
  }
}

// A tile's rows of a panel times the other tile's decays: a lane takes a unit, lane % 16 over both halves, of every second
// token.
__device__ __forceinline__ void scale_rows(uint32_t rows, int half_stride, uint32_t total, uint32_t lane) {
  uint32_t first = rows + lane % 16 / 8 * half_stride + swizzled(lane / 16, lane % 8);
  uint32_t high[4], low[4];  // the decays as sums of two bf16: a product with both, rounded once, is as good as in fp32
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 decay = load_shared_float2(total + total_offset(8 * (lane % 16) + 2 * i));
    high[i] = pack_bf16(decay.x, decay.y);
    const float2 rounded = unpack_bf16(high[i]);
    low[i] = pack_bf16(decay.x - rounded.x, decay.y - rounded.y);
  }
#pragma unroll 1
  for (int begin = 0; begin < kTile; begin += 8, first += 8 * kRowBytes) {
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = load_shared_uint4(at_token(first, 2 * i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = fma_bf16x2(words[w], high[w], fma_bf16x2(words[w], low[w], 0));
      }
      store_shared_uint4(at_token(first, 2 * i), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The second tile against the first: Aqk, and the block of T_inv below the tiles' own inverses T_0 and T_1,
//   -T_1 (Akk T_0) = -(M + (T_1 - I) M),   M = Akk + Akk (T_0 - I),
// where what the unit diagonals give stays in fp32.
template <class S>
__device__ __forceinline__ void join_inverses(const CrossSums& sums, float beta, uint32_t slot, uint32_t lane) {
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

// The three panels that take the other tile's decays.
enum Rescaled { kFirstKsuf, kSecondQ, kSecondK };

template <class S>
__device__ __forceinline__ void rescale(Rescaled what, const TileFactors<S>& to, uint32_t lane) {
  const uint32_t rows = what == kFirstKsuf ? S::kKsuf : (what == kSecondQ ? S::kQ : S::kK) + kTileRows;
  scale_rows(to.slot + rows, what == kFirstKsuf ? S::kKsufHalf : kHalfBytes, to.total(what == kFirstKsuf ? 1 : 0), lane);
}

// The decays of the whole chunk.
template <class S>
__device__ __forceinline__ void join_totals(const TileFactors<S>& to, uint32_t lane) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 64; ++i) {
    const uint32_t place = total_offset(2 * (lane + 32 * i));
    const float2 first = load_shared_float2(to.total(0) + place), second = load_shared_float2(to.total(1) + place);
    store_shared_float2(to.slot + S::kTotal + place, first.x * second.x, first.y * second.y);
  }
}

// The sums of both halves of the channels, for the warps that add them; after it Aqk and T_inv may take the place where they
// were parked, and have zeros in their upper triangles.
template <class S, class Team>
__device__ __forceinline__ void take_parked(PairSums& sums, const TileFactors<S>& to, bool adds, uint32_t lane,
                                            const Team& team) {
  if (adds) add_parked(sums, to, lane);
  if constexpr (!S::kPairsInGate) {
    __syncwarp();  // the place is the warp's own
    return;
  }
  team.meet();  // both tiles' sums lie where T_inv will be
  if (!adds) return;
  const uint32_t upper = to.slot + (to.tile == 0 ? S::kTInv : S::kAqk) + kPairBlock;
  store_shared_uint4(upper + lane / kTile * kPairUnit + lane % kTile * 16, make_uint4(0, 0, 0, 0));
}

// What the tiles need of each other, in two steps with a meeting between them. With four warps the second halves' have the
// products between the tiles and what follows from them. (That they also rescale while the first halves' invert was slower.)
template <class S, class Team>
__device__ __forceinline__ void join(PairSums& sums, const TileFactors<S>& to, float beta, uint32_t lane, const Team& team) {
  CrossSums cross = {};
  if constexpr (S::kWholeTiles) {
    take_parked(sums, to, true, lane, team);
    finish_tile(sums, to, beta, lane);
    if (to.tile == 1) {
      multiply_cross(cross, to, lane);
    } else {
      join_totals(to, lane);
    }
    team.meet();  // the products between the tiles are made, and T_inv of both
    if (to.tile == 1) join_inverses<S>(cross, beta, to.slot, lane);
#pragma unroll 1
    for (int what = kFirstKsuf; what <= kSecondK; ++what) {
      if ((what == kSecondK) == (to.tile == 1)) rescale(static_cast<Rescaled>(what), to, opaque(lane));
    }
  } else {
    take_parked(sums, to, to.half == 0, lane, team);
    if (to.half == 0) {
      finish_tile(sums, to, beta, lane);
    } else if (to.tile == 1) {
      multiply_cross(cross, to, lane);
    } else {
      join_totals(to, lane);
    }
    team.meet();  // the same
    if (to.half == 1 && to.tile == 1) {
      join_inverses<S>(cross, beta, to.slot, lane);
      return;
    }
    rescale(to.half == 1 ? kSecondQ : to.tile == 1 ? kSecondK : kFirstKsuf, to, lane);
  }
}

}  // namespace kda::prefill
