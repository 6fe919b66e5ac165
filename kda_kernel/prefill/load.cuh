// A chunk's rows of q, k, g, v from global memory into the ring.
#pragma once

#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/ring.cuh"
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

// A load warp's way through the chunks: it has one of the tensors and, of eight warps, one of the tiles, of four both. Eight
// lanes copy 128 consecutive bytes of a token to a row, a piece of 16 bytes each.
template <class S>
struct ChunkLoader {
  static constexpr int kTensorV = 0, kTensorG = 3;            // q and k between them, in the order of the slot
  static constexpr int kRows = kChunk / S::kValueWarps;       // that a warp copies
  static constexpr int kStep = 4;                             // at a time
  static_assert(S::kV == 0 && S::kK == S::kQ + kPanelBytes && S::kG == S::kK + kPanelBytes, "the order of the slot");

  const char* from;  // the lane's first piece in the next chunk
  int64_t stride;    // of a token, in bytes

  static __device__ __forceinline__ int tensor(int warp) { return warp % 4; }
  static __device__ __forceinline__ int first_row(int warp, int lane) { return warp / 4 * kRows + lane / 8; }

  // `rank` is the CTA's in its cluster.
  __device__ __forceinline__ ChunkLoader(const PrefillParams& p, const Sequence& sequence, int head, int rank, int warp,
                                         int lane) {
    const int t = tensor(warp);
    const TokenTensor& x = t == kTensorV ? p.v : t == 1 ? p.q : t == 2 ? p.k : p.g;
    const int width = t == kTensorG ? sizeof(typename S::GElem) : sizeof(__nv_bfloat16);
    const int64_t x_head = t == 1 || t == 2 ? head / p.heads_per_qk : head;
    stride = x.token_stride * width;
    from = static_cast<const char*>(x.data) +
           (sequence.batch * x.batch_stride + sequence.begin * x.token_stride + x_head * x.head_stride) * width +
           first_row(warp, lane) * stride + lane % 8 * 16;
    if (S::kCluster && t == kTensorV) from += rank * S::kVBytes / kChunk;
  }

  __device__ __forceinline__ void skip(int chunks) { from += chunks * kChunk * stride; }

