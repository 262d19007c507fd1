#include "mmkernels/layer_project.h"

#include <algorithm>
#include <vector>

#include "cpu/activation.h"
#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

template <class A>
MMK_INLINE const A* input_row(const NormProductInput& x, int64_t row, int64_t tap) {
  return at<A>(x.data, row * x.row_stride + tap * x.tap_stride);
}

template <class A>
MMK_INLINE void stats(const NormProductStats& args, int64_t tap, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const A* x = input_row<A>(args.x, n, tap);
    const A* next = n + 1 < end ? input_row<A>(args.x, n + 1, tap) : x;
    const Moments<A> m = moments(x, next, args.shape.inputs, args.eps);
    A* out = at<A>(args.stats, 2 * (n * args.shape.taps + tap));
    out[0] = m.mean;
    out[1] = m.rstd;
  }
}

template <class A, Activation kActivation>
MMK_INLINE void activate_rows(const NormProductActivate& args, int64_t tap, const void* product,
                              int64_t first, int64_t begin, int64_t end) {
  const int64_t outputs = args.shape.outputs;
  const A* bias = at<A>(args.folded_bias, tap * outputs);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t i = n * args.shape.taps + tap;
    const A rstd = args.stats == nullptr ? A(1) : *at<A>(args.stats, 2 * i + 1);
    const A* x = at<A>(product, (n - first) * outputs);
    A* y = at<A>(args.y, i * outputs);
    A* preactivation = at<A>(args.preactivation, i * outputs);
    for (int64_t j = 0; j < outputs; ++j) {
      const A z = rstd * x[j] + bias[j];
      if (preactivation != nullptr) preactivation[j] = z;
      y[j] = activate(kActivation, z);
    }
  }
}

template <class A, Activation kActivation>
MMK_INLINE void gradient_chunk(const NormProductGradient& args, int64_t tap, int64_t chunk) {
  const NormProductShape& shape = args.shape;
  const int64_t outputs = shape.outputs;
  const A* bias = at<A>(args.folded_bias, tap * outputs);
  A* bias_sum = at<A>(args.partial_bias, (chunk * shape.taps + tap) * outputs);
  std::vector<double> sum_of_rows(outputs, 0.0);
  const int64_t begin = chunk * kLayerProjectChunk;
  const int64_t end = std::min(shape.rows, begin + kLayerProjectChunk);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t i = n * shape.taps + tap;
    const A rstd = args.stats == nullptr ? A(1) : *at<A>(args.stats, 2 * i + 1);
    const A* grad = at<A>(args.grad, i * outputs);
    const A* value = at<A>(args.value, i * outputs);
    A* scaled = at<A>(args.scaled_grad, n * outputs);
    for (int64_t j = 0; j < outputs; ++j) {
      const A dz = grad[j] * activation_slope(kActivation, value[j]);
      sum_of_rows[j] += static_cast<double>(dz);
      scaled[j] = dz * rstd;
    }
    if (args.pull == nullptr) continue;
    // For relu, value is the output: it equals z except where dz is 0.
    const A sum = sum_over<A>(
        outputs, [&](int64_t j) MMK_LAMBDA { return load(scaled + j) * (load(value + j) - load(bias + j)); },
        [&](int64_t j) MMK_LAMBDA { return scaled[j] * (value[j] - bias[j]); });
    *at<A>(args.pull, i) = rstd / static_cast<A>(shape.inputs) * sum;
  }
  for (int64_t j = 0; j < outputs; ++j) bias_sum[j] = static_cast<A>(sum_of_rows[j]);
}

template <class A>
MMK_INLINE void input_gradient(const NormProductInputGradient& args, int64_t tap, const void* product,
                               int64_t first, int64_t begin, int64_t end) {
  const int64_t inputs = args.shape.inputs;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t i = n * args.shape.taps + tap;
    const A* g = at<A>(product, (n - first) * inputs);
    A* dx = at<A>(args.dx, i * inputs);
    if (args.pull == nullptr) {
      std::copy(g, g + inputs, dx);
      continue;
    }
    const A mean = *at<A>(args.stats, 2 * i);
    const A pull = *at<A>(args.pull, i);
    const A* x = input_row<A>(args.x, n, tap);
    for (int64_t j = 0; j < inputs; ++j) dx[j] = g[j] - pull * (x[j] - mean);
  }
}

}  // namespace

MMK_MULTIARCH void layer_project_stats(DType dtype, const NormProductStats& args, int64_t tap, int64_t begin,
                                       int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { stats<decltype(element)>(args, tap, begin, end); });
}

MMK_MULTIARCH void layer_project_activate(DType dtype, const NormProductActivate& args, int64_t tap,
                                          const void* product, int64_t first, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
      activate_rows<decltype(element), decltype(activation)::value>(args, tap, product, first, begin, end);
    });
  });
}

MMK_MULTIARCH void layer_project_gradient(DType dtype, const NormProductGradient& args, int64_t tap,
                                          int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        gradient_chunk<decltype(element), decltype(activation)::value>(args, tap, chunk);
      }
    });
  });
}

MMK_MULTIARCH void layer_project_input_gradient(DType dtype, const NormProductInputGradient& args,
                                                int64_t tap, const void* product, int64_t first,
                                                int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    input_gradient<decltype(element)>(args, tap, product, first, begin, end);
  });
}

}  // namespace mmk::cpu
