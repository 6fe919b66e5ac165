// The state warps: the recurrence over chunks, the state in registers from the first token to the last. Here what all of them
// have in common, and those of a single CTA; cluster.cuh has a cluster's.
//
// Everything is transposed, so that the accumulator of one MMA, rounded to bf16, is the A operand of the next
// (rows are the warp's 16 of V):
//   P^T = S Kpre^T            R^T = S Qpre^T
//   U^T = U0^T T_inv^T        U0 = diag(beta) (V - P), in fp32 where T_inv has its unit diagonal, in bf16 below it
//   O^T = R^T + U^T Aqk^T
//   S   = S diag(total) + U^T Ksuf
// The matrix products are the engine's (engine_mma.cuh, engine_wgmma.cuh); everything else stands here once.
//
// Fragments: tile[n] holds 16 rows and the columns 8 n .. 8 n + 7; element x of a lane is row lane / 4 + 8 (x / 2),
// column 2 (lane % 4) + x % 2.
#pragma once

#include "common/ptx.cuh"
#include "prefill/load.cuh"
#include "prefill/ring.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr int kChannelTiles = kHeadDim / 8;
constexpr int kTokenTiles = kChunk / 8;

using StateFragment = float[kChannelTiles][4];  // S [16 rows of V, 128 channels]
using TokenFragment = float[kTokenTiles][4];    // [16 rows of V, 32 tokens]
using TokenOperand = uint32_t[kTiles][4];       // the same in bf16, as A operands of 16 tokens

// The bf16 A operand of 16 rows and 16 columns from two neighbouring accumulator tiles.
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack_bf16(low[0], low[1]);
  a[1] = pack_bf16(low[2], low[3]);
  a[2] = pack_bf16(high[0], high[1]);
  a[3] = pack_bf16(high[2], high[3]);
}

__device__ __forceinline__ void pack_tokens(TokenOperand& a, const TokenFragment& x) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) pack_operand(a[tile], x[2 * tile], x[2 * tile + 1]);
}

// Calls f(n, x, row, channel) for the pairs of channels a lane holds.
template <class F>
__device__ __forceinline__ void for_each_pair(int first_row, int lane, F f) {
#pragma unroll
  for (int n = 0; n < kChannelTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f(n, 2 * half, first_row + 8 * half + lane / 4, 8 * n + 2 * (lane % 4));
    }
  }
}

// Two neighbouring elements at an address that is a multiple of both their sizes.
__device__ __forceinline__ float2 load_pair(const float* x) { return *reinterpret_cast<const float2*>(x); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* x) {
  return unpack_bf16(*reinterpret_cast<const uint32_t*>(x));
}
__device__ __forceinline__ void store_pair(float* x, float low, float high) {
  *reinterpret_cast<float2*>(x) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* x, float low, float high) {
  *reinterpret_cast<uint32_t*>(x) = pack_bf16(low, high);
}

template <class Elem>
__device__ __forceinline__ bool pairs_aligned(const Elem* state) {
  return reinterpret_cast<uintptr_t>(state) % (2 * sizeof(Elem)) == 0;
}

template <class Elem>
__device__ __forceinline__ void load_state(StateFragment& s, const Elem* state, bool v_first, int first_row,
                                           int lane) {
  if (v_first && pairs_aligned(state)) {
    for_each_pair(first_row, lane, [&](int n, int x, int row, int channel) {
      const float2 pair = load_pair(state + row * kHeadDim + channel);
      s[n][x] = pair.x;
      s[n][x + 1] = pair.y;
    });
  } else {
    const int row_step = v_first ? kHeadDim : 1, channel_step = v_first ? 1 : kHeadDim;
    for_each_pair(first_row, lane, [&](int n, int x, int row, int channel) {
      const Elem* first = state + row * row_step + channel * channel_step;
      s[n][x] = static_cast<float>(first[0]);
      s[n][x + 1] = static_cast<float>(first[channel_step]);
    });
  }
}

