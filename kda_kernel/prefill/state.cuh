// The state warps: the recurrence over chunks, the state in registers from the first token to the last.
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

// v^T of the warp's 16 columns, as ldmatrix gives it per tile.
using ValueFragment = uint32_t[kTiles][4];

// U0^T = diag(beta) (V - P)^T; v^T by ldmatrix.
__device__ __forceinline__ void residual(TokenFragment& u0, const TokenFragment& projected, const ValueFragment& v,
                                         const float2 (&beta)[kTokenTiles]) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 value = unpack_bf16(v[n / 2][2 * half + n % 2]);  // rows 8 half .., tokens 8 n ..
      u0[n][2 * half] = beta[n].x * (value.x - projected[n][2 * half]);
      u0[n][2 * half + 1] = beta[n].y * (value.y - projected[n][2 * half + 1]);
    }
  }
}

// o of the warp's 16 columns on its way out: transposed and gathered to pieces of 16 bytes through the warp's own columns of
// a panel. (Writing the 4-byte pairs of the transposed fragment straight to global memory was slower: half-filled sectors,
// and address arithmetic in the chain.)
struct OutputPieces {
  uint4 piece[kTiles];

  __device__ __forceinline__ OutputPieces(const TokenOperand& o, uint32_t columns, int first_unit, int lane) {
    __syncwarp();  // every lane has had its v from these columns
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      stmatrix_x4_trans(columns + tile * kTileRows + swizzled(lane / 16 * 8 + lane % 8, first_unit + lane / 8 % 2), o[tile]);
    }
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      piece[tile] = load_shared_uint4(columns + swizzled(tile * kTile + lane / 2, first_unit + lane % 2));
    }
  }

  // `rows` is the first token's; tokens from `valid` on are left out.
  __device__ __forceinline__ void store(const PrefillParams& p, __nv_bfloat16* rows, int valid, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = tile * kTile + lane / 2;
      if (token >= valid) return;
      __nv_bfloat16* destination = rows + token * p.out.token_stride + 8 * (lane % 2);
      if (p.out_aligned) {
        *reinterpret_cast<uint4*>(destination) = piece[tile];
      } else {
        const auto* values = reinterpret_cast<const __nv_bfloat16*>(&piece[tile]);
#pragma unroll
        for (int e = 0; e < 8; ++e) destination[e] = values[e];
      }
    }
  }
};

