// The launchers of layer_mix with arguments that ctypes can pass: arrays of pointers and strides instead of
// structures.
#include <algorithm>
#include <cstdint>

#include "mmkernels/layer_mix.h"

namespace {

mmk::LayerMixParams make_params(const int64_t* sizes, const void* const* layers, const int64_t* strides,
                                const int64_t* lengths, const float* weights, const float* norm_weight,
                                const float* norm_bias, double eps) {
  mmk::LayerMixParams p = {};
  p.dtype = static_cast<mmk::DType>(sizes[0]);
  p.layers = static_cast<int32_t>(sizes[1]);
  p.batch = sizes[2];
  p.frames = sizes[3];
  p.width = sizes[4];
  p.norm = sizes[5] != 0;
  for (int l = 0; l < p.layers; ++l) {
    p.layer[l] = layers[l];
    p.batch_stride[l] = strides[2 * l];
    p.frame_stride[l] = strides[2 * l + 1];
  }
  p.lengths = lengths;
  p.weights = weights;
  p.norm_weight = norm_weight;
  p.norm_bias = norm_bias;
  p.eps = eps;
  return p;
}

}  // namespace

// sizes: dtype, layers, batch, frames, width, norm
extern "C" int layer_mix_forward(const int64_t* sizes, const void* const* layers, const int64_t* strides,
                                 const int64_t* lengths, const float* weights, const float* norm_weight,
                                 const float* norm_bias, double eps, void* out, float* stats,
                                 float* mixed_bias) {
  const mmk::LayerMixParams p =
      make_params(sizes, layers, strides, lengths, weights, norm_weight, norm_bias, eps);
  return mmk::cuda::layer_mix_forward({p, out, stats, mixed_bias}, nullptr);
}

// need: weights, affine; d_layers: null if not needed
extern "C" int layer_mix_backward(const int64_t* sizes, const void* const* layers, const int64_t* strides,
                                  const int64_t* lengths, const float* weights, const float* norm_weight,
                                  const float* norm_bias, const void* grad, const int64_t* grad_strides,
                                  const float* stats, void* const* d_layers, const int64_t* need,
                                  float* partial_dot, float* partial_scale, float* partial_shift,
                                  float* d_weights, float* d_norm_weight, float* d_norm_bias) {
  mmk::LayerMixBackward args = {};
  args.mix = make_params(sizes, layers, strides, lengths, weights, norm_weight, norm_bias, 0.0);
  args.grad = grad;
  args.grad_batch_stride = grad_strides[0];
  args.grad_frame_stride = grad_strides[1];
  args.stats = stats;
  std::copy(d_layers, d_layers + args.mix.layers, args.d_layer);
  args.need_weights = need[0] != 0;
  args.need_affine = need[1] != 0;
  args.partial_dot = partial_dot;
  args.partial_scale = partial_scale;
  args.partial_shift = partial_shift;
  args.d_weights = d_weights;
  args.d_norm_weight = d_norm_weight;
  args.d_norm_bias = d_norm_bias;
  return mmk::cuda::layer_mix_backward(args, nullptr);
}

namespace {

mmk::cuda::LayerMixBackwardPlan plan_of(const int64_t* sizes, const int64_t* need) {
  return mmk::cuda::layer_mix_backward_plan(static_cast<mmk::DType>(sizes[0]), sizes[2] * sizes[3], sizes[4],
                                            static_cast<int32_t>(sizes[1]), sizes[5] != 0, need[0] != 0,
                                            need[1] != 0, need[2] != 0);
}

}  // namespace

// need: weights, affine, layers; sizes as above. result: dot partials, affine partials
extern "C" int layer_mix_partials(const int64_t* sizes, const int64_t* need, int64_t* result) {
  const mmk::cuda::LayerMixBackwardPlan plan = plan_of(sizes, need);
  result[0] = plan.dot_partials;
  result[1] = plan.affine_partials;
  return 0;
}

// result: rows and number of the blocks of the gradients, rows and number of the chunks of the sums, blocks
// of the sums
extern "C" int layer_mix_plan(const int64_t* sizes, const int64_t* need, int64_t* result) {
  const mmk::cuda::LayerMixBackwardPlan plan = plan_of(sizes, need);
  const int64_t values[] = {plan.rows_per_block, plan.gradient_blocks, plan.sum_plan.rows_per_chunk,
                            plan.sum_plan.chunks, plan.sum_plan.blocks()};
  for (int i = 0; i < 5; ++i) result[i] = values[i];
  return 0;
}
