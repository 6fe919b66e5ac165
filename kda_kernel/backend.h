// What the operators leave to the backend they are compiled for.
#pragma once

#include <cstdint>

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

}  // namespace kda
