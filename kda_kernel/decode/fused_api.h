#pragma once

#include <optional>

#include "tensor.h"

// One decode step of a layer between its projections: short convolution of q, k and v, recurrence, gated RMSNorm; both
// states are updated in place. Bad arguments raise before anything is launched or written.
void kda_fused_decode(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                      const kda::Tensor& beta, const kda::Tensor& gate, const std::optional<kda::Tensor>& A_log,
                      const std::optional<kda::Tensor>& dt_bias, kda::Tensor& conv_state, kda::Tensor& recurrent_state,
                      const kda::Tensor& conv_weight, const std::optional<kda::Tensor>& conv_bias,
                      const kda::Tensor& norm_weight, kda::Tensor& out, double scale, double norm_eps,
                      std::optional<double> lower_bound, int64_t flags, const std::optional<kda::Tensor>& state_indices,
                      const std::optional<kda::Tensor>& num_accepted_tokens,
                      const std::optional<kda::Tensor>& cu_seqlens);
