// A chunk's rows of q, k, g, v from global memory into the ring.
#pragma once

#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/ring.cuh"
#include "prefill/tensor_maps.h"
#include "prefill/traits.cuh"

namespace kda::prefill {

// The first token's row of a tensor at a head.
template <class Elem>
__device__ __forceinline__ const Elem* row_pointer(const TokenTensor& x, const Sequence& sequence, int64_t head) {
  return static_cast<const Elem*>(x.data) + sequence.batch * x.batch_stride + sequence.begin * x.token_stride +
         head * x.head_stride;
}

// The same place and column `x`, for tensor copies.
__device__ __forceinline__ TensorPlace tensor_place(const Sequence& sequence, int64_t head, int x, int token) {
  return {.x = x,
          .head = static_cast<int>(head),
          .token = static_cast<int>(sequence.begin) + token,
          .batch = static_cast<int>(sequence.batch)};
}

// beta's rows at a sequence and head, as they lie in shared memory beside the sequence's Item.
struct Source {
  const char* rows;  // of the first token
  int64_t stride;    // of a token, in bytes

  template <class S>
  static __device__ __forceinline__ uint32_t place(const SharedMap<S>& shared, int number) {
    return shared.item(number) + sizeof(Item);
  }

  template <class S>
  static __device__ __forceinline__ void store(const PrefillParams& p, const SharedMap<S>& shared, int number,
                                               const Sequence& sequence, int head) {
    const bool wide = p.beta_dtype == FloatKind::kFloat32;
    const auto rows = wide ? reinterpret_cast<uint64_t>(row_pointer<float>(p.beta, sequence, head))
                           : reinterpret_cast<uint64_t>(row_pointer<__nv_bfloat16>(p.beta, sequence, head));
    const uint64_t stride = p.beta.token_stride * (wide ? sizeof(float) : sizeof(__nv_bfloat16));
    store_shared_uint4(place(shared, number), make_uint4(rows, rows >> 32, stride, stride >> 32));
  }

