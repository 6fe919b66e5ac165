// Half a tile with resets, by the bounded way in segments.
//
// A reset is a decay of one channel below 2^-150: what it multiplies is 0 in fp32, and so is every factor across it. A
// channel's resets cut the tile's tokens into segments, the reset's token being the first of its segment. With G
// counted from the segment's start, k exp(G), q exp(G) and k exp(-G) stay in range where the segments' own decays do,
// and
//   pairs        meet inside a segment only; across segments they are 0
//   Kpre, Qpre   are 0 from a channel's first reset on
//   Ksuf         is 0 before its last
//   total        is 0 if there is one
// Where all of the half's channels have theirs at the same tokens, the products are made as without any, and what they gave
// for tokens of two segments is set to 0. Else segments differ from channel to channel, and the products take them one after
// another, with the operands of all others set to 0 in the registers.
#pragma once

#include "common/ptx.cuh"
#include "prefill/decay_tree.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr float kReset = -150.0f;

// G of a tile is above it, for log2 decays end at -160; so each sum is rounded by at most 2^-13, and differences are good
// for factors: what the tile's fifteen sums may change them by is less than their rounding to bf16.
constexpr float kLeastSum = -4096.0f;

// G from the start of each token's segment, in place, and the tokens with a reset: bit t of the lower half for the
// lane's first channel, of the upper for its second. False where a segment's decays are out of bounds, or G is not a
// number; the caller then needs another way.
__device__ __forceinline__ bool cut_at_resets(float2 (&G)[kTile], uint32_t& resets, float bound) {
  float2 before = {0.0f, 0.0f}, start = {0.0f, 0.0f};
  float least = 0.0f;
  resets = 0;
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    const float2 now = G[t];
    if (now.x - before.x < kReset) {
      start.x = now.x;
      resets |= 1u << t;
    }
    if (now.y - before.y < kReset) {
      start.y = now.y;
      resets |= 0x10000u << t;
    }
    before = now;
    G[t] = {now.x - start.x, now.y - start.y};
    least = fminf(least, fminf(G[t].x, G[t].y));
  }
  return __all_sync(~0u, least >= bound && before.x >= kLeastSum && before.y >= kLeastSum);
}

// The tokens with a reset, if all channels have the same, or 0.
__device__ __forceinline__ uint32_t common_resets(uint32_t resets) {
  int same;
  __match_all_sync(~0u, resets, &same);
  const uint32_t tokens = resets & 0xffff;
  return same && tokens == resets >> kTile ? tokens : 0;
}

// How many segments end before a token.
__device__ __forceinline__ int segment_number(uint32_t tokens, int token) { return __popc(tokens & ((2u << token) - 2)); }

// Products of tokens in two segments become 0.
__device__ __forceinline__ void keep_inside_segments(PairSums& sums, uint32_t tokens, uint32_t lane) {
  const auto keep = [&](float (&sum)[4], int first_row, int first_column) {
    const int row = segment_number(tokens, first_row + lane / 4);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const bool inside = row == segment_number(tokens, first_column + 2 * (lane % 4) + x);
      sum[x] = inside ? sum[x] : 0.0f;
      sum[2 + x] = inside ? sum[2 + x] : 0.0f;
    }
  };
  keep(sums.group[0], 0, 0);
  keep(sums.group[1], 8, 8);
  keep(sums.across, 8, 0);
}

// clear_across_resets() where all channels have their resets at the same tokens.
template <class S>
__device__ __forceinline__ void clear_across_tokens(const TileFactors<S>& to, uint32_t tokens, uint32_t first,
                                                    uint32_t total) {
  store_shared_float2(total, 0.0f, 0.0f);
  const int first_reset = __ffs(tokens) - 1, last_reset = 31 - __clz(tokens);
#pragma unroll 1
  for (int begin = 0; begin < kTile; begin += 8, first += 8 * kRowBytes) {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint32_t place = at_token(first, t);
      if (begin + t >= first_reset) {
        store_shared(to.q() + place, 0);
        store_shared(to.k() + place, 0);
      }
      if (begin + t < last_reset) store_shared(to.k_suf() + place, 0);
    }
  }
}

// Products inside a tile over half the channels, as multiply_pairs() makes them, of tokens of the same segment.
// `resets` is that of the lane's pair of channels.
template <class S>
__device__ __forceinline__ void multiply_segments(PairSums& sums, const TileFactors<S>& to, uint32_t resets, uint32_t lane) {
  const uint32_t rows = pair_rows(to, to.half, lane);
#pragma unroll 1
  for (int block = 0; block < kHalfBlocks; ++block) {
    uint32_t low[4], high[4], b[4];
    ldmatrix_x4(low, rows ^ block * 32);
    ldmatrix_x4(high, (rows ^ block * 32) + kGroupRows);
    ldmatrix_x4(b, to.inverse() + block_columns(block, lane));
    // All fragments have token lane / 4, and that eight further, of channels 8 h + 2 (lane % 4) and the next. Their
    // segments' numbers are the resets up to the token, but those at token 0, which nothing precedes: at most 15. A
    // half word has the bit 15 - number.
    uint32_t segment[2][2];  // [h][token group]
    uint32_t last = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = __shfl_sync(~0u, resets, 8 * block + 4 * h + lane % 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t through = (2u << (8 * r + lane / 4)) - 2;
        const uint32_t x = __popc(pair & through), y = __popc(pair >> 16 & through);
        segment[h][r] = 0x8000u >> x | 0x80000000u >> y;
        last = max(last, max(x, y));
      }
    }
    last = __reduce_max_sync(~0u, last);
#pragma unroll 1
    for (uint32_t number = 0; number <= last; ++number) {
      uint32_t low_part[4], high_part[4], b_part[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t low_mask = spread_signs(segment[h][0]), high_mask = spread_signs(segment[h][1]);
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          low_part[i] = low[i] & low_mask;
          high_part[i] = high[i] & high_mask;
        }
        b_part[h] = b[h] & low_mask;
        b_part[2 + h] = b[2 + h] & high_mask;
        segment[h][0] <<= 1;
        segment[h][1] <<= 1;
      }
      mma_bf16(sums.group[0], low_part, b_part[0], b_part[1]);
      mma_bf16(sums.group[1], high_part, b_part[2], b_part[3]);
      mma_bf16(sums.across, high_part, b_part[0], b_part[1]);
    }
  }
}

// What no token beyond a reset sees, and no token before it: zeros in Qpre, Kpre, Ksuf and the total of a lane's pair
// of channels. `first` is its place at token 0 in half a panel.
template <class S>
__device__ __forceinline__ void clear_across_resets(const TileFactors<S>& to, uint32_t resets, uint32_t first,
                                                    uint32_t total) {
  int first_reset[2], last_reset[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const uint32_t tokens = resets >> kTile * x & 0xffff;
    first_reset[x] = __ffs(tokens | 1 << kTile) - 1;
    last_reset[x] = 31 - __clz(tokens | 1);
    if (tokens) store_shared_float(total + 4 * x, 0.0f);
  }
#pragma unroll 1
  for (int begin = 0; begin < kTile; begin += 8, first += 8 * kRowBytes) {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint32_t place = at_token(first, t);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (begin + t >= first_reset[x]) {
          store_shared_u16(to.q() + place + 2 * x, 0);
          store_shared_u16(to.k() + place + 2 * x, 0);
        }
        if (begin + t < last_reset[x]) store_shared_u16(to.k_suf() + place + 2 * x, 0);
      }
    }
  }
}

}  // namespace kda::prefill
