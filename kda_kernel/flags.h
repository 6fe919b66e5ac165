// The operators' `flags`: a sum of these. torch's dispatcher takes 0.2 us for every bool of its own.
// torch-ext/flash_kda/flags.py has the same names and numbers.
#pragma once

#include <cstdint>

namespace kda {

enum Flag : int64_t {
  USE_GATE_IN_KERNEL = 1,
  USE_QK_L2NORM_IN_KERNEL = 2,
  USE_BETA_SIGMOID_IN_KERNEL = 4,
  ALLOW_NEG_EIGVAL = 8,
  STATE_V_FIRST = 16,
  INPLACE = 32,   // kda_decode
  PORTABLE = 64,  // kda_prefill: by the portable kernel, where a faster one exists
};

constexpr int64_t kAttentionFlags =
    USE_GATE_IN_KERNEL | USE_QK_L2NORM_IN_KERNEL | USE_BETA_SIGMOID_IN_KERNEL | ALLOW_NEG_EIGVAL | STATE_V_FIRST;

}  // namespace kda
