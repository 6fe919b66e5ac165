// Small kernels, each with a fault that the emulator has to find.
#include <stdexcept>
#include <string>

#include "common/ptx.cuh"
#include "prefill/tensor_maps.h"
#include "watched_faults.h"

namespace {

using namespace kda;

constexpr int kThreads = 64;
constexpr int kSharedBytes = kWatchedBytes;

uint32_t place(int bytes) { return emulator::first_address() + bytes; }

// A barrier of 32 arrivals at the start of shared memory, and `then`.
template <class Then>
void with_barrier(Then then) {
  if (threadIdx.x == 0) barrier_init(place(0), 32);
  __syncthreads();
  then(place(0));
}

// A [1, 16, 1, 128] tensor, in boxes of 64 columns and 32 rows.
CUtensorMap tensor(void* data) {
  CUtensorMap map;
  const TokenTensor rows{.data = data, .batch_stride = 0, .token_stride = kHeadDim, .head_stride = 0};
  if (!prefill::describe_rows<__nv_bfloat16>(map, rows, 1, 16, 1, 64)) emulator::fail("not a tensor");
  return map;
}
__nv_bfloat16 zeros[16 * kHeadDim];

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
    [] {
      with_barrier([](uint32_t barrier) {
        cluster_arrive_relaxed();
        cluster_wait();
        if (emulator::own_rank() == 1) return;
        for (int i = 0; i < 100; ++i) __syncthreads();
        barrier_arrive_remote(remote_address(barrier, 1));
      });
    },
    [] { cp_async<16>(reinterpret_cast<void*>(8), nullptr); },
    [] {
      static const uint4 sources[2]{};
      cp_async<16>(emulator::declared(kSharedBytes), reinterpret_cast<const char*>(sources) + 4);
    },
    [] { block_shared<float>(); },
    [] {
      with_barrier([](uint32_t barrier) {
        if (threadIdx.x > 0) return;
        barrier_expect(barrier, 4096);
        copy_from_tensor(place(1024), tensor(zeros), {.x = 0, .head = 0, .token = 0, .batch = 0}, barrier);
        load_shared(place(1024));
      });
    },
    [] {
      if (threadIdx.x == 0) copy_to_tensor(tensor(zeros), {.x = 64, .head = 0, .token = 0, .batch = 0}, place(1024));
    },
    [] {
      if (threadIdx.x == 0) copy_to_tensor(tensor(zeros), {.x = 64, .head = 0, .token = 0, .batch = 0}, place(1024 + 128));
    },
    threads_without_a_barrier,
    lanes_without_a_barrier,
    copy_without_a_wait,
    nothing_wrong,
};

// What a thread reads of what is written to shared memory in time or too late.
uint32_t found;

// Another thread writes, without a barrier between them.
void read_of_a_thread() {
  if (threadIdx.x == 32) store_shared(place(0), 1);
  if (threadIdx.x == 0) found = load_shared(place(0));
}

// A copy that is not waited for.
void read_of_a_copy() {
  static const uint32_t one = 1;
  if (threadIdx.x == 0) cp_async<4>(emulator::declared(kSharedBytes), &one);
  __syncthreads();
  if (threadIdx.x == 0) found = load_shared(place(0));
}

// Another CTA's store, whose barrier is waited for too late.
void read_of_a_cta() {
  if (threadIdx.x == 0) barrier_init(place(8), 1);
  cluster_sync();
  if (threadIdx.x > 0) return;
  if (emulator::own_rank() == 0) return store_remote(1, place(0), std::bit_cast<float>(1), place(8));
  found = load_shared(place(0));
  barrier_arrive_expecting(place(8), 4);
  barrier_wait_for_cluster(place(8), 0);
}

// A copy from shared memory that changes before it is known to have been read.
void copy_of_what_changes() {
  static uint32_t target[16 * kHeadDim];
  if (emulator::own_rank() > 0) return;
  if (threadIdx.x == 0) {
    store_shared(place(1024), 1);
    copy_to_tensor(tensor(target), {.x = 0, .head = 0, .token = 0, .batch = 0}, place(1024));
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  store_shared(place(1024), 0);
  bulk_wait_read();
  found = target[0];
}

const std::function<void()> kRaces[] = {read_of_a_thread, read_of_a_copy, read_of_a_cta, copy_of_what_changes};

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

__attribute__((visibility("default"))) int emulator_races() { return std::size(kRaces); }

// Whether the race's writer was in time: it depends on the order.
__attribute__((visibility("default"))) int emulator_race(int index) {
  emulator::run_grid(dim3(2), kThreads, 2, kSharedBytes, kRaces[index]);
  return found == 1;
}
}