template <class Elem>
__device__ __forceinline__ void store_state(const StateFragment& s, Elem* state, bool v_first, int first_row,
                                           int lane) {
  if (v_first && pairs_aligned(state)) {
    for_each_pair(first_row, lane, [&](int n, int x, int row, int channel) {
      store_pair(state + row * kHeadDim + channel, s[n][x], s[n][x + 1]);
    });
  } else {
    const int row_step = v_first ? kHeadDim : 1, channel_step = v_first ? 1 : kHeadDim;
    for_each_pair(first_row, lane, [&](int n, int x, int row, int channel) {
      Elem* first = state + row * row_step + channel * channel_step;
      first[0] = static_cast<Elem>(s[n][x]);
      first[channel_step] = static_cast<Elem>(s[n][x + 1]);
    });
  }
}

// A head's first element in a tensor of states.
__device__ __forceinline__ int64_t state_offset(const PrefillParams& p, const Item& item, int head) {
  return (static_cast<int64_t>(item.index) * p.num_heads + head) * kHeadDim * kHeadDim;
}

// From and to a tensor of states, at the head's first element, where there is one.
__device__ __forceinline__ void read_initial_state(StateFragment& s, const StateTensor& state, int64_t offset,
                                                   int first_row, int lane) {
  if (state.data == nullptr) return;
  if (state.dtype == FloatKind::kFloat32) {
    load_state(s, static_cast<const float*>(state.data) + offset, state.v_first, first_row, lane);
  } else {
    load_state(s, static_cast<const __nv_bfloat16*>(state.data) + offset, state.v_first, first_row, lane);
  }
}

__device__ __forceinline__ void write_final_state(const StateFragment& s, const StateTensor& state, int64_t offset,
                                                  int first_row, int lane) {
  if (state.data == nullptr) return;
  if (state.dtype == FloatKind::kFloat32) {
    store_state(s, static_cast<float*>(state.data) + offset, state.v_first, first_row, lane);
  } else {
    store_state(s, static_cast<__nv_bfloat16*>(state.data) + offset, state.v_first, first_row, lane);
  }
}

// S diag(total); `list` is the lane's own list of decays.
__device__ __forceinline__ void decay_state(StateFragment& s, uint32_t list) {
  float4 total[kChannelTiles / 2];  // two pairs of channels each, in the order of the tiles
#pragma unroll
  for (int i = 0; i < kChannelTiles / 2; ++i) total[i] = load_shared_float4(list + 16 * i);
#pragma unroll
  for (int n = 0; n < kChannelTiles; ++n) {
    const float low = n % 2 ? total[n / 2].z : total[n / 2].x, high = n % 2 ? total[n / 2].w : total[n / 2].y;
#pragma unroll
    for (int x = 0; x < 4; ++x) s[n][x] *= x % 2 ? high : low;
  }
}

// v^T of 16 columns, as ldmatrix gives it per tile, and beta, of all tokens: what U0 needs beside P.
template <class S>
struct Values {
  uint32_t v[kTiles][4];
  float2 beta[kTokenTiles];

  // `columns` is half a panel of v, `block` counts its 16 columns.
  __device__ __forceinline__ Values(uint32_t slot, uint32_t columns, int block, int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) ldmatrix_x4_trans(v[tile], columns + tile * kTileRows + block_rows(block, lane));
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) beta[n] = load_shared_float2(slot + S::kBeta + lane % 4 * 8 + n * 32);
  }

  // From P^T to U0^T = diag(beta) (V - P)^T.
  __device__ __forceinline__ void residual(TokenFragment& u) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = unpack_bf16(v[n / 2][2 * half + n % 2]);  // rows 8 half .., tokens 8 n ..
        u[n][2 * half] = beta[n].x * (value.x - u[n][2 * half]);
        u[n][2 * half + 1] = beta[n].y * (value.y - u[n][2 * half + 1]);
      }
    }
  }
};

// From P^T and R^T, which are under way, in u and o, to U^T in bf16 and O^T, which is under way then.
template <class S, class Engine>
__device__ __forceinline__ void solve_values(const Engine& engine, const Values<S>& values, TokenFragment& u,
                                             TokenFragment& o, TokenOperand& operand, uint32_t slot) {
  engine.template wait_but<1>(u);
  values.residual(u);
  pack_tokens(operand, u);
  engine.multiply_pairs(u, operand, slot + S::kTInv);
  engine.template wait_but<0>(u, o);
  pack_tokens(operand, u);
  engine.multiply_pairs(o, operand, slot + S::kAqk);
}

