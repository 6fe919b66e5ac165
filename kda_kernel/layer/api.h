// The operators around the delta rule, on tensors; the schemas with the shapes stand in torch-ext/torch_binding.cpp.
// Bad arguments raise before anything is launched or written.
#pragma once

#include <optional>

#include "tensor.h"

// Causal depthwise convolution and SiLU of q|k|v, written into q_out, k_out, v_out and final_state.
void kda_short_conv(const kda::Tensor& q, const kda::Tensor& k, const kda::Tensor& v, const kda::Tensor& weight,
                    const std::optional<kda::Tensor>& bias, const std::optional<kda::Tensor>& initial_state,
                    const std::optional<kda::Tensor>& cu_seqlens, kda::Tensor& q_out, kda::Tensor& k_out,
                    kda::Tensor& v_out, std::optional<kda::Tensor>& final_state);

// RMS norm of every head, times the sigmoid (or SiLU) of a gate, written into out.
void gated_rms_norm(const kda::Tensor& x, const kda::Tensor& gate, const kda::Tensor& weight, kda::Tensor& out,
                    double eps, bool silu);
