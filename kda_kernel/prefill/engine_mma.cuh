// The state warps' matrix products by mma.sync: each warp for itself, every product complete on return.
#pragma once

#include "prefill/state.cuh"

namespace kda::prefill {

struct MmaEngine {
  static constexpr bool kReadsThroughAsyncProxy = false;
  static constexpr bool kHasTensors = false;

  const int lane;

  static __device__ __forceinline__ void take_state_registers() {}
  static __device__ __forceinline__ void take_factor_registers() {}
  static __device__ __forceinline__ void take_load_registers() {}

  __device__ __forceinline__ explicit MmaEngine(int lane) : lane(lane) {}

  // S, which is rounded to bf16 where it is used.
  struct StateOperand {
    const StateFragment& s;
  };
  static __device__ __forceinline__ StateOperand operand(const StateFragment& s) { return {s}; }

  static __device__ __forceinline__ void settle(StateFragment&) {}

  // X^T = S M^T for a panel M.
  __device__ __forceinline__ void read_state(TokenFragment& x, const StateOperand& state, uint32_t panel) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      uint32_t a[4];
      pack_operand(a, state.s[2 * block], state.s[2 * block + 1]);
      const uint32_t rows = panel + block / kHalfBlocks * kHalfBytes + block_rows(block % kHalfBlocks, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t m[4];
        ldmatrix_x4(m, rows + tile * kTileRows);
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_bf16(x[2 * tile + n], a, m[n], m[2 + n]);
      }
    }
  }

  // X^T += U^T M^T for a lower triangular [32, 32] matrix M: the second tile of U reaches the second of X alone.
  __device__ __forceinline__ void multiply_pairs(TokenFragment& x, const TokenOperand& u, uint32_t matrix) const {
#pragma unroll
    for (int row = 0; row < kTiles; ++row) {
#pragma unroll
      for (int column = 0; column <= row; ++column) {
        uint32_t m[4];
        ldmatrix_x4(m, matrix + pair_block_rows(lane) + row * kPairTile + column * kPairBlock);
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_bf16(x[2 * row + n], u[column], m[n], m[2 + n]);
      }
    }
  }

  // S += U^T Ksuf.
  template <class Slot>
  __device__ __forceinline__ void update_state(StateFragment& s, const TokenOperand& u, uint32_t slot) const {
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      const uint32_t rows = block / kHalfBlocks * Slot::kKsufHalf + block_rows(block % kHalfBlocks, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t k[4];
        ldmatrix_x4_trans(k, slot + Slot::kKsuf + rows + tile * kTileRows);
        mma_bf16(s[2 * block], u[tile], k[0], k[1]);
        mma_bf16(s[2 * block + 1], u[tile], k[2], k[3]);
      }
    }
  }

  template <int kGroups, class... Fragment>
  __device__ __forceinline__ void wait_but(Fragment&...) const {}
};

}  // namespace kda::prefill
