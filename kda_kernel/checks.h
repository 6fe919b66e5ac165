// What every operator asks of its tensors. A message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "backend.h"

namespace kda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Values>
inline std::string bracketed(const Values& values) {
  std::string text = "[";
  for (auto value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline void check_dtype(const Tensor& x, const char* name, std::initializer_list<ScalarType> allowed) {
  std::string expected;
  for (ScalarType dtype : allowed) {
    if (x.scalar_type() == dtype) return;
    expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  STD_TORCH_CHECK(false, name, ": expected dtype ", expected, ", got ", dtype_name(x.scalar_type()));
}

inline void check_shape(const Tensor& x, const char* name, const char* meaning, std::initializer_list<int64_t> expected) {
  const auto sizes = x.sizes();
  const bool same = sizes.size() == expected.size() && std::equal(expected.begin(), expected.end(), sizes.begin());
  STD_TORCH_CHECK(same, name, ": expected shape ", meaning, " = ", bracketed(expected), ", got ", bracketed(sizes));
}

inline void check_device(const Tensor& x, const char* name, int32_t device) {
  if constexpr (kServesCpu) {
    STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor, got one on another device type");
    return;
  }
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected a CUDA tensor, got one on another device type");
  STD_TORCH_CHECK(x.get_device_index() == device, name, ": expected device cuda:", device, " as q, got cuda:",
                  static_cast<int>(x.get_device_index()));
}

inline void check_last_dim_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1, name,
                  ": expected a contiguous last dimension (stride 1), got strides ", bracketed(x.strides()));
}

inline void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor, got strides ", bracketed(x.strides()));
}

// An output must not name one element twice.
inline void check_no_overlap(const Tensor& x, const char* name) {
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    STD_TORCH_CHECK(x.size(dim) <= 1 || x.stride(dim) != 0, name,
                    ": expected an output without overlapping elements, got strides ", bracketed(x.strides()));
  }
}

// Does every row along the last dimension start at a multiple of 16 bytes?
inline bool rows_aligned(const Tensor& x) {
  const int64_t elements = 16 / static_cast<int64_t>(x.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    aligned &= x.size(dim) <= 1 || x.stride(dim) % elements == 0;
  }
  return aligned;
}

}  // namespace kda
