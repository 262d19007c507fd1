// Checks and views that the CPU and the CUDA glue of layer_project share. The schema is in
// mmkernels/ops/layer_project/schema.py.
#pragma once

#include <tuple>

#include "mmkernels/layer_project.h"
#include "torch/glue.h"

namespace mmk::glue {

// The inputs of a call, kept alive for its duration. Parameters are contiguous and have one type, the
// accumulation type of x or that of x.
struct LayerProjectInputs {
  Tensor x, weight;
  OptionalTensor bias, norm_weight, norm_bias;
  NormProductShape shape;

  LayerProjectInputs(const Tensor& given_x, const Tensor& given_weight, const OptionalTensor& given_bias,
                     const OptionalTensor& given_norm_weight, const OptionalTensor& given_norm_bias) {
    STD_TORCH_CHECK(given_x.dim() == 3, "x: expected (N, L, C), got ", given_x.dim(), " dimensions");
    STD_TORCH_CHECK(given_weight.dim() == 3, "weight: expected (L, C_out, C), got ", given_weight.dim(),
                    " dimensions");
    shape = {given_x.size(0), given_x.size(1), given_x.size(2), given_weight.size(1)};
    const ScalarType type = glue::parameter_type(given_weight, given_x, "weight");
    const int64_t taps = shape.taps, inputs = shape.inputs, outputs = shape.outputs;
    x = given_x.stride(2) == 1 || inputs <= 1 ? given_x : torch::stable::contiguous(given_x);
    weight = checked(given_weight, {taps, outputs, inputs}, type, x, "weight");
    bias = checked(given_bias, {taps, outputs}, type, x, "bias");
    norm_weight = checked(given_norm_weight, {taps, inputs}, type, x, "norm_weight");
    norm_bias = checked(given_norm_bias, {taps, inputs}, type, x, "norm_bias");
    STD_TORCH_CHECK(norm_weight.has_value() || !norm_bias.has_value(), "norm_bias: needs norm_weight");
  }

  bool norm() const { return norm_weight.has_value(); }
  ScalarType accumulate() const { return accumulate_type(dtype_of(x, "x")); }
  ScalarType parameter_type() const { return weight.scalar_type(); }
};

inline NormProductInput view_of(const Tensor& x) {
  return {x.const_data_ptr(), stride_of(x, 0), stride_of(x, 1)};
}

}  // namespace mmk::glue
