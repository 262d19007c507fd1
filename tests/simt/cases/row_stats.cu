// Mean and largest absolute value of each row: vector loads with a scalar tail, warp and block reductions.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace {

template <int Threads, class T>
__global__ void __launch_bounds__(Threads) row_stats(const T* __restrict__ x, float* __restrict__ mean,
                                                     float* __restrict__ largest, int64_t columns) {
  constexpr int kWidth = mmk::kVectorWidth<T>;
  const T* row = x + blockIdx.x * columns;
  float sum = 0.0f;
  float top = 0.0f;
  const int64_t in_vectors = mmk::rows_aligned<T, kWidth>(row) ? columns / kWidth * kWidth : 0;
  for (int64_t i = threadIdx.x * kWidth; i < in_vectors; i += Threads * kWidth) {
    const auto values = mmk::to_accumulator(mmk::load_streaming<kWidth>(row + i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      sum += values[j];
      top = mmk::Max()(top, fabsf(values[j]));
    }
  }
  for (int64_t i = in_vectors + threadIdx.x; i < columns; i += Threads) {
    const float value = mmk::to_accumulator(row[i]);
    sum += value;
    top = mmk::Max()(top, fabsf(value));
  }
  sum = mmk::block_sum<Threads>(sum);
  top = mmk::block_max<Threads>(top);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = sum / static_cast<float>(columns);
    largest[blockIdx.x] = top;
  }
}

template <class T>
cudaError_t run(const void* x, float* mean, float* largest, int64_t rows, int64_t columns) {
  constexpr int kThreads = 128;
  return mmk::launch(row_stats<kThreads, T>, dim3(rows), dim3(kThreads), 0, nullptr, static_cast<const T*>(x),
                     mean, largest, columns);
}

}  // namespace

extern "C" int row_stats_float(const void* x, float* mean, float* largest, int64_t rows, int64_t columns) {
  return run<float>(x, mean, largest, rows, columns);
}
extern "C" int row_stats_half(const void* x, float* mean, float* largest, int64_t rows, int64_t columns) {
  return run<__half>(x, mean, largest, rows, columns);
}
extern "C" int row_stats_bfloat16(const void* x, float* mean, float* largest, int64_t rows, int64_t columns) {
  return run<__nv_bfloat16>(x, mean, largest, rows, columns);
}
