// Vectors of kLanes floats in the compiler's own vector types, and the functions on them that the kernel needs.
// Included once per instruction set, after its target pragma and the constant kLanes: everything here has internal
// linkage, so that no function built for one instruction set can stand in for another's.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace kda::cpu {
namespace {

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

inline Vec load_bf16(const uint16_t* p) {
  ShortVec x;
  std::memcpy(&x, p, sizeof(x));
  return (Vec)(__builtin_convertvector(x, UintVec) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVec y = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, ShortVec);
  std::memcpy(p, &y, sizeof(y));
}

// kLanes elements at `index` of a tensor of either dtype.
inline Vec load_as(FloatKind dtype, const void* data, int64_t index) {
  return dtype == FloatKind::kFloat32 ? load(static_cast<const float*>(data) + index)
                                      : load_bf16(static_cast<const uint16_t*>(data) + index);
}

inline void store_as(FloatKind dtype, void* data, int64_t index, Vec x) {
  if (dtype == FloatKind::kFloat32) {
    store(static_cast<float*>(data) + index, x);
  } else {
    store_bf16(static_cast<uint16_t*>(data) + index, x);
  }
}

inline float load_scalar_as(FloatKind dtype, const void* data, int64_t index) {
  if (dtype == FloatKind::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x within 2 ulp: 2^n e^r with |r| <= ln(2) / 2 and e^r by its series to r^7 (the rest is under 6e-9). 0 where the
// result would be denormal, infinity above 88.3.
inline Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts, the first exact times n
  constexpr float kSeries[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec p = splat(1.0f / 5040);
  for (float c : kSeries) p = p * r + c;
  const Vec y = p * (Vec)(((IntVec)shifted - (IntVec)splat(kRound) + 127) << 23);
  return x < -87.3f ? splat(0.0f) : x > 88.3f ? splat(__builtin_inff()) : y;
}

// log(1 + y) for y in [0, 1]: 2 atanh(s) with s = y / (2 + y) <= 1/3, by its series to s^15 (the rest is under 2e-9).
inline Vec log1p(Vec y) {
  const Vec s = y / (y + 2.0f), s2 = s * s;
  constexpr float kSeries[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  Vec p = splat(1.0f / 15);
  for (float c : kSeries) p = p * s2 + c;
  return 2.0f * s * p;
}

inline Vec sigmoid(Vec x) { return 1.0f / (exp(-x) + 1.0f); }

inline Vec softplus(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  return (x < 0.0f ? splat(0.0f) : x) + log1p(exp(-magnitude));
}

}  // namespace
}  // namespace kda::cpu
