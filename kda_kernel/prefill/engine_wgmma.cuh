// The state warps' matrix products by wgmma (compute capability 9.0a): four warps make a warpgroup of 64 rows of V,
// A comes from registers, B from the ring as the factor warps left it, and nothing is copied.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>

#include "prefill/state.cuh"

namespace kda::prefill {

// A shared-memory operand without swizzle, made of 8 x 8 matrices of 128 bytes: kDepthStep bytes to the next matrix
// along the summed dimension, kWidthStep along the other. Shared memory ends below 2^18 bytes: no bit of the address
// needs masking.
template <uint32_t kDepthStep, uint32_t kWidthStep>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kSteps = static_cast<uint64_t>(kDepthStep / 16) << 16 | static_cast<uint64_t>(kWidthStep / 16) << 32;
  return kSteps + address / 16;
}

template <class Op, int kTiles, size_t... kIndex>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                                      std::index_sequence<kIndex...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[kIndex / 4][kIndex % 4]..., cute::SM90::GMMA::ScaleOut::One);
}

// D[64, 8 kTiles] += A[64, 16] B[16, 8 kTiles]; Op is CuTe's wrapper of the instruction.
template <class Op, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  wgmma<Op>(d, a, b, std::make_index_sequence<4 * kTiles>{});
}

// Keeps the compiler from moving a register of an unfinished product across this point.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) asm volatile("" : "+f"(d[n][x])::"memory");
  }
}

struct WgmmaEngine {
  static constexpr bool kReadsThroughAsyncProxy = true;

  // 256 state threads and 256 others share 65536 registers: 152 hold S, its bf16 copy and two products in flight.
  static __device__ __forceinline__ void take_state_registers() { cutlass::arch::warpgroup_reg_alloc<152>(); }
  static __device__ __forceinline__ void take_factor_registers() { cutlass::arch::warpgroup_reg_dealloc<104>(); }

  using Major = cute::SM90::GMMA::Major;
  using PairsOp = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<Major::K, Major::K>;
  using UpdateOp = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;

  __device__ __forceinline__ explicit WgmmaEngine(int) {}

  // Tokens by columns, the columns summed over.
  static __device__ __forceinline__ uint64_t token_rows(uint32_t tile) {
    return operand_descriptor<kUnitBytes, kHalfUnitBytes>(tile);
  }

  // Starts P^T += S Kpre^T, then R^T += S Qpre^T.
  __device__ __forceinline__ void read_state(TokenFragment& p, TokenFragment& r, const StateFragment& s, uint32_t k_pre,
                                             uint32_t q_pre) const {
    constexpr int kBlocks = kHeadDim / 16;
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) pack_operand(a[block], s[2 * block], s[2 * block + 1]);
    pin(p);
    pin(r);
    cute::warpgroup_arrive();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      wgmma<PairsOp>(p, a[block], token_rows(k_pre) + block * (kBlockBytes / 16));
    }
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      wgmma<PairsOp>(r, a[block], token_rows(q_pre) + block * (kBlockBytes / 16));
    }
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void wait_projected(TokenFragment& p) const {
    cute::warpgroup_wait<1>();
    pin(p);
  }

  // Starts X^T += U^T M^T for a [16, 16] matrix M.
  __device__ __forceinline__ void multiply_pairs(TokenFragment& x, const uint32_t (&u)[4], uint32_t matrix) const {
    pin(x);
    cute::warpgroup_arrive();
    wgmma<PairsOp>(x, u, token_rows(matrix));
    cute::warpgroup_commit_batch();
  }

  // Starts S += U^T Ksuf: here the tokens are the depth.
  __device__ __forceinline__ void update_state(StateFragment& s, const uint32_t (&u)[4], uint32_t k_suf) const {
    pin(s);
    cute::warpgroup_arrive();
    wgmma<UpdateOp>(s, u, operand_descriptor<kHalfUnitBytes, kUnitBytes>(k_suf));
    cute::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void wait(TokenFragment& u, TokenFragment& o, StateFragment& s) const {
    cute::warpgroup_wait<0>();
    pin(u);
    pin(o);
    pin(s);
  }
};

}  // namespace kda::prefill
