#include "mmkernels/norm_product.h"
#include "torch/adapter.h"
#include "torch/blas.h"
#include "torch/cuda.h"

namespace mmk::glue {
namespace {

// The down-projection with the LayerNorm folded in (Vc, b', folded_sum), and the up-projection. Both weights
// have x's type, the rest is float.
struct Folded {
  Tensor down, bias, sum, up;
  OptionalTensor up_bias;
};

// Whether the kernels can read a weight of the caller as it is.
bool serves(const Tensor& weight, const AdapterInputs& inputs) {
  if (weight.scalar_type() != inputs.x.scalar_type()) return false;
  return !cuda::adapter_fuses(inputs.dtype(), inputs.shape) || cuda::adapter_rows_fuse(rows_of(weight));
}

Folded folded(const AdapterInputs& inputs, CudaStream stream) {
  const auto [rows, width, bottleneck] = inputs.shape;
  const Tensor& x = inputs.x;
  const ScalarType type = x.scalar_type();
  const bool new_down = inputs.norm() || !serves(inputs.down_weight, inputs);
  const bool new_up = !serves(inputs.up_weight, inputs);
  const bool new_bias = inputs.up_bias.has_value() && inputs.parameter_type() != ScalarType::Float;
  Folded result = {new_down ? new_empty(x, {bottleneck, width}, type) : inputs.down_weight,
                   new_empty(x, {bottleneck}, ScalarType::Float),
                   new_empty(x, {inputs.norm() ? bottleneck : 0}, ScalarType::Float),
                   new_up ? new_empty(x, {width, bottleneck}, type) : inputs.up_weight, inputs.up_bias};
  if (new_bias) result.up_bias = new_empty(x, {width}, ScalarType::Float);
  NormProductFold args = {{rows, 1, width, bottleneck},
                          inputs.down_weight.const_data_ptr(),
                          data_or_null(inputs.down_bias),
                          data_or_null(inputs.norm_weight),
                          data_or_null(inputs.norm_bias),
                          new_down ? mutable_or_null(result.down) : nullptr,
                          mutable_or_null(result.bias),
                          mutable_or_null(result.sum),
                          dtype_of(inputs.down_weight, "down_weight")};
  if (new_up)
    args.next_weight = {inputs.up_weight.const_data_ptr(), mutable_or_null(result.up), width * bottleneck};
  if (new_bias) args.next_bias = {inputs.up_bias->const_data_ptr(), mutable_or_null(*result.up_bias), width};
  check_launch(cuda::norm_product_fold(inputs.dtype(), args, stream), "adapter fold");
  return result;
}

// out = a b of matrices, in the type of out
void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::unsqueeze;
  bmm_out_as(unsqueeze(out, 0), unsqueeze(a, 0), unsqueeze(b, 0));
}

Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, 0, 1);
}

NormProductInput input_of(const Tensor& x) {
  return {rows_of(x).data, stride_of(x, 0), 0};
}

// ---- forward

struct Result {
  Tensor out, hidden, stats;
};