// 16 bytes of a row of out, which may start anywhere unless all are `aligned`.
__device__ __forceinline__ void store_out(void* to, uint4 piece, bool aligned) {
  if (aligned) {
    *static_cast<uint4*>(to) = piece;
  } else {
    const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) static_cast<uint16_t*>(to)[e] = static_cast<uint16_t>(pairs[e / 2] >> e % 2 * 16);
  }
}

// o of the warp's 16 columns on its way out: transposed and gathered to pieces of 16 bytes in shared memory, where `place` says
// for a token and one of the two pieces. (Writing the 4-byte pairs of the transposed fragment straight to global memory was
// slower: half-filled sectors, and address arithmetic in the chain.)
template <class Place>
__device__ __forceinline__ void gather_output(const TokenOperand& o, int lane, Place place) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    stmatrix_x4_trans(place(tile * kTile + lane / 16 * 8 + lane % 8, lane / 8 % 2), o[tile]);
  }
}

// The lane's pieces of what gather_output() has left; `rows` is the first token's, tokens from `valid` on are left out.
struct OutputPieces {
  uint4 piece[kTiles];

  template <class Place>
  __device__ __forceinline__ OutputPieces(int lane, Place place) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) piece[tile] = load_shared_uint4(place(tile * kTile + lane / 2, lane % 2));
  }

  __device__ __forceinline__ void store(const PrefillParams& p, __nv_bfloat16* rows, int valid, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = tile * kTile + lane / 2;
      if (token >= valid) return;
      __nv_bfloat16* destination = rows + token * p.out.token_stride + 8 * (lane % 2);
      store_out(destination, piece[tile], p.out_aligned);
    }
  }
};

// A state warp's own way out for o, by TMA where that can be.
template <class S>
struct OutputStage {
  const KernelParams<S>& p;
  const Sequence& sequence;
  const int head, first_row;  // of the warp's in S
  const uint32_t stage;

  // The chunk from `token` on.
  __device__ __forceinline__ void send(const TokenOperand& o, int token, int lane) const {
    const auto place = [&](int row, int unit) { return stage + staged(row, unit); };
    if (lane == 0) bulk_wait_read();
    __syncwarp();  // the last chunk's o has left
    gather_output(o, lane, place);
    fence_proxy_async();
    __syncwarp();
    const int valid = sequence.length - token;
    if (p.stores && valid >= kChunk) {
      if (lane == 0) copy_to_tensor(p.output, tensor_place(sequence, head, first_row, token), stage);
    } else {
      auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head)) + first_row;
      OutputPieces(lane, place).store(p, out + token * p.out.token_stride, valid, lane);
    }
  }
};

// The states before every 64th token, in bf16, where they are wanted.
struct IntermediateStates {
  int64_t next;

  __device__ __forceinline__ IntermediateStates(const PrefillParams& p, int64_t index)
      : next(p.intermediate_states.data == nullptr ? p.num_intermediate_states
                                                   : intermediate_states_before(p.cu_seqlens, index, p.num_tokens)) {}

  __device__ __forceinline__ bool wanted(const PrefillParams& p, int token) const {
    return __builtin_expect(token % kIntermediateStep == 0 && next < p.num_intermediate_states, false);
  }

  // The next one's place.
  __device__ __forceinline__ __nv_bfloat16* place(const PrefillParams& p, int head) {
    return static_cast<__nv_bfloat16*>(p.intermediate_states.data) + (next++ * p.num_heads + head) * kHeadDim * kHeadDim;
  }
};

// In a single CTA, where the state warps load, too: a warp's way through the chunks, ahead of the state.
template <class S>
struct Filling {
  ChunkWalk<S> walk;
  ChunkLoader<S> loader;

