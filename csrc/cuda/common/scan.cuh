// Scans over a block. The order of the operations is fixed.
#pragma once

#include "cuda/common/reduce.cuh"

namespace mmk {

// Combines this thread's value with those of all threads before it; `total` is that of all. All Threads
// threads of the block must call it. It ends with a barrier and needs none before.
template <int Threads, class T, class Combine>
MMK_DEVICE T block_inclusive_scan(T value, T& total, Combine combine) {
  static_assert(Threads % kWarpSize == 0 && Threads <= 1024, "whole warps");
  constexpr int kWarps = Threads / kWarpSize;
  MMK_SHARED(T, totals, kWarps);
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T before = __shfl_up_sync(kFullMask, value, offset);
    if (lane_index() >= offset) value = combine(before, value);
  }
  if (lane_index() == kWarpSize - 1) totals[warp_index()] = value;
  __syncthreads();
  T result = value;
  total = totals[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    if (warp == warp_index()) result = combine(total, value);
    total = combine(total, totals[warp]);
  }
  __syncthreads();
  return result;
}

}  // namespace mmk
