// Checks and views that the CPU and the CUDA glue of adapter share. The schema is in
// mmkernels/ops/adapter/schema.py.
#pragma once

#include "mmkernels/adapter.h"
#include "torch/glue.h"

namespace mmk::glue {

// A tensor (rows, width) with a dense last dimension: the tensor itself, or a copy.
inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline AdapterRows rows_of(const Tensor& tensor) {
  return {tensor.numel() == 0 ? nullptr : tensor.const_data_ptr(), stride_of(tensor, 0)};
}

inline AdapterRows rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? rows_of(*tensor) : AdapterRows{nullptr, 0};
}

// The inputs of a call, kept alive for its duration. Parameters are contiguous and have one type, the
// accumulation type of x or that of x. The backward pass has no up_bias.
struct AdapterInputs {
  Tensor x, down_weight, up_weight;
  OptionalTensor down_bias, up_bias, norm_weight, norm_bias;
  AdapterShape shape;

  AdapterInputs(const Tensor& given_x, const Tensor& given_down_weight, const OptionalTensor& given_down_bias,
                const Tensor& given_up_weight, const OptionalTensor& given_up_bias,
                const OptionalTensor& given_norm_weight, const OptionalTensor& given_norm_bias) {
    STD_TORCH_CHECK(given_x.dim() == 2, "x: expected (rows, width), got ", given_x.dim(), " dimensions");
    STD_TORCH_CHECK(given_down_weight.dim() == 2, "down_weight: expected (bottleneck, width), got ",
                    given_down_weight.dim(), " dimensions");
    shape = {given_x.size(0), given_x.size(1), given_down_weight.size(0)};
    const auto [rows, width, bottleneck] = shape;
    const ScalarType type = glue::parameter_type(given_down_weight, given_x, "down_weight");
    x = dense_rows(given_x);
    down_weight = checked(given_down_weight, {bottleneck, width}, type, x, "down_weight");
    down_bias = checked(given_down_bias, {bottleneck}, type, x, "down_bias");
    up_weight = checked(given_up_weight, {width, bottleneck}, type, x, "up_weight");
    up_bias = checked(given_up_bias, {width}, type, x, "up_bias");
    norm_weight = checked(given_norm_weight, {width}, type, x, "norm_weight");
    norm_bias = checked(given_norm_bias, {width}, type, x, "norm_bias");
    STD_TORCH_CHECK(norm_weight.has_value() || !norm_bias.has_value(), "norm_bias: needs norm_weight");
  }

  bool norm() const { return norm_weight.has_value(); }
  DType dtype() const { return dtype_of(x, "x"); }
  ScalarType accumulate() const { return accumulate_type(dtype()); }
  ScalarType parameter_type() const { return down_weight.scalar_type(); }

  // The tensor that the adapter adds to: x, another tensor of x's type or of the accumulation type, or none.
  OptionalTensor residual(const OptionalTensor& given, bool add_input) const {
    STD_TORCH_CHECK(!add_input || !given.has_value(), "residual: expected None where x is the residual");
    if (add_input) return x;
    if (!given.has_value()) return std::nullopt;
    const ScalarType type = given->scalar_type();
    STD_TORCH_CHECK(type == x.scalar_type() || type == accumulate(),
                    "residual: expected the dtype of x, or its accumulation type");
    return checked_rows(*given, type, "residual");
  }

  Tensor grad(const Tensor& given) const { return checked_rows(given, x.scalar_type(), "grad"); }

  Tensor hidden(const Tensor& given) const {
    return checked(given, {shape.rows, shape.bottleneck}, x.scalar_type(), x, "hidden");
  }

  // Mean and 1 / standard deviation of each row; nothing without norm.
  OptionalTensor stats(const Tensor& given) const {
    if (!norm()) return std::nullopt;
    return checked(given, {shape.rows, 2}, accumulate(), x, "stats");
  }

 private:
  Tensor checked_rows(const Tensor& tensor, ScalarType type, const char* name) const {
    check_shape(tensor, {shape.rows, shape.width}, name);
    check_same_device(tensor, x, name);
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
    return dense_rows(tensor);
  }
};

}  // namespace mmk::glue
