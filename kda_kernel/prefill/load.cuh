// A chunk's rows of q, k, g, v from global memory into the ring, by the state warps: each has one of the tensors and one of
// the tiles.
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

// beta's rows at the sequence and head, as they lie in shared memory: too many registers to keep.
struct Source {
  const char* rows;  // of the first token
  int64_t stride;    // of a token, in bytes

  template <class Elem>
  static __device__ __forceinline__ void store(uint32_t place, const TokenTensor& x, const Sequence& sequence,
                                               int64_t head) {
    const auto rows = reinterpret_cast<uint64_t>(row_pointer<Elem>(x, sequence, head));
    const uint64_t stride = x.token_stride * sizeof(Elem);
    store_shared_uint4(place, make_uint4(rows, rows >> 32, stride, stride >> 32));
  }

  static __device__ __forceinline__ Source load(uint32_t place) {
    const uint4 x = load_shared_uint4(place);
    return {.rows = reinterpret_cast<const char*>(static_cast<uint64_t>(x.y) << 32 | x.x),
            .stride = static_cast<int64_t>(static_cast<uint64_t>(x.w) << 32 | x.z)};
  }
};

// For rows that do not start at a multiple of 16 bytes.
template <class Elem>
__device__ __forceinline__ void copy_unaligned(uint32_t to, const char* from, bool inside) {
  constexpr int kElems = 16 / sizeof(Elem);
  alignas(16) Elem piece[kElems] = {};
  if (inside) {
    const auto* values = reinterpret_cast<const Elem*>(from);
#pragma unroll
    for (int e = 0; e < kElems; ++e) piece[e] = values[e];
  }
  store_shared_uint4(to, *reinterpret_cast<const uint4*>(piece));
}

// A warp's way through the chunks: eight lanes copy 128 consecutive bytes of a token to a row, a piece of 16 bytes each.
template <class GElem>
struct ChunkLoader {
  using S = Slot<GElem>;
  static_assert(kStateWarps == 4 * kTiles && S::kK == kPanelBytes && S::kV == 2 * kPanelBytes && S::kG == 3 * kPanelBytes,
                "a warp's tensor is the panel of its number");
  static constexpr int kGate = 3;
  static constexpr int kStep = 4;  // tokens a warp copies at a time

  const char* from;  // the lane's first piece in the next chunk
  int64_t stride;    // of a token, in bytes
  int token = 0;     // the next chunk's first
  RingPosition ring{.slot = 0, .parity = 0};

  __device__ __forceinline__ ChunkLoader(const PrefillParams& p, const Sequence& sequence, int head, int warp, int lane) {
    const int tensor = warp % 4;
    const TokenTensor& x = tensor == 0 ? p.q : tensor == 1 ? p.k : tensor == 2 ? p.v : p.g;
    const int width = tensor == kGate ? sizeof(GElem) : sizeof(__nv_bfloat16);
    const int64_t x_head = tensor < 2 ? head / p.heads_per_qk : head;
    stride = x.token_stride * width;
    from = static_cast<const char*>(x.data) +
           (sequence.batch * x.batch_stride + sequence.begin * x.token_stride + x_head * x.head_stride) * width +
           first_row(warp, lane) * stride + lane % 8 * 16;
  }

  static __device__ __forceinline__ int first_row(int warp, int lane) { return warp / 4 * kTile + lane / 8; }

  // Tokens from `valid` on become zeros and are never read. `copy` takes a piece's place, its source and whether there is
  // one.
  template <class Elem, class Copy>
  __device__ __forceinline__ void for_each_piece(uint32_t panel, int valid, int warp, int lane, Copy copy) const {
    constexpr int kRows = kHeadDim * sizeof(Elem) / kRowBytes;  // of a token
    const int row = first_row(warp, lane);
    const uint32_t to = panel + swizzled(row, lane % 8);
    const char* source = from;
#pragma unroll
    for (int i = 0; i < kTile / kStep; ++i) {
      const bool inside = row + i * kStep < valid;
      const uint32_t place = (to ^ i % 2 * 64) + i * kStep * kRowBytes;  // four tokens on, the unit's third bit is flipped
#pragma unroll
      for (int part = 0; part < kRows; ++part) copy(place + part * kHalfBytes, source + part * kRowBytes, inside);
      source += kStep * stride;
    }
  }

  template <class Elem>
  __device__ __forceinline__ void copy_tile(uint32_t panel, int valid, bool aligned, int warp, int lane) const {
    if (aligned) {
      for_each_piece<Elem>(panel, valid, warp, lane, cp_async_16);
    } else {
      for_each_piece<Elem>(panel, valid, warp, lane, copy_unaligned<Elem>);
    }
  }

  // Starts the next chunk's way into its slot, if there is one.
  __device__ __forceinline__ void load_next(const SharedMap<GElem>& shared, int length, bool aligned, int warp, int lane) {
    if (token >= length) return;
    const uint32_t panel = shared.slot(ring.slot) + warp % 4 * kPanelBytes;
    await_reuse(shared, ring);
    if (sizeof(GElem) == 2 || warp % 4 != kGate) {
      copy_tile<__nv_bfloat16>(panel, length - token, aligned, warp, lane);
    } else {
      copy_tile<GElem>(panel, length - token, aligned, warp, lane);
    }
    if (aligned) {
      barrier_arrive_after_cp_async(shared.raw_ready(ring.slot));
    } else {
      barrier_arrive(shared.raw_ready(ring.slot));
    }
    ring.advance(1, shared.ring.num_slots);
    token += kChunk;
    from += kChunk * stride;
  }
};

}  // namespace kda::prefill
