#include "torch/layer_project.h"

#include <algorithm>

#include "torch/blas.h"

namespace mmk::glue {
namespace {

Tensor widened(const Tensor& tensor, ScalarType wide) {
  return tensor.scalar_type() == wide ? tensor : torch::stable::to(tensor, wide);
}

// A thread is worth its start for about 32,000 elements.
int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

// The folded parameters, and the dtype that the kernels and products run in: half precision is widened.
struct Folded {
  ScalarType type;
  DType dtype;
  Tensor weight, bias;
};

Folded fold(const LayerProjectInputs& inputs) {
  const auto [rows, taps, in, out] = inputs.shape;
  (void)rows;
  const DType given = dtype_of(inputs.x, "x");
  Folded folded;
  folded.type = accumulate_type(given);
  folded.dtype = given == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  folded.weight = inputs.norm() ? new_empty(inputs.x, {taps, out, in}, folded.type) : inputs.weight;
  folded.bias = new_empty(inputs.x, {taps, out}, folded.type);
  const LayerProjectFold args = {inputs.shape,
                                 inputs.weight.const_data_ptr(),
                                 data_or_null(inputs.bias),
                                 data_or_null(inputs.norm_weight),
                                 data_or_null(inputs.norm_bias),
                                 inputs.norm() ? folded.weight.mutable_data_ptr() : nullptr,
                                 folded.bias.mutable_data_ptr()};
  torch::stable::parallel_for(0, taps * out, grain(in), [&](int64_t begin, int64_t end) {
    cpu::layer_project_fold(folded.dtype, args, begin, end);
  });
  return folded;
}

// Rows that forward works on at once: a tap's input is still in the last-level cache when the product reads it again.
constexpr int64_t kBlock = 4096;

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given_x, const Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps,
                                           int64_t activation_index, bool save) {
  LayerProjectInputs inputs(given_x, weight, bias, norm_weight, norm_bias);
  const Activation activation = activation_of(activation_index);
  const Folded folded = fold(inputs);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor x = widened(inputs.x, folded.type);
  const bool save_value = save && needs_preactivation(activation);
  const Tensor y = new_empty(x, {rows, taps, out}, folded.type);
  const Tensor value = new_empty(x, {save_value ? rows : 0, taps, out}, folded.type);
  const Tensor stats = new_empty(x, {inputs.norm() ? rows : 0, taps, 2}, folded.type);

  const LayerProjectStats stats_args = {inputs.shape, view_of(x), eps, mutable_or_null(stats)};
  const LayerProjectActivate activate_args = {inputs.shape,
                                              activation,
                                              mutable_or_null(stats),
                                              folded.bias.const_data_ptr(),
                                              y.mutable_data_ptr(),
                                              mutable_or_null(value)};
  for (int64_t start = 0; start < rows; start += kBlock) {
    const int64_t count = std::min(kBlock, rows - start);
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (inputs.norm()) {
        torch::stable::parallel_for(start, start + count, grain(in), [&](int64_t begin, int64_t end) {
          cpu::layer_project_stats(folded.dtype, stats_args, tap, begin, end);
        });
      }
      mm_out(tap_rows(y, tap, start, count), tap_rows(x, tap, start, count),
             transposed(torch::stable::select(folded.weight, 0, tap)));
      torch::stable::parallel_for(start, start + count, grain(out), [&](int64_t begin, int64_t end) {
        cpu::layer_project_activate(folded.dtype, activate_args, tap, begin, end);
      });
    }
  }
  const ScalarType type = given_x.scalar_type();
  const bool save_stats = save && inputs.norm();
  return {widened(y, type), widened(value, type),
          save_stats ? stats : new_empty(x, {0, taps, 2}, folded.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& given_grad, const Tensor& given_x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& given_value,
    const Tensor& given_stats, int64_t activation_index, bool need_x, bool need_weight, bool need_norm) {
  LayerProjectInputs inputs(given_x, weight, bias, norm_weight, norm_bias);
  const Activation activation = activation_of(activation_index);
  const Folded folded = fold(inputs);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor x = widened(inputs.x, folded.type);
  const ScalarType type = given_x.scalar_type();
  const Tensor grad = widened(checked(given_grad, {rows, taps, out}, type, given_x, "grad"), folded.type);
  const Tensor value = widened(checked(given_value, {rows, taps, out}, type, given_x, "value"), folded.type);
  OptionalTensor stats;
  if (inputs.norm()) stats = checked(given_stats, {rows, taps, 2}, folded.type, given_x, "stats");

  // The gain's gradient comes out of the product's, so the product is needed for either.
  const bool need_product = need_weight || (need_norm && inputs.norm());
  const bool pull_rows = need_x && inputs.norm();
  const int64_t chunks = layer_project_chunks(rows);
  const Tensor dx = new_empty(x, {need_x ? rows : 0, taps, in}, folded.type);
  const Tensor d_weight = new_empty(x, {need_product ? taps : 0, out, in}, folded.type);
  const Tensor d_bias = new_empty(x, {taps, out}, folded.type);
  const Tensor d_norm_weight = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor d_norm_bias = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor partial_bias = new_empty(x, {chunks, taps, out}, folded.type);
  // One tap's worth, written again for each.
  const Tensor scaled = new_empty(x, {rows, out}, folded.type);
  const Tensor pull = new_empty(x, {pull_rows ? rows : 0, taps}, folded.type);
  const void* stats_data = data_or_null(stats);
  const LayerProjectGradient gradient_args = {inputs.shape,
                                              activation,
                                              grad.const_data_ptr(),
                                              value.const_data_ptr(),
                                              stats_data,
                                              folded.bias.const_data_ptr(),
                                              scaled.mutable_data_ptr(),
                                              mutable_or_null(pull),
                                              partial_bias.mutable_data_ptr()};
  const LayerProjectInputGradient input_args = {inputs.shape, view_of(x), stats_data, mutable_or_null(pull),
                                                mutable_or_null(dx)};
  for (int64_t tap = 0; tap < taps; ++tap) {
    torch::stable::parallel_for(0, chunks, grain(kLayerProjectChunk * out), [&](int64_t begin, int64_t end) {
      cpu::layer_project_gradient(folded.dtype, gradient_args, tap, begin, end);
    });
    if (need_product) {
      mm_out(torch::stable::select(d_weight, 0, tap), transposed(scaled), torch::stable::select(x, 1, tap));
    }
    if (!need_x) continue;
    mm_out(torch::stable::select(dx, 1, tap), scaled, torch::stable::select(folded.weight, 0, tap));
    if (!pull_rows) continue;
    torch::stable::parallel_for(0, rows, grain(in), [&](int64_t begin, int64_t end) {
      cpu::layer_project_input_gradient(folded.dtype, input_args, tap, begin, end);
    });
  }

  const LayerProjectUnfold args = {inputs.shape,
                                   chunks,
                                   partial_bias.const_data_ptr(),
                                   inputs.weight.const_data_ptr(),
                                   data_or_null(inputs.norm_weight),
                                   data_or_null(inputs.norm_bias),
                                   mutable_or_null(d_weight),
                                   d_bias.mutable_data_ptr(),
                                   mutable_or_null(d_norm_weight),
                                   mutable_or_null(d_norm_bias)};
  torch::stable::parallel_for(0, taps, 1, [&](int64_t begin, int64_t end) {
    cpu::layer_project_unfold(folded.dtype, args, begin, end);
  });
  return {widened(dx, type), d_weight, d_bias, d_norm_weight, d_norm_bias};
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("layer_project_fwd", TORCH_BOX(&forward));
  m.impl("layer_project_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
