// What the operators leave to the backend they are compiled for.
#pragma once

#include <cstdint>

#include "layer/layer_params.h"
#include "params.h"

namespace kda {

// The devices whose tensors are served. kernel-builder defines CPU_KERNEL for the CPU's variant.
#if defined(CPU_KERNEL)
constexpr bool kServesCpu = true;
#else
constexpr bool kServesCpu = false;
#endif

// Runs the prefill kernel on checked arguments of at least one sequence, on the current stream of CUDA device `device`
// or on this CPU. `portable`: by the kernel that serves every processor, even where a faster one exists.
void run_prefill(const PrefillParams& params, int32_t device, bool portable);

// The same for the decode kernel, of which there is one.
void run_decode(const DecodeParams& params, int32_t device);

// On a GPU alone.
void run_fused_decode(const FusedDecodeParams& params, int32_t device);

// The operators around the delta rule, on checked arguments with something to do, likewise.
void run_short_conv(const ShortConvParams& params, int32_t device);
void run_gated_norm(const GatedNormParams& params, int32_t device);

}  // namespace kda
