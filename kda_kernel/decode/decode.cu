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

template <class Elem, bool kVFirst, bool kFused, class Params>
cudaError_t launch(const Params& p, cudaStream_t stream) {
  const int warps = kFused ? kWarpsPerHead : warps_per_block(p, kVFirst);
  const int64_t rows = p.num_sequences < kMaxGridRows ? p.num_sequences : kMaxGridRows;
  const dim3 grid(p.num_heads * (kWarpsPerHead / warps), rows, (p.num_sequences + rows - 1) / rows);
  if (is_plain(p)) {
    kda_decode_kernel<Elem, kVFirst, kFused, true><<<grid, 32 * warps, 0, stream>>>(p);
  } else {
    kda_decode_kernel<Elem, kVFirst, kFused, false><<<grid, 32 * warps, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <bool kFused, class Params>
cudaError_t launch_for_state(const Params& p, cudaStream_t stream) {
  const StatePool& state = p.initial_state.data != nullptr ? p.initial_state : p.final_state;
  if (state.dtype == FloatKind::kFloat32) {
    return state.v_first ? launch<float, true, kFused>(p, stream) : launch<float, false, kFused>(p, stream);
  }
  return state.v_first ? launch<__nv_bfloat16, true, kFused>(p, stream)
                       : launch<__nv_bfloat16, false, kFused>(p, stream);
}

}  // namespace
}  // namespace decode

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  return decode::launch_for_state<false>(params, stream);
}

cudaError_t launch_fused_decode(const FusedDecodeParams& params, cudaStream_t stream) {
  return decode::launch_for_state<true>(params, stream);
}

}  // namespace kda
