// The portable build: compute capability 8.0 and newer.
#include "prefill/engine_mma.cuh"
#include "prefill/kernel.cuh"
#include "prefill/launch.h"

namespace kda {

cudaError_t launch_prefill_portable(const PrefillParams& params, cudaStream_t stream) {
  return prefill::launch_for_gate<prefill::MmaEngine>(params, stream);
}

}  // namespace kda
