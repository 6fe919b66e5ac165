// Stands in for CuTe's header: wgmma, by what PTX's manual says of it. A product happens somewhere between its commit and the
// wait for it, and reads shared memory then.
#pragma once

#include "emulator.h"

namespace cute {
namespace SM90::GMMA {

enum class Major { K, MN };
enum class ScaleOut { Zero, One };

}  // namespace SM90::GMMA

namespace wgmma {

using SM90::GMMA::Major;
using SM90::GMMA::ScaleOut;

struct Operand {
  uint64_t descriptor = 0;
  Major major = Major::K;

  // Element (i, k), i along M or N, as a matrix descriptor lays them out without a swizzle or with that of 128 bytes.
  uint32_t bits(int i, int k) const {
    const uint32_t start = (descriptor & 0x3fff) * 16, leading = (descriptor >> 16 & 0x3fff) * 16;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) * 16;
    const uint64_t layout = descriptor >> 62;
    if (layout > 1) emulator::fail("a matrix descriptor's layout that is not emulated");
    uint32_t place = start;
    if (major == Major::K) {
      place += i / 8 * stride + (layout == 0 ? i % 8 * 16 + k / 8 * leading + k % 8 * 2 : i % 8 * 128 + k * 2);
    } else {
      if (layout == 0) emulator::fail("a matrix descriptor's layout that is not emulated");
      place += i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2;
    }
    if (layout == 1) place ^= (place >> 7 & 7) << 4;
    return emulator::load<uint16_t>(emulator::remote(place, emulator::own_rank()));
  }
};

struct Product {
  int columns;
  bool a_shared, zero = false;
  uint32_t a[4];
  Operand a_operand, b;
  std::vector<float*> d;

  void take(float& x) { d.push_back(&x); }
  void take(ScaleOut scale) { zero = scale == ScaleOut::Zero; }
};

struct Queue {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};

// The calling thread's.
inline Queue& queue() {
  auto& kept = emulator::products();
  if (kept == nullptr) kept = std::make_shared<Queue>();
  return *static_cast<Queue*>(kept.get());
}

// Makes a warp's oldest groups of products, all but `left`.
inline void finish(size_t left) {
  struct Lane {
    Queue* queue;
    size_t left;
  } mine{&queue(), left};
  emulator::collective("wgmma", &mine, [](void* const* lanes) {
    const auto of_lane = [&](int lane) -> Queue& { return *static_cast<const Lane*>(lanes[lane])->queue; };
    auto& first = of_lane(0).groups;
    while (first.size() > static_cast<const Lane*>(lanes[0])->left) {
      for (size_t i = 0; i < first.front().size(); ++i) {
        const auto of = [&](int lane) -> Product& { return of_lane(lane).groups.front()[i]; };
        const Product& one = of(0);
        const int row = emulator::thread_index() / 32 % 4 * 16;
        if (one.zero) {
          for (int lane = 0; lane < 32; ++lane) {
            for (float* d : of(lane).d) *d = 0;
          }
        }
        emulator::multiply(
            one.columns,
            [&](int lane, int e) {
              if (!one.a_shared) return of(lane).a[e];
              const int i = row + lane / 4 + e % 2 * 8, k = lane % 4 * 2 + e / 2 * 8;
              return one.a_operand.bits(i, k) | one.a_operand.bits(i, k + 1) << 16;
            },
            [&](int k, int column) { return emulator::bf16(one.b.bits(column, k)); },
            [&](int lane, int n, int x) -> float& { return *of(lane).d[4 * n + x]; });
      }
      for (int lane = 0; lane < 32; ++lane) of_lane(lane).groups.erase(of_lane(lane).groups.begin());
    }
  });
}

template <int kColumns, Major kA, Major kB>
struct FromRegisters {
  template <class... Rest>
  static void fma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, Rest&&... rest) {
    static_assert(kA == Major::K);
    Product product{.columns = kColumns, .a_shared = false, .a = {a0, a1, a2, a3}, .a_operand = {}, .b = {b, kB}, .d = {}};
    (product.take(rest), ...);
    queue().open.push_back(std::move(product));
  }
};

template <int kColumns, Major kA, Major kB>
struct FromShared {
  template <class... Rest>
  static void fma(uint64_t a, uint64_t b, Rest&&... rest) {
    Product product{.columns = kColumns, .a_shared = true, .a = {}, .a_operand = {a, kA}, .b = {b, kB}, .d = {}};
    (product.take(rest), ...);
    queue().open.push_back(std::move(product));
  }
};

}  // namespace wgmma

inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {
  wgmma::Queue& queue = wgmma::queue();
  queue.groups.push_back(std::exchange(queue.open, {}));
  const bool early = emulator::chance(0.5);
  if (__shfl_sync(~0u, early, 0)) wgmma::finish(0);
}
template <int kLeft>
void warpgroup_wait() {
  if (!wgmma::queue().open.empty()) emulator::fail("a product that was not committed");
  wgmma::finish(kLeft);
}

namespace SM90::GMMA {

template <Major kA, Major kB>
using MMA_64x32x16_F32BF16BF16_RS = wgmma::FromRegisters<32, kA, kB>;
template <Major kA, Major kB>
using MMA_64x32x16_F32BF16BF16_SS = wgmma::FromShared<32, kA, kB>;
template <Major kA, Major kB>
using MMA_64x128x16_F32BF16BF16_RS = wgmma::FromRegisters<128, kA, kB>;

}  // namespace SM90::GMMA
}  // namespace cute
