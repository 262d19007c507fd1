// Reductions over a warp and over a block. The order of the operations is fixed: every run gives the same
// bits, and all participating threads get the same value.
#pragma once

#include "cuda/common/platform.cuh"

namespace mmk {

MMK_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}
MMK_DEVICE int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

struct Sum {
  template <class T>
  MMK_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// Propagates NaN as torch.amax does; fmaxf would drop it.
struct Max {
  template <class T>
  MMK_DEVICE T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Combines the values of each group of Lanes neighbouring lanes (a power of two). All lanes of the warp must
// call it.
template <int Lanes = kWarpSize, class T, class Combine>
MMK_DEVICE T warp_reduce(T value, Combine combine) {
  static_assert(Lanes >= 1 && Lanes <= kWarpSize && (Lanes & (Lanes - 1)) == 0, "a power of two up to 32");
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

template <int Lanes = kWarpSize, class T>
MMK_DEVICE T warp_sum(T value) {
  return warp_reduce<Lanes>(value, Sum());
}

template <int Lanes = kWarpSize, class T>
MMK_DEVICE T warp_max(T value) {
  return warp_reduce<Lanes>(value, Max());
}

// Reduces each of Count values over the Threads threads of a one-dimensional block. All threads must call it.
// It ends with a barrier and needs none before, so that calls can follow each other.
template <int Threads, int Count, class T, class Combine>
MMK_DEVICE void block_reduce(T (&values)[Count], Combine combine) {
  static_assert(Threads % kWarpSize == 0 && Threads <= 1024, "whole warps");
  constexpr int kWarps = Threads / kWarpSize;
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] = warp_reduce(values[i], combine);
  if constexpr (kWarps > 1) {
    MMK_SHARED(T, partial, kWarps, Count);
    if (lane_index() == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) partial[warp_index()][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      T total = partial[0][i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp][i]);
      values[i] = total;
    }
    __syncthreads();
  }
}

template <int Threads, class T>
MMK_DEVICE T block_sum(T value) {
  T values[1] = {value};
  block_reduce<Threads>(values, Sum());
  return values[0];
}

// Several sums that share the two barriers of one.
template <int Threads, int Count, class T>
MMK_DEVICE void block_sums(T (&values)[Count]) {
  block_reduce<Threads>(values, Sum());
}

template <int Threads, class T>
MMK_DEVICE T block_max(T value) {
  T values[1] = {value};
  block_reduce<Threads>(values, Max());
  return values[0];
}

}  // namespace mmk
