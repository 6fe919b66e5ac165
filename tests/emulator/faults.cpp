// Small kernels, each with a fault that the emulator has to find.
#include <stdexcept>
#include <string>

#include "common/ptx.cuh"

namespace {

using namespace kda;

constexpr int kThreads = 64;
constexpr int kSharedBytes = 4096;

uint32_t place(int bytes) { return emulator::first_address() + bytes; }

// A barrier of 32 arrivals at the start of shared memory, and `then`.
template <class Then>
void with_barrier(Then then) {
  if (threadIdx.x == 0) barrier_init(place(0), 32);
  __syncthreads();
  then(place(0));
}

const std::function<void()> kFaults[] = {
    [] { with_barrier([](uint32_t barrier) { barrier_wait(barrier, 0); }); },
    [] {
      with_barrier([](uint32_t barrier) {
        if (threadIdx.x < 32) barrier_arrive_expecting(barrier, threadIdx.x == 0 ? 16 : 0);
        __syncthreads();
        if (threadIdx.x == 32) barrier_arrive(barrier);
      });
    },
    [] {
      if (threadIdx.x % 2 == 0) {
        __syncwarp();
      } else {
        movmatrix_trans(0);
      }
    },
    [] {
      if (threadIdx.x < 31) __syncwarp();
    },
    [] {
      static const uint4 source{};
      with_barrier([](uint32_t barrier) {
        cp_async_16(place(64 + 16 * threadIdx.x), &source, true);
        barrier_arrive_after_cp_async(barrier);
        load_shared(place(64 + 16 * threadIdx.x));
      });
    },
    [] {
      static const uint4 source{};
      cp_async_16(place(64 + 16 * threadIdx.x), &source, true);
    },
    [] { load_shared(place(2)); },
    [] { load_shared(place(kSharedBytes)); },
    [] { store_shared(remote_address(place(0), 1 - emulator::own_rank()), 0); },
    [] { barrier_arrive(place(0)); },
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int emulator_faults() { return std::size(kFaults); }

// What is said of a fault, in two CTAs of two warps; empty if nothing is.
__attribute__((visibility("default"))) const char* emulator_fault(int index) {
  static std::string said;
  said.clear();
  try {
    emulator::run_grid(dim3(2), kThreads, 2, kSharedBytes, kFaults[index]);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  return said.c_str();
}

// What thread 0 reads of what thread 32 writes, without a barrier between them: it depends on the order.
__attribute__((visibility("default"))) int emulator_race() {
  static uint32_t found;
  emulator::run_grid(dim3(1), kThreads, 1, kSharedBytes, [] {
    if (threadIdx.x == 32) store_shared(place(0), 1);
    if (threadIdx.x == 0) found = load_shared(place(0));
  });
  return found == 1;
}
}
