#include "torch/cuda.h"
#include "torch/layer_mix.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor> forward(const std::vector<Tensor>& layers, const Tensor& weights,
                                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                   const OptionalTensor& lengths, bool norm, double eps, bool save_stats) {
  STD_TORCH_CHECK(!layers.empty(), "layers: expected at least one tensor");
  const CudaScope scope(layers.front());
  const LayerMixInputs inputs(layers, weights, norm_weight, norm_bias, lengths, norm, eps);
  LayerMixForwardOutputs outputs = layer_mix_forward_outputs(inputs, save_stats);
  LayerMixForward args = layer_mix_forward_args(inputs, outputs);
  const bool shifted = norm && norm_bias.has_value();
  const Tensor mixed_bias = new_empty(layers.front(), {shifted ? args.mix.width : 0}, ScalarType::Float);
  if (shifted) args.mixed_bias = mixed_bias.mutable_data_ptr();
  check_launch(cuda::layer_mix_forward(args, scope.stream()), "layer_mix_fwd");
  return {outputs.out, outputs.stats};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const Tensor& grad, const std::vector<Tensor>& layers, const Tensor& weights,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& lengths,
    const Tensor& stats, bool norm, bool need_weights, bool need_affine, const std::vector<int64_t>& wanted) {
  STD_TORCH_CHECK(!layers.empty(), "layers: expected at least one tensor");
  const CudaScope scope(layers.front());
  const LayerMixInputs inputs(layers, weights, norm_weight, norm_bias, lengths, norm, 0.0);
  const LayerMixParams& p = inputs.params;
  const cuda::LayerMixBackwardPlan plan = cuda::layer_mix_backward_plan(
      p.dtype, p.batch * p.frames, p.width, p.layers, norm, need_weights, need_affine, !wanted.empty());
  const LayerMixGradients gradients(inputs, grad, stats, need_weights, need_affine, wanted, plan.dot_partials,
                                    plan.affine_partials);
  // The kernels read (mean, rstd) as float2.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(gradients.args.stats) % 8 == 0,
                  "stats: expected 8-byte alignment");
  check_launch(cuda::layer_mix_backward(gradients.args, scope.stream()), "layer_mix_bwd");
  return gradients.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("layer_mix_fwd", TORCH_BOX(&forward));
  m.impl("layer_mix_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
