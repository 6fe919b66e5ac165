// The prefill kernels' sizes, shared-memory map and barriers, for host and device alike.
//
// A CTA owns a value head of one sequence, or of several short ones, one after another, and walks their chunks of 32 tokens,
// two tiles of 16, through a ring of slots:
//
//   factor teams    gate, decay tree, Akk, Aqk, T_inv: one or two warps per tile, teams in turn      (factors.cuh)
//   state warps     S in registers, 16 rows of V each; o and the next S; they also load              (state.cuh, load.cuh)
//
//   barrier        arrives                             waits           arrivals
//   RawReady       q, k, g are there                   factor team     a lane each
//   FactorsReady   the chunk's factor team; v is there all             a lane each
//   SlotFree       state warps, factors consumed       all             a lane each
//   ValuesFree     state warps, o has left v's place   state warps     a lane each
// Every lane arrives for what it has read and written itself; where a tensor copy (TMA) loads, its bytes count as well, and one
// lane arrives for its warp. A slot is loaded again once its last chunk has been consumed. v, which no factor team needs, has a
// ring of its own, as short as the memory left over makes it. Without TMA o leaves through v's place, with it each state warp
// has a stage of its own, and nobody needs ValuesFree.
//
// With few heads, a cluster of two to eight CTAs owns a (sequence, value head). Two of them hold half the rows of S each;
// all take chunks in turn, load their q, k and g into a ring of their own, prepare the factors there, and copy what the
// state needs to a second ring, of guests, in the other CTAs that hold S. So a slot is taken for as long as the chunk's
// preparation takes only where that happens. There are the same rings in all CTAs. The state warps have S there and nothing
// else; four load warps do the rest, one of them all that concerns v and o (cluster.cuh).
//   FactorsReady   of a guest: the copy's bytes; v
//   SlotFree       of an own slot: a lane of v's load warp of both CTAs
//   GuestFree      of an own slot: the places that its chunk is to be copied to are free; the same of the other CTAs alone
//   OutputReady    in ValuesFree's place: the state warps' lanes, o is in v's place and nothing else is needed of the chunk
//
// A slot is reused in place: a lane of a factor warp reads its elements of q, k, g into registers before it writes
// Qpre, Kpre, Ksuf to the same bytes, and no other lane reads those bytes as q, k or g after that; a state warp is the
// only reader of its columns of v, where o follows.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "params.h"

namespace kda::prefill {

constexpr int kTile = 16;  // tokens of an MMA tile: every level of the decay tree stays inside a warp's fragments
constexpr int kTiles = 2;  // of a chunk; the state chain's latency and its work on S are per chunk
constexpr int kChunk = kTiles * kTile;
constexpr int kRowsPerStateWarp = 16;  // of V: one MMA tile

// CTAs that a head may have; six and seven are slower than five, or no faster.
constexpr int kClusterSizes[] = {8, 5, 4, 3, 2, 1};
constexpr int kMaxCtas = kClusterSizes[0];

// Barriers are laid out for so many: all that 227 KB hold.
constexpr int kMaxSlots = 6;
constexpr int kSlotBarriers = 5;

// A bf16 panel [32 tokens, 128 columns] lies in shared memory as two halves of 64 columns, a row of 128 bytes per token,
// the eight units (of 16 bytes, eight columns) of a row permuted by the token: the 128-byte swizzle of wgmma. A warp that
// reads 64 columns of a token, eight rows of one unit (ldmatrix), or copies a row from global memory finds every bank once.
constexpr int kRowBytes = 128;
constexpr int kGroupRows = 8 * kRowBytes;           // eight tokens, the permutation's period
constexpr int kTileRows = kTile * kRowBytes;
constexpr int kHalfBytes = kChunk * kRowBytes;      // [32, 64]
constexpr int kPanelBytes = 2 * kHalfBytes;         // [32, 128]
constexpr int kHalves = 2;
constexpr int kHalfChannels = kHeadDim / kHalves;
constexpr int kHalfBlocks = kHalfChannels / 16;     // an MMA's depth is sixteen columns
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t unit) { return row * kRowBytes + (unit ^ row % 8) * 16; }

