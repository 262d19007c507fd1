// Shared by the forward and the backward kernels of norm_product.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/norm_product.h"

namespace mmk::cuda {

inline constexpr int kNormProductThreads = 256;
inline constexpr int kNormProductWarps = kNormProductThreads / kWarpSize;

// Row `index` = n * taps + tap of x.
template <class T>
MMK_DEVICE const T* input_row(const NormProductInput& x, int64_t taps, int64_t index) {
  const int64_t n = index / taps;
  return static_cast<const T*>(x.data) + n * x.row_stride + (index - n * taps) * x.tap_stride;
}

template <class T>
bool rows_aligned(const void* data, int64_t width) {
  return is_vector_aligned(static_cast<const T*>(data), width, kVectorWidth<T>);
}

template <class T>
bool rows_aligned(const NormProductInput& x, int64_t inputs) {
  return rows_aligned<T>(x.data, inputs) && x.row_stride % kVectorWidth<T> == 0 &&
         x.tap_stride % kVectorWidth<T> == 0;
}

// The grid of kernels with one thread per vector of (rows, width); false if no GPU accepts it.
template <class T>
bool vector_grid(int64_t rows, int64_t width, int64_t* vectors_per_row, dim3* grid) {
  *vectors_per_row = ceil_div<int64_t>(width, kVectorWidth<T>);
  return make_grid(ceil_div<int64_t>(rows * *vectors_per_row, kNormProductThreads), grid);
}

// Mean and 1 / standard deviation of row n * taps + tap; 0 and 1 without norm.
MMK_DEVICE float2 moments_of(const NormProductActivate& args, int64_t index) {
  return args.stats == nullptr ? float2{0.0f, 1.0f} : __ldg(static_cast<const float2*>(args.stats) + index);
}

// Writes z and y = act(z) for columns of row n * taps + tap, from the product x Vc^T.
template <class T, bool kAligned, int kWidth>
MMK_DEVICE void finish_columns(const NormProductActivate& args, int64_t index, int64_t tap, int64_t column,
                               Vec<float, kWidth> value) {
  const int64_t outputs = args.shape.outputs;
  const float* bias = static_cast<const float*>(args.folded_bias) + tap * outputs;
  const float2 moments = moments_of(args, index);
  const auto shift = load_columns<kAligned, kWidth>(bias, column, outputs);
  Vec<float, kWidth> sum = {};
  if (args.folded_sum != nullptr) {
    sum = load_columns<kAligned, kWidth>(static_cast<const float*>(args.folded_sum) + tap * outputs, column,
                                         outputs);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = moments.y * (value[i] - moments.x * sum[i]) + shift[i];
  if (args.preactivation != nullptr) {
    T* preactivation = static_cast<T*>(args.preactivation) + index * outputs;
    store_columns<kAligned>(preactivation, column, outputs, from_accumulator<T>(value));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = activate(args.activation, value[i]);
  store_columns<kAligned>(static_cast<T*>(args.y) + index * outputs, column, outputs,
                          from_accumulator<T>(value));
}

}  // namespace mmk::cuda
