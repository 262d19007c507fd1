// Shared by the forward and the backward kernels of norm_product.
#pragma once

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
bool input_aligned(const NormProductInput& x, int64_t inputs) {
  return rows_aligned<T>(x.data, inputs, x.row_stride, x.tap_stride);
}

// The grid of kernels with one thread per vector of (rows, width); false if no GPU accepts it.
template <class T>
bool vector_grid(int64_t rows, int64_t width, int64_t* vectors_per_row, dim3* grid) {
  *vectors_per_row = ceil_div<int64_t>(width, kVectorWidth<T>);
  return make_grid(ceil_div<int64_t>(rows * *vectors_per_row, kNormProductThreads), grid);
}

}  // namespace mmk::cuda
