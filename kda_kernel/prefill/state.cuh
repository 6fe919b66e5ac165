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
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr int kChannelTiles = kHeadDim / 8;
constexpr int kTokenTiles = kChunk / 8;

using StateFragment = float[kChannelTiles][4];  // S [16 rows of V, 128 channels]
using TokenFragment = float[kTokenTiles][4];    // [16 rows of V, 16 tokens]

// The bf16 A operand of 16 rows and 16 columns from two neighbouring accumulator tiles.
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack_bf16(low[0], low[1]);
  a[1] = pack_bf16(low[2], low[3]);
  a[2] = pack_bf16(high[0], high[1]);
  a[3] = pack_bf16(high[2], high[3]);
}

// Calls f(n, x, offset of the first element, distance to the second) for the pairs of channels a lane holds.
template <class F>
__device__ __forceinline__ void for_each_pair(bool v_first, int warp, int lane, F f) {
#pragma unroll
  for (int n = 0; n < kChannelTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kRowsPerStateWarp + 8 * half + lane / 4;
      const int channel = 8 * n + 2 * (lane % 4);
      f(n, 2 * half, v_first ? row * kHeadDim + channel : channel * kHeadDim + row, v_first ? 1 : kHeadDim);
    }
  }
}

template <class Elem>
__device__ __forceinline__ void load_state(StateFragment& s, const Elem* state, bool v_first, int warp, int lane) {
  for_each_pair(v_first, warp, lane, [&](int n, int x, int offset, int step) {
    s[n][x] = static_cast<float>(state[offset]);
    s[n][x + 1] = static_cast<float>(state[offset + step]);
  });
}

template <class Elem>
__device__ __forceinline__ void store_state(const StateFragment& s, Elem* state, bool v_first, int warp, int lane) {
  for_each_pair(v_first, warp, lane, [&](int n, int x, int offset, int step) {
    state[offset] = static_cast<Elem>(s[n][x]);
    state[offset + step] = static_cast<Elem>(s[n][x + 1]);
  });
}

// Per lane: the decays of its channels, pairs in the order of the tiles.
using TotalFragment = float4[kChannelTiles / 2];

__device__ __forceinline__ void load_total(TotalFragment& total, uint32_t list) {
#pragma unroll
  for (int i = 0; i < kChannelTiles / 2; ++i) total[i] = load_shared_float4(list + 16 * i);
}

__device__ __forceinline__ void decay_state(StateFragment& s, const TotalFragment& total) {
#pragma unroll
  for (int n = 0; n < kChannelTiles; ++n) {
    const float low = n % 2 ? total[n / 2].z : total[n / 2].x, high = n % 2 ? total[n / 2].w : total[n / 2].y;
#pragma unroll
    for (int x = 0; x < 4; ++x) s[n][x] *= x % 2 ? high : low;
  }
}

// U0^T = diag(beta) (V - P)^T; v^T by ldmatrix.
__device__ __forceinline__ void residual(TokenFragment& u0, const TokenFragment& projected, const uint32_t (&v)[4],
                                         const float2 (&beta)[kTokenTiles]) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 value = unpack_bf16(v[2 * half + n]);  // rows 8 half .., tokens 8 n ..
      u0[n][2 * half] = beta[n].x * (value.x - projected[n][2 * half]);
      u0[n][2 * half + 1] = beta[n].y * (value.y - projected[n][2 * half + 1]);
    }
  }
}

