// Compute capability 8.0 and newer.
#include "decode/kernel.cuh"
#include "decode/launch.h"

namespace kda {
namespace decode {
namespace {

// With few heads a head is spread over blocks of fewer warps, so that more SMs load it; with very many, whole heads
// spare the repeated check of cu_seqlens. In between, measured on an H100: small blocks keep the memory busiest for one
// token of V-first states, but each block prepares the tokens for itself, which several tokens make dear.
constexpr int64_t kFewHeads = 64, kManyHeads = 1 << 16;

constexpr int64_t kMaxGridRows = 65535;  // a grid's limit in its second dimension

int warps_per_block(const DecodeParams& p, bool v_first) {
  const int64_t heads = p.num_sequences * p.num_heads;
  const bool one_token = p.num_tokens <= (p.cu_seqlens.data == nullptr ? 1 : p.num_sequences);
  if (heads <= kFewHeads || (one_token && v_first && heads <= kManyHeads)) return kWarpsPerHead / 4;
  return heads <= kManyHeads ? kWarpsPerHead / 2 : kWarpsPerHead;
}

// `clusters`: a head's blocks are one.
template <class Elem, bool kVFirst, bool kFused, class Params>
cudaError_t launch(const Params& p, cudaStream_t stream, bool clusters) {
  const int blocks = kFused ? (clusters ? kClusterBlocks : 1) : kWarpsPerHead / warps_per_block(p, kVFirst);
  const int64_t rows = p.num_sequences < kMaxGridRows ? p.num_sequences : kMaxGridRows;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.num_heads * blocks, rows, (p.num_sequences + rows - 1) / rows);
  config.blockDim = dim3(32 * kWarpsPerHead / blocks);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = clusters ? 1 : 0;
  return is_plain(p) ? cudaLaunchKernelEx(&config, kda_decode_kernel<Elem, kVFirst, kFused, true>, p)
                     : cudaLaunchKernelEx(&config, kda_decode_kernel<Elem, kVFirst, kFused, false>, p);
}

template <bool kFused, class Params>
cudaError_t launch_for_state(const Params& p, cudaStream_t stream, bool clusters) {
  const StatePool& state = p.initial_state.data != nullptr ? p.initial_state : p.final_state;
  if (state.dtype == FloatKind::kFloat32) {
    return state.v_first ? launch<float, true, kFused>(p, stream, clusters)
                         : launch<float, false, kFused>(p, stream, clusters);
  }
  return state.v_first ? launch<__nv_bfloat16, true, kFused>(p, stream, clusters)
                       : launch<__nv_bfloat16, false, kFused>(p, stream, clusters);
}

}  // namespace
}  // namespace decode

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  return decode::launch_for_state<false>(params, stream, false);
}

cudaError_t launch_fused_decode(const FusedDecodeParams& params, cudaStream_t stream, bool clusters) {
  return decode::launch_for_state<true>(params, stream, clusters);
}

}  // namespace kda