  // The next chunk, if there is one, into that slot or place for v, once what was there has been consumed: what `last` says,
  // if it says anything.
  __device__ __forceinline__ void next(const KernelParams<S>& p, const SharedMap<S>& shared, const RingPosition& last, int slot,
                                       int value_place, int warp, int lane) {
    if (!walk.reach(shared)) return;
    loader.go_to(Item::load(shared, walk.number), walk.token);
    if (last.slot >= 0) loader.await_consumed(shared, last, warp);
    loader.load_next(p, shared, slot, value_place, walk.length - walk.token, warp, lane);
    walk.skip(1);
  }
};

template <class Engine, class S>
__device__ void state_role(const KernelParams<S>& p, const SharedMap<S>& shared, int head, int warp) {
  const int lane = threadIdx.x % 32;
  const int first_row = warp * kRowsPerStateWarp;  // of the warp's in S

  // All slots and places for v before the first chunk, then those of the one consumed last, before they wait for a chunk's
  // factors: the team that prepares these has its next data there.
  Filling<S> filling{.walk = ChunkWalk<S>(shared, 0), .loader = ChunkLoader<S>(p, head, 0, warp)};
  const int ahead = filling.loader.ahead(shared.ring, warp);
  RingPosition ring, last{.slot = -1};
#pragma unroll 1
  for (int chunk = 0; chunk < ahead; ++chunk) filling.next(p, shared, last, chunk, chunk, warp, lane);

  const int v_half = warp / kHalfBlocks * kHalfBytes, first_unit = warp % kHalfBlocks * 2;
  const uint32_t total_lane = S::kTotal + total_offset(2 * (lane % 4));
  Engine engine(lane);
  int value_place = 0, last_place = 0;
#pragma unroll 1
  for (int number = 0;; ++number) {
    const Item item = Item::load(shared, number).uniform();
    if (!item.exists()) break;
    const Sequence sequence = item.sequence();
    const int64_t state = state_offset(p, item, head);
    IntermediateStates intermediate(p, item.index);
    StateFragment s = {};
    read_initial_state(s, p.initial_state, state, first_row, lane);
    engine.settle(s);  // or S would be moved to other registers in each chunk
    for (int token = 0; token < sequence.length; token += kChunk) {
      const uint32_t slot = shared.slot(ring.slot);
      if (intermediate.wanted(p, token)) {
        store_state(s, intermediate.place(p, head), p.intermediate_states.v_first, first_row, lane);
      }
      if (last.slot >= 0) {
        const int later = last.slot + ahead;  // the same slot, but for v
        filling.next(p, shared, last, later < shared.ring.own_slots ? later : later - shared.ring.own_slots, last_place, warp,
                     lane);
      }
      barrier_wait(shared.factors_ready(ring.slot), ring.parity);

      TokenFragment u, o;  // P and R first
      TokenOperand operand;
      const uint32_t v = shared.values(value_place) + v_half;
      const Values<S> values(slot, v, warp % kHalfBlocks, lane);
      const auto a = engine.operand(s);
      engine.read_state(u, a, slot + S::kK);
      engine.read_state(o, a, slot + S::kQ);
      last = ring;
      ring.advance(1, shared.ring.own_slots);
      last_place = value_place;
      value_place = value_place + 1 == shared.ring.value_places ? 0 : value_place + 1;
      solve_values(engine, values, u, o, operand, slot);
      decay_state(s, slot + total_lane);  // not sooner: it takes registers that S in bf16 needs
      engine.template update_state<S>(s, operand, slot);
      engine.template wait_but<0>(o, s);
      barrier_arrive(shared.slot_free(last.slot));
      pack_tokens(operand, o);
      if constexpr (S::kStaged) {
        OutputStage<S>{p, sequence, head, first_row, shared.stage(warp)}.send(operand, token, lane);
      } else {
        // Through v's place: the warp's own columns.
        const auto place = [&](int row, int unit) { return v + swizzled(row, first_unit + unit); };
        __syncwarp();  // every lane has had its v from there
        gather_output(operand, lane, place);
        __syncwarp();
        const OutputPieces pieces(lane, place);
        barrier_arrive(shared.values_free(last.slot));
        auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head)) + first_row;
        pieces.store(p, out + token * p.out.token_stride, sequence.length - token, lane);
      }
    }
    write_final_state(s, p.final_state, state, first_row, lane);
  }
  if (S::kStaged && lane == 0) bulk_wait_read();
}

}  // namespace kda::prefill
