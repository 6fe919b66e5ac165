// What every operator asks of its tensors. A message names the argument, what was expected and what came.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "backend.h"
#include "tensor.h"

namespace kda {

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
  const ScalarType got = x.scalar_type();
  if (std::find(allowed.begin(), allowed.end(), got) != allowed.end()) return;
  std::string expected;
  for (ScalarType dtype : allowed) expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  STD_TORCH_CHECK(false, name, ": expected dtype ", expected, ", got ", dtype_name(got));
}

inline void check_defined(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.defined(), name, ": expected a tensor, got None");
}

inline void check_shape(const Tensor& x, const char* name, const char* meaning, std::initializer_list<int64_t> expected) {
  check_defined(x, name);
  const auto sizes = x.sizes();
  const bool same = sizes.size() == expected.size() && std::equal(expected.begin(), expected.end(), sizes.begin());
  STD_TORCH_CHECK(same, name, ": expected shape ", meaning, " = ", bracketed(expected), ", got ", bracketed(sizes));
}

// `device` is the index of the argument called `as`.
inline void check_device(const Tensor& x, const char* name, int32_t device, const char* as = "q") {
  check_defined(x, name);
  if constexpr (kServesCpu) {
    STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor, got one on another device type");
    return;
  }
  STD_TORCH_CHECK(x.is_cuda(), name, ": expected a CUDA tensor, got one on another device type");
  STD_TORCH_CHECK(x.get_device_index() == device, name, ": expected device cuda:", device, " as ", as,
                  ", got cuda:", x.get_device_index());
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

// An output that shares no memory with an input. Looks at dense tensors alone: of two strided ones whose ranges overlap,
// as slices of one buffer do, it can't tell.
inline void check_apart(const Tensor& output, const char* name, const Tensor& input, const char* input_name) {
  const auto* begin = static_cast<const char*>(output.data_ptr());
  const auto* other = static_cast<const char*>(input.data_ptr());
  const auto bytes = [](const Tensor& x) { return x.numel() * x.element_size(); };
  const bool overlap = begin < other + bytes(input) && other < begin + bytes(output);
  STD_TORCH_CHECK(!overlap || !output.is_contiguous() || !input.is_contiguous(), name,
                  ": expected memory apart from that of ", input_name, ", got overlapping tensors");
}

// Does every row along the last dimension start at a multiple of 16 bytes?
inline bool rows_aligned(const Tensor& x) {
  const int64_t elements = 16 / x.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    aligned &= x.size(dim) <= 1 || x.stride(dim) % elements == 0;
  }
  return aligned;
}

// Boundaries of sequences packed along T tokens of B = 1 row; returns N. What they say is for the backend to check.
inline int64_t check_cu_seqlens(const Tensor& x, int64_t B, int64_t T, int32_t device) {
  check_device(x, "cu_seqlens", device);
  check_dtype(x, "cu_seqlens", {ScalarType::Int, ScalarType::Long});
  STD_TORCH_CHECK(x.dim() == 1 && x.numel() >= 1, "cu_seqlens: expected shape [N + 1], got ", bracketed(x.sizes()));
  check_contiguous(x, "cu_seqlens");
  STD_TORCH_CHECK(B == 1, "cu_seqlens: expected packed sequences with B = 1, got B = ", B);
  const int64_t N = x.numel() - 1;
  STD_TORCH_CHECK(N > 0 || T == 0, "cu_seqlens: expected at least one sequence for T = ", T, " tokens, got none");
  return N;
}

}  // namespace kda
