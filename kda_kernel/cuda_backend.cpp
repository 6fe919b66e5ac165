#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "backend.h"
#include "common/per_device.h"
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
  static PerDevice capabilities;
  int capability = 0;
  const cudaError_t error = capabilities.get(device, capability, [](int device, int& capability) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capability = 10 * major + minor;
    return error;
  });
  check_cuda(error, "device query");
  STD_TORCH_CHECK(capability >= 10 * kMinComputeCapability,
                  "q: expected a GPU of compute capability 8.0 or newer, got cuda:", device, " with ", capability / 10,
                  ".", capability % 10);
  return capability;
}

// Runs `launch` with the current stream of `device`, while that is the current device. (A DeviceGuard allocates, and
// most often has nothing to do.)
template <class Launch>
void enqueue(int32_t device, const char* what, Launch launch) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "device query");
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (current != device) guard.emplace(device);
  check_cuda(launch(current_stream(device)), what);
}

}  // namespace

void run_prefill(const PrefillParams& params, int32_t device, bool portable) {
  const bool hopper = check_capability(device) == 90 && !portable;
  const auto launch = hopper ? launch_prefill_sm90 : launch_prefill_portable;
  enqueue(device, hopper ? "launch of the SM90a prefill kernel" : "launch of the portable prefill kernel",
          [&](cudaStream_t stream) { return launch(params, stream); });
}

void run_decode(const DecodeParams& params, int32_t device) {
  check_capability(device);
  enqueue(device, "launch of the decode kernel",
          [&](cudaStream_t stream) { return launch_decode(params, stream); });
}

void run_fused_decode(const FusedDecodeParams& params, int32_t device) {
  const bool clusters = check_capability(device) >= 90;
  enqueue(device, "launch of the fused decode kernel",
          [&](cudaStream_t stream) { return launch_fused_decode(params, stream, clusters); });
}

void run_short_conv(const ShortConvParams& params, int32_t device) {
  check_capability(device);
  enqueue(device, "launch of the short convolution",
          [&](cudaStream_t stream) { return launch_short_conv(params, stream); });
}

void run_gated_norm(const GatedNormParams& params, int32_t device) {
  check_capability(device);
  enqueue(device, "launch of the gated RMS norm",
          [&](cudaStream_t stream) { return launch_gated_norm(params, stream); });
}

}  // namespace kda
