// The prefill kernel: roles only. traits.cuh has the map of roles and barriers.
#pragma once

#include <algorithm>

#include "common/gate.cuh"
#include "common/per_device.h"
#include "common/ptx.cuh"
#include "common/sequences.cuh"
#include "prefill/cluster.cuh"
#include "prefill/factors.cuh"
#include "prefill/load.cuh"
#include "prefill/state.cuh"
#include "prefill/tensor_maps.h"
#include "prefill/traits.cuh"

namespace kda::prefill {

constexpr int kMaxClusters = 128;  // with more heads than this no device is asked how many it runs at once

__device__ inline void poison_state(const StateTensor& state, int64_t index) {
  const float nan = __int_as_float(0x7fffffff);
  for (int e = threadIdx.x; e < kHeadDim * kHeadDim; e += blockDim.x) {
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
    for (int e = threadIdx.x; e < kHeadDim; e += blockDim.x) out[token * p.out.token_stride + e] = __float2bfloat16(nan);
  }
  if (p.final_state.data != nullptr) poison_state(p.final_state, state_index);
  if (p.intermediate_states.data == nullptr) return;
  for (int64_t state = sequence; state < p.num_intermediate_states; state += p.num_sequences) {
    poison_state(p.intermediate_states, state * p.num_heads + head);
  }
}

// T_inv and Aqk are lower triangular: what the first tile's tokens have from the second is zero in every chunk.
template <class S>
__device__ __forceinline__ void clear_upper_pairs(const SharedMap<S>& shared, int thread) {
  constexpr int kPieces = kTile / 8 * kTile;  // of 16 bytes, in a [16, 16] block
  for (int i = thread; i < shared.ring.own_slots * kPieces; i += 32 * S::kFactorWarps) {
    const uint32_t place = shared.slot(i / kPieces) + kPairBlock + i / kTile % 2 * kPairUnit + i % kTile * 16;
    store_shared_uint4(place + S::kTInv, make_uint4(0, 0, 0, 0));
    store_shared_uint4(place + S::kAqk, make_uint4(0, 0, 0, 0));
  }
  fence_proxy_async();
}

// What the factor warps find in shared memory beside the chunks. `thread` counts theirs; A_log is the head's, bias that of
// channel `thread`.
template <GateKind kGate, class S>
__device__ __forceinline__ void prepare_factors(const PrefillParams& p, const SharedMap<S>& shared, float A_log, float bias,
                                                int thread) {
  const GateScale gate_scale = make_gate_scale<kGate>(A_log, p.lower_bound);
  if (thread < kHeadDim) store_shared_float(shared.bias() + thread * 4, bias * gate_scale.input);
  if (thread == 0) store_shared_float2(shared.gate(), gate_scale.input, gate_scale.output);
  if constexpr (!S::kPairsInGate) clear_upper_pairs(shared, thread);  // there they would not last
  named_barrier_sync(1 + S::kMaxTeams, 32 * S::kFactorWarps);
}

template <GateKind kGate, class S, class Engine>
__global__ void __launch_bounds__(S::kThreads, 1)
    prefill_kernel(const __grid_constant__ KernelParams<S> p, const Ring ring, int cluster_ctas, int groups) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const int num_ctas = S::kCluster ? cluster_ctas : 1;
  const SharedMap<S> shared{.base = smem_address(shared_memory), .ring = ring, .num_ctas = num_ctas};
  const int rank = blockIdx.x % num_ctas, head = blockIdx.x / num_ctas % p.num_heads;
  const int first_item = blockIdx.x / num_ctas / p.num_heads, num_sequences = static_cast<int>(p.num_sequences);
  if constexpr (S::kTensors) {
    if (p.loads && threadIdx.x < 4) prefetch_tensor_map(p.inputs[threadIdx.x]);
    if (p.stores && threadIdx.x == 4) prefetch_tensor_map(p.output);
  }

