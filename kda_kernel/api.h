// The operators on tensors: they check, fill the kernels' parameter structs and launch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

// Kimi Delta Attention over whole sequences, written into `out` and the states; the schema with the shapes stands
// in torch-ext/torch_binding.cpp. Bad arguments raise before anything is launched or written.
void kda_prefill(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                 const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
                 const std::optional<torch::stable::Tensor>& A_log,
                 const std::optional<torch::stable::Tensor>& dt_bias,
                 const std::optional<torch::stable::Tensor>& initial_state,
                 const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out,
                 std::optional<torch::stable::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                 bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel,
                 bool allow_neg_eigval, bool state_v_first, bool portable,
                 std::optional<torch::stable::Tensor>& intermediate_states);

// The same for one or a few tokens of each sequence, with its state in place, in a pool's slots or in `final_state`.
void kda_decode(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
                const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
                std::optional<torch::stable::Tensor>& initial_state,
                const std::optional<torch::stable::Tensor>& state_indices,
                const std::optional<torch::stable::Tensor>& num_accepted_tokens,
                const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out,
                std::optional<torch::stable::Tensor>& final_state, double scale, std::optional<double> lower_bound,
                bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel,
                bool allow_neg_eigval, bool state_v_first, bool inplace);
