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

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("layer_mix_fwd", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace mmk::glue
