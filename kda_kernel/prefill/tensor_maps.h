// What a prefill kernel is launched with: its parameters and, where q, k, v, g and o are copied by TMA, descriptions of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "params.h"
#include "prefill/traits.cuh"

namespace kda::prefill {

template <class S, bool kTensors = S::kTensors>
struct KernelParams : PrefillParams {
  KernelParams(const PrefillParams& p, int64_t) : PrefillParams(p) {}
};

// The driver's cuTensorMapEncodeTiled(); null where there is none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return encoder;
}

// Boxes of a chunk's tokens and `columns` columns of a [B, T, H, kHeadDim] tensor, which are 32 or 128 bytes and lie in shared
// memory with the swizzle of that width. False if the tensor's strides or sizes are none for TMA.
template <class Elem>
bool describe_rows(CUtensorMap& map, const TokenTensor& x, int64_t batches, int64_t tokens, int64_t heads, int columns) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  constexpr bool kWide = sizeof(Elem) == 4;
  const auto encode = tensor_map_encoder();
  if (encode == nullptr || batches > kMost || tokens > kMost || heads > kMost) return false;
  const cuuint64_t sizes[4] = {kHeadDim, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(batches)};
  const int64_t strides[3] = {x.head_stride, x.token_stride, x.batch_stride};
  cuuint64_t bytes[3];
  for (int i = 0; i < 3; ++i) {  // the stride of a single row, head or batch means nothing and may be any
    bytes[i] = sizes[1 + i] == 1 ? kHeadDim * sizeof(Elem) : static_cast<cuuint64_t>(strides[i]) * sizeof(Elem);
    if (bytes[i] == 0) return false;
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), 1, kChunk, 1}, steps[4] = {1, 1, 1, 1};
  return encode(&map, kWide ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                const_cast<void*>(x.data), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                columns * sizeof(Elem) == kRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class S>
struct KernelParams<S, true> : PrefillParams {
  CUtensorMap inputs[4];  // v, q, k and g, half a panel of a chunk each, or a quarter of an fp32 g
  CUtensorMap output;     // o of a state warp, or of all those of a cluster's CTA
  bool loads, stores;     // whether there are such

  KernelParams(const PrefillParams& p, int64_t batches) : PrefillParams(p) {
    using Elem = __nv_bfloat16;
    using GElem = typename S::GElem;
    const int64_t tokens = p.num_tokens, heads = p.num_heads, qk_heads = heads / p.heads_per_qk;
    loads = p.inputs_aligned && describe_rows<Elem>(inputs[0], p.v, batches, tokens, heads, kHalfChannels) &&
            describe_rows<Elem>(inputs[1], p.q, batches, tokens, qk_heads, kHalfChannels) &&
            describe_rows<Elem>(inputs[2], p.k, batches, tokens, qk_heads, kHalfChannels) &&
            describe_rows<GElem>(inputs[3], p.g, batches, tokens, heads, kRowBytes / sizeof(GElem));
    const int columns = S::kCluster ? kHalfChannels : kRowsPerStateWarp;
    stores = p.out_aligned && describe_rows<Elem>(output, p.out, batches, tokens, heads, columns);
  }
};

}  // namespace kda::prefill
