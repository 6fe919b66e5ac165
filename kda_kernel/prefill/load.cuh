// The load warp: a chunk's rows of q, k, g, v from global memory into the ring.
#pragma once

#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// The first token's row of a tensor at a head.
template <class Elem>
__device__ __forceinline__ const Elem* row_pointer(const TokenTensor& x, const Sequence& sequence, int64_t head) {
  return static_cast<const Elem*>(x.data) + sequence.batch * x.batch_stride + sequence.begin * x.token_stride +
         head * x.head_stride;
}

// One tensor's way into the ring, in pieces of 16 bytes: eight lanes write eight tokens of a column group side by side
// (no bank conflict) and neighbouring groups of lanes read neighbouring pieces of those rows.
template <class Elem>
struct TileLoader {
  static constexpr int kUnit = 8 * sizeof(Elem);     // bytes of eight columns of a row
  static constexpr int kUnitPieces = kUnit / 16;
  static constexpr int kUnitStride = (kChunk + 1) * kUnit;
  static constexpr int kStep = 4 / kUnitPieces;      // column groups a warp copies at a time
  static constexpr int kSteps = kHeadDim / 8 / kStep;
  static constexpr int kElems = 16 / sizeof(Elem);

  const char* source;  // this lane's first piece of the next chunk, token lane_token()
  int64_t stride;      // of a token, in bytes
  uint32_t target;     // the same piece in the tile

  __device__ __forceinline__ TileLoader(const Elem* rows, int64_t token_stride, int lane)
      : stride(token_stride * static_cast<int64_t>(sizeof(Elem))) {
    const int piece = lane % kUnitPieces, unit = lane / (8 * kUnitPieces);
    source = reinterpret_cast<const char*>(rows) + lane_token(lane) * stride + unit * kUnit + piece * 16;
    target = unit * kUnitStride + lane_token(lane) * kUnit + piece * 16;
  }

  static __device__ __forceinline__ int lane_token(int lane) { return lane / kUnitPieces % 8; }

  // Rows from `valid` on become zeros and are never read.
  __device__ __forceinline__ void load_aligned(uint32_t tile, int valid, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = lane_token(lane) + 8 * half < valid;
      const char* row = source + (inside ? 8 * half * stride : 0);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        cp_async_16(tile + target + half * 8 * kUnit + i * kStep * kUnitStride, row + i * kStep * kUnit, inside);
      }
    }
  }

  // For rows that do not start at a multiple of 16 bytes.
  __device__ void load_unaligned(uint32_t tile, int valid, int lane) const {
#pragma unroll 1
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int half = i % 2, step = i / 2;
      alignas(16) Elem piece[kElems] = {};
      if (lane_token(lane) + 8 * half < valid) {
        const auto* values = reinterpret_cast<const Elem*>(source + 8 * half * stride + step * kStep * kUnit);
#pragma unroll
        for (int e = 0; e < kElems; ++e) piece[e] = values[e];
      }
      const auto* words = reinterpret_cast<const uint32_t*>(piece);
      const uint32_t place = tile + target + half * 8 * kUnit + step * kStep * kUnitStride;
#pragma unroll
      for (int w = 0; w < 4; ++w) store_shared(place + 4 * w, words[w]);
    }
  }

  __device__ __forceinline__ void load(uint32_t tile, int valid, bool aligned, int lane) {
    if (aligned) {
      load_aligned(tile, valid, lane);
    } else {
      load_unaligned(tile, valid, lane);
    }
    source += kChunk * stride;
  }
};

template <class GElem>
__device__ void load_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence, int head) {
  using S = Slot<GElem>;
  using Loader = TileLoader<__nv_bfloat16>;
  const int lane = threadIdx.x % 32;
  const int qk_head = head / p.heads_per_qk;
  Loader q(row_pointer<__nv_bfloat16>(p.q, sequence, qk_head), p.q.token_stride, lane);
  Loader k(row_pointer<__nv_bfloat16>(p.k, sequence, qk_head), p.k.token_stride, lane);
  Loader v(row_pointer<__nv_bfloat16>(p.v, sequence, head), p.v.token_stride, lane);
  TileLoader<GElem> g(row_pointer<GElem>(p.g, sequence, head), p.g.token_stride, lane);

  RingPosition ring{.slot = 0, .parity = 0};
  for (int token = 0; token < sequence.length; token += kChunk) {
    const int valid = min(sequence.length - token, kChunk);
    const uint32_t slot = shared.slot(ring.slot);
    await_reuse(shared, ring);
    k.load(slot + S::kK, valid, p.inputs_aligned, lane);
    q.load(slot + S::kQ, valid, p.inputs_aligned, lane);
    g.load(slot + S::kG, valid, p.inputs_aligned, lane);
    v.load(slot + S::kV, valid, p.inputs_aligned, lane);
    if (p.inputs_aligned) {
      barrier_arrive_after_cp_async(shared.raw_ready(ring.slot));
    } else {
      barrier_arrive(shared.raw_ready(ring.slot));
    }
    ring.advance(1, shared.num_slots);
  }
}

}  // namespace kda::prefill
