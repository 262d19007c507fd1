#include "mmkernels/norm_product.h"
#include "torch/adapter.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
int64_t grain(int64_t width) {
  return 1 + 32768 / (width + 1);
}

// The inputs of a call in the type that the kernels compute in, the accumulation type of x: the inputs
// themselves, or `storage`.
const AdapterInputs& widened(const AdapterInputs& inputs, std::optional<AdapterInputs>& storage) {
  const ScalarType type = inputs.accumulate();
  if (inputs.x.scalar_type() == type) return inputs;
  AdapterInputs& wide = storage.emplace(inputs);
  wide.x = as_type(inputs.x, type);
  wide.down_weight = as_type(inputs.down_weight, type);
  wide.down_bias = as_type(inputs.down_bias, type);
  wide.up_weight = as_type(inputs.up_weight, type);
  wide.up_bias = as_type(inputs.up_bias, type);
  wide.norm_weight = as_type(inputs.norm_weight, type);
  wide.norm_bias = as_type(inputs.norm_bias, type);
  return wide;
}

// Packs factor times a matrix (depth, columns), whose element (k, n) is
// source[k * depth_stride + n * column_stride].
Tensor packed(const AdapterInputs& wide, const Tensor& source, int64_t depth, int64_t columns,
              int64_t depth_stride, int64_t column_stride, double factor = 1.0) {
  const Tensor result =
      new_empty(wide.x, {cpu::adapter_packed_size(wide.dtype(), depth, columns)}, wide.accumulate());
  const cpu::AdapterPack args = {source.const_data_ptr(), depth_stride, column_stride, depth, columns, factor,
                                 mutable_or_null(result)};
  torch::stable::parallel_for(
      0, cpu::adapter_panels(wide.dtype(), columns), grain(depth * 16),
      [&](int64_t begin, int64_t end) { cpu::adapter_pack(wide.dtype(), args, begin, end); });
  return result;
}

// The down-projection with the LayerNorm folded in: Vc and b'.
struct Folded {
  Tensor weight, bias;
};

NormProductShape projection_shape(const AdapterShape& shape) {
  return {shape.rows, 1, shape.width, shape.bottleneck};
}

