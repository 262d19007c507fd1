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

// Address of row `start` of a contiguous tensor whose rows hold `width` elements; null stays null.
void* from_row(const Tensor& tensor, int64_t start, int64_t width, int64_t bytes) {
  return tensor.numel() == 0 ? nullptr : static_cast<char*>(tensor.mutable_data_ptr()) + start * width * bytes;
}

template <class Body>
void for_each_block(int64_t rows, Body&& body) {
  for (int64_t start = 0; start < rows; start += kLayerProjectBlock) {
    body(start, std::min(kLayerProjectBlock, rows - start));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given_x, const Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps,
                                           int64_t activation_index, bool save) {
  LayerProjectInputs inputs(given_x, weight, bias, norm_weight, norm_bias);
  const Activation activation = activation_of(activation_index);
  const Folded folded = fold(inputs);
  const auto [rows, taps, in, out] = inputs.shape;
  const int64_t bytes = element_size(folded.dtype);
  const Tensor x = widened(inputs.x, folded.type);
  const bool save_value = save && needs_preactivation(activation);
  const Tensor y = new_empty(x, {rows, taps, out}, folded.type);
  const Tensor value = new_empty(x, {save_value ? rows : 0, taps, out}, folded.type);
  const Tensor stats = new_empty(x, {inputs.norm() ? rows : 0, taps, 2}, folded.type);

  for_each_block(rows, [&](int64_t start, int64_t count) {
    const LayerProjectShape block = {count, taps, in, out};
    const Tensor block_x = torch::stable::narrow(const_cast<Tensor&>(x), 0, start, count);
    void* block_stats = from_row(stats, start, taps * 2, bytes);
    if (block_stats != nullptr) {
      const LayerProjectStats args = {block, view_of(block_x), eps, block_stats};
      torch::stable::parallel_for(0, count * taps, grain(in), [&](int64_t begin, int64_t end) {
        cpu::layer_project_stats(folded.dtype, args, begin, end);
      });
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      mm_out(tap_rows(y, tap, start, count), tap_rows(x, tap, start, count),
             transposed(torch::stable::select(folded.weight, 0, tap)));
    }
    const LayerProjectActivate args = {block, activation, block_stats, folded.bias.const_data_ptr(),
                                       from_row(y, start, taps * out, bytes),
                                       from_row(value, start, taps * out, bytes)};
    torch::stable::parallel_for(0, count * taps, grain(out), [&](int64_t begin, int64_t end) {
      cpu::layer_project_activate(folded.dtype, args, begin, end);
    });
  });
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
  const int64_t bytes = element_size(folded.dtype);
  const Tensor x = widened(inputs.x, folded.type);
  const ScalarType type = given_x.scalar_type();
  const Tensor grad = widened(checked(given_grad, {rows, taps, out}, type, given_x, "grad"), folded.type);
  const Tensor value = widened(checked(given_value, {rows, taps, out}, type, given_x, "value"), folded.type);
  OptionalTensor stats;
  if (inputs.norm()) stats = checked(given_stats, {rows, taps, 2}, folded.type, given_x, "stats");

  // The gain's gradient comes out of the product's, so the product is needed for either.
  const bool need_product = need_weight || (need_norm && inputs.norm());
  const bool pull_rows = need_x && inputs.norm();
  const int64_t blocks = (rows + kLayerProjectBlock - 1) / kLayerProjectBlock;
  const Tensor dx = new_empty(x, {need_x ? rows : 0, taps, in}, folded.type);
  const Tensor d_weight = new_empty(x, {need_product ? taps : 0, out, in}, folded.type);
  const Tensor d_bias = new_empty(x, {taps, out}, folded.type);
  const Tensor d_norm_weight = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor d_norm_bias = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor partial_bias = new_empty(x, {blocks, taps, out}, folded.type);
  // One block's worth: it is written again for each, while it is still in cache.
  const Tensor scaled = new_empty(x, {std::min(rows, kLayerProjectBlock), taps, out}, folded.type);
  const Tensor pull = new_empty(x, {pull_rows ? std::min(rows, kLayerProjectBlock) : 0, taps}, folded.type);
  if (rows == 0 && need_product) {
    Tensor zeroed = d_weight;
    torch::stable::zero_(zeroed);
  }

  for_each_block(rows, [&](int64_t start, int64_t count) {
    const LayerProjectShape block = {count, taps, in, out};
    const void* block_stats = stats.has_value() ? from_row(*stats, start, taps * 2, bytes) : nullptr;
    const LayerProjectGradient args = {block,
                                       activation,
                                       from_row(grad, start, taps * out, bytes),
                                       from_row(value, start, taps * out, bytes),
                                       block_stats,
                                       folded.bias.const_data_ptr(),
                                       mutable_or_null(scaled),
                                       mutable_or_null(pull),
                                       partial_bias.mutable_data_ptr()};
    torch::stable::parallel_for(0, taps, grain(count * out), [&](int64_t begin, int64_t end) {
      cpu::layer_project_gradient(folded.dtype, args, start / kLayerProjectBlock, begin, end);
    });
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Tensor g = tap_rows(scaled, tap, 0, count);
      if (need_product) {
        const Tensor product = torch::stable::select(d_weight, 0, tap);
        const Tensor tap_x = tap_rows(x, tap, start, count);
        start == 0 ? mm_out(product, transposed(g), tap_x) : mm_add(product, transposed(g), tap_x);
      }
      if (need_x) {
        mm_out(tap_rows(dx, tap, start, count), g, torch::stable::select(folded.weight, 0, tap));
      }
    }
    if (!pull_rows) return;
    const Tensor block_x = torch::stable::narrow(const_cast<Tensor&>(x), 0, start, count);
    const LayerProjectInputGradient input_args = {block, view_of(block_x), block_stats, mutable_or_null(pull),
                                                  from_row(dx, start, taps * in, bytes)};
    torch::stable::parallel_for(0, count * taps, grain(in), [&](int64_t begin, int64_t end) {
      cpu::layer_project_input_gradient(folded.dtype, input_args, begin, end);
    });
  });

  const LayerProjectUnfold args = {inputs.shape,
                                   blocks,
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
