#include "torch/blas.h"
#include "torch/cuda.h"
#include "torch/layer_project.h"

namespace mmk::glue {
namespace {

void check_pairs(const void* stats) {
  // The kernels read (mean, rstd) as float2.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(stats) % 8 == 0, "stats: expected 8-byte alignment");
}

// Whether the kernels can read the caller's weight as it is.
bool serves(const Tensor& weight, const LayerProjectInputs& inputs) {
  if (weight.scalar_type() != inputs.x.scalar_type()) return false;
  const DType dtype = dtype_of(inputs.x, "x");
  return !cuda::layer_project_fuses(dtype, inputs.shape, view_of(inputs.x)) ||
         cuda::layer_project_fuses(dtype, inputs.shape, view_of(weight));
}

// The folded parameters: Vc in x's type, b' and folded_sum.
struct Folded {
  Tensor weight, bias, sum;
};

Folded fold(const LayerProjectInputs& inputs, CudaStream stream) {
  const auto [rows, taps, in, out] = inputs.shape;
  (void)rows;
  const bool rewritten = inputs.norm() || !serves(inputs.weight, inputs);
  const ScalarType type = inputs.x.scalar_type();
  const Folded folded = {rewritten ? new_empty(inputs.x, {taps, out, in}, type) : inputs.weight,
                         new_empty(inputs.x, {taps, out}, ScalarType::Float),
                         new_empty(inputs.x, {inputs.norm() ? taps : 0, out}, ScalarType::Float)};
  const NormProductFold args = {inputs.shape,
                                inputs.weight.const_data_ptr(),
                                data_or_null(inputs.bias),
                                data_or_null(inputs.norm_weight),
                                data_or_null(inputs.norm_bias),
                                rewritten ? mutable_or_null(folded.weight) : nullptr,
                                mutable_or_null(folded.bias),
                                mutable_or_null(folded.sum),
                                dtype_of(inputs.weight, "weight")};
  check_launch(cuda::norm_product_fold(dtype_of(inputs.x, "x"), args, stream), "layer_project fold");
  return folded;
}

// (N, L, ...) as (L, N, ...)
Tensor by_tap(const Tensor& tensor) {
  return torch::stable::transpose(tensor, 0, 1);
}

Tensor matrices_transposed(const Tensor& tensor) {
  return torch::stable::transpose(tensor, 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given_x, const Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps,
                                           int64_t activation_index, bool save) {
  const CudaScope scope(given_x);
  const LayerProjectInputs inputs(given_x, weight, bias, norm_weight, norm_bias);
  const Activation activation = activation_of(activation_index);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor& x = inputs.x;
  const DType dtype = dtype_of(x, "x");
  const Folded folded = fold(inputs, scope.stream());
  const bool save_value = save && needs_preactivation(activation);
  const Tensor y = new_empty(x, {rows, taps, out}, x.scalar_type());
  const Tensor value = new_empty(x, {save_value ? rows : 0, taps, out}, x.scalar_type());
  const Tensor stats = new_empty(x, {inputs.norm() ? rows : 0, taps, 2}, ScalarType::Float);

  if (inputs.norm()) {
    const NormProductStats args = {inputs.shape, view_of(x), eps, mutable_or_null(stats)};
    check_launch(cuda::norm_product_stats(dtype, args, scope.stream()), "layer_project stats");
  }
  const NormProductActivate activate = {inputs.shape,
                                        activation,
                                        mutable_or_null(stats),
                                        mutable_or_null(folded.bias),
                                        mutable_or_null(y),
                                        mutable_or_null(value),
                                        mutable_or_null(folded.sum)};
  if (cuda::layer_project_fuses(dtype, inputs.shape, view_of(x))) {
    const cuda::LayerProjectProduct args = {view_of(x), mutable_or_null(folded.weight), activate};
    check_launch(cuda::layer_project_product(dtype, args, scope.stream()), "layer_project product");
  } else {
    bmm_out(by_tap(y), by_tap(x), matrices_transposed(folded.weight));
    check_launch(cuda::norm_product_activate(dtype, activate, scope.stream()), "layer_project activation");
  }
  const bool save_stats = save && inputs.norm();
  return {y, value, save_stats ? stats : new_empty(x, {0, taps, 2}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& given_grad, const Tensor& given_x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& given_value,
    const Tensor& given_stats, int64_t activation_index, bool need_x, bool need_weight, bool need_norm) {
  const CudaScope scope(given_x);
  const LayerProjectInputs inputs(given_x, weight, bias, norm_weight, norm_bias);
  const Activation activation = activation_of(activation_index);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor& x = inputs.x;
  const DType dtype = dtype_of(x, "x");
  const ScalarType type = x.scalar_type();
  const Tensor grad = checked(given_grad, {rows, taps, out}, type, x, "grad");
  const Tensor value = checked(given_value, {rows, taps, out}, type, x, "value");
  OptionalTensor stats;
  if (inputs.norm()) stats = checked(given_stats, {rows, taps, 2}, ScalarType::Float, x, "stats");
  check_pairs(data_or_null(stats));

  // The gradients of weight and gain both follow from that of the folded weight.
  const bool need_product = need_weight || (need_norm && inputs.norm());
  const bool need_pull = need_x && inputs.norm();
  const int64_t chunks = cuda::norm_product_chunks(rows);
  const Tensor dx = new_empty(x, {need_x ? rows : 0, taps, in}, type);
  // Gradients of parameters have the parameters' type. Keep dVc in float until the last step centres it.
  const ScalarType given = inputs.parameter_type();
  const bool apart = inputs.norm() && given != ScalarType::Float;
  const Tensor d_weight = new_empty(x, {need_product ? taps : 0, out, in}, given);
  Tensor d_folded = apart ? new_empty(x, {d_weight.size(0), out, in}, ScalarType::Float) : d_weight;
  const Tensor d_bias = new_empty(x, {taps, out}, given);
  const Tensor d_norm_weight = new_empty(x, {need_norm ? taps : 0, in}, given);
  const Tensor d_norm_bias = new_empty(x, {need_norm ? taps : 0, in}, given);
  const Tensor partial_bias = new_empty(x, {chunks, taps, out}, ScalarType::Float);
  const Tensor scaled = new_empty(x, {need_product || need_x ? rows : 0, taps, out}, type);
  const Tensor pull = new_empty(x, {need_pull ? rows : 0, taps}, ScalarType::Float);
  const Tensor row_sums = new_empty(x, {need_product || need_norm ? taps : 0, out, 2}, ScalarType::Float);
  Folded folded;
  if (need_x) folded = fold(inputs, scope.stream());

  const NormProductGradient gradient_args = {inputs.shape,
                                             activation,
                                             grad.const_data_ptr(),
                                             value.const_data_ptr(),
                                             data_or_null(stats),
                                             need_pull ? mutable_or_null(folded.bias) : nullptr,
                                             mutable_or_null(scaled),
                                             mutable_or_null(pull),
                                             mutable_or_null(partial_bias)};
  check_launch(cuda::norm_product_gradient(dtype, gradient_args, scope.stream()), "layer_project gradient");
  if (need_product && rows > 0) bmm_out_as(d_folded, matrices_transposed(by_tap(scaled)), by_tap(x));
  if (need_product && rows == 0) torch::stable::zero_(d_folded);
  if (need_x) bmm_out(by_tap(dx), by_tap(scaled), folded.weight);
  if (need_pull) {
    const NormProductInputGradient args = {inputs.shape, view_of(x), data_or_null(stats),
                                           mutable_or_null(pull), mutable_or_null(dx)};
    check_launch(cuda::norm_product_input_gradient(dtype, args, scope.stream()), "layer_project dx");
  }
  const NormProductUnfold unfold_args = {inputs.shape,
                                         chunks,
                                         mutable_or_null(partial_bias),
                                         inputs.weight.const_data_ptr(),
                                         data_or_null(inputs.norm_weight),
                                         data_or_null(inputs.norm_bias),
                                         mutable_or_null(d_weight),
                                         mutable_or_null(d_bias),
                                         mutable_or_null(d_norm_weight),
                                         mutable_or_null(d_norm_bias),
                                         inputs.norm() ? mutable_or_null(d_folded) : nullptr,
                                         mutable_or_null(row_sums),
                                         dtype_of(inputs.weight, "weight")};
  check_launch(cuda::norm_product_unfold(unfold_args, scope.stream()), "layer_project unfold");
  return {dx, d_weight, d_bias, d_norm_weight, d_norm_bias};
}

MMK_CUDA_KERNELS(m) {
  m.impl("layer_project_fwd", TORCH_BOX(&forward));
  m.impl("layer_project_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
