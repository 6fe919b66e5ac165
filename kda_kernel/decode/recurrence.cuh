// One token of the recurrence, on a warp's 16 values of V.
//
//   S  = S diag(a)
//   u  = beta (v - S k)
//   o  = S q + (q . k) u        of S before the update, so that both sums over K come from one pass
//   S  = S + u k^T
#pragma once

#include "decode/tile.cuh"
#include "decode/tokens.cuh"

namespace kda::decode {

// Gives o of the value number Tile::value(k_lane % kTileV) to the lanes with has_output().
template <class Tile>
struct Recurrence {
  static __device__ __forceinline__ bool has_output(int lane) { return Tile::k_lane(lane) >= Tile::kTileV; }
  static __device__ __forceinline__ int output_value(int lane) {
    return Tile::value(Tile::k_lane(lane) % Tile::kTileV, lane);
  }

  static __device__ __forceinline__ float step(typename Tile::Values& s, const SharedTokens& group, int t,
                                               int warp_value, int lane) {
    constexpr int kTileV = Tile::kTileV, kTileK = Tile::kTileK, kKLanes = Tile::kKLanes;
    const float4* decay = group.decay[t].fours + Tile::k_lane(lane);
    const float4* key = group.key[t].fours + Tile::k_lane(lane);
    const float4* query = group.query[t].fours + Tile::k_lane(lane);

    float sums[2 * kTileV] = {};  // S k, then S q
#pragma unroll
    for (int m = 0; m < kTileK / 4; ++m) {
      const float4 a = decay[m * kKLanes], k = key[m * kKLanes], q = query[m * kKLanes];
      const float as[4] = {a.x, a.y, a.z, a.w}, ks[4] = {k.x, k.y, k.z, k.w}, qs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < kTileV; ++i) {
          float& x = s[i][4 * m + e];
          x *= as[e];
          sums[i] = fmaf(x, ks[e], sums[i]);
          sums[kTileV + i] = fmaf(x, qs[e], sums[kTileV + i]);
        }
      }
    }
    const float sum = Tile::reduce_over_k(sums, lane);

    // Lanes k_lane < kTileV have S k of their value, the others S q; u is theirs to give.
    const float v = group.value[t].values[warp_value + output_value(lane)];
    const float u_mine = group.beta[t] * (v - sum);
    const float o = fmaf(group.query_key[t], __shfl_sync(~0u, u_mine, Tile::k_lane(lane) % kTileV, kKLanes), sum);
    float u[kTileV];
#pragma unroll
    for (int i = 0; i < kTileV; ++i) u[i] = __shfl_sync(~0u, u_mine, i, kKLanes);

#pragma unroll
    for (int m = 0; m < kTileK / 4; ++m) {
      const float4 k = key[m * kKLanes];
      const float ks[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < kTileV; ++i) s[i][4 * m + e] = fmaf(u[i], ks[e], s[i][4 * m + e]);
      }
    }
    return o;
  }
};

}  // namespace kda::decode
