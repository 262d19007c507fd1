#include "torch/layer_mix.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor> forward(const std::vector<Tensor>& layers, const Tensor& weights,
                                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                   const OptionalTensor& lengths, bool norm, double eps, bool save_stats) {
  const LayerMixInputs inputs(layers, weights, norm_weight, norm_bias, lengths, norm, eps);
  LayerMixForwardOutputs outputs = layer_mix_forward_outputs(inputs, save_stats);
  const LayerMixForward args = layer_mix_forward_args(inputs, outputs);
  const LayerMixParams& p = inputs.params;
  if (p.width > 0) {
    // Starting a thread pays off from about 32,000 elements on.
    const int64_t grain = 1 + 32768 / (p.layers * p.width);
    torch::stable::parallel_for(0, p.batch * p.frames, grain, [&](int64_t begin, int64_t end) {
      cpu::layer_mix_forward(args, begin, end);
    });
  }
  return {outputs.out, outputs.stats};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const Tensor& grad, const std::vector<Tensor>& layers, const Tensor& weights,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& lengths,
    const Tensor& stats, bool norm, bool need_weights, bool need_affine, const std::vector<int64_t>& wanted) {
  const LayerMixInputs inputs(layers, weights, norm_weight, norm_bias, lengths, norm, 0.0);
  const LayerMixParams& p = inputs.params;
  const LayerMixChunks chunks = layer_mix_chunks(p.batch * p.frames, need_affine);
  const LayerMixGradients gradients(inputs, grad, stats, need_weights, need_affine, wanted, chunks.chunks,
                                    chunks.chunks);
  const int64_t grain = 1 + 32768 / (1 + chunks.rows_per_chunk * p.layers * p.width);
  torch::stable::parallel_for(0, chunks.chunks, grain, [&](int64_t begin, int64_t end) {
    cpu::layer_mix_backward(gradients.args, begin, end);
  });
  cpu::layer_mix_reduce(gradients.args);
  return gradients.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("layer_mix_fwd", TORCH_BOX(&forward));
  m.impl("layer_mix_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
