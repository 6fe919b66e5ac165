// Roles, the kernel and its launch; the map of the roles and barriers stands in portable_traits.cuh.
#include "prefill/portable.h"

#include <algorithm>

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/portable_factors.cuh"
#include "prefill/portable_load.cuh"
#include "prefill/portable_state.cuh"
#include "prefill/portable_traits.cuh"

namespace kda {
namespace portable {

// What a call with invalid cu_seqlens gives: NaN in every element of out and final_state. The CTAs of a head share
// the tokens.
__device__ void poison(const PrefillParams& p, int64_t sequence, int head, int64_t state_index) {
  const float nan = __int_as_float(0x7fffffff);
  auto* out = static_cast<__nv_bfloat16*>(const_cast<void*>(p.out.data)) + head * p.out.head_stride;
  for (int64_t token = sequence; token < p.num_tokens; token += p.num_sequences) {
    for (int e = threadIdx.x; e < kHeadDim; e += kThreads) out[token * p.out.token_stride + e] = __float2bfloat16(nan);
  }
  if (p.final_state.data == nullptr) return;
  for (int e = threadIdx.x; e < kHeadDim * kHeadDim; e += kThreads) {
    const int64_t offset = state_index * kHeadDim * kHeadDim + e;
    if (p.final_state.dtype == FloatKind::kFloat32) {
      static_cast<float*>(p.final_state.data)[offset] = nan;
    } else {
      static_cast<__nv_bfloat16*>(p.final_state.data)[offset] = __float2bfloat16(nan);
    }
  }
}

template <GateKind kGate, class GElem>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams p, const int num_slots) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedMap<GElem> shared{.base = smem_address(shared_memory), .num_slots = num_slots};
  const int64_t index = blockIdx.x / p.num_heads;
  const int head = blockIdx.x % p.num_heads;

  if (p.cu_seqlens.data != nullptr && !sequences_valid(p.cu_seqlens, p.num_sequences, p.num_tokens)) {
    poison(p, index, head, blockIdx.x);
    return;
  }
  const Sequence sequence = find_sequence(p.cu_seqlens, index, p.num_tokens);
  const GateScale gate_scale = make_gate_scale<kGate>(p.A_log ? p.A_log[head] : 0.0f, p.lower_bound);

  if (threadIdx.x < kHeadDim) {
    const float bias = p.dt_bias ? p.dt_bias[head * kHeadDim + threadIdx.x] : 0.0f;
    store_shared_float(shared.bias() + threadIdx.x * 4, bias * gate_scale.input);
  } else if (threadIdx.x < kHeadDim + num_slots) {
    const int slot = threadIdx.x - kHeadDim;
    barrier_init(shared.slot_free(slot), kStateWarps);
    barrier_init(shared.raw_ready(slot), 32);
    barrier_init(shared.factors_ready(slot), 1);
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  if (warp < kStateWarps) {
    state_role(p, shared, sequence, blockIdx.x, head, warp);
  } else if (warp < kStateWarps + kFactorWarps) {
    factor_role<kGate>(p, shared, sequence, head, gate_scale, warp - kStateWarps);
  } else {
    load_role(p, shared, sequence, head);
  }
}

// As many slots as the device's shared memory holds: 5 in 99 KB (8.6, 8.9, 12.0), 8 in 163 KB (8.0), 12 in 227 KB.
template <GateKind kGate, class GElem>
cudaError_t launch(const PrefillParams& p, cudaStream_t stream) {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int num_slots = std::min(kMaxSlots, (limit - Fixed::kBytes) / Slot<GElem>::kBytes);
  if (num_slots < kMinSlots) return cudaErrorInvalidConfiguration;
  const int bytes = shared_bytes<GElem>(num_slots);
  auto* kernel = prefill_kernel<kGate, GElem>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(p.num_sequences * p.num_heads), kThreads, bytes, stream>>>(p, num_slots);
  return cudaGetLastError();
}

template <GateKind kGate>
cudaError_t launch_for_gate_dtype(const PrefillParams& p, cudaStream_t stream) {
  return p.g_dtype == FloatKind::kBFloat16 ? launch<kGate, __nv_bfloat16>(p, stream) : launch<kGate, float>(p, stream);
}

}  // namespace portable

cudaError_t launch_prefill_portable(const PrefillParams& p, cudaStream_t stream) {
  switch (p.gate) {
    case GateKind::kPreActivated:
      return portable::launch_for_gate_dtype<GateKind::kPreActivated>(p, stream);
    case GateKind::kLowerBound:
      return portable::launch_for_gate_dtype<GateKind::kLowerBound>(p, stream);
    case GateKind::kSoftplus:
      return portable::launch_for_gate_dtype<GateKind::kSoftplus>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kda
