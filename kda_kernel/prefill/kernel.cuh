// The prefill kernel: roles only. traits.cuh has the map of roles and barriers.
#pragma once

#include "common/gate.cuh"
#include "common/per_device.h"
#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/factors.cuh"
#include "prefill/load.cuh"
#include "prefill/state.cuh"
#include "prefill/traits.cuh"

namespace kda::prefill {

__device__ inline void poison_state(const StateTensor& state, int64_t index) {
  const float nan = __int_as_float(0x7fffffff);
  for (int e = threadIdx.x; e < kHeadDim * kHeadDim; e += kThreads) {
    const int64_t offset = index * kHeadDim * kHeadDim + e;
    if (state.dtype == FloatKind::kFloat32) {
      static_cast<float*>(state.data)[offset] = nan;
    } else {
      static_cast<__nv_bfloat16*>(state.data)[offset] = __float2bfloat16(nan);
    }
  }
}

// What a call with invalid cu_seqlens gives: NaN in every element of out and of the states. The CTAs of a head share
// the tokens.
__device__ inline void poison(const PrefillParams& p, int64_t sequence, int head, int64_t state_index) {
  const float nan = __int_as_float(0x7fffffff);
  auto* out = static_cast<__nv_bfloat16*>(const_cast<void*>(p.out.data)) + head * p.out.head_stride;
  for (int64_t token = sequence; token < p.num_tokens; token += p.num_sequences) {
    for (int e = threadIdx.x; e < kHeadDim; e += kThreads) out[token * p.out.token_stride + e] = __float2bfloat16(nan);
  }
  if (p.final_state.data != nullptr) poison_state(p.final_state, state_index);
  if (p.intermediate_states.data == nullptr) return;
  for (int64_t state = sequence; state < p.num_intermediate_states; state += p.num_sequences) {
    poison_state(p.intermediate_states, state * p.num_heads + head);
  }
}

// T_inv and Aqk are lower triangular: what the first tile's tokens have from the second is zero in every chunk.
template <class GElem>
__device__ __forceinline__ void clear_upper_pairs(const SharedMap<GElem>& shared) {
  constexpr int kPieces = kTile / 8 * kTile;  // of 16 bytes, in a [16, 16] block
  for (int i = threadIdx.x; i < shared.ring.num_slots * kPieces; i += kThreads) {
    const uint32_t place = shared.slot(i / kPieces) + kPairBlock + i / kTile % 2 * kPairUnit + i % kTile * 16;
    store_shared_uint4(place + Slot<GElem>::kTInv, make_uint4(0, 0, 0, 0));
    store_shared_uint4(place + Slot<GElem>::kAqk, make_uint4(0, 0, 0, 0));
  }
  fence_proxy_async();
}

template <GateKind kGate, class GElem, class Engine>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams p, const Ring ring) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedMap<GElem> shared{.base = smem_address(shared_memory), .ring = ring};
  const int64_t index = blockIdx.x / p.num_heads;
  const int head = blockIdx.x % p.num_heads;

  // First everything that comes from global memory, so that one wait covers it; bounds are used once they are checked.
  const Sequence sequence = find_sequence(p.cu_seqlens, index, p.num_tokens);
  const float A_log = p.A_log ? p.A_log[head] : 0.0f;
  const float bias = p.dt_bias && threadIdx.x < kHeadDim ? p.dt_bias[head * kHeadDim + threadIdx.x] : 0.0f;
  if (p.cu_seqlens.data != nullptr && !sequences_valid(p.cu_seqlens, p.num_sequences, p.num_tokens)) {
    poison(p, index, head, blockIdx.x);
    return;
  }
  const GateScale gate_scale = make_gate_scale<kGate>(A_log, p.lower_bound);

  if (threadIdx.x < kHeadDim) {
    store_shared_float(shared.bias() + threadIdx.x * 4, bias * gate_scale.input);
  } else if (threadIdx.x < kHeadDim + ring.num_slots) {
    const int slot = threadIdx.x - kHeadDim;
    barrier_init(shared.slot_free(slot), 32 * kStateWarps);
    barrier_init(shared.raw_ready(slot), 32 * kStateWarps);
    barrier_init(shared.factors_ready(slot), 32 * kTiles);
  }
  if (threadIdx.x == 0) {
    if (p.beta_dtype == FloatKind::kFloat32) {
      Source::store<float>(shared.beta(), p.beta, sequence, head);
    } else {
      Source::store<__nv_bfloat16>(shared.beta(), p.beta, sequence, head);
    }
    store_shared_float2(shared.gate(), gate_scale.input, gate_scale.output);
  }
  clear_upper_pairs(shared);
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform to the compiler, as the roles are
  if (warp < kStateWarps) {
    Engine::take_state_registers();
    state_role<Engine>(p, shared, sequence, index, head, warp);
  } else {
    Engine::take_factor_registers();
    factor_role<kGate, Engine::kReadsThroughAsyncProxy>(p, shared, sequence.length, warp - kStateWarps);
  }
}

template <GateKind kGate, class GElem, class Engine>
cudaError_t launch(const PrefillParams& p, cudaStream_t stream) {
  auto* kernel = prefill_kernel<kGate, GElem, Engine>;
  static PerDevice shared_limits;  // known where the kernel has been allowed the bytes of its ring
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = shared_limits.get(device, limit, [kernel](int device, int& limit) {
    const cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    const Ring ring = fit_ring<GElem>(limit);
    if (ring.num_slots == 0) return cudaErrorInvalidConfiguration;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<GElem>(ring));
  });
  if (error != cudaSuccess) return error;
  const Ring ring = fit_ring<GElem>(limit);
  const int bytes = shared_bytes<GElem>(ring);
  kernel<<<static_cast<unsigned>(p.num_sequences * p.num_heads), kThreads, bytes, stream>>>(p, ring);
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
