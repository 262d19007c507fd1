// Work on one row: loops over its vectors and its tail, and its mean and variance.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace mmk::cpu {

// Calls main(j) for whole vectors and tail(j) for the rest of [0, width).
template <class A, class Main, class Tail>
MMK_INLINE void sweep(int64_t width, Main&& main, Tail&& tail) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) main(j);
  for (; j < width; ++j) tail(j);
}

template <class A>
struct Moments {
  A mean;
  A rstd;
};

// Two passes over the row: the second one reads it from the L1 cache, and no cancellation occurs for a large mean.
template <class T>
MMK_INLINE Moments<acc_t<T>> moments(const T* x, int64_t width, double eps) {
  using A = acc_t<T>;
  vec_t<A> sum0 = {}, sum1 = {};
  A rest = 0;
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>) {
    sum0 += load(x + j);
    sum1 += load(x + j + kLanes<A>);
  }
  for (; j < width; ++j) rest += convert(x[j]);
  const A mean = (sum_lanes<A>(sum0 + sum1) + rest) / static_cast<A>(width);
  vec_t<A> square0 = {}, square1 = {};
  rest = 0;
  j = 0;
  for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>) {
    const vec_t<A> d0 = load(x + j) - mean;
    const vec_t<A> d1 = load(x + j + kLanes<A>) - mean;
    square0 += d0 * d0;
    square1 += d1 * d1;
  }
  for (; j < width; ++j) rest += (convert(x[j]) - mean) * (convert(x[j]) - mean);
  const A variance = (sum_lanes<A>(square0 + square1) + rest) / static_cast<A>(width);
  return {mean, A(1) / std::sqrt(variance + static_cast<A>(eps))};
}

}  // namespace mmk::cpu
