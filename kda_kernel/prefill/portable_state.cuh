// The state warps: the recurrence over chunks, the state in registers from the first token to the last.
//
// Everything is transposed, so that the accumulator of one MMA, rounded to bf16, is the A operand of the next
// (rows are the warp's 32 of V, two MMA tiles of 16):
//   P^T = S Kpre^T            R^T = S Qpre^T
//   U^T = (diag(beta) (V - P))^T T_inv^T
//   O^T = R^T + U^T Aqk^T
//   S   = S diag(total) + U^T Ksuf
#pragma once

#include "common/ptx.cuh"
#include "prefill/portable_load.cuh"
#include "prefill/portable_traits.cuh"

namespace kda::portable {

constexpr int kRowTiles = kRowsPerStateWarp / 16;
constexpr int kChannelTiles = kHeadDim / 8;
constexpr int kTokenTiles = kChunk / 8;

// S [32 rows of V, 128 channels] of a warp, fp32. Element x of a tile: row lane / 4 + 8 (x / 2), channel
// 2 (lane % 4) + x % 2.
struct StateFragment {
  float tile[kRowTiles][kChannelTiles][4];
};

using TokenFragment = float[kRowTiles][kTokenTiles][4];  // [32 rows of V, 16 tokens]

// Calls f(x, address of the pair's first element, distance to its second) for the pairs of channels a lane holds.
template <class F>
__device__ __forceinline__ void for_each_pair(bool v_first, int warp, int lane, F f) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kChannelTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * kRowsPerStateWarp + 16 * m + 8 * half + lane / 4;
        const int channel = 8 * n + 2 * (lane % 4);
        f(m, n, 2 * half, v_first ? row * kHeadDim + channel : channel * kHeadDim + row, v_first ? 1 : kHeadDim);
      }
    }
  }
}

template <class Elem>
__device__ __forceinline__ void load_state(StateFragment& s, const Elem* state, bool v_first, int warp, int lane) {
  for_each_pair(v_first, warp, lane, [&](int m, int n, int x, int offset, int step) {
    s.tile[m][n][x] = static_cast<float>(state[offset]);
    s.tile[m][n][x + 1] = static_cast<float>(state[offset + step]);
  });
}

template <class Elem>
__device__ __forceinline__ void store_state(const StateFragment& s, Elem* state, bool v_first, int warp, int lane) {
  for_each_pair(v_first, warp, lane, [&](int m, int n, int x, int offset, int step) {
    state[offset] = static_cast<Elem>(s.tile[m][n][x]);
    state[offset + step] = static_cast<Elem>(s.tile[m][n][x + 1]);
  });
}

// The bf16 A operand of 16 rows and 16 columns from two neighbouring accumulator tiles.
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack_bf16(low[0], low[1]);
  a[1] = pack_bf16(low[2], low[3]);
  a[2] = pack_bf16(high[0], high[1]);
  a[3] = pack_bf16(high[2], high[3]);
}

// P^T = S Kpre^T and R^T = S Qpre^T; `k_pre`, `q_pre` are this lane's ldmatrix addresses.
__device__ __forceinline__ void read_state(TokenFragment& p, TokenFragment& r, const StateFragment& s, uint32_t k_pre,
                                           uint32_t q_pre) {
#pragma unroll
  for (int block = 0; block < kHeadDim / 16; ++block) {
    uint32_t k[4], q[4];
    ldmatrix_x4(k, k_pre ^ (block * 32));
    ldmatrix_x4(q, q_pre ^ (block * 32));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t a[4];
      pack_operand(a, s.tile[m][2 * block], s.tile[m][2 * block + 1]);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        mma_bf16(p[m][n], a, k[n], k[2 + n]);
        mma_bf16(r[m][n], a, q[n], q[2 + n]);
      }
    }
  }
}

// U^T = U0^T T_inv^T, U0 = diag(beta) (V - P), as the bf16 operand of what follows. U0 enters in fp32 where T_inv has
// its unit diagonal and in bf16 below it. `v` and `t_inv` are ldmatrix addresses.
__device__ __forceinline__ void solve_u(uint32_t (&u)[kRowTiles][4], const TokenFragment& p, uint32_t v, uint32_t v_column,
                                        uint32_t t_inv, uint32_t beta, int lane) {
  uint32_t t[4];
  float2 beta_pair[kTokenTiles];
  ldmatrix_x4(t, t_inv);
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) beta_pair[n] = load_shared_float2(beta + (8 * n + 2 * (lane % 4)) * 4);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    uint32_t v_packed[4], a[4];
    float solved[kTokenTiles][4];
    ldmatrix_x4_trans(v_packed, v ^ (v_column + m * 32));
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = unpack_bf16(v_packed[2 * half + n]);  // rows 8 half.., tokens 8 n..
        solved[n][2 * half] = beta_pair[n].x * (value.x - p[m][n][2 * half]);
        solved[n][2 * half + 1] = beta_pair[n].y * (value.y - p[m][n][2 * half + 1]);
      }
    }
    pack_operand(a, solved[0], solved[1]);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) mma_bf16(solved[n], a, t[n], t[2 + n]);
    pack_operand(u[m], solved[0], solved[1]);
  }
}