  template <class S>
  static __device__ __forceinline__ Source load(const SharedMap<S>& shared, int number) {
    const uint4 x = load_shared_uint4(place(shared, number));
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

// A load warp's way through the chunks: it has one of the tensors and, of eight warps, one of the tiles, of four both, or of
// the halves of the channels where they come by TMA. Otherwise eight lanes copy 128 consecutive bytes of a token to a row, a
// piece of 16 bytes each.
template <class S>
struct ChunkLoader {
  static constexpr int kTensorV = 0, kTensorG = 3;            // q and k between them, in the order of the slot
  static constexpr int kRows = kChunk / S::kValueWarps;       // that a warp copies
  static constexpr int kStep = 4;                             // at a time
  static_assert(S::kV == 0 && S::kK == S::kQ + kPanelBytes && S::kG == S::kK + kPanelBytes, "the order of the slot");

  TensorPlace at;  // the tensor's head and first column, the next chunk's first token

  static __device__ __forceinline__ int tensor(int warp) { return warp % 4; }
  static __device__ __forceinline__ int first_row(int warp, int lane) { return warp / 4 * kRows + lane / 8; }

  // `rank` is the CTA's in its cluster.
  __device__ __forceinline__ ChunkLoader(const PrefillParams& p, int head, int rank, int warp)
      : at{.x = S::kCluster && tensor(warp) == kTensorV ? rank * kHeadDim / S::kParts : 0,
           .head = tensor(warp) == 1 || tensor(warp) == 2 ? head / p.heads_per_qk : head,
           .token = 0,
           .batch = 0} {}

  __device__ __forceinline__ void go_to(const Item& item, int token) {
    at.batch = item.batch;
    at.token = item.begin + token;
  }
  __device__ __forceinline__ void skip(int chunks) { at.token += chunks * kChunk; }

  // The lane's first piece of the next chunk.
  __device__ __forceinline__ const char* first_piece(const TokenTensor& x, int width, int warp, int lane) const {
    return static_cast<const char*>(x.data) + lane % 8 * 16 +
           (at.batch * x.batch_stride + (static_cast<int64_t>(at.token) + first_row(warp, lane)) * x.token_stride +
            at.head * x.head_stride + at.x) *
               width;
  }

  // Tokens from `valid` on become zeros and are never read. `copy` takes a piece's place, its source and whether there is
  // one.
  template <int kRowsPerToken, class Copy>
  __device__ __forceinline__ void for_each_piece(const char* source, int64_t stride, uint32_t panel, int valid, int warp,
                                                 int lane, Copy copy) const {
    const int row = first_row(warp, lane);
    const uint32_t to = panel + swizzled(row, lane % 8);
    constexpr int kUnrolled = S::kTensors ? 1 : kRows / kStep;  // little code where it is seldom needed
#pragma unroll kUnrolled
    for (int i = 0; i < kRows / kStep; ++i) {
      const bool inside = row + i * kStep < valid;
      const uint32_t place = (to ^ i % 2 * 64) + i * kStep * kRowBytes;  // four tokens on, the unit's third bit is flipped
#pragma unroll
      for (int r = 0; r < kRowsPerToken; ++r) copy(place + r * kHalfBytes, source + r * kRowBytes, inside);
      source += kStep * stride;
    }
  }

  template <class Elem, int kColumns>
  __device__ __forceinline__ void copy_rows(const TokenTensor& x, uint32_t panel, int valid, bool aligned, int warp,
                                            int lane) const {
    constexpr int kRowsPerToken = kColumns * sizeof(Elem) / kRowBytes;
    const char* source = first_piece(x, sizeof(Elem), warp, lane);
    const int64_t stride = x.token_stride * sizeof(Elem);
    if (aligned) {
      for_each_piece<kRowsPerToken>(source, stride, panel, valid, warp, lane, cp_async_16);
    } else {
      for_each_piece<kRowsPerToken>(source, stride, panel, valid, warp, lane, copy_unaligned<Elem>);
    }
  }

  // What the warp has of the chunk. One copy of the loop where all panels are alike: three cost a single CTA 5 to 15
  // percent, in instruction cache misses.
  __device__ __forceinline__ void copy_chunk(const PrefillParams& p, uint32_t panel, int valid, int warp, int lane) const {
    using GElem = typename S::GElem;
    const bool aligned = p.inputs_aligned;
    const int t = tensor(warp);
    const TokenTensor& x = t == kTensorV ? p.v : t == 1 ? p.q : t == 2 ? p.k : p.g;
    if (S::kCluster && t == kTensorV) {
      copy_rows<__nv_bfloat16, kHeadDim / S::kParts>(x, panel, valid, aligned, warp, lane);
    } else if (sizeof(GElem) != sizeof(__nv_bfloat16) && t == kTensorG) {
      copy_rows<GElem, kHeadDim>(x, panel, valid, aligned, warp, lane);
    } else {
      copy_rows<__nv_bfloat16, kHeadDim>(x, panel, valid, aligned, warp, lane);
    }
  }

  // How many halves of a panel, each of kHalfBytes, the warp copies by TMA, and the columns of one.
  static __device__ __forceinline__ int boxes(int warp) {
    const bool wide = sizeof(typename S::GElem) == 4 && tensor(warp) == kTensorG;
    return (wide ? 4 : S::kCluster && tensor(warp) == kTensorV ? 1 : 2) / S::kValueWarps;
  }
  static __device__ __forceinline__ int box_columns(int warp) {
    return tensor(warp) == kTensorG ? kRowBytes / sizeof(typename S::GElem) : kHalfChannels;
  }
  __device__ __forceinline__ TensorPlace box(int index, int ahead, int warp) const {
    return {.x = at.x + index * box_columns(warp), .head = at.head, .token = at.token + ahead, .batch = at.batch};
  }

  // Has the chunk that is so many tokens ahead of the next brought to the L2 cache: its slot is not free yet. `valid` tokens
  // are left there.
  __device__ __forceinline__ void prefetch(const KernelParams<S>& p, int ahead, int valid, int warp, int lane) const {
    if (!p.loads || valid < kChunk || lane != 0) return;
    const int count = boxes(warp);
#pragma unroll 1
    for (int i = 0; i < count; ++i) prefetch_tensor(p.inputs[tensor(warp)], box(i, ahead, warp));
  }

  // Where in a slot the warp's tensor lies, of q, k and g.
  static __device__ __forceinline__ uint32_t panel(int warp) { return S::kQ + (tensor(warp) - 1) * kPanelBytes; }

  // Starts the chunk's way to `panel`, which is free. `valid` tokens are left, at least one; the warp has arrived at `ready`, a
  // lane each, when its part is there.
  __device__ __forceinline__ void load(const KernelParams<S>& p, uint32_t panel, uint32_t ready, int valid, int warp,
                                       int lane) {
    if constexpr (S::kTensors) {
      if (p.loads && valid >= kChunk) {
        if (lane == 0) {
          const int count = boxes(warp), first = warp / 4 * count;
          barrier_expect(ready, count * kHalfBytes);
#pragma unroll 1
          for (int i = first; i < first + count; ++i) {
            copy_from_tensor(panel + i * kHalfBytes, p.inputs[tensor(warp)], box(i, 0, warp), ready);
          }
          barrier_arrive_many(ready, 32);
        }
        return;
      }
    }
    copy_chunk(p, panel, valid, warp, lane);
    if (p.inputs_aligned) {
      barrier_arrive_after_cp_async(ready);
    } else {
      barrier_arrive(ready);
    }
  }

  // In a single CTA: how many chunks ahead of the state the warp loads.
  static __device__ __forceinline__ int ahead(const Ring& ring, int warp) {
    return tensor(warp) == kTensorV ? ring.value_places : ring.own_slots;
  }

  // There: until a chunk and what the warp loads to its place have been consumed.
  static __device__ __forceinline__ void await_consumed(const SharedMap<S>& shared, const RingPosition& ring, int warp) {
    if (!S::kTensors && tensor(warp) == kTensorV) {
      barrier_wait(shared.values_free(ring.slot), ring.parity);
    } else {
      barrier_wait(shared.slot_free(ring.slot), ring.parity);
    }
  }

  // There: its next chunk, into the slot of that position or v's place.
  __device__ __forceinline__ void load_next(const KernelParams<S>& p, const SharedMap<S>& shared, int slot, int value_place,
                                            int valid, int warp, int lane) {
    const bool is_v = tensor(warp) == kTensorV;
    const uint32_t place = is_v ? shared.values(value_place) : shared.slot(slot) + panel(warp);
    load(p, place, is_v ? shared.factors_ready(slot) : shared.raw_ready(slot), valid, warp, lane);
  }
};

// The load warps of a cluster's CTA that have q, k and g of its own chunks. The next of these is brought to the L2 cache
// meanwhile, and not more of them: what 128 CTAs had brought there a ring ahead drove itself out again. Of beta, which a team
// reads where it needs it, a lane has a token.
template <class S>
__device__ void load_role(const KernelParams<S>& p, const SharedMap<S>& shared, int head, int rank, int warp) {
  const int lane = threadIdx.x % 32, ctas = shared.num_ctas;
  const Item item = Item::load(shared, 0);
  ChunkLoader<S> loader(p, head, rank, warp);
  loader.go_to(item, rank * kChunk);
  const Source beta = Source::load(shared, 0);
  RingPosition ring;
  const int step = ctas * kChunk;
#pragma unroll 1
  for (int token = rank * kChunk; token < item.length; token += step) {
    await_reuse(shared, ring);
    const int valid = item.length - token;
    loader.load(p, shared.slot(ring.slot) + loader.panel(warp), shared.raw_ready(ring.slot), valid, warp, lane);
    loader.prefetch(p, step, valid - step, warp, lane);
    if (loader.tensor(warp) == loader.kTensorG && lane < valid - step) {
      prefetch_to_l2(beta.rows + static_cast<int64_t>(token + step + lane) * beta.stride);
    }
    loader.skip(ctas);
    ring.advance(1, shared.ring.own_slots);
  }
}

}  // namespace kda::prefill
