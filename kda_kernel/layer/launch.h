// Launches of the operators around the delta rule. Each enqueues one kernel on `stream` of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "layer/layer_params.h"

namespace kda {

// N >= 1; tensors in bf16.
cudaError_t launch_short_conv(const ShortConvParams& params, cudaStream_t stream);

// At least one row; tensors in bf16.
cudaError_t launch_gated_norm(const GatedNormParams& params, cudaStream_t stream);

}  // namespace kda
