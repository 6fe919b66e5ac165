// Where packed sequences begin and end, on a CPU.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "params.h"

namespace kda::cpu {

// All N + 1 boundaries; raises where they do not go from 0 to T without a decrease.
inline std::vector<int64_t> sequence_bounds(const SequenceBounds& cu_seqlens, int64_t num_sequences,
                                            int64_t num_tokens) {
  std::vector<int64_t> bounds(num_sequences + 1);
  for (int64_t n = 0; n <= num_sequences; ++n) {
    bounds[n] = cu_seqlens.is_int64 ? static_cast<const int64_t*>(cu_seqlens.data)[n]
                                    : static_cast<const int32_t*>(cu_seqlens.data)[n];
  }
  STD_TORCH_CHECK(bounds[0] == 0, "cu_seqlens: expected to start at 0, got ", bounds[0]);
  for (int64_t n = 0; n < num_sequences; ++n) {
    STD_TORCH_CHECK(bounds[n] <= bounds[n + 1], "cu_seqlens: expected no decrease, got ", bounds[n], " then ",
                    bounds[n + 1], " at entries ", n, " and ", n + 1);
  }
  STD_TORCH_CHECK(bounds.back() == num_tokens, "cu_seqlens: expected to end at T = ", num_tokens, ", got ",
                  bounds.back());
  return bounds;
}

}  // namespace kda::cpu
