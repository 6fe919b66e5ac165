// The state warps and v's load warp of a CTA of a cluster that holds rows of S. Every clock of the chain from one S to the next
// counts there, so the state warps do little else: they leave o in v's place, and v's load warp does the rest.
//
//   barrier        arrives                             waits            arrivals
//   OutputReady    state warps, o is in v's place      v's load warp    a lane each
//                  and nothing else is needed
#pragma once

#include "common/ptx.cuh"
#include "prefill/load.cuh"
#include "prefill/ring.cuh"
#include "prefill/state.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

template <class Engine, class S>
__device__ void chain_role(const KernelParams<S>& p, const SharedMap<S>& shared, int head, int rank, int warp) {
  const int lane = threadIdx.x % 32;
  const Item item = Item::load(shared, 0).uniform();
  const int first_row = (rank * S::kStateWarps + warp) * kRowsPerStateWarp;  // of the warp's in S
  const int64_t state = state_offset(p, item, head);
  StateFragment s = {};
  read_initial_state(s, p.initial_state, state, first_row, lane);

  const uint32_t total_lane = S::kTotal + total_offset(2 * (lane % 4));
  IntermediateStates intermediate(p, item.index);
  Engine engine(lane);
  engine.settle(s);  // or S would be moved to other registers in each chunk
  ChunkPlace place{.rank = rank};
  RingPosition ring = place.position(shared.ring);
  for (int token = 0; token < item.length; token += kChunk) {
    const uint32_t slot = shared.slot(ring.slot), output_ready = shared.output_ready(ring.slot);
    if (intermediate.wanted(p, token)) {
      store_state(s, intermediate.place(p, head), p.intermediate_states.v_first, first_row, lane);
    }
    barrier_wait(shared.factors_ready(ring.slot), ring.parity);

    TokenFragment u, o;  // P and R first
    TokenOperand operand;
    const Values<S> values(slot, slot + S::kV, warp, lane);
    const auto a = engine.operand(s);
    engine.read_state(u, a, slot + S::kK);
    engine.read_state(o, a, slot + S::kQ);
    // While that is under way: all that needs neither.
    decay_state(s, slot + total_lane);
    engine.settle(s);
    place.advance(shared.ring, shared.num_ctas);
    ring = place.position(shared.ring);
    solve_values(engine, values, u, o, operand, slot);
    engine.template update_state<S>(s, operand, slot);
    engine.template wait_but<0>(o, s);
    pack_tokens(operand, o);
    __syncwarp();  // every lane has had its v from there
    gather_output(operand, lane, [&](int row, int unit) { return slot + S::kV + swizzled(row, warp * 2 + unit); });
    barrier_arrive(output_ready);
  }
  write_final_state(s, p.final_state, state, first_row, lane);
}

// The chunks that come to the slots of a CTA, one for each chunk that leaves one: in the same slot, the next of its own or
// the next guest.
struct Arrivals {
  int num_ctas, rank, own_step;
  int guest;  // the next one

  __device__ __forceinline__ Arrivals(const Ring& ring, int num_ctas, int rank)
      : num_ctas(num_ctas), rank(rank), own_step(ring.own_slots * num_ctas), guest(rank == 0) {}

  __device__ __forceinline__ int next_guest() {
    const int chunk = guest++;
    if (guest % num_ctas == rank) ++guest;
    return chunk;
  }
};

// o of a chunk from v's place to where it belongs. Tokens from `valid` on are left out.
template <class S>
__device__ __forceinline__ void send_output(const KernelParams<S>& p, const Sequence& sequence, int head, int rank,
                                            uint32_t panel, int token, int lane) {
  const int valid = sequence.length - token, first_column = rank * kHeadDim / S::kParts;
  // Here and not by those who stored: in their chain it would cost a hundred clocks. It orders their stores before the copy of
  // o, or else before that of the next v to the same place.
  fence_proxy_async();
  if (p.stores && valid >= kChunk) {
    if (lane == 0) {
      copy_to_tensor(p.output, tensor_place(sequence, head, first_column, token), panel);
      bulk_wait_read();
    }
    return;
  }
  auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head)) + first_column;
  for (int row = lane / 8; row < min(valid, kChunk); row += 4) {
    const uint4 piece = load_shared_uint4(panel + swizzled(row, lane % 8));
    __nv_bfloat16* destination = out + (token + row) * p.out.token_stride + lane % 8 * 8;
    store_out(destination, piece, p.out_aligned);
  }
}

// The load warp that has v, where there are rows of S: it brings v to all slots, tells which are free, and takes o, which the
// state warps leave in v's place, out of there.
template <class S>
__device__ void value_role(const KernelParams<S>& p, const SharedMap<S>& shared, int head, int rank) {
  const int lane = threadIdx.x % 32;
  const Item item = Item::load(shared, 0);
  const Sequence sequence = item.sequence();
  ChunkLoader<S> values(p, head, rank, ChunkLoader<S>::kTensorV);
  values.go_to(item, 0);
  Arrivals arrivals(shared.ring, shared.num_ctas, rank);
  const auto load = [&](int chunk, int slot, bool guest) {
    const int valid = sequence.length - chunk * kChunk;
    if (valid <= 0) return;
    const uint32_t ready = shared.factors_ready(slot);
    if (guest && lane == 0) barrier_arrive_expecting(ready, S::kFactorBytes);
    ChunkLoader<S> loader = values;
    loader.skip(chunk);
    loader.load(p, shared.slot(slot) + S::kV, ready, valid, ChunkLoader<S>::kTensorV, lane);
    const int ahead = shared.ring.num_slots() * kChunk;
    loader.prefetch(p, ahead, valid - ahead, ChunkLoader<S>::kTensorV, lane);
  };
#pragma unroll 1
  for (int slot = 0; slot < shared.ring.num_slots(); ++slot) {
    const bool guest = slot >= shared.ring.own_slots;
    load(guest ? arrivals.next_guest() : slot * shared.num_ctas + rank, slot, guest);
  }
  Release<S> release(shared, rank, lane);
  release.invite(shared);
  ChunkPlace place{.rank = rank};
#pragma unroll 1
  for (int chunk = 0; chunk * kChunk < sequence.length; ++chunk) {
    const RingPosition ring = place.position(shared.ring);
    const bool guest = !place.is_own(), tells = release.tells(guest);
    const uint32_t there = release.next(shared, tells);
    place.advance(shared.ring, shared.num_ctas);
    barrier_wait(shared.output_ready(ring.slot), ring.parity);
    if (tells) barrier_arrive_remote(there);
    send_output(p, sequence, head, rank, shared.slot(ring.slot) + S::kV, chunk * kChunk, lane);
    __syncwarp();
    load(guest ? arrivals.next_guest() : chunk + arrivals.own_step, ring.slot, guest);
  }
}

}  // namespace kda::prefill
