// A GPU of threads that are run one after another, for kernels compiled as plain C++: what CUDA gives to device code, and the
// launch calls of its runtime. Included before everything else.
//
// Every CUDA thread is a fiber. A fiber runs until it waits; the scheduler takes warps in random order, leaves some out, and
// lets whatever is asynchronous (copies, arrivals at other CTAs' barriers, products) happen at a random later time that the
// program allows. Shared memory starts as NaN. What is wrong stops the launch with a message: all threads waiting, a collective
// that a warp's lanes do not enter together, an address outside or misaligned.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace emulator {

// ---- what is running ---------------------------------------------------------------------------------------

unsigned thread_index();
unsigned block_x();
unsigned block_y();
unsigned block_z();
unsigned grid_y();
unsigned block_size();
int lane();
int own_rank();

// A number of the calling thread's, as it is when it is read.
template <unsigned (*kGet)()>
struct Word {
  operator unsigned() const { return kGet(); }
};

[[noreturn]] void fail(const char* what);

// Lets others run until *word is no longer `value`.
void wait_while(const uint32_t* word, uint32_t value);

// A random yes with this probability.
bool chance(double probability);

// `happens` at a random later time; `in_order`, after what the same thread has put off so before.
void later(std::function<void()> happens, bool in_order = false);

// What the thread has put off until it waits for its copies, or until what it releases is seen by the cluster, or until what it
// copies from shared memory has been read there: it happens at a random time before, or then.
enum Until { kCopied, kReleased, kRead };
void put_off(Until until, std::function<void()> happens);
void settle(Until until);

// All 32 lanes enter with their arguments; the last to come calls `run` with all of them. `name` says which collective it is.
void collective(const char* name, void* arguments, void (*run)(void* const* of_lanes));

// Meets `threads` others of the CTA that name this barrier (0 to 15), or all of the cluster's threads.
void named_barrier(int barrier, int threads);
void cluster_arrive();
void cluster_wait();

// ---- shared memory -----------------------------------------------------------------------------------------

// The place of `bytes` at an address, which has the CTA's rank in the cluster from bit 24 on. `local`: it has to be in the
// calling thread's CTA.
void* shared(uint32_t address, int bytes, bool local = true);
uint32_t remote(uint32_t address, int cta);
uint32_t first_address();

// What a CTA declares to be in shared memory, which is all that it has of it, and the address of something there.
void* declared(size_t bytes);
uint32_t address_of(const void* place);

template <class T>
T load(uint32_t address) {
  T x;
  std::memcpy(&x, shared(address, sizeof(T)), sizeof(T));
  return x;
}
template <class T>
void store(uint32_t address, const T& x) {
  std::memcpy(shared(address, sizeof(T)), &x, sizeof(T));
}

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int expected_bytes = 0, int arrivals = 1);
void barrier_bytes(uint32_t barrier, int bytes);
bool barrier_test(uint32_t barrier, uint32_t parity);
void barrier_wait(uint32_t barrier, uint32_t parity);

// What cuTensorMapEncodeTiled() keeps in a CUtensorMap: a tensor of four dimensions, its element's bytes, and the box and the
// swizzle (the units of 16 bytes in a row that change places) of copies.
struct TensorMap {
  uint8_t* data;
  uint64_t sizes[4], strides[4];
  int box[4], elem_bytes, swizzled_units;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
inline int box_bytes(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.elem_bytes; }
// A box of the tensor, from coordinates on, to or from the CTA's shared memory, where that lies; elements outside the tensor are
// zero, and not written.
void copy_box(const TensorMap& map, const int (&from)[4], uint8_t* shared, bool to_shared);

// The calling thread's: copies that have been started and not yet been handed to a barrier; wgmma's products, as the header
// that emulates it keeps them.
std::vector<std::function<void()>>& copies();
// A piece of the calling thread's shared memory, of 16 bytes, is written by a copy from now on, or no more: nobody touches it.
void in_flight(uint32_t address, bool begins);
std::shared_ptr<void>& products();

// ---- accesses to what is declared (accesses.cpp) ------------------------------------------------------------

// What a CTA has declared, and what accesses.cpp knows of it.
struct Declared {
  std::vector<uint8_t> memory;
  struct Accesses* accesses = nullptr;
};
Declared& declared_by(int rank);

// The calling thread, how many of its CTA's and of its warp's barriers it has passed, and what its CTA has declared (null: no
// thread is running).
struct Position {
  int thread;
  uint32_t cta_barriers, warp_barriers;
  Declared* declared;
};
Position& position();

// Called for every access of code that is compiled for it: each has to be ordered with those of other threads.
void access(const void* place, size_t bytes, bool writes);
// A copy by the calling thread, which waits for all of them together.
void copy_later(void* place, const void* source, size_t bytes);
void wait_for_copies();
// Writes to what a CTA has declared when a barrier in shared memory is about to tell so.
void write_from_outside(int rank, void* place, const void* source, size_t bytes);

// ---- warps -------------------------------------------------------------------------------------------------

// Every lane gives a value and `all` makes the lanes' results from all of them.
template <class T, class R, class F>
R exchange(const char* name, T value, F all) {
  struct Arguments {
    T value;
    R result;
    F* all;
  } mine{value, R{}, &all};
  collective(name, &mine, [](void* const* lanes) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = static_cast<Arguments*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) {
      auto* arguments = static_cast<Arguments*>(lanes[i]);
      arguments->result = (*arguments->all)(values, i);
    }
  });
  return mine.result;
}

