#include <algorithm>

#include "torch/blas.h"
#include "torch/layer_project.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
int64_t grain(int64_t width) {
  return 1 + 32768 / (width + 1);
}

// The inputs of a call in the type that the kernels compute in, the accumulation type of x.
LayerProjectInputs widened(const LayerProjectInputs& inputs) {
  const ScalarType type = inputs.accumulate();
  LayerProjectInputs wide = inputs;
  wide.x = as_type(inputs.x, type);
  wide.weight = as_type(inputs.weight, type);
  wide.bias = as_type(inputs.bias, type);
  wide.norm_weight = as_type(inputs.norm_weight, type);
  wide.norm_bias = as_type(inputs.norm_bias, type);
  return wide;
}

// The folded parameters, if needed, and the type to compute in.
struct Folded {
  ScalarType type;
  DType dtype;
  OptionalTensor weight, bias;
};

Folded fold(const LayerProjectInputs& wide, bool needed) {
  const auto [rows, taps, in, out] = wide.shape;
  (void)rows;
  Folded folded = {wide.accumulate(), dtype_of(wide.x, "x"), std::nullopt, std::nullopt};
  if (!needed) return folded;
  folded.weight = wide.norm() ? new_empty(wide.x, {taps, out, in}, folded.type) : wide.weight;
  folded.bias = new_empty(wide.x, {taps, out}, folded.type);
  const NormProductFold args = {wide.shape,
                                wide.weight.const_data_ptr(),
                                data_or_null(wide.bias),
                                data_or_null(wide.norm_weight),
                                data_or_null(wide.norm_bias),
                                wide.norm() ? folded.weight->mutable_data_ptr() : nullptr,
                                folded.bias->mutable_data_ptr()};
  torch::stable::parallel_for(0, taps * out, grain(in), [&](int64_t begin, int64_t end) {
    cpu::norm_product_fold(folded.dtype, args, begin, end);
  });
  return folded;
}

// Rows processed together, so that their product is still in cache for the next step.
constexpr int64_t kBlock = 1024;

// Taps processed together: a batch of products keeps all threads busy, single products do not.
int64_t tap_group() {
  return std::max<int64_t>(1, torch::stable::get_num_threads());
}

// A view (taps, rows, width) of some taps and rows of a tensor (N, L, width).
Tensor matrices(Tensor tensor, int64_t tap, int64_t taps, int64_t start, int64_t rows) {
  Tensor of_taps = torch::stable::narrow(tensor, 1, tap, taps);
  return torch::stable::transpose(torch::stable::narrow(of_taps, 0, start, rows), 0, 1);
}

Tensor narrowed(Tensor tensor, int64_t start, int64_t count) {
  return torch::stable::narrow(tensor, 0, start, count);
}

Tensor transposed(const Tensor& tensor) {
  return torch::stable::transpose(tensor, 1, 2);
}

// Dense memory for the batched product of one block of rows and one group of taps.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t width) : like_(like), width_(width) {}

  const Tensor& sized(int64_t taps, int64_t rows) {
    if (!tensor_.has_value() || tensor_->size(0) != taps || tensor_->size(1) != rows) {
      tensor_ = new_empty(like_, {taps, rows, width_}, like_.scalar_type());
    }
    return *tensor_;
  }

 private:
  Tensor like_;
  int64_t width_;
  OptionalTensor tensor_;
};

// Calls body(first tap, taps) for each group of taps.
template <class Body>
void for_each_group(int64_t taps, Body&& body) {
  const int64_t group = tap_group();
  for (int64_t tap = 0; tap < taps; tap += group) body(tap, std::min(group, taps - tap));
}

// Calls body(first row, rows) for each block of rows.
template <class Body>
void for_each_block(int64_t rows, Body&& body) {
  for (int64_t start = 0; start < rows; start += kBlock) body(start, std::min(kBlock, rows - start));
}

