// Where roles stand in the rings of slots, and what the CTAs of a cluster tell each other about them.
#pragma once

#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// One of the sequences that a CTA has, as it stands in shared memory: roles read it there again rather than keep it.
struct Item {
  int32_t batch;   // index into the batch dimension
  int32_t begin;   // its first token
  int32_t length;  // in tokens
  int32_t index;   // of the sequence; -1: there is none any more

  template <class S>
  static __device__ __forceinline__ Item load(const SharedMap<S>& shared, int number) {
    const uint4 x = load_shared_uint4(shared.item(number));
    return {.batch = static_cast<int32_t>(x.x),
            .begin = static_cast<int32_t>(x.y),
            .length = static_cast<int32_t>(x.z),
            .index = static_cast<int32_t>(x.w)};
  }
  template <class S>
  __device__ __forceinline__ void store(const SharedMap<S>& shared, int number) const {
    store_shared_uint4(shared.item(number), make_uint4(batch, begin, length, index));
  }
  __device__ __forceinline__ bool exists() const { return index >= 0; }

  // For loops that hold wgmma: these want a length that is uniform to the compiler.
  __device__ __forceinline__ Item uniform() const {
    return {.batch = batch, .begin = begin, .length = __shfl_sync(~0u, length, 0), .index = __shfl_sync(~0u, index, 0)};
  }
  // For what counts tokens and batches in 64 bits.
  __device__ __forceinline__ Sequence sequence() const { return {.batch = batch, .begin = begin, .length = length}; }
};

// A way through the chunks of all the CTA's sequences as if they were one's.
template <class S>
struct ChunkWalk {
  int token;       // the next chunk's first, counted from the start of
  int number = 0;  // this sequence, or one further on until reach()
  int length;      // the sequence's

  __device__ __forceinline__ ChunkWalk(const SharedMap<S>& shared, int chunk)
      : token(chunk * kChunk), length(Item::load(shared, 0).length) {}

  __device__ __forceinline__ void skip(int chunks) { token += chunks * kChunk; }

  // To the sequence that has the chunk; false if there are no more chunks.
  __device__ __forceinline__ bool reach(const SharedMap<S>& shared) {
    while (token >= length) {
      const Item next = Item::load(shared, number + 1);
      if (!next.exists()) return false;
      token -= (length + kChunk - 1) / kChunk * kChunk;
      ++number;
      length = next.length;
    }
    return true;
  }
};

// Where a role stands in a ring of slots.
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int chunks, int num_slots) {  // at most as many chunks as slots
    slot += chunks;
    const bool around = slot >= num_slots;
    slot -= around ? num_slots : 0;
    parity ^= around;
  }
};

// Until the slot's last chunk has been made and consumed; a fresh barrier passes a wait for the odd parity, so the first
// round finds every slot free. SlotFree alone implies FactorsReady: a role waits for all that it follows at first hand, because
// racecheck does not follow chains of barriers. (That wait falls through.)
template <class S>
__device__ __forceinline__ void await_reuse(const SharedMap<S>& shared, const RingPosition& ring) {
  barrier_wait(shared.factors_ready(ring.slot), ring.parity ^ 1);
  barrier_wait(shared.slot_free(ring.slot), ring.parity ^ 1);
}

// The chunks one after another in a CTA that holds rows of S, in its own slots and in those of guests. (No branches: the
// state warps have this in their chain.)
struct ChunkPlace {
  int rank;         // the CTA's
  int builder = 0;  // of this chunk
  RingPosition own, guest;

  __device__ __forceinline__ bool is_own() const { return builder == rank; }
  // Counted over all slots.
  __device__ __forceinline__ RingPosition position(const Ring& ring) const {
    return is_own() ? own : RingPosition{.slot = ring.own_slots + guest.slot, .parity = guest.parity};
  }
  __device__ __forceinline__ void advance(const Ring& ring, int num_ctas) {
    own.advance(is_own(), ring.own_slots);
    guest.advance(!is_own(), ring.guest_slots);
    builder = builder + 1 == num_ctas ? 0 : builder + 1;
  }
};

// Which of its slots for guests a chunk of `rank` comes to in another CTA, where all chunks but its own are guests: of
// each round of the CTAs all but one, and in this round those of the CTAs before. `round` counts the rounds before.
__device__ __forceinline__ int guest_slot(const Ring& ring, int num_ctas, int round, int rank, int cta) {
  return ring.own_slots + (round * (num_ctas - 1) + rank - (cta < rank)) % ring.guest_slots;
}

// What a state warp of a cluster tells when it has done with a chunk: lane 0 the CTA that prepared it, and lane 1, if it
// was a guest, the CTA whose chunk comes to its place next.
template <class S>
struct Release {
  int lane, rank;
  uint32_t barriers;  // SlotFree or GuestFree of the first slot
  int cta;            // whose chunk, and in which of its own slots it lies there
  int slot;

  __device__ __forceinline__ Release(const SharedMap<S>& shared, int rank, int lane)
      : lane(lane),
        rank(rank),
        barriers(lane == 0 ? shared.slot_free(0) : shared.guest_free(0)),
        cta(rank == 0 && lane == 1),
        slot(0) {}

  __device__ __forceinline__ void advance(const SharedMap<S>& shared, int chunks) {  // by none or one
    cta += chunks;
    const bool around = cta == shared.num_ctas;
    cta = around ? 0 : cta;
    slot += around;
    slot = slot == shared.ring.own_slots ? 0 : slot;
  }

  __device__ __forceinline__ bool tells(bool guest) const { return lane == 0 || (lane == 1 && guest); }

  // The lane's barrier for this chunk; if it tells, on to its next.
  __device__ __forceinline__ uint32_t next(const SharedMap<S>& shared, bool tells) {
    const uint32_t barrier = remote_address(barriers + slot * 8, cta);
    advance(shared, tells);
    advance(shared, lane == 1 && cta == rank);
    return barrier;
  }

  // At the beginning: all places for guests are free.
  __device__ __forceinline__ void invite(const SharedMap<S>& shared) {
#pragma unroll 1
    for (int guest = 0; lane == 1 && guest < shared.ring.guest_slots; ++guest) barrier_arrive_remote(next(shared, true));
  }
};

}  // namespace kda::prefill
