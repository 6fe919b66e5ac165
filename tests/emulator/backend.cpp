// The operators' backend: the kernels for GPUs, on tensors of a CPU, by the emulator.
#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

#include "backend.h"
#include "decode/launch.h"
#include "emulator.h"
#include "layer/launch.h"
#include "prefill/launch.h"

namespace kda {

namespace prefill {
uint8_t shared_memory[1];
}

cudaError_t launch_decode_sm90(const DecodeParams& params, cudaStream_t stream);
cudaError_t launch_fused_decode_sm90(const FusedDecodeParams& params, cudaStream_t stream, bool clusters);

namespace {

// A device has compute capability 9.0 if it has clusters.
bool is_sm90() { return emulator::device().cluster_ctas > 1; }

template <class Launch, class... Arguments>
void run(Launch launch, const Arguments&... arguments) {
  std::string wrong;
  try {
    const cudaError_t error = launch(arguments...);
    if (error != cudaSuccess) wrong = cudaGetErrorString(error);
  } catch (const std::runtime_error& error) {
    wrong = error.what();
  }
  STD_TORCH_CHECK(wrong.empty(), wrong);
}

}  // namespace

void run_prefill(const PrefillParams& params, int32_t, bool portable) {
  run(portable ? launch_prefill_portable : launch_prefill_sm90, params, nullptr);
}
void run_decode(const DecodeParams& params, int32_t) {
  run(is_sm90() ? launch_decode_sm90 : launch_decode, params, nullptr);
}
void run_fused_decode(const FusedDecodeParams& params, int32_t) {
  run(is_sm90() ? launch_fused_decode_sm90 : launch_fused_decode, params, nullptr, is_sm90());
}
void run_short_conv(const ShortConvParams& params, int32_t) { run(launch_short_conv, params, nullptr); }
void run_gated_norm(const GatedNormParams& params, int32_t) { run(launch_gated_norm, params, nullptr); }

}  // namespace kda
