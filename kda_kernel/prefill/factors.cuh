// The factor teams: everything of a chunk that does not depend on the state, by two warps for each tile of 16 tokens, for half
// of the channels each, or by one.
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
#include "prefill/ring.cuh"
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

// A chunk's factors on their way from an own slot to the other CTAs that hold rows of S, once there is a place for them: half
// a warp for each. `round` counts the rounds of the cluster's CTAs before the chunk.
template <class S>
__device__ __forceinline__ void copy_factors(const SharedMap<S>& shared, const RingPosition& own, int round, int rank,
                                             uint32_t lane) {
  constexpr int kPartLanes = 32 / S::kParts;
  const int cta = lane / kPartLanes, piece = lane % kPartLanes;
  const int panel = piece / kHalves, half = piece % kHalves;
  uint32_t place = (panel == 0 ? S::kQ : panel == 1 ? S::kK : S::kKsuf) + half * (panel == 2 ? S::kKsufHalf : kHalfBytes);
  int bytes = kHalfBytes;
  if (piece == S::kPieces) {
    place = S::kTInv;
    bytes = S::kRestBytes;
  } else if (piece > S::kPieces) {
    place = S::kAqk;
    bytes = S::kApartBytes;
  }
  barrier_wait(shared.guest_free(own.slot), own.parity);
  if (cta != rank && piece <= S::kPieces + S::kPairsInGate) {
    const int guest = guest_slot(shared.ring, shared.num_ctas, round, rank, cta);
    copy_to_remote(remote_address(shared.slot(guest) + place, cta), shared.slot(own.slot) + place, bytes,
                   remote_address(shared.factors_ready(guest), cta));
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
__device__ void factor_role(const PrefillParams& p, const SharedMap<S>& shared, int rank, int warp) {
  const uint32_t warp_lane = opaque(threadIdx.x % 32);
  const Team<S> team{.index = warp / S::kTeamWarps};
  if (team.index >= shared.ring.num_teams) return;
  const int num_ctas = shared.num_ctas;
  RingPosition ring;
  ring.advance(team.index, shared.ring.own_slots);
  ChunkWalk<S> walk(shared, team.index * num_ctas + rank);
  for (int round = team.index; __all_sync(~0u, walk.reach(shared));  // the same in all lanes, for the compiler, too
       round += shared.ring.num_teams, walk.skip(shared.ring.num_teams * num_ctas)) {
    const uint32_t lane = opaque(warp_lane);
    TileFactors<S> to{.slot = shared.slot(ring.slot),
                      .scratch = shared.scratch(team.index),
                      .tile = S::kWholeTiles ? warp % kTiles : warp % S::kTeamWarps / kHalves,
                      .half = S::kWholeTiles ? 1 : warp % kHalves};
    const int token = walk.token + to.tile * kTile, valid = max(0, min(walk.length - token, kTile));
    const uint32_t beta_bits = lane < valid ? load_beta_bits(p, Source::load(shared, walk.number), token + lane) : 0;
    // In this order: before the slot's last chunk has been consumed, RawReady may be two phases behind, which a wait by parity
    // does not see.
    await_reuse(shared, ring);
    barrier_wait(shared.raw_ready(ring.slot), ring.parity);

    PairSums sums;
    if constexpr (S::kWholeTiles) {
#pragma unroll 1
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
    team.meet();  // all of Kpre, Qpre, Ksuf stands, and the second half's sums
    join(sums, to, lane < valid ? beta_value(p, beta_bits) : 0.0f, opaque(lane), team);
    if constexpr (kAsyncProxy) fence_proxy_async();
    if constexpr (S::kCluster) {
      team.meet();  // all of it stands
      if (warp % S::kTeamWarps == 0) copy_factors(shared, ring, round, rank, lane);
    }
    barrier_arrive(shared.factors_ready(ring.slot));
    ring.advance(shared.ring.num_teams, shared.ring.own_slots);
  }
}

}  // namespace kda::prefill
