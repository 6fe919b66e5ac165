// What the decode operators ask of their states, and the parameters made of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"
#include "params.h"

namespace kda {

struct StateArguments {
  const char* name;  // of initial_state, in messages
  const std::optional<Tensor>& initial_state;
  const std::optional<Tensor>& state_indices;
  const std::optional<Tensor>& num_accepted_tokens;
  const std::optional<Tensor>& final_state;
  bool state_v_first;
  bool inplace;
};

// After check_attention().
void check_decode(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes);

// Of checked arguments.
DecodeParams decode_params(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes);

}  // namespace kda