// T_inv and Aqk [32, 32]: units of eight columns, row after row, an odd row between them. Eight rows of a unit are 128
// consecutive bytes: one 8 x 8 matrix of ldmatrix, of an MMA fragment (lane l at byte 4 l) and of an unswizzled wgmma
// operand.
constexpr int kPairUnit = (kChunk + 1) * 16;
constexpr int kPairGroup = 8 * 16;            // eight rows
constexpr int kPairTile = 2 * kPairGroup;     // a tile's rows
constexpr int kPairBlock = 2 * kPairUnit;     // a tile's columns
constexpr int kPairBytes = kChunk / 8 * kPairUnit;
constexpr int kPairDiagonal = kPairBlock + kPairTile;  // from pairs inside the first tile to pairs inside the second

// The decay of a chunk per channel, in the order in which a state lane wants it: the pairs of channels of lane % 4 side
// by side, and an odd 16 bytes between the four lists so that they lie in different banks.
constexpr int kTotalList = kHeadDim + 16;
constexpr int kTotalBytes = 4 * kTotalList;
__device__ __forceinline__ uint32_t total_offset(uint32_t channel) {
  return channel % 8 / 2 * kTotalList + channel / 8 * 8;
}

// Byte offsets in a slot. An fp32 gate has rows of 32 channels in the same manner, four of them a token. Ksuf takes the
// place of the gate; where that is fp32, half a panel of Ksuf covers the first of the two rows that a token has for these
// channels.
template <class GateElem, int kStateParts, bool kTensorCopies>
struct Slot {
  using GElem = GateElem;
  static constexpr int kParts = kStateParts;  // CTAs that share the rows of S
  static constexpr bool kCluster = kParts > 1;
  static constexpr bool kTensors = kTensorCopies;  // q, k, v, g and o are copied by TMA where they can be
  static constexpr bool kStaged = kTensors && !kCluster;  // o on its way out is not in v's place
  static constexpr int kStateWarps = kHeadDim / kRowsPerStateWarp / kParts;
  static constexpr bool kWholeTiles = !kCluster;  // a factor warp's part of a chunk is a tile, or half its channels
  static constexpr int kTeamWarps = kTiles * (kWholeTiles ? 1 : kHalves);
  static constexpr int kMaxTeams = kCluster ? 3 : 4;
  static constexpr int kFactorWarps = kTeamWarps * kMaxTeams;
  static constexpr int kLoadWarps = kCluster ? 4 : kStateWarps;  // in a single CTA these are the state warps
  static constexpr int kThreads = 32 * (kStateWarps + kFactorWarps + (kCluster ? kLoadWarps : 0));
  static constexpr int kValueWarps = kLoadWarps / 4;  // of these, those that load v
  static constexpr int kMaxItems = kCluster ? 1 : 16;  // sequences of a CTA, one after another
  static constexpr int kFreeArrivals = kCluster ? kParts : 32 * kStateWarps;
  static constexpr int kOutputArrivals = 32 * kStateWarps;

  static constexpr int kGateScale = sizeof(GElem) / 2;
  static constexpr int kV = 0;  // in a cluster, v of the part's rows; a single CTA has places for v behind the slots
  static constexpr int kVBytes = kCluster ? kPanelBytes / kParts : 0;
  static constexpr int kQ = kV + kVBytes;               // q, then Qpre
  static constexpr int kK = kQ + kPanelBytes;           // k, then Kpre
  static constexpr int kG = kK + kPanelBytes;           // g, then Ksuf
  static constexpr int kKsuf = kG;
  static constexpr int kKsufHalf = kHalfBytes * kGateScale;
  // What follows lies behind these, or in the two places that an fp32 gate has and Ksuf has not: for one team or slot more.
  static constexpr bool kPairsInGate = kGateScale == 2;
  static constexpr int kGateEnd = kG + kPanelBytes * kGateScale;
  static constexpr int kTInv = kPairsInGate ? kG + kKsufHalf + kHalfBytes : kGateEnd;  // T_inv below its diagonal
  static constexpr int kAqk = kPairsInGate ? kG + kHalfBytes : kTInv + kPairBytes;
  static constexpr int kTotal = (kPairsInGate ? kTInv : kAqk) + kPairBytes;  // [128] fp32, by total_offset()
  static constexpr int kBeta = kTotal + kTotalBytes;                         // [32] fp32
  // What CTAs copy to each other: Q, K and Ksuf by halves, and the rest, all from T_inv on, Aqk apart if it lies elsewhere.
  static constexpr int kPieces = 3 * kHalves;
  static constexpr int kRestBytes = kBeta + kChunk * 4 - kTInv;
  static constexpr int kApartBytes = kPairsInGate ? kPairBytes : 0;
  static constexpr int kFactorBytes = kPieces * kHalfBytes + kRestBytes + kApartBytes;
  static constexpr int kEnd = kPairsInGate ? kGateEnd : kBeta + kChunk * 4;
  static constexpr int kBytes = (kEnd + 1023) / 1024 * 1024;  // the swizzle counts from multiples of 1024
  static_assert(!kPairsInGate || (kAqk + kPairBytes <= kG + kKsufHalf && kBeta + kChunk * 4 <= kEnd), "they fit");
};

