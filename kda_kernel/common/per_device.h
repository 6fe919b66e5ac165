// What is found out or set up on the host once for each device.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace kda {

// A positive number of each device that stays as it is while the process lives. To be a static variable.
class PerDevice {
 public:
  // `find(device, value)` sets value and returns an error; it runs on a device's first use, and again after an error.
  // Threads that come at the same time may all run it, so it must bear that.
  template <class Find>
  cudaError_t get(int device, int& value, Find find) {
    const bool kept = device < kKept;
    value = kept ? values_[device].load(std::memory_order_acquire) : 0;
    if (value != 0) return cudaSuccess;
    const cudaError_t error = find(device, value);
    if (error == cudaSuccess && kept) values_[device].store(value, std::memory_order_release);
    return error;
  }

 private:
  static constexpr int kKept = 64;  // more devices than a machine has; the number of another is found at each call
  std::atomic<int> values_[kKept]{};
};

}  // namespace kda
