// The operators' backend: the prefill kernels for GPUs, on tensors of a CPU, by the emulator.
#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

#include "backend.h"
#include "prefill/launch.h"

namespace kda {

namespace prefill {
uint8_t shared_memory[1];  // what kernels declare; emulator.h gives each CTA its own
}

void run_prefill(const PrefillParams& params, int32_t, bool portable) {
  std::string wrong;
  try {
    const cudaError_t error = (portable ? launch_prefill_portable : launch_prefill_sm90)(params, nullptr);
    if (error != cudaSuccess) wrong = cudaGetErrorString(error);
  } catch (const std::runtime_error& error) {
    wrong = error.what();
  }
  STD_TORCH_CHECK(wrong.empty(), wrong);
}

void run_decode(const DecodeParams&, int32_t) { STD_TORCH_CHECK(false, "kda_decode: not emulated"); }
void run_short_conv(const ShortConvParams&, int32_t) { STD_TORCH_CHECK(false, "kda_short_conv: not emulated"); }
void run_gated_norm(const GatedNormParams&, int32_t) { STD_TORCH_CHECK(false, "gated_rms_norm: not emulated"); }

}  // namespace kda