// Library products with a kernel after each, for float32 and problems that the fused kernel rejects.
void forward_by_products(const AdapterInputs& inputs, const Folded& weights, const OptionalTensor& residual,
                         double scale, double eps, Activation activation, const Result& result,
                         CudaStream stream) {
  const auto [rows, width, bottleneck] = inputs.shape;
  const Tensor& x = inputs.x;
  const NormProductShape down = {rows, 1, width, bottleneck};
  const Tensor stats = inputs.norm() ? new_empty(x, {rows, 2}, ScalarType::Float) : result.stats;
  if (inputs.norm()) {
    const Tensor& target = result.stats.numel() > 0 ? result.stats : stats;
    const NormProductStats args = {down, input_of(x), eps, mutable_or_null(target)};
    check_launch(cuda::norm_product_stats(inputs.dtype(), args, stream), "adapter stats");
  }
  const Tensor& moments = result.stats.numel() > 0 ? result.stats : stats;
  const Tensor activated = new_empty(x, {rows, bottleneck}, x.scalar_type());
  product(activated, x, transposed(weights.down));
  const NormProductActivate activate = {down,
                                        activation,
                                        inputs.norm() ? mutable_or_null(moments) : nullptr,
                                        mutable_or_null(weights.bias),
                                        mutable_or_null(activated),
                                        mutable_or_null(result.hidden),
                                        mutable_or_null(weights.sum)};
  check_launch(cuda::norm_product_activate(inputs.dtype(), activate, stream), "adapter activation");
  const Tensor sums = new_empty(x, {rows, width}, ScalarType::Float);
  product(sums, activated, transposed(weights.up));
  cuda::AdapterFinish args = {};
  args.shape = inputs.shape;
  args.scale = scale;
  args.product = mutable_or_null(sums);
  args.bias = data_or_null(weights.up_bias);
  args.addend = rows_of(residual);
  args.out_type = dtype_of(result.out, "out");
  args.out = mutable_or_null(result.out);
  check_launch(cuda::adapter_finish(inputs.dtype(), args, stream), "adapter residual");
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given_x, const Tensor& down_weight,
                                           const OptionalTensor& down_bias, const Tensor& up_weight,
                                           const OptionalTensor& up_bias,
                                           const OptionalTensor& given_residual,
                                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                           double scale, double eps, int64_t activation_index, bool add_input,
                                           bool save) {
  const CudaScope scope(given_x);
  const AdapterInputs inputs(given_x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias);
  const OptionalTensor residual = inputs.residual(given_residual, add_input);
  const Activation activation = activation_of(activation_index);
  const auto [rows, width, bottleneck] = inputs.shape;
  const Tensor& x = inputs.x;
  const ScalarType out_type = residual.has_value() ? residual->scalar_type() : x.scalar_type();
  const bool save_stats = save && inputs.norm();
  const Result result = {new_empty(x, {rows, width}, out_type),
                         new_empty(x, {save ? rows : 0, bottleneck}, x.scalar_type()),
                         new_empty(x, {save_stats ? rows : 0, 2}, ScalarType::Float)};
  const bool fuses = cuda::adapter_fuses(inputs.dtype(), inputs.shape) &&
                     cuda::adapter_rows_fuse(rows_of(x)) && cuda::adapter_rows_fuse(rows_of(residual));
  const Folded weights = folded(inputs, scope.stream());
  if (!fuses || rows == 0) {
    forward_by_products(inputs, weights, residual, scale, eps, activation, result, scope.stream());
    return {result.out, result.hidden, result.stats};
  }
  cuda::AdapterTiles tiles = {};
  check_launch(cuda::adapter_tiles(inputs.shape, add_input, &tiles), "adapter plan");
  const cuda::AdapterForward args = {inputs.shape,
                                     activation,
                                     scale,
                                     eps,
                                     rows_of(x),
                                     add_input ? AdapterRows{nullptr, 0} : rows_of(residual),
                                     add_input,
                                     dtype_of(result.out, "out"),
                                     mutable_or_null(weights.down),
                                     mutable_or_null(weights.bias),
                                     mutable_or_null(weights.sum),
                                     mutable_or_null(weights.up),
                                     data_or_null(weights.up_bias),
                                     mutable_or_null(result.out),
                                     mutable_or_null(result.hidden),
                                     mutable_or_null(result.stats)};
  check_launch(cuda::adapter_forward(inputs.dtype(), args, tiles, scope.stream()), "adapter forward");
  return {result.out, result.hidden, result.stats};
}

// ---- backward. The gradients of the parameters have their type. Each is rounded once from its float sum; a
// product in half precision rounds as the library does.

struct BackwardCall {
  const AdapterInputs& inputs;
  Tensor grad, hidden;
  OptionalTensor stats;
  double scale;
  Activation activation;
  bool add_input, need_x, need_product, need_up;
  CudaStream stream;
};

// Results of the row-wise part of the backward pass; empty if not needed.
struct RowGradients {
  Tensor dx, activated, scaled_grad, partial_bias, partial_up_bias;
  int64_t bias_chunks, up_bias_chunks;
};

RowGradients allocate(const BackwardCall& call, int64_t bias_chunks, int64_t up_bias_chunks,
                      bool need_scaled) {
  const auto [rows, width, bottleneck] = call.inputs.shape;
  const Tensor& x = call.inputs.x;
  const ScalarType type = x.scalar_type();
  return {new_empty(x, {call.need_x ? rows : 0, width}, type),
          new_empty(x, {call.need_up ? rows : 0, bottleneck}, type),
          new_empty(x, {need_scaled ? rows : 0, bottleneck}, type),
          new_empty(x, {call.need_product ? bias_chunks : 0, bottleneck}, ScalarType::Float),
          new_empty(x, {call.need_up ? up_bias_chunks : 0, width}, ScalarType::Float),
          bias_chunks,
          up_bias_chunks};
}

