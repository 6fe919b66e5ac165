// The load warp: a chunk's rows of q, k, g, v from global memory into the ring.
#pragma once

#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/portable_traits.cuh"

namespace kda::portable {

// The first token's row of a tensor at a head.
template <class Elem>
__device__ __forceinline__ const Elem* row_pointer(const TokenTensor& x, const Sequence& sequence, int64_t head) {
  return static_cast<const Elem*>(x.data) + sequence.batch * x.batch_stride + sequence.begin * x.token_stride +
         head * x.head_stride;
}

// One chunk of one tensor; rows from `valid` on become zeros and are never read.
template <class Elem, class Swizzle>
__device__ __forceinline__ void load_tile(uint32_t tile, const Elem* rows, int64_t stride, int valid, bool aligned,
                                          int lane) {
  constexpr int kRowBytes = kHeadDim * sizeof(Elem);
  constexpr int kPieces = kRowBytes / 16;
  constexpr int kElems = 16 / sizeof(Elem);
#pragma unroll
  for (int i = 0; i < kChunk * kPieces / 32; ++i) {
    int row = (i * 32 + lane) / kPieces, piece = (i * 32 + lane) % kPieces;
    uint32_t target = tile + swizzled<Swizzle, kRowBytes>(row, piece * 16);
    const Elem* source = rows + (row < valid ? row * stride : 0) + piece * kElems;
    if (aligned) {
      cp_async_16(target, source, row < valid);
    } else {
      alignas(16) Elem piece_values[kElems];
#pragma unroll
      for (int e = 0; e < kElems; ++e) piece_values[e] = row < valid ? source[e] : Elem(0.0f);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(piece_values);
#pragma unroll
      for (int w = 0; w < 4; ++w) store_shared(target + 4 * w, words[w]);
    }
  }
}

template <class GElem>
__device__ void load_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence, int head) {
  using S = Slot<GElem>;
  using GateSwizzle = std::conditional_t<S::kGateInPlace, TileSwizzle, WideTileSwizzle>;
  const int lane = threadIdx.x % 32;
  const int qk_head = head / p.heads_per_qk;
  const auto* q = row_pointer<__nv_bfloat16>(p.q, sequence, qk_head);
  const auto* k = row_pointer<__nv_bfloat16>(p.k, sequence, qk_head);
  const auto* v = row_pointer<__nv_bfloat16>(p.v, sequence, head);
  const auto* g = row_pointer<GElem>(p.g, sequence, head);

  RingPosition ring{.slot = 0, .parity = 0};
  for (int64_t token = 0; token < sequence.length; token += kChunk) {
    const int valid = static_cast<int>(min(sequence.length - token, static_cast<int64_t>(kChunk)));
    const uint32_t slot = shared.slot(ring.slot);
    // A fresh barrier passes a wait for the odd parity: the first round finds every slot free.
    barrier_wait(shared.slot_free(ring.slot), ring.parity ^ 1);
    load_tile<GElem, GateSwizzle>(slot + S::kG, g + token * p.g.token_stride, p.g.token_stride, valid,
                                  p.inputs_aligned, lane);
    load_tile<__nv_bfloat16, TileSwizzle>(slot + S::kK, k + token * p.k.token_stride, p.k.token_stride, valid,
                                          p.inputs_aligned, lane);
    load_tile<__nv_bfloat16, TileSwizzle>(slot + S::kQ, q + token * p.q.token_stride, p.q.token_stride, valid,
                                          p.inputs_aligned, lane);
    load_tile<__nv_bfloat16, TileSwizzle>(slot + S::kV, v + token * p.v.token_stride, p.v.token_stride, valid,
                                          p.inputs_aligned, lane);
    if (p.inputs_aligned) {
      barrier_arrive_after_cp_async(shared.raw_ready(ring.slot));
    } else {
      barrier_arrive(shared.raw_ready(ring.slot));
    }
    ring.advance(1, shared.num_slots);
  }
}

}  // namespace kda::portable
