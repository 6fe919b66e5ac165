#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

// One decode step of a layer between its projections: short convolution of q, k and v, recurrence, gated RMSNorm; both
// states are updated in place. Bad arguments raise before anything is launched or written.
void kda_fused_decode(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                      const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
                      const torch::stable::Tensor& gate, const std::optional<torch::stable::Tensor>& A_log,
                      const std::optional<torch::stable::Tensor>& dt_bias, torch::stable::Tensor& conv_state,
                      torch::stable::Tensor& recurrent_state, const torch::stable::Tensor& conv_weight,
                      const std::optional<torch::stable::Tensor>& conv_bias, const torch::stable::Tensor& norm_weight,
                      const std::optional<torch::stable::Tensor>& state_indices,
                      const std::optional<torch::stable::Tensor>& num_accepted_tokens,
                      const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out, double scale,
                      double norm_eps, std::optional<double> lower_bound, bool use_gate_in_kernel,
                      bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
                      bool state_v_first);