// -Akk of each eight tokens of a tile against themselves, fp32: rows of 12 words and 16 bytes between the two blocks, so that
// eight rows' float4, and the blocks' of one row, lie in different banks.
constexpr int kAkkRow = 12;
constexpr int kAkkBlock = kTile / 2 * kAkkRow * 4 + 16;
constexpr int kAkkBytes = 2 * kAkkBlock;

// A factor team's own room: for each warp k exp(-G) of its tile and half of the channels, swizzled, and in the place of a
// tile's first, once the products are in registers, its Akk; an fp32 gate leaves room for both in the slot. Of each tile per
// token the factors on q and on k, fp32, and its decay per channel.
template <class S>
struct Scratch {
  static constexpr int kNorms = S::kPairsInGate ? 0 : S::kTeamWarps * kTileRows;
  static constexpr int kNormBytes = kTile * 8;
  static constexpr int kTotal = kNorms + kTiles * kNormBytes;
  static constexpr int kBytes = (kTotal + kTiles * kTotalBytes + 127) / 128 * 128;
  static_assert(S::kPairsInGate ? S::kAqk + kPairBytes + kTiles * kAkkBytes <= S::kG + S::kKsufHalf : kAkkBytes <= kTileRows,
                "Akk fits");
};

// A state warp's o on its way out by TMA: a row of 32 bytes per token, whose two units change places every four tokens.
constexpr int kStageRow = 32;
constexpr int kStageBytes = kChunk * kStageRow;
__device__ __forceinline__ uint32_t staged(int row, int unit) { return row * kStageRow + (unit ^ row / 4 % 2) * 16; }

// Before the slots: what lives as long as the CTA.
struct Fixed {
  static constexpr int kBarriers = 0;                          // those of each slot
  static constexpr int kGate = kSlotBarriers * kMaxSlots * 8;  // GateScale
  static constexpr int kItems = kGate + 16;                    // Item and Source of each sequence, and an Item that is none
  static constexpr int kItemBytes = 32;
  template <class S>  // [128] fp32: dt_bias in the gate's units
  static constexpr int kBias = (kItems + (S::kMaxItems + 1) * kItemBytes + 127) / 128 * 128;
  static constexpr int kStage = 1536;  // o on its way out by TMA, [32, 16] of each state warp
  template <class S>
  static constexpr int kScratch = S::kStaged ? kStage + S::kStateWarps * kStageBytes : kBias<S> + kHeadDim * 4;
  template <class S>
  static constexpr int bytes(int num_teams) {
    static_assert(!S::kStaged || kBias<S> + kHeadDim * 4 <= kStage, "all that fits before them");
    return (kScratch<S> + num_teams * Scratch<S>::kBytes + 1023) / 1024 * 1024;
  }
  static_assert(kItems % 16 == 0 && kStage % 256 == 0, "as they are read");
};

// How a CTA divides its shared memory: own slots, then those of guests, or, in a single CTA, places for v.
struct Ring {
  int own_slots;
  int guest_slots;
  int value_places;
  int num_teams;
  int first_slot;  // bytes before it

  __host__ __device__ constexpr int num_slots() const { return own_slots + guest_slots; }
};

template <class S>
constexpr int shared_bytes(Ring ring) {
  return ring.first_slot + ring.num_slots() * S::kBytes + ring.value_places * kPanelBytes;
}