template <class Engine, class S>
__device__ void state_role(const PrefillParams& p, const SharedMap<S>& shared, const Sequence& sequence,
                           int64_t index, int head, int rank, int warp) {
  const int lane = threadIdx.x % 32;
  const int first_row = (rank * S::kStateWarps + warp) * kRowsPerStateWarp;  // of the warp's in S
  auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head)) + first_row;
  const int64_t state_offset = (index * p.num_heads + head) * kHeadDim * kHeadDim;

  // In a single CTA the state warps load, too: all slots before the first chunk, then the one consumed last, before they wait
  // for a chunk's factors: the team that prepares these has its next data there.
  ChunkLoader<S> loader(p, sequence, head, rank, warp, lane);
  const int ahead = shared.ring.own_slots * kChunk;
  if constexpr (!S::kCluster) {
    RingPosition ring;
#pragma unroll 1
    for (int token = 0; token < min(ahead, sequence.length); token += kChunk, ++ring.slot) {
      loader.load_next(shared, ring, sequence.length - token, p.inputs_aligned, warp, lane);
    }
  }

  StateFragment s = {};
  read_initial_state(s, p.initial_state, state_offset, first_row, lane);

  // The warp's two units of v and o in this CTA's part of them.
  const int v_half = warp / kHalfBlocks * kHalfBytes, first_unit = warp % kHalfBlocks * 2;
  const uint32_t beta_lane = S::kBeta + lane % 4 * 8;
  const uint32_t total_lane = S::kTotal + total_offset(2 * (lane % 4));
  [[maybe_unused]] Release<S> release(shared, rank, lane);
  if constexpr (S::kCluster) release.invite(shared);
  int64_t next_state = p.intermediate_states.data == nullptr
                           ? p.num_intermediate_states
                           : intermediate_states_before(p.cu_seqlens, index, p.num_tokens);
  Engine engine(lane);
  ChunkPlace place{.rank = rank};
  RingPosition ring = place.position(shared.ring), last = ring;
  // A chunk's o leaves through v's place. In a cluster, where every clock of the chain counts, that is done while the next
  // chunk's products are under way.
  TokenOperand o_bf16;
  const auto send = [&](int slot_index, int valid) {
    const OutputPieces pieces(o_bf16, shared.slot(slot_index) + S::kV + v_half, first_unit, lane);
    barrier_arrive(shared.values_free(slot_index));
    pieces.store(p, out, valid, lane);
    out += kChunk * p.out.token_stride;
  };
  bool ready = false;
  for (int token = 0; token < sequence.length; token += kChunk) {
    const uint32_t slot = shared.slot(ring.slot);
    if (__builtin_expect(token % kIntermediateStep == 0 && next_state < p.num_intermediate_states, false)) {
      store_state(s, static_cast<__nv_bfloat16*>(p.intermediate_states.data) +
                         (next_state++ * p.num_heads + head) * kHeadDim * kHeadDim,
                  p.intermediate_states.v_first, first_row, lane);
    }
    if constexpr (!S::kCluster) {
      const int later = token - kChunk + ahead;
      if (token > 0 && later < sequence.length) {
        const RingPosition freed{.slot = last.slot, .parity = last.parity ^ 1};
        loader.load_next(shared, freed, sequence.length - later, p.inputs_aligned, warp, lane);
      }
    }
    if (!ready) barrier_wait(shared.factors_ready(ring.slot), ring.parity);

    TokenFragment projected = {}, o = {}, u;
    TokenOperand operand;
    ValueFragment v;
    float2 beta[kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      ldmatrix_x4_trans(v[tile], slot + S::kV + v_half + tile * kTileRows + block_rows(warp % kHalfBlocks, lane));
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) beta[n] = load_shared_float2(slot + beta_lane + n * 32);
    engine.read_state(projected, o, s, slot + S::kK, slot + S::kQ);
    // While that is under way: what comes next.
    [[maybe_unused]] const bool tells = release.tells(!place.is_own());
    [[maybe_unused]] const uint32_t there = S::kCluster ? release.next(shared, tells) : 0;
    place.advance(shared.ring, shared.num_ctas);
    const RingPosition next = place.position(shared.ring);
    engine.wait_projected(projected);
    residual(u, projected, v, beta);
    pack_tokens(operand, u);
    engine.multiply_pairs(u, operand, slot + S::kTInv);
    engine.wait(u, o);
    pack_tokens(operand, u);
    engine.multiply_pairs(o, operand, slot + S::kAqk);
    decay_state(s, slot + total_lane);  // not sooner: it takes registers that S in bf16 needs
    engine.template update_state<S>(s, operand, slot);
    if (S::kCluster && token > 0) send(last.slot, kChunk);
    last = ring;
    ring = next;
    ready = barrier_peek(shared.factors_ready(ring.slot), ring.parity);
    engine.wait(o, s);
    if constexpr (S::kCluster) {
      __syncwarp();
      if (tells) barrier_arrive_remote(there);
    } else {
      barrier_arrive(shared.slot_free(last.slot));
    }
    pack_tokens(o_bf16, o);
    if (!S::kCluster) send(last.slot, sequence.length - token);
  }
  if (S::kCluster && sequence.length > 0) send(last.slot, (sequence.length - 1) % kChunk + 1);

  write_final_state(s, p.final_state, state_offset, first_row, lane);
}

}  // namespace kda::prefill