  // Tokens from `valid` on become zeros and are never read. `copy` takes a piece's place, its source and whether there is
  // one.
  template <int kRowsPerToken, class Copy>
  __device__ __forceinline__ void for_each_piece(uint32_t panel, int valid, int warp, int lane, Copy copy) const {
    const int row = first_row(warp, lane);
    const uint32_t to = panel + swizzled(row, lane % 8);
    const char* source = from;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const bool inside = row + i * kStep < valid;
      const uint32_t place = (to ^ i % 2 * 64) + i * kStep * kRowBytes;  // four tokens on, the unit's third bit is flipped
#pragma unroll
      for (int r = 0; r < kRowsPerToken; ++r) copy(place + r * kHalfBytes, source + r * kRowBytes, inside);
      source += kStep * stride;
    }
  }

  template <class Elem, int kColumns>
  __device__ __forceinline__ void copy_rows(uint32_t panel, int valid, bool aligned, int warp, int lane) const {
    constexpr int kRowsPerToken = kColumns * sizeof(Elem) / kRowBytes;
    if (aligned) {
      for_each_piece<kRowsPerToken>(panel, valid, warp, lane, cp_async_16);
    } else {
      for_each_piece<kRowsPerToken>(panel, valid, warp, lane, copy_unaligned<Elem>);
    }
  }

  // What the warp has of the chunk. One copy of the loop where all panels are alike: three cost a single CTA 5 to 15
  // percent, in instruction cache misses.
  __device__ __forceinline__ void copy_chunk(uint32_t slot, int valid, bool aligned, int warp, int lane) const {
    using GElem = typename S::GElem;
    const int t = tensor(warp);
    const uint32_t panel = slot + (t == kTensorV ? 0 : S::kVBytes + (t - 1) * kPanelBytes);
    if (S::kCluster && t == kTensorV) {
      copy_rows<__nv_bfloat16, kHeadDim / S::kParts>(panel, valid, aligned, warp, lane);
    } else if (sizeof(GElem) != sizeof(__nv_bfloat16) && t == kTensorG) {
      copy_rows<GElem, kHeadDim>(panel, valid, aligned, warp, lane);
    } else {
      copy_rows<__nv_bfloat16, kHeadDim>(panel, valid, aligned, warp, lane);
    }
  }

  // Has a later chunk brought to the L2 cache, whose slot is not free yet: a token per lane. `ahead` counts tokens from the
  // next chunk.
  __device__ __forceinline__ void prefetch(int ahead, int valid, int warp, int lane) const {
    constexpr int kLine = 128;
    const int t = tensor(warp);
    const int width = t == kTensorV ? S::kVBytes / kChunk : kHeadDim * (t == kTensorG ? sizeof(typename S::GElem) : 2);
    const char* row = from + (ahead + lane - first_row(warp, lane)) * stride - lane % 8 * 16;
    if (lane < valid) {
      for (int byte = 0; byte < width; byte += kLine) prefetch_l2(row + byte);
    }
  }

  // Starts the chunk's way into a slot, which is free, and goes on by `chunks`. `valid` tokens are left, at least one; the
  // lane arrives at `ready` when its own are there.
  __device__ __forceinline__ void load(uint32_t slot, uint32_t ready, int chunks, int valid, bool aligned, int warp,
                                       int lane) {
    copy_chunk(slot, valid, aligned, warp, lane);
    if (aligned) {
      barrier_arrive_after_cp_async(ready);
    } else {
      barrier_arrive(ready);
    }
    skip(chunks);
  }

  // In a single CTA: the next chunk into the slot of that position.
  __device__ __forceinline__ void load_next(const SharedMap<S>& shared, const RingPosition& ring, int valid, bool aligned,
                                            int warp, int lane) {
    const bool is_v = tensor(warp) == kTensorV;
    if (is_v) {
      barrier_wait(shared.values_free(ring.slot), ring.parity ^ 1);
    } else {
      await_reuse(shared, ring);
    }
    load(shared.slot(ring.slot), is_v ? shared.factors_ready(ring.slot) : shared.raw_ready(ring.slot), 1, valid, aligned,
         warp, lane);
  }
};

// The load warps of a cluster's CTA: v of all chunks where there are rows of S, q, k and g of its own chunks. What comes a
// ring later is brought to the L2 cache meanwhile.
template <class S>
__device__ void load_role(const PrefillParams& p, const SharedMap<S>& shared, const Sequence& sequence, int head, int rank,
                          int warp) {
  const int lane = threadIdx.x % 32, ctas = shared.num_ctas;
  ChunkLoader<S> loader(p, sequence, head, rank, warp, lane);
  if (ChunkLoader<S>::tensor(warp) == ChunkLoader<S>::kTensorV) {
    if (rank >= S::kParts) return;
    ChunkPlace place{.rank = rank};
    const int ahead = shared.ring.num_slots() * kChunk;
#pragma unroll 1
    for (int token = 0; token < sequence.length; token += kChunk) {
      const RingPosition ring = place.position(shared.ring);
      const uint32_t ready = shared.factors_ready(ring.slot);
      barrier_wait(shared.values_free(ring.slot), ring.parity ^ 1);
      if (!place.is_own() && lane == 0) barrier_arrive_expecting(ready, S::kFactorBytes);
      loader.load(shared.slot(ring.slot), ready, 1, sequence.length - token, p.inputs_aligned, warp, lane);
      loader.prefetch(ahead - kChunk, sequence.length - token - ahead, warp, lane);
      place.advance(shared.ring, ctas);
    }
  } else {
    RingPosition ring;
    loader.skip(rank);
    const int step = ctas * kChunk, ahead = shared.ring.own_slots * step;
#pragma unroll 1
    for (int token = rank * kChunk; token < sequence.length; token += step) {
      await_reuse(shared, ring);
      loader.load(shared.slot(ring.slot), shared.raw_ready(ring.slot), ctas, sequence.length - token, p.inputs_aligned,
                  warp, lane);
      loader.prefetch(ahead - step, sequence.length - token - ahead, warp, lane);
      ring.advance(1, shared.ring.own_slots);
    }
  }
}

}  // namespace kda::prefill