RowGradients rows_fused(const BackwardCall& call) {
  const AdapterInputs& inputs = call.inputs;
  cuda::AdapterTiles tiles = {};
  check_launch(cuda::adapter_tiles(inputs.shape, call.need_x && call.add_input, &tiles), "adapter plan");
  const RowGradients result = allocate(call, tiles.tiles(), tiles.column_sums(), call.need_product);
  const Folded weights = folded(inputs, call.stream);
  const cuda::AdapterBackward args = {inputs.shape,
                                      call.activation,
                                      call.scale,
                                      rows_of(call.grad),
                                      rows_of(inputs.x),
                                      call.add_input,
                                      mutable_or_null(weights.down),
                                      mutable_or_null(weights.bias),
                                      mutable_or_null(weights.up),
                                      rows_of(call.hidden).data,
                                      data_or_null(call.stats),
                                      mutable_or_null(result.dx),
                                      mutable_or_null(result.activated),
                                      mutable_or_null(result.scaled_grad),
                                      mutable_or_null(result.partial_bias),
                                      mutable_or_null(result.partial_up_bias)};
  check_launch(cuda::adapter_backward(inputs.dtype(), args, tiles, call.stream), "adapter backward");
  return result;
}

// dx from the gradients at z: s Vc - pull * (x - mean) + g
void input_gradient(const BackwardCall& call, const Folded& weights, const Tensor& scaled_grad,
                    const Tensor& pull, const Tensor& dx) {
  const auto [rows, width, bottleneck] = call.inputs.shape;
  const Tensor sums = new_empty(dx, {rows, width}, ScalarType::Float);
  product(sums, scaled_grad, weights.down);
  cuda::AdapterFinish args = {};
  args.shape = call.inputs.shape;
  args.scale = 1.0;
  args.product = mutable_or_null(sums);
  if (call.add_input) args.addend = rows_of(call.grad);
  args.x = rows_of(call.inputs.x);
  args.stats = data_or_null(call.stats);
  args.pull = mutable_or_null(pull);
  args.out_type = call.inputs.dtype();
  args.out = mutable_or_null(dx);
  check_launch(cuda::adapter_finish(call.inputs.dtype(), args, call.stream), "adapter dx");
}

RowGradients rows_by_products(const BackwardCall& call) {
  const AdapterInputs& inputs = call.inputs;
  const auto [rows, width, bottleneck] = inputs.shape;
  const Tensor& x = inputs.x;
  const DType dtype = inputs.dtype();
  const bool need_hidden = call.need_x || call.need_product;
  const int64_t sum_rows = cuda::kAdapterSumRows;
  const RowGradients result =
      allocate(call, cuda::norm_product_chunks(rows), (rows + sum_rows - 1) / sum_rows, need_hidden);
  if (call.need_up) {
    const cuda::AdapterActivate activate = {inputs.shape, call.activation, call.scale,
                                            rows_of(call.hidden).data, mutable_or_null(result.activated)};
    check_launch(cuda::adapter_activate(dtype, activate, call.stream), "adapter activation");
    const cuda::AdapterColumnSums sums = {inputs.shape, rows_of(call.grad),
                                          mutable_or_null(result.partial_up_bias)};
    check_launch(cuda::adapter_column_sums(dtype, sums, call.stream), "adapter column sums");
  }
  if (!need_hidden) return result;
  const Folded weights = folded(inputs, call.stream);
  const bool need_pull = call.need_x && inputs.norm();
  const Tensor pull = new_empty(x, {need_pull ? rows : 0}, ScalarType::Float);
  const Tensor partial_bias = call.need_product
                                  ? result.partial_bias
                                  : new_empty(x, {result.bias_chunks, bottleneck}, ScalarType::Float);
  const Tensor d_activated = new_empty(x, {rows, bottleneck}, x.scalar_type());
  product(d_activated, call.grad, weights.up);
  const NormProductGradient args = {{rows, 1, width, bottleneck},
                                    call.activation,
                                    mutable_or_null(d_activated),
                                    rows_of(call.hidden).data,
                                    data_or_null(call.stats),
                                    need_pull ? mutable_or_null(weights.bias) : nullptr,
                                    mutable_or_null(result.scaled_grad),
                                    mutable_or_null(pull),
                                    mutable_or_null(partial_bias),
                                    call.scale};
  check_launch(cuda::norm_product_gradient(dtype, args, call.stream), "adapter gradient");
  if (call.need_x) input_gradient(call, weights, result.scaled_grad, pull, result.dx);
  return result;
}

struct UpGradients {
  Tensor weight, bias;
};

