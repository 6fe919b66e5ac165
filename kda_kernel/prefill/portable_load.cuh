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

// One tensor's way into the ring. A lane copies 16-byte pieces, the same column in every kRowStep-th row, so that a
// chunk costs it a pointer, an addition and a copy per piece.
template <class Elem, class Swizzle>
struct TileLoader {
  static constexpr int kRowBytes = kHeadDim * sizeof(Elem);
  static constexpr int kPieces = kRowBytes / 16;  // of a row
  static constexpr int kRowStep = 32 / kPieces;
  static constexpr int kCopies = kChunk / kRowStep;

  const char* source;     // this lane's first piece of the next chunk
  int64_t stride;         // of a token, in bytes
  uint32_t target;        // this lane's first piece, relative to the tile

  __device__ __forceinline__ TileLoader(const Elem* rows, int64_t token_stride, int lane)
      : source(reinterpret_cast<const char*>(rows + lane / kPieces * token_stride) + lane % kPieces * 16),
        stride(token_stride * static_cast<int64_t>(sizeof(Elem))),
        target(swizzled<Swizzle, kRowBytes>(lane / kPieces, lane % kPieces * 16)) {}

  // A swizzle is linear over exclusive or: the i-th piece is the first one's place with the bits of i in it.
  __device__ __forceinline__ uint32_t piece_target(uint32_t tile, int i) const {
    const uint32_t row_bytes = i * kRowStep * kRowBytes;
    const uint32_t column_bits = Swizzle::apply(row_bytes) ^ row_bytes;
    return tile + row_bytes + (target ^ column_bits);
  }

  __device__ __forceinline__ void load_whole(uint32_t tile) const {
    const char* piece = source;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, piece += kRowStep * stride) cp_async_16(piece_target(tile, i), piece, true);
  }

  // Rows from `valid` on become zeros and are never read.
  __device__ __forceinline__ void load_tail(uint32_t tile, int valid, int lane) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = i * kRowStep + lane / kPieces < valid;
      cp_async_16(piece_target(tile, i), source + (inside ? i * kRowStep * stride : 0), inside);
    }
  }

  // For rows that do not start at a multiple of 16 bytes.
  __device__ void load_unaligned(uint32_t tile, int valid, int lane) const {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = i * kRowStep + lane / kPieces < valid;
      const auto* values = reinterpret_cast<const Elem*>(source + (inside ? i * kRowStep * stride : 0));
      alignas(16) Elem piece[16 / sizeof(Elem)] = {};
      if (inside) {
#pragma unroll
        for (int e = 0; e < static_cast<int>(16 / sizeof(Elem)); ++e) piece[e] = values[e];
      }
      const auto* words = reinterpret_cast<const uint32_t*>(piece);
#pragma unroll
      for (int w = 0; w < 4; ++w) store_shared(piece_target(tile, i) + 4 * w, words[w]);
    }
  }

  __device__ __forceinline__ void load(uint32_t tile, int valid, bool aligned, int lane) {
    if (!aligned) {
      load_unaligned(tile, valid, lane);
    } else if (valid == kChunk) {
      load_whole(tile);
    } else {
      load_tail(tile, valid, lane);
    }
    source += kChunk * stride;
  }
};

template <class GElem>
__device__ void load_role(const PrefillParams& p, const SharedMap<GElem>& shared, const Sequence& sequence, int head) {
  using S = Slot<GElem>;
  using Loader = TileLoader<__nv_bfloat16, TileSwizzle>;
  using GateLoader = TileLoader<GElem, std::conditional_t<S::kGateInPlace, TileSwizzle, WideTileSwizzle>>;
  const int lane = threadIdx.x % 32;
  const int qk_head = head / p.heads_per_qk;
  Loader q(row_pointer<__nv_bfloat16>(p.q, sequence, qk_head), p.q.token_stride, lane);
  Loader k(row_pointer<__nv_bfloat16>(p.k, sequence, qk_head), p.k.token_stride, lane);
  Loader v(row_pointer<__nv_bfloat16>(p.v, sequence, head), p.v.token_stride, lane);
  GateLoader g(row_pointer<GElem>(p.g, sequence, head), p.g.token_stride, lane);

  RingPosition ring{.slot = 0, .parity = 0};
  for (int64_t token = 0; token < sequence.length; token += kChunk) {
    const int valid = static_cast<int>(min(sequence.length - token, static_cast<int64_t>(kChunk)));
    const uint32_t slot = shared.slot(ring.slot);
    // A fresh barrier passes a wait for the odd parity: the first round finds every slot free.
    barrier_wait(shared.slot_free(ring.slot), ring.parity ^ 1);
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

}  // namespace kda::portable
