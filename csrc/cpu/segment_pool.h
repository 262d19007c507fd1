// Shared by the forward and the backward pass of segment_pool.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/rows.h"
#include "mmkernels/segment_pool.h"

namespace mmk::cpu {

// Columns of a piece processed at a time, so that their sums stay in the L1 cache.
inline constexpr int64_t kTile = 1024;

// As sweep. Narrower types take tail(j) everywhere: the compiler vectorises their conversions in loops only.
template <class T, class Main, class Tail>
MMK_INLINE void for_columns(int64_t width, Main&& main, Tail&& tail) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    sweep<T>(width, main, tail);
  } else {
    for (int64_t j = 0; j < width; ++j) tail(j);
  }
}

template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  MMK_INLINE const T* row(int64_t r) const { return data + r * stride; }
};

template <class T>
MMK_INLINE Rows<T> frames_of(const void* x, int64_t batch_stride, int64_t frame_stride,
                             const SegmentPiece& piece) {
  return {static_cast<const T*>(x) + piece.row * batch_stride + piece.first * frame_stride, frame_stride};
}

MMK_INLINE int64_t frames_of_segment(const SegmentPoolShape& shape, const int64_t* stops, int64_t row,
                                     int64_t segment) {
  const int64_t* stop = stops + row * shape.segments + segment;
  return stop[0] - (segment == 0 ? 0 : stop[-1]);
}

template <class A>
MMK_INLINE A mean_divisor(const SegmentPoolShape& shape, const int64_t* stops, int64_t row, int64_t segment) {
  if (shape.reduce != Reduction::kMean) return A(1);
  return static_cast<A>(std::max<int64_t>(frames_of_segment(shape, stops, row, segment), 1));
}

}  // namespace mmk::cpu