// Calls body(tap, data of its matrix) for each tap of a group; `dense` is (taps, rows, width).
template <class Body>
void for_each_matrix(const Tensor& dense, int64_t first_tap, Body&& body) {
  for (int64_t i = 0; i < dense.size(0); ++i) {
    body(first_tap + i, torch::stable::select(dense, 0, i).mutable_data_ptr());
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given_x, const Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps,
                                           int64_t activation_index, bool save) {
  const LayerProjectInputs inputs =
      widened(LayerProjectInputs(given_x, weight, bias, norm_weight, norm_bias));
  const Activation activation = activation_of(activation_index);
  const Folded folded = fold(inputs, true);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor& x = inputs.x;
  const bool save_value = save && needs_preactivation(activation);
  const Tensor y = new_empty(x, {rows, taps, out}, folded.type);
  const Tensor value = new_empty(x, {save_value ? rows : 0, taps, out}, folded.type);
  const Tensor stats = new_empty(x, {inputs.norm() ? rows : 0, taps, 2}, folded.type);

  const NormProductStats stats_args = {inputs.shape, view_of(x), eps, mutable_or_null(stats)};
  const NormProductActivate activate_args = {inputs.shape,           activation,
                                             mutable_or_null(stats), data_or_null(folded.bias),
                                             y.mutable_data_ptr(),   mutable_or_null(value)};
  Scratch scratch(x, out);
  for_each_group(taps, [&](int64_t first_tap, int64_t group) {
    const Tensor group_weight = transposed(narrowed(*folded.weight, first_tap, group));
    for_each_block(rows, [&](int64_t start, int64_t count) {
      for (int64_t tap = first_tap; inputs.norm() && tap < first_tap + group; ++tap) {
        torch::stable::parallel_for(start, start + count, grain(in), [&](int64_t begin, int64_t end) {
          cpu::layer_project_stats(folded.dtype, stats_args, tap, begin, end);
        });
      }
      const Tensor& product = scratch.sized(group, count);
      bmm_out(product, matrices(x, first_tap, group, start, count), group_weight);
      for_each_matrix(product, first_tap, [&](int64_t tap, const void* matrix) {
        torch::stable::parallel_for(start, start + count, grain(out), [&](int64_t begin, int64_t end) {
          cpu::layer_project_activate(folded.dtype, activate_args, tap, matrix, start, begin, end);
        });
      });
    });
  });
  const ScalarType type = given_x.scalar_type();
  const bool save_stats = save && inputs.norm();
  return {as_type(y, type), as_type(value, type),
          save_stats ? stats : new_empty(x, {0, taps, 2}, folded.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& given_grad, const Tensor& given_x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& given_value,
    const Tensor& given_stats, int64_t activation_index, bool need_x, bool need_weight, bool need_norm) {
  const LayerProjectInputs inputs =
      widened(LayerProjectInputs(given_x, weight, bias, norm_weight, norm_bias));
  const Activation activation = activation_of(activation_index);
  const Folded folded = fold(inputs, need_x);
  const auto [rows, taps, in, out] = inputs.shape;
  const Tensor& x = inputs.x;
  const ScalarType type = given_x.scalar_type();
  const Tensor grad = as_type(checked(given_grad, {rows, taps, out}, type, given_x, "grad"), folded.type);
  const Tensor value = as_type(checked(given_value, {rows, taps, out}, type, given_x, "value"), folded.type);
  OptionalTensor stats;
  if (inputs.norm()) stats = checked(given_stats, {rows, taps, 2}, folded.type, given_x, "stats");

  // The gradients of weight and gain both follow from that of the folded weight.
  const bool need_product = need_weight || (need_norm && inputs.norm());
  const bool pull_rows = need_x && inputs.norm();
  const int64_t chunks = cpu::layer_project_chunks(rows);
  const Tensor dx = new_empty(x, {need_x ? rows : 0, taps, in}, folded.type);
  const Tensor d_weight = new_empty(x, {need_product ? taps : 0, out, in}, folded.type);
  const Tensor d_bias = new_empty(x, {taps, out}, folded.type);
  const Tensor d_norm_weight = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor d_norm_bias = new_empty(x, {need_norm ? taps : 0, in}, folded.type);
  const Tensor partial_bias = new_empty(x, {chunks, taps, out}, folded.type);
  const Tensor pull = new_empty(x, {pull_rows ? rows : 0, taps}, folded.type);
  const void* stats_data = data_or_null(stats);
  NormProductGradient gradient_args = {inputs.shape,
                                       activation,
                                       grad.const_data_ptr(),
                                       value.const_data_ptr(),
                                       stats_data,
                                       data_or_null(folded.bias),
                                       nullptr,
                                       mutable_or_null(pull),
                                       partial_bias.mutable_data_ptr()};
  const NormProductInputGradient input_args = {inputs.shape, view_of(x), stats_data, mutable_or_null(pull),
                                               mutable_or_null(dx)};
  Scratch scaled_scratch(x, out), product_scratch(x, in);
  for_each_group(taps, [&](int64_t first_tap, int64_t group) {
    const Tensor scaled = scaled_scratch.sized(group, rows);
    for_each_matrix(scaled, first_tap, [&](int64_t tap, void* matrix) {
      gradient_args.scaled_grad = matrix;
      torch::stable::parallel_for(0, chunks, grain(cpu::kLayerProjectChunk * out),
                                  [&](int64_t begin, int64_t end) {
                                    cpu::layer_project_gradient(folded.dtype, gradient_args, tap, begin, end);
                                  });
    });
    if (need_product) {
      bmm_out(narrowed(d_weight, first_tap, group), transposed(scaled),
              matrices(x, first_tap, group, 0, rows));
    }
    if (!need_x) return;
    const Tensor group_weight = narrowed(*folded.weight, first_tap, group);
    for_each_block(rows, [&](int64_t start, int64_t count) {
      const Tensor& product = product_scratch.sized(group, count);
      Tensor scaled_rows = scaled;
      bmm_out(product, torch::stable::narrow(scaled_rows, 1, start, count), group_weight);
      for_each_matrix(product, first_tap, [&](int64_t tap, const void* matrix) {
        torch::stable::parallel_for(start, start + count, grain(in), [&](int64_t begin, int64_t end) {
          cpu::layer_project_input_gradient(folded.dtype, input_args, tap, matrix, start, begin, end);
        });
      });
    });
  });

  const NormProductUnfold args = {inputs.shape,
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
    cpu::norm_product_unfold(folded.dtype, args, begin, end);
  });
  const auto parameter = [&](const Tensor& gradient) { return as_type(gradient, weight.scalar_type()); };
  return {as_type(dx, type), parameter(d_weight), parameter(d_bias), parameter(d_norm_weight),
          parameter(d_norm_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("layer_project_fwd", TORCH_BOX(&forward));
  m.impl("layer_project_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
