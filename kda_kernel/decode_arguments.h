// What the decode operators ask of their states, and the parameters made of them.
#pragma once

#include "arguments.h"
#include "params.h"
#include "tensor.h"

namespace kda {

struct StateArguments {
  const char* name;  // of initial_state, in messages
  const Tensor* initial_state;
  const Tensor* state_indices;
  const Tensor* num_accepted_tokens;
  const Tensor* final_state;
  bool state_v_first;
  bool inplace;
};

// After check_attention().
void check_decode(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes);

// Of checked arguments.
DecodeParams decode_params(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes);

}  // namespace kda
