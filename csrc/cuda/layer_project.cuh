// Shared by the forward and the backward kernels of layer_project.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/layer_project.h"

namespace mmk::cuda {

inline constexpr int kProjectThreads = 256;
inline constexpr int kProjectWarps = kProjectThreads / kWarpSize;

// Row `index` = n * taps + tap of x.
template <class T>
MMK_DEVICE const T* input_row(const LayerProjectInput& x, int64_t taps, int64_t index) {
  const int64_t n = index / taps;
  return static_cast<const T*>(x.data) + n * x.row_stride + (index - n * taps) * x.tap_stride;
}

template <class T>
bool rows_aligned(const void* data, int64_t width) {
  return is_vector_aligned(static_cast<const T*>(data), width, kVectorWidth<T>);
}

template <class T>
bool rows_aligned(const LayerProjectInput& x, int64_t inputs) {
  return rows_aligned<T>(x.data, inputs) && x.row_stride % kVectorWidth<T> == 0 &&
         x.tap_stride % kVectorWidth<T> == 0;
}

// The grid of kernels with one thread per vector of (rows, width); false if no GPU accepts it.
template <class T>
bool vector_grid(int64_t rows, int64_t width, int64_t* vectors_per_row, dim3* grid) {
  *vectors_per_row = ceil_div<int64_t>(width, kVectorWidth<T>);
  return make_grid(ceil_div<int64_t>(rows * *vectors_per_row, kProjectThreads), grid);
}

}  // namespace mmk::cuda
