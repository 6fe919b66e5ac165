// The operators around the delta rule, on tensors; the schemas with the shapes stand in torch-ext/torch_binding.cpp.
// Bad arguments raise before anything is launched or written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

// Causal depthwise convolution and SiLU of q|k|v, written into q_out, k_out, v_out and final_state.
void kda_short_conv(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                    const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
                    const std::optional<torch::stable::Tensor>& initial_state,
                    const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& q_out,
                    torch::stable::Tensor& k_out, torch::stable::Tensor& v_out,
                    std::optional<torch::stable::Tensor>& final_state);

// RMS norm of every head, times the sigmoid (or SiLU) of a gate, written into out.
void gated_rms_norm(const torch::stable::Tensor& x, const torch::stable::Tensor& gate,
                    const torch::stable::Tensor& weight, torch::stable::Tensor& out, double eps, bool silu);
