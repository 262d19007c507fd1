// Scans over a block, in a fixed order.
#pragma once

#include "cuda/common/reduce.cuh"

namespace mmk {

// Combines each thread's value with those of all threads before it in the block, and gives the block's total.
// All threads must call it. It ends with a barrier and needs none before, so that calls can follow each
// other.
template <int Threads, class T, class Combine>
MMK_DEVICE T block_scan(T value, Combine combine, T* total) {
  static_assert(Threads % kWarpSize == 0 && Threads <= 1024, "whole warps");
  constexpr int kWarps = Threads / kWarpSize;
  const int lane = lane_index();
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T before = __shfl_up_sync(kFullMask, value, offset);
    if (lane >= offset) value = combine(before, value);
  }
  MMK_SHARED(T, of_warp, kWarps);
  if (lane == kWarpSize - 1) of_warp[warp_index()] = value;
  __syncthreads();
  T sum = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    if (warp == warp_index()) value = combine(sum, value);
    sum = combine(sum, of_warp[warp]);
  }
  *total = sum;
  __syncthreads();
  return value;
}

}  // namespace mmk
