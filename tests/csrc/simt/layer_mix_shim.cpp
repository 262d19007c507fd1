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