// o of the warp's 16 columns: transposed in registers, gathered to 16-byte pieces through the warp's own columns of
// the v tile (read before, by this warp alone), written row by row. (Writing the 4-byte pairs of the transposed
// fragment straight to global memory was slower: half-filled sectors, and address arithmetic in the chain.)
__device__ __forceinline__ void store_output(const PrefillParams& p, const TokenFragment& o, uint32_t columns,
                                             __nv_bfloat16* rows, int valid, int lane) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_shared(columns + 4 * lane + half * kUnitBytes + n * kHalfUnitBytes,
                   movmatrix_trans(pack_bf16(o[n][2 * half], o[n][2 * half + 1])));
    }
  }
  __syncwarp();
  const int token = lane / 2, unit = lane % 2;
  const uint4 piece = load_shared_uint4(columns + unit * kUnitBytes + token * 16);
  if (token >= valid) return;
  __nv_bfloat16* destination = rows + token * p.out.token_stride + 8 * unit;
  if (p.out_aligned) {
    *reinterpret_cast<uint4*>(destination) = piece;
  } else {
    const auto* values = reinterpret_cast<const __nv_bfloat16*>(&piece);
#pragma unroll
    for (int e = 0; e < 8; ++e) destination[e] = values[e];
  }
}

template <class Engine, class GElem>
__device__ void state_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence,
                           int64_t state_index, int head, int warp) {
  using S = Slot<GElem>;
  const int lane = threadIdx.x % 32;
  auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head)) + warp * kRowsPerStateWarp;
  const int64_t state_offset = state_index * kHeadDim * kHeadDim;

  StateFragment s = {};
  if (p.initial_state.data != nullptr) {
    if (p.initial_state.dtype == FloatKind::kFloat32) {
      load_state(s, static_cast<const float*>(p.initial_state.data) + state_offset, p.initial_state.v_first, warp, lane);
    } else {
      load_state(s, static_cast<const __nv_bfloat16*>(p.initial_state.data) + state_offset, p.initial_state.v_first,
                 warp, lane);
    }
  }

  const uint32_t v_columns = S::kV + warp * kBlockBytes;
  const uint32_t beta_lane = S::kBeta + lane % 4 * 8;
  const uint32_t total_lane = S::kTotal + total_offset(2 * (lane % 4));
  RingPosition ring{.slot = 0, .parity = 0};
  for (int token = 0; token < sequence.length; token += kChunk, out += kChunk * p.out.token_stride) {
    const uint32_t slot = shared.slot(ring.slot);
    barrier_wait(shared.raw_ready(ring.slot), ring.parity);
    barrier_wait(shared.factors_ready(ring.slot), ring.parity);

    TokenFragment projected = {}, o = {}, u;
    TotalFragment total;
    uint32_t operand[4], v[4];
    ldmatrix_x4_trans(v, slot + v_columns + ldmatrix_lane_offset(lane));
    const float2 beta[kTokenTiles] = {load_shared_float2(slot + beta_lane), load_shared_float2(slot + beta_lane + 32)};
    Engine engine(lane);
    engine.read_state(projected, o, s, slot + S::kK, slot + S::kQ);
    engine.wait_projected(projected);
    residual(u, projected, v, beta);
    pack_operand(operand, u[0], u[1]);
    engine.multiply_pairs(u, operand, slot + S::kTInv);
    load_total(total, slot + total_lane);
    engine.wait(u, o, s);
    pack_operand(operand, u[0], u[1]);
    decay_state(s, total);  // not sooner: touching S would end the products in flight
    engine.update_state(s, operand, slot + S::kKsuf);
    engine.multiply_pairs(o, operand, slot + S::kAqk);
    engine.wait(u, o, s);
    __syncwarp();  // every lane has its v: the columns may take o
    store_output(p, o, slot + v_columns, out, min(sequence.length - token, kChunk), lane);
    barrier_arrive(shared.slot_free(ring.slot));
    ring.advance(1, shared.num_slots);
  }

  if (p.final_state.data == nullptr) return;
  if (p.final_state.dtype == FloatKind::kFloat32) {
    store_state(s, static_cast<float*>(p.final_state.data) + state_offset, p.final_state.v_first, warp, lane);
  } else {
    store_state(s, static_cast<__nv_bfloat16*>(p.final_state.data) + state_offset, p.final_state.v_first, warp, lane);
  }
}

}  // namespace kda::prefill