UpGradients up_gradients(const BackwardCall& call, const RowGradients& from) {
  const auto [rows, width, bottleneck] = call.inputs.shape;
  const Tensor& x = call.inputs.x;
  const ScalarType type = call.inputs.parameter_type();
  const UpGradients result = {
      new_empty(x, {call.need_up ? width : 0, bottleneck}, type),
      new_empty(x, {call.need_up ? width : 0}, type),
  };
  if (!call.need_up) return result;
  product(result.weight, transposed(call.grad), from.activated);
  const cuda::AdapterUpBias args = {width,
                                    from.up_bias_chunks,
                                    call.scale,
                                    mutable_or_null(from.partial_up_bias),
                                    mutable_or_null(result.bias),
                                    dtype_of(result.bias, "d_up_bias")};
  check_launch(cuda::adapter_up_bias(args, call.stream), "adapter up_bias");
  return result;
}

struct DownGradients {
  Tensor weight, bias, norm_weight, norm_bias;
};

DownGradients down_gradients(const BackwardCall& call, const RowGradients& from, bool need_norm) {
  const AdapterInputs& inputs = call.inputs;
  const auto [rows, width, bottleneck] = inputs.shape;
  const Tensor& x = inputs.x;
  const ScalarType type = inputs.parameter_type();
  const int64_t weight_rows = call.need_product ? bottleneck : 0;
  const DownGradients result = {new_empty(x, {weight_rows, width}, type), new_empty(x, {weight_rows}, type),
                                new_empty(x, {need_norm ? width : 0}, type),
                                new_empty(x, {need_norm ? width : 0}, type)};
  if (!call.need_product) return result;
  // Keep dVc in float until the next step centres it.
  const bool apart = inputs.norm() && type != ScalarType::Float;
  const Tensor d_folded = apart ? new_empty(x, {bottleneck, width}, ScalarType::Float) : result.weight;
  product(d_folded, transposed(from.scaled_grad), x);
  const Tensor row_sums = new_empty(x, {bottleneck, 2}, ScalarType::Float);
  const NormProductUnfold args = {{rows, 1, width, bottleneck},
                                  from.bias_chunks,
                                  mutable_or_null(from.partial_bias),
                                  inputs.down_weight.const_data_ptr(),
                                  data_or_null(inputs.norm_weight),
                                  data_or_null(inputs.norm_bias),
                                  mutable_or_null(result.weight),
                                  mutable_or_null(result.bias),
                                  mutable_or_null(result.norm_weight),
                                  mutable_or_null(result.norm_bias),
                                  inputs.norm() ? mutable_or_null(d_folded) : nullptr,
                                  mutable_or_null(row_sums),
                                  dtype_of(inputs.down_weight, "down_weight")};
  check_launch(cuda::norm_product_unfold(args, call.stream), "adapter unfold");
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& given_grad, const Tensor& given_x, const Tensor& down_weight,
    const OptionalTensor& down_bias, const Tensor& up_weight, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& given_hidden, const Tensor& given_stats, double scale,
    int64_t activation_index, bool add_input, bool need_x, bool need_down, bool need_up, bool need_norm) {
  const CudaScope scope(given_x);
  const AdapterInputs inputs(given_x, down_weight, down_bias, up_weight, std::nullopt, norm_weight,
                             norm_bias);
  STD_TORCH_CHECK(inputs.norm() || !need_norm, "need_norm: expected False without norm_weight");
  // The gradient of the gain follows from that of the folded down-projection.
  const BackwardCall call = {inputs,
                             inputs.grad(given_grad),
                             inputs.hidden(given_hidden),
                             inputs.stats(given_stats),
                             scale,
                             activation_of(activation_index),
                             add_input,
                             need_x,
                             need_down || need_norm,
                             need_up,
                             scope.stream()};
  // The kernels read (mean, rstd) as float2.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data_or_null(call.stats)) % 8 == 0,
                  "stats: expected 8-byte alignment");
  const bool fuses =
      (need_x || call.need_product) && inputs.shape.rows > 0 &&
      cuda::adapter_fuses(inputs.dtype(), inputs.shape) && cuda::adapter_rows_fuse(rows_of(call.grad)) &&
      cuda::adapter_rows_fuse(rows_of(inputs.x)) && cuda::adapter_rows_fuse(rows_of(call.hidden));
  const RowGradients rows = fuses ? rows_fused(call) : rows_by_products(call);
  const DownGradients down = down_gradients(call, rows, need_norm);
  const UpGradients up = up_gradients(call, rows);
  return {rows.dx, down.weight, down.bias, up.weight, up.bias, down.norm_weight, down.norm_bias};
}

MMK_CUDA_KERNELS(m) {
  m.impl("adapter_fwd", TORCH_BOX(&forward));
  m.impl("adapter_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
