// The arguments that the attention operators have in common: their checks, and the parameters made of them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "checks.h"
#include "flags.h"
#include "params.h"
#include "tensor.h"

namespace kda {

// N is B, or the number of sequences in cu_seqlens.
struct Sizes {
  int64_t B, T, H, HV, N;
};

struct AttentionArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& g;
  const Tensor& beta;
  const std::optional<Tensor>& A_log;
  const std::optional<Tensor>& dt_bias;
  const std::optional<Tensor>& cu_seqlens;
  const Tensor& out;
  double scale;
  std::optional<double> lower_bound;
  int64_t flags;

  bool has(Flag flag) const { return (flags & flag) != 0; }
};

// The arguments of the operators behind the calls that Python's users make. These operators also take what the kernels
// can't read as it lies, and put a copy in its place: rows of q, k, v and g that are not contiguous, A_log, dt_bias and
// cu_seqlens that are not, A_log and dt_bias in another dtype.
struct Call {
  // `out` of None becomes a new tensor as v, contiguous.
  Call(Tensor& q, Tensor& k, Tensor& v, Tensor& g, const Tensor& beta, std::optional<Tensor>& A_log,
       std::optional<Tensor>& dt_bias, int64_t flags, std::optional<double> lower_bound, std::optional<double> scale,
       std::optional<Tensor>& cu_seqlens, std::optional<Tensor>& out);

  bool makes_out;
  AttentionArguments arguments;  // which refer to those above
};

// Of a start that only has to be read: contiguous, in float32 where it is in bfloat16.
void make_dense_state(std::optional<Tensor>& initial_state);

using Results = std::tuple<Result, Result>;  // o and the final state

// [N, HV, 128, 128] in float32.
Tensor new_final_state(const Sizes& sizes, const Tensor& v);

// `extra_flags`: those that the operator has besides kAttentionFlags.
Sizes check_attention(const AttentionArguments& x, int64_t extra_flags = 0);

// Of checked arguments.
AttentionParams attention_params(const AttentionArguments& x, const Sizes& sizes);

// [B, T, heads, D] or, without the last dimension, [B, T, heads].
inline TokenTensor token_tensor(const Tensor& x) {
  return {.data = x.data_ptr(),
          .batch_stride = x.stride(0),
          .token_stride = x.stride(1),
          .head_stride = x.stride(2)};
}

inline FloatKind float_kind(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? FloatKind::kFloat32 : FloatKind::kBFloat16;
}

inline void check_state_dtypes(const Tensor* initial_state, const Tensor* final_state) {
  STD_TORCH_CHECK(!initial_state || !final_state || initial_state->scalar_type() == final_state->scalar_type(),
                  "final_state: expected the dtype of initial_state, ", dtype_name(initial_state->scalar_type()),
                  ", got ", dtype_name(final_state->scalar_type()));
}

}  // namespace kda
