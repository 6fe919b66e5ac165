// The state warps' matrix products by wgmma (compute capability 9.0a): four warps make a warpgroup of 64 rows of V,
// A comes from registers, B from the ring as the factor warps left it, and nothing is copied.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>

#include "prefill/state.cuh"

namespace kda::prefill {

// Shared-memory operands, made of 8 x 8 matrices. In a cluster the address has the CTA's rank above the 18 bits that count.
enum class Swizzle : uint64_t { kNone = 0, k128Bytes = 1 };

// kLeading and kStride are bytes between matrices: unswizzled, along the summed dimension and along the other; swizzled
// with rows along the summed dimension, kStride from eight rows to the next; swizzled with rows across it, kLeading from
// 64 columns to the next and kStride from eight rows to the next.
template <Swizzle kSwizzle, uint32_t kLeading, uint32_t kStride>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kLayout = static_cast<uint64_t>(kSwizzle) << 62 | static_cast<uint64_t>(kStride / 16) << 32 |
                               static_cast<uint64_t>(kLeading / 16) << 16;
  return kLayout + (address & 0x3ffff) / 16;
}

template <class Op, int kTiles, size_t... kIndex>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                                      bool first, std::index_sequence<kIndex...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[kIndex / 4][kIndex % 4]...,
          first ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One);
}

// D[64, 8 kTiles] = A[64, 16] B[16, 8 kTiles], added to D unless it is the `first`; Op is CuTe's wrapper of the instruction.
template <class Op, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool first = false) {
  wgmma<Op>(d, a, b, first, std::make_index_sequence<4 * kTiles>{});
}

// Keeps the compiler from moving a register of an unfinished product across this point.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) keep_in_place(d[n][x]);
  }
}

struct WgmmaEngine {
  static constexpr bool kReadsThroughAsyncProxy = true;
  static constexpr bool kHasTensors = true;  // and clusters

  // 256 state and 256 factor threads share 65536 registers; in a cluster 128, 384 and 128 load threads share 61440, 96 each
  // at the start. S, its bf16 copy and two products in flight need 168.
  static __device__ __forceinline__ void take_state_registers() { cutlass::arch::warpgroup_reg_alloc<168>(); }
  static __device__ __forceinline__ void take_factor_registers() { cutlass::arch::warpgroup_reg_dealloc<88>(); }
  static __device__ __forceinline__ void take_load_registers() { cutlass::arch::warpgroup_reg_dealloc<48>(); }

  using Major = cute::SM90::GMMA::Major;
  using TokensOp = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
  using UpdateOp = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;

  __device__ __forceinline__ explicit WgmmaEngine(int) {}

  // Tokens by 16 columns of a panel, the columns summed over: blocks of a half are 32 bytes apart in the swizzled rows.
  static __device__ __forceinline__ uint64_t token_rows(uint32_t panel, int block) {
    return operand_descriptor<Swizzle::k128Bytes, 0, kGroupRows>(panel) +
           (block / kHalfBlocks * kHalfBytes + block % kHalfBlocks * 32) / 16;
  }

  struct StateOperand {
    uint32_t a[kHeadDim / 16][4];
  };

  // S in bf16, to be kept until what is started with it is done.
  static __device__ __forceinline__ StateOperand operand(const StateFragment& s) {
    StateOperand operand;
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) pack_operand(operand.a[block], s[2 * block], s[2 * block + 1]);
    return operand;
  }

  // Starts X^T = S M^T for a panel M.
  __device__ __forceinline__ void read_state(TokenFragment& x, const StateOperand& s, uint32_t panel) const {
    pin(x);
    cute::warpgroup_arrive();
#pragma unroll
    for (int block = 0; block < kHeadDim / 16; ++block) {
      wgmma<TokensOp>(x, s.a[block], token_rows(panel, block), block == 0);
    }
    cute::warpgroup_commit_batch();
  }

  // What has been computed of S so far is computed before what follows.
  __device__ __forceinline__ void settle(StateFragment& s) const { pin(s); }

  // Starts X^T += U^T M^T for a [32, 32] matrix M.
  __device__ __forceinline__ void multiply_pairs(TokenFragment& x, const TokenOperand& u, uint32_t matrix) const {
    pin(x);
    cute::warpgroup_arrive();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      wgmma<TokensOp>(x, u[tile],
                      operand_descriptor<Swizzle::kNone, kPairUnit, kPairGroup>(matrix) + tile * (kPairBlock / 16));
    }
    cute::warpgroup_commit_batch();
  }

  // Starts S += U^T Ksuf: here the tokens are the depth.
  template <class Slot>
  __device__ __forceinline__ void update_state(StateFragment& s, const TokenOperand& u, uint32_t slot) const {
    pin(s);
    cute::warpgroup_arrive();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      wgmma<UpdateOp>(s, u[tile],
                      operand_descriptor<Swizzle::k128Bytes, Slot::kKsufHalf, kGroupRows>(slot + Slot::kKsuf) +
                          tile * (kTileRows / 16));
    }
    cute::warpgroup_commit_batch();
  }

  // Until all but the last kGroups of what has been started are done, which gave `results`.
  template <int kGroups, class... Fragment>
  __device__ __forceinline__ void wait_but(Fragment&... results) const {
    cute::warpgroup_wait<kGroups>();
    (pin(results), ...);
  }
};

}  // namespace kda::prefill
