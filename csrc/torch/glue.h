// Helpers for the glue of every op, on the libtorch stable ABI: dtypes, checks, allocation, optional tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"

namespace mmk::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
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

inline DType dtype_of(const Tensor& tensor, const char* name) {
  return dtype_of(tensor.scalar_type(), name);
}

// The type of weights, statistics and sums for elements of `dtype`.
inline ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The type of all parameters of a call, that of `parameter`: x's type or its accumulation type.
inline ScalarType parameter_type(const Tensor& parameter, const Tensor& x, const char* name) {
  const ScalarType type = parameter.scalar_type();
  STD_TORCH_CHECK(type == x.scalar_type() || type == accumulate_type(dtype_of(x, "x")), name,
                  ": expected the dtype of x, or its accumulation type");
  return type;
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline OptionalTensor as_type(const OptionalTensor& tensor, ScalarType type) {
  if (!tensor.has_value()) return std::nullopt;
  return as_type(*tensor, type);
}

// The device to allocate on. A call that makes many tensors queries it once.
struct Place {
  int32_t device_type = 0, device_index = 0;

  explicit Place(const Tensor& like) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  }
  bool operator==(const Place&) const = default;
};

// A contiguous tensor. The C shim allocates without the dispatcher, unlike torch::stable::new_empty, which
// takes longer than a small kernel.
inline Tensor new_empty(const Place& place, const int64_t* sizes, size_t dimensions, ScalarType dtype) {
  constexpr size_t kMostDimensions = 64;
  STD_TORCH_CHECK(dimensions <= kMostDimensions, "new_empty: too many dimensions");
  int64_t strides[kMostDimensions];
  int64_t stride = 1;
  for (size_t d = dimensions; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides,
                                                  to<int32_t>(from(dtype)), place.device_type,
                                                  place.device_index, &handle));
  return Tensor(handle);
}

// On the device of `like`.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_empty(Place(like), sizes.begin(), sizes.size(), dtype);
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

// torch 2.11 has no == of the lists that sizes() returns.
inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  return std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin(), sizes_b.end());
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
  // torch::stable::contiguous always goes through the dispatcher, which costs as much as a small kernel.
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
                              ScalarType dtype, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(*tensor, sizes, dtype, like, name);
}

// The stride of a dimension, 0 where it has at most one element: torch leaves that stride arbitrary and no
// address uses it, but it would fail the check of the rows' alignment.
inline int64_t stride_of(const Tensor& tensor, int64_t dimension) {
  return tensor.size(dimension) > 1 ? tensor.stride(dimension) : 0;
}

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline void* mutable_or_null(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

inline Activation activation_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(Activation::kSilu),
                  "activation: expected 0 to ", static_cast<int64_t>(Activation::kSilu), ", got ", value);
  return static_cast<Activation>(value);
}

}  // namespace mmk::glue