  // First everything that comes from global memory, so that one wait covers it; bounds are used once they are checked.
  const int num_items = S::kCluster ? 1 : (num_sequences - 1 - first_item) / groups + 1;
  if (threadIdx.x < 32) {
    for_each_by_length(p.cu_seqlens, num_sequences, first_item, groups, num_items, [&](int number, int index) {
      const Sequence sequence = sequence_at(p.cu_seqlens, index, p.num_tokens);
      Item{.batch = static_cast<int32_t>(sequence.batch),
           .begin = static_cast<int32_t>(sequence.begin),
           .length = sequence.length,
           .index = index}
          .store(shared, number);
      Source::store(p, shared, number, sequence, head);
    });
    if (threadIdx.x == 0) Item{.index = -1}.store(shared, num_items);
  }
  const int factor_thread = threadIdx.x - 32 * S::kStateWarps;
  const bool has_bias = p.dt_bias && factor_thread >= 0 && factor_thread < kHeadDim;
  const float A_log = p.A_log ? p.A_log[head] : 0.0f;
  const float bias = has_bias ? p.dt_bias[head * kHeadDim + factor_thread] : 0.0f;
  if (p.cu_seqlens.data != nullptr && !sequences_valid(p.cu_seqlens, p.num_sequences, p.num_tokens)) {
    for (int number = 0; number < num_items; ++number) {
      const int64_t index = Item::load(shared, number).index;
      poison(p, index, head, index * p.num_heads + head);
    }
    return;
  }

  if (threadIdx.x < ring.num_slots()) {
    const int slot = threadIdx.x;
    const int value_lanes = rank < S::kParts ? 32 * S::kValueWarps : 0;
    barrier_init(shared.slot_free(slot), S::kFreeArrivals);
    barrier_init(shared.raw_ready(slot), 32 * (S::kLoadWarps - S::kValueWarps));
    barrier_init(shared.factors_ready(slot), value_lanes + (slot < ring.own_slots ? 32 * S::kTeamWarps : 1));
    barrier_init(shared.values_free(slot), S::kOutputArrivals);
    if constexpr (S::kCluster) barrier_init(shared.guest_free(slot), S::kParts - (rank < S::kParts));
    if constexpr (S::kTensors) fence_barrier_init();
  }
  __syncthreads();
  if constexpr (S::kCluster) cluster_meet_relaxed();  // every CTA's barriers stand before another arrives there

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform to the compiler, as the roles are
  if (warp < S::kStateWarps) {
    Engine::take_state_registers();
    if constexpr (S::kCluster) {
      if (rank < S::kParts) chain_role<Engine>(p, shared, head, rank, warp);
    } else {
      state_role<Engine>(p, shared, head, warp);
    }
  } else if (warp < S::kStateWarps + S::kFactorWarps) {
    Engine::take_factor_registers();
    prepare_factors<kGate>(p, shared, A_log, bias, factor_thread);
    factor_role<kGate, Engine::kReadsThroughAsyncProxy>(p, shared, rank, warp - S::kStateWarps);
  } else if constexpr (S::kCluster) {
    Engine::take_load_registers();
    const int load_warp = warp - S::kStateWarps - S::kFactorWarps;
    if (load_warp != ChunkLoader<S>::kTensorV) {
      load_role(p, shared, head, rank, load_warp);
    } else if (rank < S::kParts) {
      value_role(p, shared, head, rank);
    }
  }
  if constexpr (S::kCluster) cluster_sync();  // no CTA leaves while another may write to it
}

inline cudaError_t number_of_sms(int device, int& sms) {
  static PerDevice numbers;
  return numbers.get(device, sms, [](int device, int& sms) {
    return cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  });
}

// One kernel's launches, and what is asked of each device once.
template <GateKind kGate, class S, class Engine>
struct Launcher {
  static constexpr int kMaxItems = S::kMaxItems;
  static constexpr auto kKernel = prefill_kernel<kGate, S, Engine>;

  // The device's shared memory for a CTA; known where the kernel has been allowed all of it.
  static cudaError_t shared_limit(int device, int& limit) {
    static PerDevice limits;
    return limits.get(device, limit, [](int device, int& limit) {
      const cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (error != cudaSuccess) return error;
      if (fit_ring<S>(limit, kMaxCtas).own_slots == 0) return cudaErrorInvalidConfiguration;
      return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    });
  }

