// The operators on tensors: they check, fill the kernels' parameter structs and launch.
#pragma once

#include <optional>

#include "arguments.h"
#include "tensor.h"

// Kimi Delta Attention over whole sequences, written into `out` and the states; the schema with the shapes stands
// in torch-ext/torch_binding.cpp. Bad arguments raise before anything is launched or written.
void kda_prefill(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& g,
                 const kda::Tensor& beta, const std::optional<kda::Tensor>& A_log,
                 const std::optional<kda::Tensor>& dt_bias, const std::optional<kda::Tensor>& initial_state,
                 const std::optional<kda::Tensor>& cu_seqlens, kda::Tensor& out,
                 std::optional<kda::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                 int64_t flags, std::optional<kda::Tensor>& intermediate_states);

// The same with results that it allocates. A scale of None is 128 ** -0.5.
kda::Results kda_prefill_new(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                             std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                             std::optional<kda::Tensor>& initial_state, int64_t flags,
                             std::optional<double> lower_bound, std::optional<double> scale,
                             std::optional<kda::Tensor>& cu_seqlens);

// The same for one or a few tokens of each sequence, with its state in place, in a pool's slots or in `final_state`.
// Returns o where no `out` is given.
kda::Result kda_decode(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                       std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                       std::optional<kda::Tensor>& initial_state, int64_t flags, std::optional<double> lower_bound,
                       std::optional<kda::Tensor>& out, const std::optional<kda::Tensor>& state_indices,
                       std::optional<double> scale, const std::optional<kda::Tensor>& num_accepted_tokens,
                       std::optional<kda::Tensor>& cu_seqlens, std::optional<kda::Tensor>& final_state);
kda::Results kda_decode_new(kda::Tensor& q, kda::Tensor& k, kda::Tensor& v, kda::Tensor& g, const kda::Tensor& beta,
                            std::optional<kda::Tensor>& A_log, std::optional<kda::Tensor>& dt_bias,
                            std::optional<kda::Tensor>& initial_state, int64_t flags,
                            std::optional<double> lower_bound, std::optional<double> scale,
                            std::optional<kda::Tensor>& cu_seqlens);
