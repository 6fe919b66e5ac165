// From the gate input g to log2 of the decay a of one token and channel, and beta from its logit.
//
//   pre-activated   log decay = g
//   lower bound     log decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
//   softplus        log decay = -exp(A_log) * softplus(g + dt_bias)
//
// The special functions are the hardware's approximations (relative error about 2^-22 each): what they do to a
// is far below the bf16 rounding of the products it goes into.
#pragma once

#include "common/ptx.cuh"
#include "params.h"

namespace kda {

constexpr float kLog2E = 1.4426950408889634f;

// Below it log2(a) is cut off where it has no bound of its own: a is 0 in fp32 then, and so is any product with it; but
// sums of log2(a) keep the bits of what comes after.
constexpr float kStrongest = -160.0f;

// Per head: what goes before and after the nonlinearity, with the change of base folded in.
struct GateScale {
  float input;   // multiplies g, and dt_bias when it is staged
  float output;  // turns the activated gate into log2(a)

  // The activated gate at kStrongest; not 0, for the case that `output` is infinite.
  __device__ __forceinline__ float limit() const { return fmaxf(kStrongest * reciprocal_approx(output), 1e-37f); }
};

template <GateKind kGate>
__device__ __forceinline__ GateScale make_gate_scale(float A_log, float lower_bound) {
  if constexpr (kGate == GateKind::kLowerBound) {
    return {.input = -kLog2E * expf(A_log), .output = kLog2E * lower_bound};
  } else if constexpr (kGate == GateKind::kSoftplus) {
    return {.input = kLog2E, .output = -expf(A_log)};
  } else {
    return {.input = 1.0f, .output = kLog2E};
  }
}

// log2(1 + 2^x), softplus with base 2, for every x: the identity above 29 (2^-29 is far below half an ulp of 29), a
// series where 1 + 2^x would round away what matters (2^x < 2^-6: the next term is below 2^-26).
__device__ __forceinline__ float softplus_2(float x) {
  float e = exp2_approx(x);
  float series = e * fmaf(e, fmaf(e, fmaf(e, -kLog2E / 4, kLog2E / 3), -kLog2E / 2), kLog2E);
  float y = e < 0.015625f ? series : log2_approx(1.0f + e);
  return x > 29.0f ? x : y;
}

// log2(a) over scale.output, not below kStrongest; `bias` is dt_bias times scale.input.
template <GateKind kGate>
__device__ __forceinline__ float activate_gate(float g, float bias, GateScale scale) {
  if constexpr (kGate == GateKind::kLowerBound) {
    return reciprocal_approx(1.0f + exp2_approx(fmaf(g, scale.input, bias)));
  } else if constexpr (kGate == GateKind::kSoftplus) {
    return min_or_nan(softplus_2(fmaf(g, scale.input, bias)), scale.limit());
  } else {
    return max_or_nan(g, kStrongest / kLog2E);
  }
}

template <GateKind kGate>
__device__ __forceinline__ float log2_decay(float g, float bias, GateScale scale) {
  return scale.output * activate_gate<kGate>(g, bias, scale);
}

__device__ __forceinline__ float activate_beta(float beta, bool sigmoid, bool neg_eigval) {
  if (!sigmoid) return beta;
  float y = reciprocal_approx(1.0f + exp2_approx(-kLog2E * beta));
  return neg_eigval ? 2.0f * y : y;
}

}  // namespace kda