Folded fold(const AdapterInputs& wide) {
  const auto [rows, width, bottleneck] = wide.shape;
  const Folded folded = {
      wide.norm() ? new_empty(wide.x, {bottleneck, width}, wide.accumulate()) : wide.down_weight,
      new_empty(wide.x, {bottleneck}, wide.accumulate())};
  const NormProductFold args = {
      projection_shape(wide.shape), wide.down_weight.const_data_ptr(),
      data_or_null(wide.down_bias), data_or_null(wide.norm_weight),
      data_or_null(wide.norm_bias), wide.norm() ? mutable_or_null(folded.weight) : nullptr,
      mutable_or_null(folded.bias)};
  torch::stable::parallel_for(0, bottleneck, grain(width), [&](int64_t begin, int64_t end) {
    cpu::norm_product_fold(wide.dtype(), args, begin, end);
  });
  return folded;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& down_weight,
                                           const OptionalTensor& down_bias, const Tensor& up_weight,
                                           const OptionalTensor& up_bias,
                                           const OptionalTensor& given_residual,
                                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                           double scale, double eps, int64_t activation_index, bool add_input,
                                           bool save) {
  const AdapterInputs inputs(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias);
  const auto [rows, width, bottleneck] = inputs.shape;
  const OptionalTensor residual = inputs.residual(given_residual, add_input);
  const ScalarType out_type = residual.has_value() ? residual->scalar_type() : inputs.x.scalar_type();
  std::optional<AdapterInputs> storage;
  const AdapterInputs& wide = widened(inputs, storage);
  const OptionalTensor wide_residual =
      add_input ? OptionalTensor(wide.x) : as_type(residual, wide.accumulate());
  const Folded folded = fold(wide);
  const Tensor down = packed(wide, folded.weight, width, bottleneck, 1, width);
  const Tensor up = packed(wide, wide.up_weight, bottleneck, width, 1, bottleneck, scale);
  const Tensor out = new_empty(wide.x, {rows, width}, wide.accumulate());
  const Tensor hidden = new_empty(wide.x, {save ? rows : 0, bottleneck}, wide.accumulate());
  const Tensor stats = new_empty(wide.x, {save && inputs.norm() ? rows : 0, 2}, wide.accumulate());
  const cpu::AdapterForward args = {inputs.shape,
                                    activation_of(activation_index),
                                    scale,
                                    eps,
                                    inputs.norm(),
                                    rows_of(wide.x),
                                    rows_of(wide_residual),
                                    mutable_or_null(down),
                                    mutable_or_null(up),
                                    mutable_or_null(folded.bias),
                                    data_or_null(wide.up_bias),
                                    mutable_or_null(out),
                                    mutable_or_null(hidden),
                                    mutable_or_null(stats)};
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    cpu::adapter_forward(wide.dtype(), args, begin, end);
  });
  return {as_type(out, out_type), as_type(hidden, inputs.x.scalar_type()), stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& given_grad, const Tensor& x, const Tensor& down_weight, const OptionalTensor& down_bias,
    const Tensor& up_weight, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const Tensor& given_hidden, const Tensor& given_stats, double scale, int64_t activation_index,
    bool add_input, bool need_x, bool need_down, bool need_up, bool need_norm) {
  const AdapterInputs inputs(x, down_weight, down_bias, up_weight, std::nullopt, norm_weight, norm_bias);
  const auto [rows, width, bottleneck] = inputs.shape;
  STD_TORCH_CHECK(inputs.norm() || !need_norm, "need_norm: expected False without norm_weight");
  std::optional<AdapterInputs> storage;
  const AdapterInputs& wide = widened(inputs, storage);
  const Tensor grad = as_type(inputs.grad(given_grad), wide.accumulate());
  const Tensor hidden = as_type(inputs.hidden(given_hidden), wide.accumulate());
  const OptionalTensor stats = inputs.stats(given_stats);
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return new_empty(wide.x, sizes, wide.accumulate());
  };

  // The gradients of weight and gain both follow from that of the folded weight.
  const bool need_product = need_down || need_norm;
  const int64_t runs = cpu::adapter_runs(rows);
  const Tensor dx = empty({need_x ? rows : 0, width});
  const Tensor d_down = empty({need_product ? bottleneck : 0, width});
  const Tensor d_hidden_bias = empty({need_product ? bottleneck : 0});
  const Tensor d_up = empty({need_up ? width : 0, bottleneck});
  const Tensor d_up_bias = empty({need_up ? width : 0});
  const Tensor d_norm_weight = empty({need_norm ? width : 0});
  const Tensor d_norm_bias = empty({need_norm ? width : 0});
  const Tensor partial_hidden_bias = empty({runs, bottleneck});
  const Tensor scaled = empty({cpu::adapter_strips_size(rows, bottleneck)});
  const Tensor activated = empty({cpu::adapter_strips_size(rows, bottleneck)});

  const Tensor up = packed(wide, wide.up_weight, width, bottleneck, bottleneck, 1, scale);
  OptionalTensor down, bias;
  if (need_x) {
    const Folded folded = fold(wide);
    down = packed(wide, folded.weight, bottleneck, width, width, 1);
    bias = folded.bias;
  }
  const cpu::AdapterBackward args = {inputs.shape,
                                     activation_of(activation_index),
                                     add_input,
                                     rows_of(grad),
                                     rows_of(wide.x),
                                     mutable_or_null(hidden),
                                     data_or_null(stats),
                                     mutable_or_null(up),
                                     data_or_null(down),
                                     data_or_null(bias),
                                     mutable_or_null(dx),
                                     mutable_or_null(scaled),
                                     mutable_or_null(activated),
                                     mutable_or_null(partial_hidden_bias)};
  torch::stable::parallel_for(0, runs, 1 + grain(width) / cpu::kAdapterRun, [&](int64_t begin, int64_t end) {
    cpu::adapter_backward(wide.dtype(), args, begin, end);
  });
  const cpu::AdapterWeightGradients weight_args = {inputs.shape,
                                                   scale,
                                                   rows_of(grad),
                                                   rows_of(wide.x),
                                                   mutable_or_null(scaled),
                                                   mutable_or_null(activated),
                                                   mutable_or_null(d_down),
                                                   mutable_or_null(d_up),
                                                   mutable_or_null(d_up_bias)};
  torch::stable::parallel_for(0, need_product || need_up ? cpu::adapter_panels(wide.dtype(), width) : 0,
                              grain(rows * 16), [&](int64_t begin, int64_t end) {
                                cpu::adapter_weight_gradients(wide.dtype(), weight_args, begin, end);
                              });
  if (need_product) {
    const NormProductUnfold unfold_args = {projection_shape(inputs.shape),
                                           runs,
                                           mutable_or_null(partial_hidden_bias),
                                           wide.down_weight.const_data_ptr(),
                                           data_or_null(wide.norm_weight),
                                           data_or_null(wide.norm_bias),
                                           mutable_or_null(d_down),
                                           mutable_or_null(d_hidden_bias),
                                           mutable_or_null(d_norm_weight),
                                           mutable_or_null(d_norm_bias)};
    cpu::norm_product_unfold(wide.dtype(), unfold_args, 0, 1);
  }
  const auto parameter = [&](const Tensor& gradient) { return as_type(gradient, inputs.parameter_type()); };
  return {as_type(dx, inputs.x.scalar_type()),
          parameter(d_down),
          parameter(d_hidden_bias),
          parameter(d_up),
          parameter(d_up_bias),
          parameter(d_norm_weight),
          parameter(d_norm_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("adapter_fwd", TORCH_BOX(&forward));
  m.impl("adapter_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
