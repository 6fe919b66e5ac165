// The Hopper build: compute capability 9.0a.
#include "prefill/engine_wgmma.cuh"
#include "prefill/kernel.cuh"
#include "prefill/launch.h"

namespace kda {

cudaError_t launch_prefill_sm90(const PrefillParams& params, cudaStream_t stream) {
  return prefill::launch_for_gate<prefill::WgmmaEngine>(params, stream);
}

}  // namespace kda
