#include "decode_arguments.h"

#include <utility>

namespace kda {
namespace {

constexpr int64_t kHeadStateSize = kHeadDim * kHeadDim;
constexpr int64_t kStateAlignment = 16;  // bytes; of the GPU kernel's loads and stores

// [slots, HV, V, K] or [slots, HV, K, V] whose slots are contiguous, at any distance.
void check_pool(const Tensor& x, const char* name, const char* rows, bool v_first, int64_t slots, int64_t heads,
                int32_t device) {
  check_device(x, name, device);
  check_dtype(x, name, {ScalarType::Float, ScalarType::BFloat16});
  const std::string meaning = "[" + std::string(rows) + (v_first ? ", HV, V, K]" : ", HV, K, V]");
  check_shape(x, name, meaning.c_str(), {slots, heads, kHeadDim, kHeadDim});
  STD_TORCH_CHECK(x.stride(3) == 1 && x.stride(2) == kHeadDim && (heads == 1 || x.stride(1) == kHeadStateSize), name,
                  ": expected contiguous slots (any stride in the first dimension), got strides ",
                  bracketed(x.strides()));
  if constexpr (kServesCpu) return;
  const int64_t size = x.element_size();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % kStateAlignment == 0 &&
                      (slots <= 1 || x.stride(0) * size % kStateAlignment == 0),
                  name, ": expected slots that start at multiples of ", kStateAlignment, " bytes, got storage at ",
                  reinterpret_cast<uintptr_t>(x.data_ptr()) % kStateAlignment, " past one, strides ",
                  bracketed(x.strides()));
}

// A pool that is written must not name one element twice.
void check_slots_apart(const Tensor& x, const char* name, int64_t heads) {
  STD_TORCH_CHECK(x.size(0) <= 1 || x.stride(0) >= heads * kHeadStateSize, name,
                  ": expected slots that do not overlap, got strides ", bracketed(x.strides()));
}

void check_indices(const Tensor& x, const char* name, int32_t device) {
  check_device(x, name, device);
  check_dtype(x, name, {ScalarType::Int, ScalarType::Long});
}

StatePool state_pool(const Tensor* x, bool v_first) {
  if (!x) return {.data = nullptr, .num_slots = 0, .slot_stride = 0, .dtype = FloatKind::kFloat32, .v_first = v_first};
  return {.data = x->data_ptr(),
          .num_slots = x->size(0),
          .slot_stride = x->stride(0),
          .dtype = float_kind(*x),
          .v_first = v_first};
}

IndexTensor index_tensor(const Tensor* x) {
  if (!x) return {.data = nullptr, .row_stride = 0, .column_stride = 0, .is_int64 = false};
  return {.data = x->data_ptr(),
          .row_stride = x->stride(0),
          .column_stride = x->dim() == 2 ? x->stride(1) : 0,
          .is_int64 = x->scalar_type() == ScalarType::Long};
}

void check_state_indices(const StateArguments& x, int64_t N, int32_t device) {
  if (!x.state_indices) {
    STD_TORCH_CHECK(!x.num_accepted_tokens,
                    "num_accepted_tokens: expected None without state_indices [N, T_max], got a tensor");
    return;
  }
  const Tensor& indices = *x.state_indices;
  check_indices(indices, "state_indices", device);
  const int64_t dim = indices.dim();
  STD_TORCH_CHECK((dim == 1 || dim == 2) && indices.size(0) == N && (dim == 1 || indices.size(1) > 0),
                  "state_indices: expected shape [N] or [N, T_max] with N = ", N, ", got ", bracketed(indices.sizes()));
  STD_TORCH_CHECK(x.initial_state, x.name, ": expected a pool of states with state_indices, got None");
  STD_TORCH_CHECK(dim == 1 || x.inplace,
                  "inplace: expected true with state_indices [N, T_max], whose slots receive the states, got false");
  if (!x.num_accepted_tokens) return;
  STD_TORCH_CHECK(dim == 2, "num_accepted_tokens: expected None without state_indices [N, T_max], got a tensor");
  check_indices(*x.num_accepted_tokens, "num_accepted_tokens", device);
  check_shape(*x.num_accepted_tokens, "num_accepted_tokens", "[N]", {N});
}

void check_states(const StateArguments& x, const Sizes& sizes, int32_t device) {
  check_state_indices(x, sizes.N, device);
  if (x.initial_state) {
    const bool pool = x.state_indices != nullptr;
    check_pool(*x.initial_state, x.name, pool ? "slots" : "N", x.state_v_first,
               pool && x.initial_state->dim() > 0 ? x.initial_state->size(0) : sizes.N, sizes.HV, device);
    if (x.inplace) check_slots_apart(*x.initial_state, x.name, sizes.HV);
  }
  STD_TORCH_CHECK(!x.inplace || x.initial_state, x.name, ": expected a tensor to be updated in place, got None");
  STD_TORCH_CHECK(!x.inplace || !x.final_state, "final_state: expected None with an update in place, got a tensor");
  if (x.final_state) {
    check_pool(*x.final_state, "final_state", "N", x.state_v_first, sizes.N, sizes.HV, device);
    check_slots_apart(*x.final_state, "final_state", sizes.HV);
  }
  check_state_dtypes(x.initial_state, x.final_state);
}

// What is written must lie apart from what is read: other threads may not have read it yet.
void check_memory_apart(const AttentionArguments& x, const StateArguments& states) {
  for (const auto& [input, name] : {std::pair<const Tensor&, const char*>{x.q, "q"}, {x.k, "k"}, {x.v, "v"},
                                    {x.g, "g"}, {x.beta, "beta"}}) {
    check_apart(x.out, "out", input, name);
  }
  if (!states.initial_state) return;
  check_apart(x.out, "out", *states.initial_state, states.name);
  if (states.final_state) check_apart(*states.final_state, "final_state", *states.initial_state, states.name);
}

}  // namespace

void check_decode(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes) {
  check_states(states, sizes, x.q.get_device_index());
  check_memory_apart(x, states);
}

DecodeParams decode_params(const AttentionArguments& x, const StateArguments& states, const Sizes& sizes) {
  DecodeParams params{attention_params(x, sizes)};
  params.initial_state = state_pool(states.initial_state, states.state_v_first);
  params.final_state = state_pool(states.final_state, states.state_v_first);
  params.state_indices = index_tensor(states.state_indices);
  params.num_accepted_tokens = index_tensor(states.num_accepted_tokens);
  const bool per_token = states.state_indices && states.state_indices->dim() == 2;
  params.slots_per_sequence = per_token ? states.state_indices->size(1) : 0;
  params.inplace = states.inplace;
  return params;
}

}  // namespace kda