inline float bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline float low(uint32_t pair) { return bf16(static_cast<uint16_t>(pair)); }
inline float high(uint32_t pair) { return bf16(static_cast<uint16_t>(pair >> 16)); }

// D[16, columns] += A[16, 16] B[16, columns] over a warp's fragments. a[lane][4], d(lane, n, x); b(k, column).
template <class A, class B, class D>
void multiply(int columns, A a, B b, D d) {
  float rows[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
      rows[row][k] = low(a(lane, i));
      rows[row][k + 1] = high(a(lane, i));
    }
  }
  for (int column = 0; column < columns; ++column) {
    float operand[16];
    for (int k = 0; k < 16; ++k) operand[k] = b(k, column);
    for (int row = 0; row < 16; ++row) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += rows[row][k] * operand[k];
      d(row % 8 * 4 + column % 8 / 2, column / 8, row / 8 * 2 + column % 2) += sum;
    }
  }
}

// ---- launches ----------------------------------------------------------------------------------------------

// The device that launches go to: the most CTAs a cluster may have, the shared memory of a CTA in bytes, and how many SMs it
// says it has.
struct Device {
  int cluster_ctas;
  int shared_bytes;
  int sms;
};
const Device& device();

void run_grid(dim3 grid, int threads, int cluster_ctas, int shared_bytes, const std::function<void()>& kernel);

}  // namespace emulator

#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__

inline const struct {
  emulator::Word<emulator::thread_index> x;
} threadIdx{};
inline const struct {
  emulator::Word<emulator::block_x> x;
  emulator::Word<emulator::block_y> y;
  emulator::Word<emulator::block_z> z;
} blockIdx{};
inline const struct {
  emulator::Word<emulator::grid_y> y;
} gridDim{};
inline const struct {
  emulator::Word<emulator::block_size> x;
} blockDim{};

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

void __syncwarp();
template <class T>
T __shfl_sync(uint32_t, T x, int lane, int width = 32) {
  const int source = emulator::lane() / width * width + lane % width;
  return emulator::exchange<std::pair<T, int>, T>("__shfl_sync", {x, source}, [](const std::pair<T, int>* all, int i) {
    return all[all[i].second].first;
  });
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  return __shfl_sync(~0u, x, emulator::lane() ^ mask);
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  return emulator::exchange<bool, uint32_t>("__ballot_sync", x, [](const bool* all, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
    return bits;
  });
}
inline uint32_t __match_all_sync(uint32_t, uint32_t x, int* same) {
  *same = emulator::exchange<uint32_t, bool>("__match_all_sync", x, [](const uint32_t* all, int) {
    return std::all_of(all, all + 32, [&](uint32_t other) { return other == all[0]; });
  });
  return *same ? ~0u : 0;
}
inline bool __all_sync(uint32_t, bool x) { return __ballot_sync(~0u, x) == ~0u; }
inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
  return emulator::exchange<uint32_t, uint32_t>("__reduce_max_sync", x,
                                                [](const uint32_t* all, int) { return *std::max_element(all, all + 32); });
}
void __syncthreads();
int __syncthreads_or(int x);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t emulator_max_clusters(int* clusters, const cudaLaunchConfig_t* config);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  return emulator_max_clusters(clusters, config);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  const int cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  emulator::run_grid(config->gridDim, config->blockDim.x, cluster, config->dynamicSmemBytes,
                     [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
