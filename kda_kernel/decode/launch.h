// The decode kernel's launches. Each enqueues one kernel on `stream` of the current device; N >= 1 and HV >= 1.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace kda {

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

// `clusters`: the device has them, from compute capability 9.0 on.
cudaError_t launch_fused_decode(const FusedDecodeParams& params, cudaStream_t stream, bool clusters);

}  // namespace kda