// As many factor teams and slots as fit into `limit` bytes, whatever the gate's dtype. In a single CTA more slots than teams,
// and two chunks' v or more, up to one for each slot: 4 teams, 6 slots and 2 places for v in 227 KB (3 without TMA), 3, 4 and
// 3 in 163 KB (8.0), 1, 2 and 2 in 99 KB (8.6, 8.9, 12.0). In a cluster 3 teams and 6 slots; guests, which are every second
// chunk with two CTAs and more with three or more, have two of them or what three own ones leave. No slots if it cannot be.
template <class S>
constexpr Ring fit_ring(int limit, int num_ctas) {
  constexpr int kLeastValues = S::kCluster ? 0 : 2;
  for (int teams = S::kMaxTeams; teams > 0; --teams) {
    const int left = limit - Fixed::bytes<S>(teams);
    const int fitting = (left - kLeastValues * kPanelBytes) / S::kBytes;
    const int slots = fitting < kMaxSlots ? fitting : kMaxSlots;
    if (slots >= teams + (S::kCluster ? 2 : 1)) {
      const int guests = !S::kCluster ? 0 : num_ctas == 2 ? 2 : slots - 3;
      const int places = S::kCluster ? 0 : (left - slots * S::kBytes) / kPanelBytes;
      return {.own_slots = slots - guests,
              .guest_slots = guests,
              .value_places = places < slots ? places : slots,
              .num_teams = teams,
              .first_slot = Fixed::bytes<S>(teams)};
    }
  }
  return {.own_slots = 0, .guest_slots = 0, .value_places = 0, .num_teams = 0, .first_slot = 0};
}

constexpr int kLeastShared = 99 << 10;  // what a CTA may have from compute capability 8.0 on, or more
static_assert(fit_ring<Slot<__nv_bfloat16, 1, false>>(kLeastShared, 1).own_slots > 0 &&
                  fit_ring<Slot<float, 1, false>>(kLeastShared, 1).own_slots > 0,
              "either gate runs everywhere");

// A team's chunks are in its CTA's own slots, and no more of them than that are on their way; guests need a place.
template <class S>
constexpr bool fits_clusters(int limit) {
  for (int num_ctas = 2; num_ctas <= kMaxCtas; ++num_ctas) {
    const Ring ring = fit_ring<S>(limit, num_ctas);
    if (ring.num_teams > ring.own_slots || ring.own_slots == 0 || ring.guest_slots < 2) return false;
  }
  return true;
}
constexpr int kHopperShared = 227 << 10;
static_assert(fits_clusters<Slot<__nv_bfloat16, 2, true>>(kHopperShared) && fits_clusters<Slot<float, 2, true>>(kHopperShared),
              "either gate runs in clusters");

// Shared-memory addresses of one CTA.
template <class S>
struct SharedMap {
  uint32_t base;
  Ring ring;
  int num_ctas;  // of the cluster

  __device__ __forceinline__ uint32_t slot(int index) const {
    return base + ring.first_slot + index * S::kBytes;
  }
  // In a single CTA.
  __device__ __forceinline__ uint32_t values(int place) const { return slot(ring.own_slots) + place * kPanelBytes; }
  __device__ __forceinline__ uint32_t slot_free(int slot) const { return base + Fixed::kBarriers + slot * 8; }
  __device__ __forceinline__ uint32_t raw_ready(int slot) const { return slot_free(slot) + kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t factors_ready(int slot) const { return slot_free(slot) + 2 * kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t values_free(int slot) const { return slot_free(slot) + 3 * kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t output_ready(int slot) const { return values_free(slot); }  // in a cluster, instead
  __device__ __forceinline__ uint32_t guest_free(int slot) const { return slot_free(slot) + 4 * kMaxSlots * 8; }
  __device__ __forceinline__ uint32_t item(int index) const { return base + Fixed::kItems + index * Fixed::kItemBytes; }
  __device__ __forceinline__ uint32_t gate() const { return base + Fixed::kGate; }
  __device__ __forceinline__ uint32_t bias() const { return base + Fixed::kBias<S>; }
  __device__ __forceinline__ uint32_t stage(int state_warp) const { return base + Fixed::kStage + state_warp * kStageBytes; }
  __device__ __forceinline__ uint32_t scratch(int team) const { return base + Fixed::kScratch<S> + team * Scratch<S>::kBytes; }
};

// What a lane names to ldmatrix_x4 for a 16 x 16 block of a swizzled half panel, `block` counted inside the half, or of a
// [32, 32] matrix; the four registers then hold
// (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7, columns 8-15), (rows 8-15, columns 8-15): an A operand.
__device__ __forceinline__ uint32_t block_rows(int block, uint32_t lane) {
  return swizzled(lane % 16, lane / 16) ^ block * 32;
}
__device__ __forceinline__ uint32_t pair_block_rows(uint32_t lane) { return lane / 16 * kPairUnit + lane % 16 * 16; }

// The same with the second and the third exchanged: two B operands, of the first eight rows and of the others, each in
// registers side by side, where an MMA wants it.
__device__ __forceinline__ uint32_t block_columns(int block, uint32_t lane) {
  return swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ block * 32;
}

}  // namespace kda::prefill
