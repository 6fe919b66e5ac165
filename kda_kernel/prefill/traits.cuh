// The prefill kernels' sizes, shared-memory map and barriers, for host and device alike.
//
// A CTA owns one (sequence, value head) and walks its chunks of 16 tokens through a ring of slots:
//
//   state warps     S in registers, 16 rows of V each; o and the next S                    (state.cuh)
//   factor warps    gate, decay tree, Akk, Aqk, T_inv; each warp takes every seventh chunk  (factors.cuh)
//   load warp       q, k, g, v of a chunk -> slot                                          (load.cuh)
//
//   barrier        arrives                        waits                arrivals
//   SlotFree       state warps, chunk consumed    load warp            kStateWarps
//   RawReady       load warp, every lane          factor, state warps  32
//   FactorsReady   the chunk's factor warp        state warps          1
//
// A slot is reused in place: each factor warp reads a 16 x 16 block of q, k, g into registers before it writes the
// block of Qpre, Kpre, Ksuf that takes its room (a __syncwarp lies between); a state warp is the only reader of its
// 16 columns of v and writes o there once it has read them.
#pragma once

#include <cstdint>

#include "params.h"

namespace kda::prefill {

constexpr int kChunk = 16;  // one MMA tile: every level of the decay tree stays inside a warp's fragments
constexpr int kStateWarps = 8;
constexpr int kFactorWarps = 7;
constexpr int kThreads = 32 * (kStateWarps + kFactorWarps + 1);  // 512: 128 registers a thread
constexpr int kRowsPerStateWarp = kHeadDim / kStateWarps;
static_assert(kRowsPerStateWarp == 16, "a state warp holds one MMA tile of rows");

// More slots than this no longer hide anything: seven being prepared, the others loading or waiting to be consumed.
constexpr int kMaxSlots = 12;
constexpr int kMinSlots = 2;

// A tile [16 tokens, columns] lies in shared memory in columns of eight, token after token:
//   offset(token, column) = (column / 8) * 16 * w + token * w + (column % 8) * w / 8,   w = bytes of eight elements.
// In bf16, eight tokens of eight columns are then 128 consecutive bytes, which is what one 8 x 8 matrix of ldmatrix,
// of an MMA fragment (lane l at byte 4 l) and of an unswizzled wgmma operand want: no bank conflict anywhere.
constexpr int kUnitBytes = kChunk * 16;     // eight bf16 columns
constexpr int kHalfUnitBytes = 8 * 16;      // of eight tokens
constexpr int kBlockBytes = 2 * kUnitBytes;  // sixteen columns, an MMA's depth
constexpr int kTileBytes = kHeadDim / 8 * kUnitBytes;  // [16, 128]
constexpr int kPairBytes = kChunk / 8 * kUnitBytes;    // [16, 16]

// Byte offsets in a slot.
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
  static constexpr int kBytes = (kBeta + kChunk * 4 + 127) / 128 * 128;
};

// Before the slots: what lives as long as the CTA. A scratch row is padded to 20 words so that the four token pairs
// of a warp's store fall into different banks while float4 loads stay aligned.
constexpr int kScratchRow = 20;
constexpr int kScratchBytes = kChunk * kScratchRow * 4;  // Akk of one factor warp, transposed, fp32
struct Fixed {
  static constexpr int kBarriers = 0;  // SlotFree, RawReady, FactorsReady of each slot
  static constexpr int kBias = 512;    // [128] fp32: dt_bias in the gate's units
  static constexpr int kScratch = kBias + kHeadDim * 4;
  static constexpr int kBytes = (kScratch + kFactorWarps * kScratchBytes + 127) / 128 * 128;
  static_assert(3 * kMaxSlots * 8 <= kBias, "the barriers fit before the bias");
};

template <class GElem>
constexpr int shared_bytes(int num_slots) {
  return Fixed::kBytes + num_slots * Slot<GElem>::kBytes;
}

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

// What a lane names to ldmatrix_x4 for a 16 x 16 block of a bf16 tile; the four registers then hold
// (tokens 0-7, columns 0-7), (tokens 8-15, columns 0-7), (tokens 0-7, columns 8-15), (tokens 8-15, columns 8-15).
__device__ __forceinline__ uint32_t ldmatrix_lane_offset(int lane) { return lane / 16 * kUnitBytes + lane % 16 * 16; }

}  // namespace kda::prefill
