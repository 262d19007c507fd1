// Shared by the forward and the backward kernels of cif.
#pragma once

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/scan.cuh"
#include "mmkernels/cif.h"

namespace mmk::cuda {

inline constexpr int kCifThreads = 256;
inline constexpr int kCifWarps = kCifThreads / kWarpSize;

// Elements of a row that a lane takes at a time: 16 or 32 bytes.
inline constexpr int kCifColumns = 8;
template <class T>
inline constexpr int kCifVectors = kCifColumns / kVectorWidth<T>;
inline constexpr int kCifWarpColumns = kWarpSize * kCifColumns;

MMK_DEVICE int64_t cif_length(const CifParams& params, int64_t row) {
  if (params.lengths == nullptr) return params.frames;
  return min(max(params.lengths[row], int64_t{0}), params.frames);
}

MMK_DEVICE double cif_weight(float alpha) {
  return alpha > 0.0f && alpha < INFINITY ? static_cast<double>(alpha) : 0.0;
}

// A lane's part of a row from `column` on.
template <class T>
using CifPart = Vec<T, kVectorWidth<T>>[kCifVectors<T>];

template <bool kAligned, class T>
MMK_DEVICE void load_part(CifPart<T>& part, const T* row, int64_t column, int64_t width) {
#pragma unroll
  for (int v = 0; v < kCifVectors<T>; ++v) {
    part[v] = load_columns<kAligned, kVectorWidth<T>>(row, column + v * kWarpSize * kVectorWidth<T>, width);
  }
}

template <class T>
MMK_DEVICE void add_part(float (&sum)[kCifColumns], float weight, const CifPart<T>& part) {
#pragma unroll
  for (int v = 0; v < kCifVectors<T>; ++v) {
#pragma unroll
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      sum[v * kVectorWidth<T> + i] += weight * to_accumulator(part[v][i]);
    }
  }
}

template <bool kAligned, class T>
MMK_DEVICE void store_part(T* row, int64_t column, int64_t width, const float (&sum)[kCifColumns]) {
#pragma unroll
  for (int v = 0; v < kCifVectors<T>; ++v) {
    Vec<float, kVectorWidth<T>> values;
#pragma unroll
    for (int i = 0; i < kVectorWidth<T>; ++i) values[i] = sum[v * kVectorWidth<T> + i];
    store_columns<kAligned>(row, column + v * kWarpSize * kVectorWidth<T>, width,
                            from_accumulator<T>(values));
  }
}

}  // namespace mmk::cuda