  // `cluster` has to live as long as what is returned.
  static cudaLaunchConfig_t configure(const Ring& ring, int64_t items, int num_ctas, cudaStream_t stream,
                                      cudaLaunchAttribute& cluster) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(num_ctas), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(items * num_ctas));
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = shared_bytes<S>(ring);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = S::kCluster ? 1 : 0;
    return config;
  }

  // Of kClusterSizes from the first on, the largest of which `items` clusters run at once; 1 if there is none.
  template <int kFirst = 0>
  static cudaError_t largest_cluster(int device, int limit, int64_t items, int& ctas) {
    constexpr int kCtas = kClusterSizes[kFirst];
    ctas = kCtas;
    if constexpr (kCtas > 1) {
      static PerDevice counts;
      int clusters;
      const cudaError_t error = counts.get(device, clusters, [limit](int, int& clusters) {
        cudaLaunchAttribute cluster{};
        const cudaLaunchConfig_t one = configure(fit_ring<S>(limit, kCtas), 1, kCtas, nullptr, cluster);
        return cudaOccupancyMaxActiveClusters(&clusters, kKernel, &one);
      });
      if (error != cudaSuccess) return error;
      if (items > clusters) return largest_cluster<kFirst + 1>(device, limit, items, ctas);
    }
    return cudaSuccess;
  }

  // `groups` CTAs, or clusters, share a head's sequences.
  static cudaError_t launch(const PrefillParams& p, cudaStream_t stream, int limit, int num_ctas, int64_t groups) {
    const Ring ring = fit_ring<S>(limit, num_ctas);
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t all = configure(ring, groups * p.num_heads, num_ctas, stream, cluster);
    const KernelParams<S> params(p, p.cu_seqlens.data != nullptr ? 1 : p.num_sequences);
    return cudaLaunchKernelEx(&all, kKernel, params, ring, num_ctas, static_cast<int>(groups));
  }
};

// Into how many groups, of a CTA each, a head's sequences are divided, `most` sequences a group or fewer. A CTA that goes from
// a sequence to the next prepares its first factors while the last one's state is on its way; that pays where sequences are
// short. But CTAs had better end together. Lengths that differ the host can't see: then the device needs CTAs to give away.
inline int64_t group_sequences(const PrefillParams& p, int sms, int64_t most) {
  // In chunks' time, with 64 sequences of 128 tokens and eight of 1024 (docs/notebook.md): what a CTA's first sequence costs
  // besides its chunks, and what any sequence.
  constexpr int64_t kStart = 5, kSequence = 1;
  constexpr int64_t kPackedTokens = 1024;  // of a group, where lengths may differ
  const bool packed = p.cu_seqlens.data != nullptr;
  const int64_t tokens = packed ? p.num_tokens / p.num_sequences : p.num_tokens;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk + kSequence;
  const auto groups = [&](int64_t items) { return (p.num_sequences + items - 1) / items; };
  const auto time = [&](int64_t items) {
    return (groups(items) * p.num_heads + sms - 1) / sms * (items * chunks + kStart);
  };
  most = std::min(most, p.num_sequences);
  if (packed) most = std::min(most, kPackedTokens / std::max<int64_t>(tokens, 1));
  int64_t best = 1;
  for (int64_t items = 2; items <= most; ++items) {
    if (time(items) < time(best)) best = items;
  }
  return packed && time(best) * 8 > time(1) * 7 ? p.num_sequences : groups(best);
}

// As many CTAs a head, up to kMaxCtas, as leave each an SM of its own from the start.
template <class Engine, GateKind kGate, class GElem>
cudaError_t launch_for_shape(const PrefillParams& p, cudaStream_t stream) {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if constexpr (Engine::kHasTensors) {
    using Cluster = Launcher<kGate, Slot<GElem, 2, true>, Engine>;
    const int64_t items = p.num_sequences * p.num_heads;
    if (items <= kMaxClusters) {
      int ctas;
      error = Cluster::shared_limit(device, limit);
      if (error == cudaSuccess) error = Cluster::largest_cluster(device, limit, items, ctas);
      if (error != cudaSuccess) return error;
      if (ctas > 1) return Cluster::launch(p, stream, limit, ctas, p.num_sequences);
    }
  }
  using Single = Launcher<kGate, Slot<GElem, 1, Engine::kHasTensors>, Engine>;
  int sms;
  error = Single::shared_limit(device, limit);
  if (error == cudaSuccess) error = number_of_sms(device, sms);
  if (error != cudaSuccess) return error;
  return Single::launch(p, stream, limit, 1, group_sequences(p, sms, Single::kMaxItems));
}

template <class Engine, GateKind kGate>
cudaError_t launch_for_gate_dtype(const PrefillParams& p, cudaStream_t stream) {
  return p.g_dtype == FloatKind::kBFloat16 ? launch_for_shape<Engine, kGate, __nv_bfloat16>(p, stream)
                                           : launch_for_shape<Engine, kGate, float>(p, stream);
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
