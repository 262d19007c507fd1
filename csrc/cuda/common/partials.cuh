// The second stage of a sum over rows: partial sums [count, width], added in double and in a fixed order.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/vector.cuh"

namespace mmk {

inline constexpr int kPartialThreads = 256;

// The sum of column[i * stride] over i < count, by a block of kPartialThreads: thread t has the column of
// place t % kColumns in the block, and the threads of one column share its rows. All threads must call it;
// those with the same place get the same sum. It ends with a barrier.
template <int kColumns>
MMK_DEVICE double sum_partials(const float* column, int64_t count, int64_t stride, bool inside) {
  constexpr int kParts = kPartialThreads / kColumns;
  constexpr int kSums = 4;  // their loads are in flight together
  static_assert(kPartialThreads % kColumns == 0, "the same number of threads for each column");
  const int place = static_cast<int>(threadIdx.x) % kColumns;
  const int part = static_cast<int>(threadIdx.x) / kColumns;
  double sums[kSums] = {};
  const int64_t step = kParts * stride;
  const float* row = column + part * stride;
  // Past the end the thread rereads the first row of the step: a branch would wait for each load.
  int left = inside ? static_cast<int>(ceil_div<int64_t>(count - part, kParts)) : 0;
#pragma unroll 1
  for (; left > 0; left -= kSums, row += kSums * step) {
    float values[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] = __ldg(row + (i < left ? i * step : 0));
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += i < left ? values[i] : 0.0f;
  }
  MMK_SHARED(double, parts, kParts, kColumns);
  parts[part][place] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  __syncthreads();
  double total = 0.0;
#pragma unroll 8
  for (int i = 0; i < kParts; ++i) total += parts[i][place];
  __syncthreads();
  return total;
}

template <int kColumns, class P>
__global__ void __launch_bounds__(kPartialThreads)
    add_partials(const float* partial, int64_t count, int64_t width, float scale, P* result) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = column < width;
  const double total = sum_partials<kColumns>(partial + column, count, width, inside);
  if (inside && threadIdx.x < kColumns) {
    result[column] = from_accumulator<P>(static_cast<float>(scale * total));
  }
}

// result[j] = scale * sum_i partial[i * width + j]. A block sums kColumns neighbouring columns: few for long
// sums of few columns.
template <int kColumns = kWarpSize, class P>
cudaError_t reduce_partials(const void* partial, int64_t count, int64_t width, double scale, P* result,
                            cudaStream_t stream) {
  if (width == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(width, kColumns), &grid)) return cudaErrorInvalidConfiguration;
  return launch(add_partials<kColumns, P>, grid, dim3(kPartialThreads), 0, stream,
                static_cast<const float*>(partial), count, width, static_cast<float>(scale), result);
}

}  // namespace mmk
