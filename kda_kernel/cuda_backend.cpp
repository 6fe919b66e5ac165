#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "backend.h"
#include "decode/launch.h"
#include "layer/launch.h"
#include "prefill/launch.h"

namespace kda {
namespace {

constexpr int kMinComputeCapability = 8;

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "flash-kda: ", what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// As 10 * major + minor; raises where no kernel runs.
int check_capability(int32_t device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device query");
  STD_TORCH_CHECK(major >= kMinComputeCapability, "q: expected a GPU of compute capability 8.0 or newer, got cuda:", device,
                  " with ", major, ".", minor);
  return 10 * major + minor;
}

}  // namespace

void run_prefill(const PrefillParams& params, int32_t device, bool portable) {
  const int capability = check_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool hopper = capability == 90 && !portable;
  const auto launch = hopper ? launch_prefill_sm90 : launch_prefill_portable;
  check_cuda(launch(params, current_stream(device)), hopper ? "launch of the SM90a prefill kernel"
                                                            : "launch of the portable prefill kernel");
}

void run_decode(const DecodeParams& params, int32_t device) {
  check_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_decode(params, current_stream(device)), "launch of the decode kernel");
}

void run_fused_decode(const FusedDecodeParams& params, int32_t device) {
  check_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_fused_decode(params, current_stream(device)), "launch of the fused decode kernel");
}

void run_short_conv(const ShortConvParams& params, int32_t device) {
  check_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_short_conv(params, current_stream(device)), "launch of the short convolution");
}

void run_gated_norm(const GatedNormParams& params, int32_t device) {
  check_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_gated_norm(params, current_stream(device)), "launch of the gated RMS norm");
}

}  // namespace kda
