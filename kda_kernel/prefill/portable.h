// The portable prefill kernel: mma.sync, one source for compute capability 8.0 and newer.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace kda {

// Enqueues the kernel on `stream` of the current device; needs N >= 1 and HV >= 1.
cudaError_t launch_prefill_portable(const PrefillParams& params, cudaStream_t stream);

}  // namespace kda
