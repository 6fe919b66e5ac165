// A tensor argument of an operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>

namespace kda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

// A tensor on its way to the dispatcher, as an operator's result.
struct Result {
  AtenTensorHandle handle;
};

// What torch::stable::Tensor tells about a tensor, under the same names. Checks ask for it again and again, and there
// each question is a call into torch; here all is read once. The dispatcher hands over a handle, which this owns.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined_));
    if (!defined_) return;  // None in the place of a tensor
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
  }

  // An uninitialised contiguous tensor on the device of `like`.
  static Tensor empty(const std::array<int64_t, 4>& sizes, int32_t dtype, const Tensor& like) {
    std::array<int64_t, 4> strides{1, 1, 1, 1};
    for (int dim = 2; dim >= 0; --dim) strides[dim] = strides[dim + 1] * std::max<int64_t>(sizes[dim + 1], 1);
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                    like.device_type_, like.device_index_, &handle));
    return Tensor(handle);
  }

  // In the place of a result: None in Python.
  static Result undefined() {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
    return {handle};
  }

  bool defined() const { return defined_; }
  AtenTensorHandle get() const { return handle_.get(); }
  Result release() { return {handle_.release()}; }
  void* data_ptr() const { return data_; }
  int64_t dim() const { return dim_; }
  IntHeaderOnlyArrayRef sizes() const { return IntHeaderOnlyArrayRef(sizes_, dim_); }
  IntHeaderOnlyArrayRef strides() const { return IntHeaderOnlyArrayRef(strides_, dim_); }
  int64_t size(int64_t dim) const { return sizes_[dim]; }  // 0 <= dim < dim()
  int64_t stride(int64_t dim) const { return strides_[dim]; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  int32_t get_device_index() const { return device_index_; }
  int32_t dtype() const { return dtype_; }  // in torch's numbers
  int64_t element_size() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_)); }

  ScalarType scalar_type() const {
    // the usual ones first: torch's own conversion tries a dozen others before bfloat16
    if (dtype_ == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    if (dtype_ == aoti_torch_dtype_float32()) return ScalarType::Float;
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_));
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t dim = 0; dim < dim_; ++dim) product *= sizes_[dim];
    return product;
  }

  bool is_contiguous() const {
    bool dense = true;
    int64_t elements = 1;
    for (int64_t dim = dim_ - 1; dim >= 0; --dim) {
      dense &= sizes_[dim] == 1 || strides_[dim] == elements;
      elements *= sizes_[dim];
    }
    return dense || elements == 0;
  }

 private:
  struct Release {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  std::unique_ptr<AtenTensorOpaque, Release> handle_;
  bool defined_ = false;
  void* data_ = nullptr;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;  // of dim_ elements, torch's, as long as the handle is held
  int64_t* strides_ = nullptr;
  int32_t dtype_ = 0, device_type_ = -1, device_index_ = -1;
};

inline const Tensor* pointer(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }

}  // namespace kda

// So TORCH_BOX hands over kda::Tensor, alone and in std::optional.
template <>
struct torch::stable::detail::ToImpl<kda::Tensor> {
  static kda::Tensor call(StableIValue value, uint64_t, bool) { return kda::Tensor(to<AtenTensorHandle>(value)); }
};

template <>
struct torch::stable::detail::ToImpl<std::optional<kda::Tensor>> {
  static std::optional<kda::Tensor> call(StableIValue value, uint64_t, bool) {
    const auto handle = to<std::optional<AtenTensorHandle>>(value);
    return handle ? std::make_optional<kda::Tensor>(*handle) : std::nullopt;
  }
};

template <>
struct torch::stable::detail::FromImpl<kda::Result> {
  static StableIValue call(kda::Result result, uint64_t, bool) {
    return torch::stable::detail::from(result.handle);
  }
};
