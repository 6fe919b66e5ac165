// The prefill kernel: roles only. traits.cuh has the map of roles and barriers.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/factors.cuh"
#include "prefill/load.cuh"
#include "prefill/state.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

// What a call with invalid cu_seqlens gives: NaN in every element of out and final_state. The CTAs of a head share
// the tokens.
__device__ inline void poison(const PrefillParams& p, int64_t sequence, int head, int64_t state_index) {
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

template <GateKind kGate, class GElem, class Engine>
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
    barrier_init(shared.slot_free(slot), 32 * kStateWarps);
    barrier_init(shared.raw_ready(slot), 32);
    barrier_init(shared.factors_ready(slot), 32);
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform to the compiler, as the roles are
  if (warp < kStateWarps) {
    Engine::take_state_registers();
    state_role<Engine>(p, shared, sequence, blockIdx.x, head, warp);
  } else {
    Engine::take_factor_registers();
    if (warp < kStateWarps + kFactorWarps) {
      factor_role<kGate, Engine::kReadsThroughAsyncProxy>(p, shared, sequence, head, gate_scale, warp - kStateWarps);
    } else {
      load_role(p, shared, sequence, head);
    }
  }
}

// As many slots as the device's shared memory holds, with a bf16 gate: 4 in 99 KB (8.6, 8.9, 12.0), 7 in 163 KB
// (8.0), 11 in 227 KB; with an fp32 gate 3, 5 and 7.
template <GateKind kGate, class GElem, class Engine>
cudaError_t launch(const PrefillParams& p, cudaStream_t stream) {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int fitting = (limit - Fixed::kBytes) / Slot<GElem>::kBytes;
  const int num_slots = fitting < kMaxSlots ? fitting : kMaxSlots;
  if (num_slots < kMinSlots) return cudaErrorInvalidConfiguration;
  const int bytes = shared_bytes<GElem>(num_slots);
  auto* kernel = prefill_kernel<kGate, GElem, Engine>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(p.num_sequences * p.num_heads), kThreads, bytes, stream>>>(p, num_slots);
  return cudaGetLastError();
}

template <class Engine, GateKind kGate>
cudaError_t launch_for_gate_dtype(const PrefillParams& p, cudaStream_t stream) {
  return p.g_dtype == FloatKind::kBFloat16 ? launch<kGate, __nv_bfloat16, Engine>(p, stream)
                                           : launch<kGate, float, Engine>(p, stream);
}

template <class Engine>
cudaError_t launch_for_gate(const PrefillParams& p, cudaStream_t stream) {
  switch (p.gate) {
    case GateKind::kPreActivated:
      return launch_for_gate_dtype<Engine, GateKind::kPreActivated>(p, stream);
    case GateKind::kLowerBound:
      return launch_for_gate_dtype<Engine, GateKind::kLowerBound>(p, stream);
    case GateKind::kSoftplus:
      return launch_for_gate_dtype<Engine, GateKind::kSoftplus>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kda::prefill
