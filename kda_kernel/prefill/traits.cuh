// The prefill kernels' sizes, shared-memory map and barriers, for host and device alike.
//
// A CTA owns one (sequence, value head) and walks its chunks of 16 tokens through a ring of slots:
//
//   state warps     S in registers, 16 rows of V each; o and the next S                    (state.cuh)
//   factor warps    gate, decay tree, Akk, Aqk, T_inv; each warp takes every seventh chunk  (factors.cuh)
//   load warp       q, k, g, v of a chunk -> slot                                          (load.cuh)
//
//   barrier        arrives                        waits                arrivals
//   SlotFree       state warps, chunk consumed    load, factor warps   32 kStateWarps
//   RawReady       load warp                      factor, state warps  32
//   FactorsReady   the chunk's factor warp        all of them          32
// Every lane arrives for what it has read and written itself. Load and factor warps wait for the slot's last chunk,
// state warps for its present one.
//
// A slot is reused in place: a lane of the factor warp reads its elements of q, k, g into registers before it writes
// Qpre, Kpre, Ksuf to the same bytes, and no other lane reads those bytes as q, k or g after that; a state warp is the
// only reader of its 16 columns of v and passes o through them once it has read them.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
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

// A tile [16 tokens, columns] lies in shared memory in units of eight columns, token after token, a row's width apart:
//   offset(token, column) = (column / 8) * 17 * w + token * w + (column % 8) * w / 8,   w = bytes of eight elements.
// In bf16, eight tokens of eight columns are then 128 consecutive bytes, which is what one 8 x 8 matrix of ldmatrix,
// of an MMA fragment (lane l at byte 4 l) and of an unswizzled wgmma operand want; and with the odd row between units a
// warp that holds a pair of columns per lane finds its 64 columns of a token in 32 different banks.
constexpr int kUnitBytes = (kChunk + 1) * 16;  // eight bf16 columns
constexpr int kHalfUnitBytes = 8 * 16;         // of eight tokens
constexpr int kBlockBytes = 2 * kUnitBytes;  // sixteen columns, an MMA's depth
constexpr int kTileBytes = kHeadDim / 8 * kUnitBytes;  // [16, 128]
constexpr int kPairBytes = kChunk / 8 * kUnitBytes;    // [16, 16]

// The decay of a chunk per channel, in the order in which a state lane wants it: the pairs of channels of lane % 4 side
// by side, and an odd 16 bytes between the four lists so that they lie in different banks.
constexpr int kTotalList = kHeadDim + 16;
constexpr int kTotalBytes = 4 * kTotalList;
__device__ __forceinline__ uint32_t total_offset(int channel) {
  return channel % 8 / 2 * kTotalList + channel / 8 * 8;
}

// Byte offsets in a slot.
template <class GElem>
struct Slot {
  static constexpr bool kGateInPlace = sizeof(GElem) == 2;  // an fp32 gate tile is too wide for Ksuf to follow it
  static constexpr int kGateScale = sizeof(GElem) / 2;  // the gate tile's offsets in those of a bf16 tile
  static constexpr int kGateBytes = kTileBytes * kGateScale;
  static constexpr int kQ = 0;                // q, then Qpre
  static constexpr int kK = kQ + kTileBytes;  // k, then Kpre
  static constexpr int kV = kK + kTileBytes;  // v, then o
  static constexpr int kG = kV + kTileBytes;
  static constexpr int kKsuf = kGateInPlace ? kG : kG + kGateBytes;
  static constexpr int kTInv = kKsuf + kTileBytes;  // T_inv below its diagonal
  static constexpr int kAqk = kTInv + kPairBytes;
  static constexpr int kTotal = kAqk + kPairBytes;   // [128] fp32, by total_offset()
  static constexpr int kBeta = kTotal + kTotalBytes;  // [16] fp32
  static constexpr int kBytes = (kBeta + kChunk * 4 + 127) / 128 * 128;
};

// A factor warp's own room. First it holds k exp(-G) of half the channels, then, once the products are in registers,
// Akk transposed in fp32: rows padded to 20 words, so that the four token pairs of a warp's store fall into different
// banks while float4 loads stay aligned.
constexpr int kHalfTileBytes = kTileBytes / 2;
constexpr int kScratchRow = 20;
constexpr int kAkkBytes = kChunk * kScratchRow * 4;
constexpr int kNormOffset = kHalfTileBytes > kAkkBytes ? kHalfTileBytes : kAkkBytes;
constexpr int kScratchBytes = kNormOffset + kChunk * 8;  // and per token the factors on q and on k, fp32

// Before the slots: what lives as long as the CTA.
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

// Until the slot's last chunk has been made and consumed; a fresh barrier passes a wait for the odd parity, so the first
// round finds every slot free. SlotFree alone implies FactorsReady, and RawReady implies both: a role waits for all that
// it follows at first hand, because racecheck does not follow chains of barriers. (The waits fall through.)
template <class GElem>
__device__ __forceinline__ void await_reuse(const SharedMap<GElem>& shared, const RingPosition& ring) {
  barrier_wait(shared.factors_ready(ring.slot), ring.parity ^ 1);
  barrier_wait(shared.slot_free(ring.slot), ring.parity ^ 1);
}

// What a lane names to ldmatrix_x4 for a 16 x 16 block of a bf16 tile; the four registers then hold
// (tokens 0-7, columns 0-7), (tokens 8-15, columns 0-7), (tokens 0-7, columns 8-15), (tokens 8-15, columns 8-15).
__device__ __forceinline__ uint32_t ldmatrix_lane_offset(int lane) { return lane / 16 * kUnitBytes + lane % 16 * 16; }

}  // namespace kda::prefill
