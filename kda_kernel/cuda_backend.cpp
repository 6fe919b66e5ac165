#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "backend.h"
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

// As 10 * major + minor.
int compute_capability(int32_t device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device query");
  STD_TORCH_CHECK(major >= kMinComputeCapability, "q: expected a GPU of compute capability 8.0 or newer, got cuda:", device,
                  " with ", major, ".", minor);
  return 10 * major + minor;
}

}  // namespace

void run_prefill(const PrefillParams& params, int32_t device, bool portable) {
  const int capability = compute_capability(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool hopper = capability == 90 && !portable;
  const auto launch = hopper ? launch_prefill_sm90 : launch_prefill_portable;
  check_cuda(launch(params, current_stream(device)), hopper ? "launch of the SM90a prefill kernel"
                                                            : "launch of the portable prefill kernel");
}

}  // namespace kda
