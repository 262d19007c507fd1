// Checks, strides and outputs that the CPU and the CUDA glue of layer_mix share. The schema is in
// mmkernels/ops/layer_mix/schema.py.
#pragma once

#include <tuple>
#include <vector>

#include "mmkernels/layer_mix.h"
#include "torch/glue.h"

namespace mmk::glue {

// The inputs of a call, kept alive for its duration, and the kernel parameters that point into them.
struct LayerMixInputs {
  std::vector<Tensor> layers;
  Tensor weights;
  OptionalTensor norm_weight, norm_bias, lengths;
  LayerMixParams params;

  LayerMixInputs(const std::vector<Tensor>& given, const Tensor& given_weights,
                 const OptionalTensor& given_norm_weight, const OptionalTensor& given_norm_bias,
                 const OptionalTensor& given_lengths, bool norm, double eps) {
    STD_TORCH_CHECK(!given.empty() && given.size() <= kLayerMixMaxLayers, "layers: expected 1 to ",
                    kLayerMixMaxLayers, " tensors, got ", given.size());
    const Tensor& first = given.front();
    STD_TORCH_CHECK(first.dim() == 3, "layers: expected tensors of shape (batch, frames, width), got ",
                    first.dim(), " dimensions");
    params = {};
    params.dtype = dtype_of(first, "layers");
    params.layers = static_cast<int32_t>(given.size());
    params.batch = first.size(0);
    params.frames = first.size(1);
    params.width = first.size(2);
    params.norm = norm;
    params.eps = eps;
    layers.reserve(given.size());
    for (size_t l = 0; l < given.size(); ++l) add_layer(given[l], first, l);
    const ScalarType accumulate = accumulate_type(params.dtype);
    const int64_t count = params.layers;
    weights = checked(given_weights, {count}, accumulate, first, "weights");
    norm_weight = checked(given_norm_weight, {count, params.width}, accumulate, first, "norm_weight");
    norm_bias = checked(given_norm_bias, {count, params.width}, accumulate, first, "norm_bias");
    lengths = checked(given_lengths, {params.batch}, ScalarType::Long, first, "lengths");
    params.weights = weights.const_data_ptr();
    params.norm_weight = data_or_null(norm_weight);
    params.norm_bias = data_or_null(norm_bias);
    params.lengths = static_cast<const int64_t*>(data_or_null(lengths));
  }

 private:
  // Runs once per layer. Every query of a tensor is a call, so it queries all sizes and all strides at once.
  void add_layer(const Tensor& layer, const Tensor& first, size_t l) {
    if (l > 0) {
      STD_TORCH_CHECK(same_sizes(layer, first), "layers: expected one shape for all");
      STD_TORCH_CHECK(layer.scalar_type() == first.scalar_type(), "layers: expected one dtype for all");
      check_same_device(layer, first, "layers");
    }
    const bool unit_stride = layer.strides()[2] == 1 || params.width <= 1;
    layers.push_back(unit_stride ? layer : torch::stable::contiguous(layer));
    const auto strides = layers.back().strides();
    params.layer[l] = layers.back().const_data_ptr();
    // As stride_of, with the sizes at hand.
    params.batch_stride[l] = params.batch > 1 ? strides[0] : 0;
    params.frame_stride[l] = params.frames > 1 ? strides[1] : 0;
  }
};

struct LayerMixForwardOutputs {
  Tensor out, stats;
};

inline LayerMixForwardOutputs layer_mix_forward_outputs(const LayerMixInputs& inputs, bool save_stats) {
  const LayerMixParams& p = inputs.params;
  const Tensor& first = inputs.layers.front();
  const int64_t rows = save_stats && p.norm ? p.batch * p.frames : 0;
  return {new_empty(first, {p.batch, p.frames, p.width}, first.scalar_type()),
          new_empty(first, {rows, p.layers, 2}, accumulate_type(p.dtype))};
}

inline LayerMixForward layer_mix_forward_args(const LayerMixInputs& inputs, LayerMixForwardOutputs& outputs) {
  return {inputs.params, outputs.out.mutable_data_ptr(),
          outputs.stats.numel() == 0 ? nullptr : outputs.stats.mutable_data_ptr()};
}

// Gradients and their partial sums; those not needed have no elements.
struct LayerMixGradients {
  Tensor grad, stats, d_weights, d_norm_weight, d_norm_bias, partial_dot, partial_scale, partial_shift;
  // Separate allocations: each can be freed alone, and is small enough to reuse freed memory.
  std::vector<Tensor> d_layers;
  LayerMixBackward args;

