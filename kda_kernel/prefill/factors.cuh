// The factor teams: everything of a chunk that does not depend on the state, by a warp for each tile of 16 tokens, in a
// cluster by two of them, for half of the channels each.
//
// Tokens i, j, channels d, G_i = sum of the log decays from the start of i's tile through i (base 2 here), G_C at the
// tile's end, total = exp(G_C). Inside a tile:
//   Kpre = k exp(G)         Qpre = q exp(G)         Ksuf = k exp(G_C - G)
//   Akk[i, j] = beta_i sum_d k_i k_j exp(G_i - G_j)   j <  i
//   Aqk[i, j] =        sum_d q_i k_j exp(G_i - G_j)   j <= i
// Each warp makes its products in one of three ways, all exact to rounding:
//   bounded    exp(G_i) and exp(-G_j) apart, where no exponent leaves fp32 and bf16 (tile.cuh)
//   segments   the same between resets, which leave nothing of what was before (segments.cuh)
//   tree       products of decays only, for any gate (decay_tree.cuh)
// Then the tiles are joined (join.cuh): between i of the second and j of the first the products are those of Kpre_i and
// Qpre_i with Ksuf_j, T_inv = (I + Akk)^-1 follows by tiles, and for the state of the chunk's start and end Kpre and Qpre of
// the second tile take the first's total, Ksuf of the first the second's.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "prefill/join.cuh"
#include "prefill/load.cuh"
#include "prefill/tile.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// The bits of a token's beta, and what they mean: apart, because the load takes a while and the value is needed late.
__device__ __forceinline__ uint32_t load_beta_bits(const PrefillParams& p, const Source& beta, int token) {
  const char* place = beta.rows + token * beta.stride;
  return p.beta_dtype == FloatKind::kFloat32 ? *reinterpret_cast<const uint32_t*>(place)
                                             : *reinterpret_cast<const uint16_t*>(place);
}

__device__ __forceinline__ float beta_value(const PrefillParams& p, uint32_t bits) {
  const float beta = __uint_as_float(p.beta_dtype == FloatKind::kFloat32 ? bits : bits << 16);
  return activate_beta(beta, p.sigmoid_beta, p.neg_eigval);
}

// A chunk's factors on their way to the other CTAs that hold rows of S: those that the join leaves as they are, Qpre and
// Kpre of the first tile and Ksuf of the second, while it goes on, and all others after it.
enum Pieces { kEarlyPieces, kLatePieces };

template <class S>
__device__ __forceinline__ void copy_pieces(uint32_t slot, uint32_t factors_ready, Pieces which, int rank, int lane) {
  constexpr int kLanes = S::kPieces / 2;  // each copies a tile of Q, K or Ksuf, half of the channels
  const int panel = lane / kHalves, half = lane % kHalves, tile = (panel == 2) ^ (which == kLatePieces);
  uint32_t place = slot + (panel == 0 ? S::kQ : panel == 1 ? S::kK : S::kKsuf) +
                   half * (panel == 2 ? S::kKsufHalf : kHalfBytes) + tile * kTileRows;
  int bytes = kTileRows;
  if (lane == kLanes) {
    place = slot + S::kTInv;
    bytes = S::kRestBytes;
  }
  if (lane < kLanes + (which == kLatePieces)) {
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      if (part != rank) copy_to_remote(part, place, bytes, factors_ready);
    }
  }
  __syncwarp();
}

// The warps that prepare a chunk together.
template <class S>
struct Team {
  int index;

  __device__ __forceinline__ void meet() const { named_barrier_sync(1 + index, 32 * S::kTeamWarps); }
};

// kAsyncProxy: the state warps read the factors through the async proxy (wgmma), which ordinary stores reach only
// past a fence of each writing lane.
template <GateKind kGate, bool kAsyncProxy, class S>
__device__ void factor_role(const PrefillParams& p, const SharedMap<S>& shared, int length, int rank, int warp) {
  const int warp_lane = opaque(threadIdx.x % 32);
  const Team<S> team{.index = warp / S::kTeamWarps};
  if (team.index >= shared.ring.num_teams) return;
  const int num_ctas = S::kCluster ? shared.num_ctas : 1;
  const int first = team.index * num_ctas + rank, step = shared.ring.num_teams * num_ctas;  // chunks
  RingPosition ring{.slot = 0, .parity = 0}, raw = ring;
  ring.advance(first, shared.ring.num_slots);
  raw.advance(team.index, shared.ring.num_slots);
  for (int chunk = first * kChunk; chunk < length; chunk += step * kChunk) {
    const int lane = opaque(warp_lane);
    TileFactors<S> to{.slot = shared.slot(ring.slot),
                      .scratch = shared.scratch(team.index),
                      .tile = S::kWholeTiles ? warp % kTiles : warp % S::kTeamWarps / kHalves,
                      .half = S::kWholeTiles ? 1 : warp % kHalves};
    const int token = chunk + to.tile * kTile, valid = max(0, min(length - token, kTile));
    const uint32_t beta_bits =
        lane < valid ? load_beta_bits(p, Source::load(shared.beta()), token + lane) : 0;
    barrier_wait(shared.raw_ready(raw.slot), raw.parity);
    await_reuse(shared, ring);  // not sooner: of several phases to come a parity cannot tell which
    const uint32_t ready = shared.factors_ready(ring.slot);

    PairSums sums;
    if constexpr (S::kWholeTiles) {
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        row_scales(to.norms(), tensor == 0 ? to.q_tile() : to.k_tile(), tensor, p.scale, p.l2norm_qk, lane);
      }
      // The second half first: its sums wait in shared memory, where the first's are added. The team's other warp may still
      // join the last chunk, with both tiles' totals.
#pragma unroll 1
      for (;; --to.half) {
        sums = build_half<kGate>(p, to, shared.bias(), shared.gate(), valid, opaque(lane), [&] {
          if (to.half == 1) {
            team.meet();
          } else {
            __syncwarp();
          }
        });
        if (to.half == 0) break;
        __syncwarp();
        park(sums, to, opaque(lane));
      }
    } else {
      row_scales(to.norms(), to.half == 0 ? to.q_tile() : to.k_tile(), to.half, p.scale, p.l2norm_qk, lane);
      sums = build_half<kGate>(p, to, shared.bias(), shared.gate(), valid, lane, [&] { team.meet(); });
      if (to.half == 1) {
        __syncwarp();
        park(sums, to, lane);
      }
    }
    if constexpr (S::kCluster) fence_proxy_async();  // for the early copies
    team.meet();  // all of Kpre, Qpre, Ksuf stands, and the second half's sums
    if constexpr (S::kCluster) {
      if (to.tile == 0 && to.half == 1) copy_pieces<S>(to.slot, ready, kEarlyPieces, rank, lane);
    }
    join(sums, to, lane < valid ? beta_value(p, beta_bits) : 0.0f, opaque(lane), team);
    if constexpr (kAsyncProxy) fence_proxy_async();
    if constexpr (S::kCluster) {
      team.meet();  // all of it stands
      if (warp % S::kTeamWarps == 0) copy_pieces<S>(to.slot, ready, kLatePieces, rank, lane);
    }
    barrier_arrive(ready);
    ring.advance(step, shared.ring.num_slots);
    raw.advance(shared.ring.num_teams, shared.ring.num_slots);
  }
}

}  // namespace kda::prefill
