// Stands in for kda_kernel/common/ptx.cuh: the same functions, by what PTX's manual says of their instructions.
#pragma once

#include "emulator.h"

namespace kda {

namespace prefill {
extern uint8_t shared_memory[];  // the dynamic one: what kernels declare, not what they get
}
inline uint32_t smem_address(const void* pointer) {
  return pointer == prefill::shared_memory ? emulator::first_address() : emulator::address_of(pointer);
}
inline uint32_t opaque(uint32_t x) { return x; }
inline void keep_in_place(float&) {}

// ---- matrix fragments ------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&d)[4], uint32_t address, bool transposed) {
  struct Lane {
    uint32_t* d;
    uint32_t address;
    bool transposed;
  } mine{d, address, transposed};
  emulator::collective("ldmatrix", &mine, [](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t x[8][8];
      for (int row = 0; row < 8; ++row) {
        const auto* lane = static_cast<const Lane*>(lanes[8 * matrix + row]);
        std::memcpy(x[row], emulator::shared(lane->address, 16), 16);
      }
      for (int i = 0; i < 32; ++i) {
        const auto* lane = static_cast<const Lane*>(lanes[i]);
        const int a = i / 4, b = i % 4 * 2;
        const uint32_t low = lane->transposed ? x[b][a] : x[a][b], high = lane->transposed ? x[b + 1][a] : x[a][b + 1];
        lane->d[matrix] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) { load_matrices(d, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) { load_matrices(d, address, true); }

inline uint32_t movmatrix_trans(uint32_t x) {
  return emulator::exchange<uint32_t, uint32_t>("movmatrix", x, [](const uint32_t* all, int i) {
    const auto element = [&](int row, int column) { return all[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
    return element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
  });
}

inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) {
  struct Lane {
    uint32_t address;
    const uint32_t* x;
  } mine{address, x};
  emulator::collective("stmatrix", &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      uint16_t row[8];
      for (int column = 0; column < 8; ++column) {
        const uint32_t pair = static_cast<const Lane*>(lanes[column * 4 + i % 8 / 2])->x[i / 8];
        row[column] = static_cast<uint16_t>(pair >> i % 2 * 16);
      }
      std::memcpy(emulator::shared(static_cast<const Lane*>(lanes[i])->address, 16), row, 16);
    }
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::collective("mma", &mine, [](void* const* lanes) {
    const auto of = [&](int lane) { return static_cast<const Lane*>(lanes[lane]); };
    emulator::multiply(
        8, [&](int lane, int i) { return of(lane)->a[i]; },
        [&](int k, int column) {
          const uint32_t pair = of(column * 4 + k % 8 / 2)->b[k / 8];
          return k % 2 ? emulator::high(pair) : emulator::low(pair);
        },
        [&](int lane, int, int x) -> float& { return of(lane)->d[x]; });
  });
}

inline void mma_bf16_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  mma_bf16(d, a, b, 0);
}

inline uint32_t pack_bf16(float low, float high) {
  const auto bits = [](float x) -> uint32_t { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); };
  return bits(low) | bits(high) << 16;
}
inline float2 unpack_bf16(uint32_t packed) { return make_float2(emulator::low(packed), emulator::high(packed)); }

inline uint32_t fma_bf16x2(uint32_t x, uint32_t y, uint32_t z) {
  return pack_bf16(std::fma(emulator::low(x), emulator::low(y), emulator::low(z)),
                   std::fma(emulator::high(x), emulator::high(y), emulator::high(z)));
}

inline uint32_t spread_signs(uint32_t x) { return (x & 0x8000 ? 0xffff : 0) | (x & 0x80000000 ? 0xffff0000 : 0); }

// ---- global memory ---------------------------------------------------------------------------------------

inline void check_aligned(const void* place, int bytes) {
  if (reinterpret_cast<uintptr_t>(place) % bytes != 0) emulator::fail("a misaligned address");
}
template <bool>
uint4 load_once(const void* source) {
  check_aligned(source, 16);
  uint4 x;
  std::memcpy(&x, source, 16);
  return x;
}
inline void store_once(void* target, uint4 x) {
  check_aligned(target, 16);
  std::memcpy(target, &x, 16);
}

// ---- shared memory ---------------------------------------------------------------------------------------

template <class T>
T& block_shared() {
  static_assert(sizeof(T) <= 48 << 10, "more than a CTA may declare");
  return *static_cast<T*>(emulator::declared(sizeof(T)));
}
inline void store_shared(uint32_t address, uint32_t value) { emulator::store(address, value); }
inline void store_shared_u16(uint32_t address, uint16_t value) { emulator::store(address, value); }
inline void store_shared_float(uint32_t address, float value) { emulator::store(address, value); }
inline void store_shared_float2(uint32_t address, float x, float y) { emulator::store(address, make_float2(x, y)); }
inline uint32_t load_shared(uint32_t address) { return emulator::load<uint32_t>(address); }
inline float2 load_shared_float2(uint32_t address) { return emulator::load<float2>(address); }
inline float4 load_shared_float4(uint32_t address) { return emulator::load<float4>(address); }
inline uint4 load_shared_uint4(uint32_t address) { return emulator::load<uint4>(address); }
inline void store_shared_float4(uint32_t address, const float (&x)[4]) {
  emulator::store(address, make_float4(x[0], x[1], x[2], x[3]));
}
inline void store_shared_uint4(uint32_t address, uint4 value) { emulator::store(address, value); }
inline void fence_proxy_async() {}

// ---- asynchronous copies and barriers --------------------------------------------------------------------

// The copies happen with the arrival that barrier_arrive_after_cp_async() puts off, which is the latest moment.
inline void cp_async_16(uint32_t address, const void* source, bool valid) {
  void* target = emulator::shared(address, 16);
  emulator::in_flight(address, true);
  emulator::copies().push_back([=] {
    emulator::in_flight(address, false);
    if (valid) {
      std::memcpy(target, source, 16);
    } else {
      std::memset(target, 0, 16);
    }
  });
}
template <int kBytes>
void cp_async(void* target, const void* source) {
  void* place = emulator::shared(smem_address(target), kBytes);
  check_aligned(source, kBytes);
  emulator::copy_later(place, source, kBytes);
}
inline void cp_async_wait_all() { emulator::wait_for_copies(); }

inline void barrier_init(uint32_t barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier); }
inline void barrier_arrive_after_cp_async(uint32_t barrier) {
  emulator::later([copies = std::exchange(emulator::copies(), {}), barrier] {
    for (const auto& copy : copies) copy();
    emulator::barrier_arrive(barrier);
  }, true);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void named_barrier_sync(int barrier, int threads) { emulator::named_barrier(barrier, threads); }

// ---- clusters of CTAs --------------------------------------------------------------------------------------

inline void fence_barrier_init() {}
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_meet_relaxed() {
  cluster_arrive_relaxed();
  cluster_wait();
}
inline void cluster_sync() {
  emulator::settle(emulator::kReleased);
  emulator::cluster_arrive();
  emulator::cluster_wait();
}
inline uint32_t remote_address(uint32_t address, int cta) { return emulator::remote(address, cta); }
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive_remote(uint32_t barrier) {
  emulator::put_off(emulator::kReleased, [=] { emulator::barrier_arrive(barrier); });
}
inline void barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void store_remote(int cta, uint32_t target, float x, uint32_t barrier) {
  void* to = emulator::shared(remote_address(target, cta), sizeof(x), false);
  emulator::later([=] {
    emulator::write_from_outside(cta, to, &x, sizeof(x));
    emulator::barrier_bytes(remote_address(barrier, cta), sizeof(x));
  });
}
inline void copy_to_remote(uint32_t target, uint32_t source, int bytes, uint32_t barrier) {
  const void* from = emulator::shared(source, bytes);
  void* to = emulator::shared(target, bytes, false);
  emulator::later([=] {
    std::memcpy(to, from, bytes);
    emulator::barrier_bytes(barrier, bytes);
  });
}

// ---- tensor copies (TMA) -----------------------------------------------------------------------------------

struct TensorPlace {
  int x, head, token, batch;
};
inline void copy_from_tensor(uint32_t target, const CUtensorMap& map, const TensorPlace& at, uint32_t barrier) {
  const auto& tensor = reinterpret_cast<const emulator::TensorMap&>(map);
  const int bytes = emulator::box_bytes(tensor);
  if (target % 1024 != 0) emulator::fail("a swizzled box off a multiple of 1024");
  auto* to = static_cast<uint8_t*>(emulator::shared(target, bytes));
  for (int i = 0; i < bytes; i += 16) emulator::in_flight(target + i, true);
  emulator::later([=, tensor = tensor] {
    for (int i = 0; i < bytes; i += 16) emulator::in_flight(target + i, false);
    emulator::copy_box(tensor, {at.x, at.head, at.token, at.batch}, to, true);
    emulator::barrier_bytes(barrier, bytes);
  });
}
inline void copy_to_tensor(const CUtensorMap& map, const TensorPlace& at, uint32_t source) {
  const auto& tensor = reinterpret_cast<const emulator::TensorMap&>(map);
  if (source % (tensor.swizzled_units == 8 ? 1024 : 256) != 0) emulator::fail("a swizzled box at an odd address");
  auto* from = static_cast<uint8_t*>(emulator::shared(source, emulator::box_bytes(tensor)));
  emulator::put_off(emulator::kRead, [=, tensor = tensor] {
    emulator::copy_box(tensor, {at.x, at.head, at.token, at.batch}, from, false);
  });
}
inline void bulk_wait_read() { emulator::settle(emulator::kRead); }
inline void prefetch_tensor_map(const CUtensorMap&) {}
inline void prefetch_to_l2(const void*) {}
inline void prefetch_tensor(const CUtensorMap&, const TensorPlace&) {}
inline void barrier_expect(uint32_t barrier, int bytes) { emulator::barrier_bytes(barrier, -bytes); }
inline void barrier_arrive_many(uint32_t barrier, int arrivals) { emulator::barrier_arrive(barrier, 0, arrivals); }

// ---- special functions -----------------------------------------------------------------------------------

inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::max(x, y); }
inline float min_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::min(x, y); }

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approx(float x) { return flush(std::log2(flush(x))); }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(flush(x)); }
inline float reciprocal_approx(float x) { return flush(1.0f / flush(x)); }

}  // namespace kda
