// The prefill kernels' launches. Each enqueues one kernel on `stream` of the current device; N >= 1 and HV >= 1.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace kda {

// mma.sync; compute capability 8.0 and newer.
cudaError_t launch_prefill_portable(const PrefillParams& params, cudaStream_t stream);

// wgmma; compute capability 9.0 alone.
cudaError_t launch_prefill_sm90(const PrefillParams& params, cudaStream_t stream);

}  // namespace kda