// S = S diag(total) + U^T Ksuf.
__device__ __forceinline__ void update_state(StateFragment& s, const uint32_t (&u)[kRowTiles][4], uint32_t k_suf) {
#pragma unroll
  for (int block = 0; block < kHeadDim / 16; ++block) {
    uint32_t k[4];
    ldmatrix_x4_trans(k, k_suf ^ (block * 32));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      mma_bf16(s.tile[m][2 * block], u[m], k[0], k[1]);
      mma_bf16(s.tile[m][2 * block + 1], u[m], k[2], k[3]);
    }
  }
}

__device__ __forceinline__ void decay_state(StateFragment& s, uint32_t total, int lane) {
#pragma unroll
  for (int n = 0; n < kChannelTiles; ++n) {
    const float2 factor = load_shared_float2(total + (8 * n + 2 * (lane % 4)) * 4);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) s.tile[m][n][x] *= x % 2 ? factor.y : factor.x;
    }
  }
}

// o of the warp's 32 columns: transposed in registers, gathered to 16-byte pieces through the warp's own columns of
// the v tile (read before, by this warp alone), written row by row.
__device__ __forceinline__ void store_output(const PrefillParams& p, const TokenFragment& o, uint32_t tile,
                                             __nv_bfloat16* rows, int valid, int warp, int lane) {
  const uint32_t target = tile + tile_offset(lane / 4, 0) + 4 * (lane % 4);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2, n = i / 2;
      const uint32_t packed = movmatrix_trans(pack_bf16(o[m][n][2 * half], o[m][n][2 * half + 1]));
      const int column = (warp * kRowsPerStateWarp + 16 * m + 8 * half) * 2;
      store_shared((target ^ column) + n * 8 * kHeadDim * 2, packed);
    }
  }
  __syncwarp();
  constexpr int kPieces = kRowsPerStateWarp / 8;  // of 16 bytes, per token
#pragma unroll
  for (int i = 0; i < kChunk * kPieces / 32; ++i) {
    const int token = (i * 32 + lane) / kPieces, column = warp * kRowsPerStateWarp + 8 * ((i * 32 + lane) % kPieces);
    const uint4 piece = load_shared_uint4(tile + tile_offset(token, column * 2));
    if (token >= valid) continue;
    __nv_bfloat16* destination = rows + token * p.out.token_stride + column;
    if (p.out_aligned) {
      *reinterpret_cast<uint4*>(destination) = piece;
    } else {
      const auto* values = reinterpret_cast<const __nv_bfloat16*>(&piece);
#pragma unroll
      for (int e = 0; e < 8; ++e) destination[e] = values[e];
    }
  }
}

template <class GElem>
__device__ void state_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence,
                           int64_t state_index, int head, int warp) {
  using S = Slot<GElem>;
  const int lane = threadIdx.x % 32;
  const uint32_t tile_lane = tile_offset(ldmatrix_row(lane), ldmatrix_column_byte(lane));
  const uint32_t pair_lane = pair_offset(ldmatrix_row(lane), ldmatrix_column_byte(lane));
  auto* out = const_cast<__nv_bfloat16*>(row_pointer<__nv_bfloat16>(p.out, sequence, head));
  const int64_t state_offset = state_index * kHeadDim * kHeadDim;

  StateFragment s;
  if (p.initial_state.data == nullptr) {
    for_each_pair(true, warp, lane, [&](int m, int n, int x, int, int) { s.tile[m][n][x] = s.tile[m][n][x + 1] = 0.0f; });
  } else if (p.initial_state.dtype == FloatKind::kFloat32) {
    load_state(s, static_cast<const float*>(p.initial_state.data) + state_offset, p.initial_state.v_first, warp, lane);
  } else {
    load_state(s, static_cast<const __nv_bfloat16*>(p.initial_state.data) + state_offset, p.initial_state.v_first, warp,
               lane);
  }

  RingPosition ring{.slot = 0, .parity = 0};
  for (int64_t token = 0; token < sequence.length; token += kChunk) {
    const int valid = static_cast<int>(min(sequence.length - token, static_cast<int64_t>(kChunk)));
    const uint32_t slot = shared.slot(ring.slot);
    barrier_wait(shared.raw_ready(ring.slot), ring.parity);
    barrier_wait(shared.factors_ready(ring.slot), ring.parity);

    TokenFragment projected = {}, o = {};
    uint32_t u[kRowTiles][4];
    read_state(projected, o, s, slot + S::kK + tile_lane, slot + S::kQ + tile_lane);
    solve_u(u, projected, slot + S::kV + tile_lane, warp * kRowsPerStateWarp * 2, slot + S::kTInv + pair_lane,
            slot + S::kBeta, lane);
    decay_state(s, slot + S::kTotal, lane);
    update_state(s, u, slot + S::kKsuf + tile_lane);

    uint32_t aqk[4];
    ldmatrix_x4(aqk, slot + S::kAqk + pair_lane);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) mma_bf16(o[m][n], u[m], aqk[n], aqk[2 + n]);
    }
    __syncwarp();  // every lane has its v: the warp's columns of the tile may take o
    store_output(p, o, slot + S::kV, out + token * p.out.token_stride, valid, warp, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.slot_free(ring.slot));
    ring.advance(1, shared.num_slots);
  }

  if (p.final_state.data == nullptr) return;
  if (p.final_state.dtype == FloatKind::kFloat32) {
    store_state(s, static_cast<float*>(p.final_state.data) + state_offset, p.final_state.v_first, warp, lane);
  } else {
    store_state(s, static_cast<__nv_bfloat16*>(p.final_state.data) + state_offset, p.final_state.v_first, warp, lane);
  }
}

}  // namespace kda::portable