  LayerMixGradients(const LayerMixInputs& inputs, const Tensor& given_grad, const Tensor& given_stats,
                    bool need_weights, bool need_affine, const std::vector<int64_t>& wanted,
                    int64_t dot_partials, int64_t affine_partials) {
    const LayerMixParams& p = inputs.params;
    const Tensor& first = inputs.layers.front();
    const ScalarType accumulate = accumulate_type(p.dtype);
    check_shape(given_grad, {p.batch, p.frames, p.width}, "grad");
    check_same_device(given_grad, first, "grad");
    STD_TORCH_CHECK(given_grad.scalar_type() == first.scalar_type(), "grad: expected the dtype of layers");
    STD_TORCH_CHECK(p.norm || !need_affine, "need_affine: expected False without norm");
    const bool unit_stride = given_grad.stride(2) == 1 || p.width <= 1;
    grad = unit_stride ? given_grad : torch::stable::contiguous(given_grad);
    if (p.norm) stats = checked(given_stats, {p.batch * p.frames, p.layers, 2}, accumulate, first, "stats");

    const int64_t affine_layers = need_affine ? p.layers : 0;
    if (!need_affine) affine_partials = 0;
    d_weights = new_empty(first, {need_weights ? p.layers : 0}, accumulate);
    d_norm_weight = new_empty(first, {affine_layers, p.width}, accumulate);
    d_norm_bias = new_empty(first, {affine_layers, p.width}, accumulate);
    partial_dot = new_empty(first, {need_weights ? dot_partials : 0, p.layers}, accumulate);
    partial_scale = new_empty(first, {affine_partials, p.layers, p.width}, accumulate);
    partial_shift = new_empty(first, {affine_partials, p.width}, accumulate);

    args = {};
    args.mix = p;
    args.grad = grad.const_data_ptr();
    args.grad_batch_stride = stride_of(grad, 0);
    args.grad_frame_stride = stride_of(grad, 1);
    args.stats = p.norm ? stats.const_data_ptr() : nullptr;
    d_layers.reserve(wanted.size());
    for (const int64_t l : wanted) {
      STD_TORCH_CHECK(l >= 0 && l < p.layers, "wanted: expected layer indices below ", p.layers, ", got ", l);
      STD_TORCH_CHECK(args.d_layer[l] == nullptr, "wanted: expected every layer index once, got ", l,
                      " again");
      d_layers.push_back(new_empty(first, {p.batch, p.frames, p.width}, first.scalar_type()));
      args.d_layer[l] = d_layers.back().mutable_data_ptr();
    }
    args.need_weights = need_weights;
    args.need_affine = need_affine;
    args.partial_dot = partial_dot.mutable_data_ptr();
    args.partial_scale = partial_scale.mutable_data_ptr();
    args.partial_shift = partial_shift.mutable_data_ptr();
    args.d_weights = d_weights.mutable_data_ptr();
    args.d_norm_weight = d_norm_weight.mutable_data_ptr();
    args.d_norm_bias = d_norm_bias.mutable_data_ptr();
  }

  std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> outputs() const {
    return {d_weights, d_norm_weight, d_norm_bias, d_layers};
  }
};

}  // namespace mmk::glue
