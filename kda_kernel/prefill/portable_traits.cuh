// The portable prefill kernel's sizes and shared-memory map, for host and device alike.
//
// A CTA owns one (sequence, value head) and walks its chunks of 16 tokens through a ring of slots:
//
//   load warp       q, k, g, v of a chunk -> slot                                     (portable_load.cuh)
//   factor warps    gate, decay tree, Akk, Aqk, T_inv; a warp takes every fourth chunk  (portable_factors.cuh)
//   state warps     S in registers, 32 rows of V each; o and the next S                 (portable_state.cuh)
//
//   barrier        arrives                        waits                arrivals
//   SlotFree       state warps, chunk consumed    load warp            kStateWarps
//   RawReady       load warp, every lane          factor, state warps  32
//   FactorsReady   the chunk's factor warp        state warps          1
//
// A slot is reused in place: each factor warp reads a 16 x 16 block of q, k, g into registers before it writes the
// block of Qpre, Kpre, Ksuf that takes its room (a __syncwarp lies between); a state warp is the only reader of its
// 32 columns of v and writes o there once it has read them.
#pragma once

#include <cstdint>

#include <cute/swizzle.hpp>

#include "params.h"

namespace kda::portable {

constexpr int kChunk = 16;  // one MMA tile: every level of the decay tree stays inside a warp's fragments
constexpr int kStateWarps = 8;
constexpr int kFactorWarps = 7;
constexpr int kThreads = 32 * (kStateWarps + kFactorWarps + 1);
constexpr int kRowsPerStateWarp = kHeadDim / kStateWarps;

// More slots than this no longer hide anything: four being prepared, four loading, four waiting to be consumed.
constexpr int kMaxSlots = 12;
constexpr int kMinSlots = 2;

constexpr int kTileBytes = kChunk * kHeadDim * 2;  // [16, 128] bf16
constexpr int kPairBytes = kChunk * kChunk * 2;    // [16, 16] bf16

// Byte offsets in a slot. Tiles are aligned to 512 bytes, so that a swizzled address is (row base) ^ (column bits).
template <class GElem>
struct Slot {
  static constexpr bool kGateInPlace = sizeof(GElem) == 2;  // an fp32 gate tile is too wide for Ksuf to follow it
  static constexpr int kGateBytes = kChunk * kHeadDim * static_cast<int>(sizeof(GElem));
  static constexpr int kQ = 0;               // q, then Qpre
  static constexpr int kK = kQ + kTileBytes;  // k, then Kpre
  static constexpr int kV = kK + kTileBytes;  // v, then o
  static constexpr int kG = kV + kTileBytes;
  static constexpr int kKsuf = kGateInPlace ? kG : kG + kGateBytes;
  static constexpr int kTInv = kKsuf + kTileBytes;  // T_inv below its diagonal
  static constexpr int kAqk = kTInv + kPairBytes;
  static constexpr int kTotal = kAqk + kPairBytes;      // [128] fp32
  static constexpr int kBeta = kTotal + kHeadDim * 4;  // [16] fp32
  static constexpr int kBytes = (kBeta + kChunk * 4 + 511) / 512 * 512;  // the next slot's tiles stay aligned
};

// Before the slots: what lives as long as the CTA. A scratch row is padded to 20 words so that the four token pairs
// of a warp's store fall into different banks while float4 loads stay aligned.
constexpr int kScratchRow = 20;
constexpr int kScratchBytes = kChunk * kScratchRow * 4;  // Akk of one factor warp, transposed, fp32
struct Fixed {
  static constexpr int kBarriers = 0;  // SlotFree, RawReady, FactorsReady of each slot
  static constexpr int kBias = 512;    // [128] fp32: dt_bias in the gate's units
  static constexpr int kScratch = kBias + kHeadDim * 4;
  static constexpr int kBytes = (kScratch + kFactorWarps * kScratchBytes + 511) / 512 * 512;
  static_assert(3 * kMaxSlots * 8 <= kBias, "the barriers fit before the bias");
};

template <class GElem>
constexpr int shared_bytes(int num_slots) {
  return Fixed::kBytes + num_slots * Slot<GElem>::kBytes;
}

// Swizzles on byte offsets: eight rows of one 16-byte column fall into eight different bank groups.
using TileSwizzle = cute::Swizzle<3, 4, 4>;      // rows of 256 bytes
using WideTileSwizzle = cute::Swizzle<3, 5, 4>;  // rows of 512 bytes, read 32 bytes at a time
using PairSwizzle = cute::Swizzle<1, 4, 3>;      // rows of 32 bytes

template <class Swizzle, int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int column_byte) {
  return Swizzle::apply(static_cast<uint32_t>(row * kRowBytes + column_byte));
}

__device__ __forceinline__ uint32_t tile_offset(int row, int column_byte) {
  return swizzled<TileSwizzle, kHeadDim * 2>(row, column_byte);
}

__device__ __forceinline__ uint32_t pair_offset(int row, int column_byte) {
  return swizzled<PairSwizzle, kChunk * 2>(row, column_byte);
}

// The row and the 16-byte column a lane names to ldmatrix_x4 for a 16 x 16 block; the four registers then hold
// (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7, columns 8-15), (rows 8-15, columns 8-15).
__device__ __forceinline__ int ldmatrix_row(int lane) { return lane & 15; }
__device__ __forceinline__ int ldmatrix_column_byte(int lane) { return (lane >> 4) * 16; }

// Where a role stands in the ring.
struct RingPosition {
  int slot;
  uint32_t parity;

  __device__ __forceinline__ void advance(int chunks, int num_slots) {
    slot += chunks;
    while (slot >= num_slots) {
      slot -= num_slots;
      parity ^= 1;
    }
  }
};

// Shared-memory addresses of one CTA.
template <class GElem>
struct SharedMap {
  uint32_t base;
  int num_slots;

  __device__ __forceinline__ uint32_t slot_free(int slot) const { return base + Fixed::kBarriers + slot * 8; }
  __device__ __forceinline__ uint32_t raw_ready(int slot) const { return slot_free(slot) + kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t factors_ready(int slot) const { return slot_free(slot) + 2 * kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t bias() const { return base + Fixed::kBias; }
  __device__ __forceinline__ uint32_t scratch(int warp) const { return base + Fixed::kScratch + warp * kScratchBytes; }
  __device__ __forceinline__ uint32_t slot(int index) const {
    return base + Fixed::kBytes + index * Slot<GElem>::kBytes;
  }
};

}  // namespace kda::portable
