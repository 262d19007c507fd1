// What the glue of every op needs from the libtorch stable ABI: dtypes, checks, allocation, optional tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "mmkernels/dtype.h"

namespace mmk::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
}

// Type of weights, statistics and sums that go with elements of this type.
inline ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Through the C shim: torch::stable::new_empty boxes its arguments first, which takes longer than allocating.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int32_t type = to<int32_t>(from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                   static_cast<int64_t>(sizes.size()), &type, nullptr,
                                                   nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
                  " dimensions, got ", tensor.dim());
  int64_t d = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(d) == size, name, ": expected size ", size, " in dimension ", d, ", got ",
                    tensor.size(d));
    ++d;
  }
}

inline void check_same_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of the other tensors");
}

// A contiguous tensor of the given shape, type and device, or an error that names it.
inline Tensor checked(const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype,
                      const Tensor& like, const char* name) {
  check_shape(tensor, sizes, name);
  check_same_device(tensor, like, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": unexpected dtype");
  // A copy or not, torch::stable::contiguous goes through the dispatcher, which costs as much as a small
  // kernel.
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
                              ScalarType dtype, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(*tensor, sizes, dtype, like, name);
}

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mmk::glue
