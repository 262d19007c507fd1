// Loops over the vectors and the tail of a row, and its mean and variance.
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

// Prefetches into the L2 cache: one row of every layer would not fit into L1.
template <class T>
MMK_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

template <class A>
struct Moments {
  A mean;
  A rstd;
};

// Sum of main(j) over vectors and tail(j) over the rest. Four independent sums hide the latency of additions.
// each(j) is called once for four vectors.
template <class A, class Main, class Tail, class Each>
MMK_INLINE A sum_over(int64_t width, Main&& main, Tail&& tail, Each&& each) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  vec_t<A> sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
  A rest = 0;
  int64_t j = 0;
  for (; j + kStep <= width; j += kStep) {
    each(j);
    sum0 += main(j);
    sum1 += main(j + kLanes<A>);
    sum2 += main(j + 2 * kLanes<A>);
    sum3 += main(j + 3 * kLanes<A>);
  }
  for (; j + kLanes<A> <= width; j += kLanes<A>) sum0 += main(j);
  for (; j < width; ++j) rest += tail(j);
  return sum_lanes<A>((sum0 + sum1) + (sum2 + sum3)) + rest;
}

template <class A, class Main, class Tail>
MMK_INLINE A sum_over(int64_t width, Main&& main, Tail&& tail) {
  return sum_over<A>(width, main, tail, [](int64_t) MMK_LAMBDA {});
}

// Two passes over the row, so that a large mean does not cancel; the second reads it from the L1 cache. Each
// pass prefetches one half of `next`, the row read after x: the hardware prefetcher cannot follow rows that
// lie far apart, and spreading the requests keeps the memory busy without a burst.
template <class T>
MMK_INLINE Moments<acc_t<T>> moments(const T* x, const T* next, int64_t width, double eps) {
  using A = acc_t<T>;
  const A inverse = A(1) / static_cast<A>(width > 0 ? width : 1);
  const A mean = inverse * sum_over<A>(
                               width, [&](int64_t j) MMK_LAMBDA { return load(x + j); },
                               [&](int64_t j) MMK_LAMBDA { return convert(x[j]); },
                               [&](int64_t j) MMK_LAMBDA { prefetch(next + j / 2); });
  const A variance = inverse * sum_over<A>(
                                   width,
                                   [&](int64_t j) MMK_LAMBDA {
                                     const vec_t<A> d = load(x + j) - mean;
                                     return d * d;
                                   },
                                   [&](int64_t j) MMK_LAMBDA {
                                     const A d = convert(x[j]) - mean;
                                     return d * d;
                                   },
                                   [&](int64_t j) MMK_LAMBDA { prefetch(next + (width + j) / 2); });
  return {mean, A(1) / std::sqrt(variance + static_cast<A>(eps))};
}

template <class A>
MMK_INLINE A dot(const A* a, const A* b, int64_t width) {
  return sum_over<A>(
      width, [&](int64_t j) MMK_LAMBDA { return load(a + j) * load(b + j); },
      [&](int64_t j) MMK_LAMBDA { return a[j] * b[j]; });
}

template <class A>
MMK_INLINE A sum(const A* a, int64_t width) {
  return sum_over<A>(
      width, [&](int64_t j) MMK_LAMBDA { return load(a + j); }, [&](int64_t j) MMK_LAMBDA { return a[j]; });
}

}  // namespace mmk::cpu
