// Mean and 1 / standard deviation of a row, in two passes, so that a large mean costs no precision.
#pragma once

#include "cuda/common/row_ring.cuh"
#include "cuda/common/rows.cuh"

namespace mmk {

template <class Shape, class Body>
MMK_DEVICE void for_each_element(int width, Body&& body) {
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) {
      if (Shape::inside(v, i, width)) body(v, i);
    }
  }
}

// Subtracts the mean from a row in registers, and returns its moments, which are finite for an empty row.
// Calls may follow each other, but must not mix with other calls of row_sums_in_turn.
template <class Shape>
MMK_DEVICE float2 centre(typename Shape::Part& x, int width, float eps) {
  const float inverse = 1.0f / static_cast<float>(max(width, 1));
  float sum[1] = {0.0f};
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) sum[0] += x[v][i];
  }
  row_sums_in_turn<Shape::kThreads>(sum, 0);
  const float mean = sum[0] * inverse;
  float square[1] = {0.0f};
  for_each_element<Shape>(width, [&](int v, int i) {
    x[v][i] -= mean;
    square[0] += x[v][i] * x[v][i];
  });
  row_sums_in_turn<Shape::kThreads>(square, 1);
  return {mean, rsqrtf(square[0] * inverse + eps)};
}

// The moments of a row too wide for the registers; the second pass reads it from a cache.
template <class T, bool kAligned>
MMK_DEVICE float2 wide_moments(const T* row, int64_t width, float eps) {
  constexpr int kWidth = kVectorWidth<T>;
  float sum = 0.0f;
  for_each_vector<kWideThreads, kAligned>(row, width, [&](int64_t, const Vec<float, kWidth>& x) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i];
  });
  const float mean = block_sum<kWideThreads>(sum) / static_cast<float>(width);
  float square = 0.0f;
  for_each_vector<kWideThreads, kAligned>(row, width, [&](int64_t column, const Vec<float, kWidth>& x) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (column + i < width) square += (x[i] - mean) * (x[i] - mean);
    }
  });
  return {mean, rsqrtf(block_sum<kWideThreads>(square) / static_cast<float>(width) + eps)};
}

}  // namespace mmk
