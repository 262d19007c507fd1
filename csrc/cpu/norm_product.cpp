#include "mmkernels/norm_product.h"

#include <algorithm>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

template <class A>
MMK_INLINE void fold(const NormProductFold& args, int64_t begin, int64_t end) {
  const int64_t inputs = args.shape.inputs;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tap = i / args.shape.outputs;
    const A* weight = at<A>(args.weight, i * inputs);
    const A* gain = at<A>(args.norm_weight, tap * inputs);
    const A* shift = at<A>(args.norm_bias, tap * inputs);
    A bias = args.bias == nullptr ? A(0) : *at<A>(args.bias, i);
    if (shift != nullptr) bias += dot(weight, shift, inputs);
    *at<A>(args.folded_bias, i) = bias;
    if (gain == nullptr) continue;
    A* folded = at<A>(args.folded_weight, i * inputs);
    const A mean = dot(weight, gain, inputs) / static_cast<A>(inputs);
    for (int64_t j = 0; j < inputs; ++j) folded[j] = weight[j] * gain[j] - mean;
  }
}

template <class A>
MMK_INLINE void unfold_tap(const NormProductUnfold& args, int64_t tap) {
  const NormProductShape& shape = args.shape;
  const int64_t inputs = shape.inputs;
  const A* gain = at<A>(args.norm_weight, tap * inputs);
  const A* shift = at<A>(args.norm_bias, tap * inputs);
  A* d_gain = at<A>(args.d_norm_weight, tap * inputs);
  A* d_shift = at<A>(args.d_norm_bias, tap * inputs);
  if (d_gain != nullptr) std::fill(d_gain, d_gain + inputs, A(0));
  if (d_shift != nullptr) std::fill(d_shift, d_shift + inputs, A(0));
  for (int64_t o = 0; o < shape.outputs; ++o) {
    const int64_t i = tap * shape.outputs + o;
    double sum = 0;
    for (int64_t c = 0; c < args.chunks; ++c) {
      sum += static_cast<double>(*at<A>(args.partial_bias, c * shape.taps * shape.outputs + i));
    }
    const A d_bias = static_cast<A>(sum);
    *at<A>(args.d_bias, i) = d_bias;
    const A* weight = at<A>(args.weight, i * inputs);
    A* d_weight = at<A>(args.d_weight, i * inputs);
    if (d_shift != nullptr) {
      for (int64_t j = 0; j < inputs; ++j) d_shift[j] += d_bias * weight[j];
    }
    if (d_weight == nullptr || gain == nullptr) continue;
    double total = 0;
    for (int64_t j = 0; j < inputs; ++j) total += static_cast<double>(d_weight[j]);
    const A mean = static_cast<A>(total / static_cast<double>(inputs));
    for (int64_t j = 0; j < inputs; ++j) {
      const A d_product = d_weight[j] - mean;
      if (d_gain != nullptr) d_gain[j] += d_product * weight[j];
      d_weight[j] = d_product * gain[j] + (shift == nullptr ? A(0) : d_bias * shift[j]);
    }
  }
}

}  // namespace

MMK_MULTIARCH void norm_product_fold(DType dtype, const NormProductFold& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { fold<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void norm_product_unfold(DType dtype, const NormProductUnfold& args, int64_t begin,
                                       int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t tap = begin; tap < end; ++tap) unfold_tap<decltype(element)>(args, tap);
  });
}

}  // namespace mmk::cpu
