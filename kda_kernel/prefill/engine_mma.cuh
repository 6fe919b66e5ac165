// The state warps' matrix products by mma.sync: each warp for itself, every product complete on return.
#pragma once

#include "prefill/state.cuh"

namespace kda::prefill {

struct MmaEngine {
  static constexpr bool kReadsThroughAsyncProxy = false;

  const uint32_t lane_offset;

  static __device__ __forceinline__ void take_state_registers() {}
  static __device__ __forceinline__ void take_factor_registers() {}

  __device__ __forceinline__ explicit MmaEngine(int lane) : lane_offset(ldmatrix_lane_offset(lane)) {}

  // P^T += S Kpre^T and R^T += S Qpre^T.
  __device__ __forceinline__ void read_state(TokenFragment& p, TokenFragment& r, const StateFragment& s, uint32_t k_pre,
                                             uint32_t q_pre) const {
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      uint32_t a[4], k[4], q[4];
      pack_operand(a, s[2 * block], s[2 * block + 1]);
      ldmatrix_x4(k, k_pre + lane_offset + block * kBlockBytes);
      ldmatrix_x4(q, q_pre + lane_offset + block * kBlockBytes);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        mma_bf16(p[n], a, k[n], k[2 + n]);
        mma_bf16(r[n], a, q[n], q[2 + n]);
      }
    }
  }

  // X^T += U^T M^T for a [16, 16] matrix M.
  __device__ __forceinline__ void multiply_pairs(TokenFragment& x, const uint32_t (&u)[4], uint32_t matrix) const {
    uint32_t m[4];
    ldmatrix_x4(m, matrix + lane_offset);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) mma_bf16(x[n], u, m[n], m[2 + n]);
  }

  // S += U^T Ksuf.
  __device__ __forceinline__ void update_state(StateFragment& s, const uint32_t (&u)[4], uint32_t k_suf) const {
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      uint32_t k[4];
      ldmatrix_x4_trans(k, k_suf + lane_offset + block * kBlockBytes);
      mma_bf16(s[2 * block], u, k[0], k[1]);
      mma_bf16(s[2 * block + 1], u, k[2], k[3]);
    }
  }

  __device__ __forceinline__ void wait_projected(TokenFragment&) const {}
  __device__ __forceinline__ void wait(TokenFragment&, TokenFragment&, StateFragment&) const {}
};

}  // namespace kda::prefill
