// C = A B on tensor cores: A (m, k), B (k, n), C (m, n) fp32, all row-major; n and k multiples of 64 and 16.
// Two stages of cp.async in dynamic shared memory; rows of A past m are filled with zeros.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/vector.cuh"

namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 128;
constexpr int kStages = 2;
// 16 bytes of padding put the eight rows that ldmatrix reads at once into different banks.
constexpr int kStrideA = kDepth + 8;
constexpr int kStrideB = kTile + 8;

template <class T>
struct Stage {
  T a[kTile][kStrideA];
  T b[kDepth][kStrideB];
};

template <class T>
__device__ void load_stage(Stage<T>& stage, const T* a, const T* b, int64_t m, int64_t n, int64_t k,
                           int64_t depth) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.x / 2;
  const int part = static_cast<int>(threadIdx.x) % 2 * 8;
  const bool valid = row < m;
  mmk::cp_async_zfill<16>(&stage.a[threadIdx.x / 2][part], a + (valid ? row : 0) * k + depth + part, valid);
  const int line = static_cast<int>(threadIdx.x) / 8;
  const int column = static_cast<int>(threadIdx.x) % 8 * 8;
  mmk::cp_async<16>(&stage.b[line][column], b + (depth + line) * n + blockIdx.x * kTile + column);
}

// Each of the four warps computes a 32x32 quarter of the tile: 2 x 4 mma tiles.
template <class T>
__device__ void multiply_stage(const Stage<T>& stage, float (&sums)[2][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / 2 * 32;
  const int column = warp % 2 * 32;
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) mmk::ldmatrix<4>(a[i], &stage.a[row + 16 * i + lane % 16][lane / 16 * 8]);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t b[2];
    mmk::ldmatrix<2, true>(b, &stage.b[lane % 16][column + 8 * j]);
#pragma unroll
    for (int i = 0; i < 2; ++i) mmk::mma_m16n8k16<T>(sums[i][j], a[i], b);
  }
}

template <class T>
__device__ void store_tile(float* c, const float (&sums)[2][4][4], int64_t m, int64_t n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row =
            static_cast<int64_t>(blockIdx.y) * kTile + warp / 2 * 32 + 16 * i + lane / 4 + 8 * half;
        const int64_t column =
            static_cast<int64_t>(blockIdx.x) * kTile + warp % 2 * 32 + 8 * j + lane % 4 * 2;
        if (row < m) {
          mmk::store(c + row * n + column,
                     mmk::Vec<float, 2>{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}});
        }
      }
    }
  }
}

// With !Waits it reads data that may still be in flight.
template <class T, bool Waits>
__global__ void __launch_bounds__(kThreads) gemm(const T* __restrict__ a, const T* __restrict__ b,
                                                 float* __restrict__ c, int64_t m, int64_t n, int64_t k) {
  MMK_DYNAMIC_SMEM(Stage<T>, stages);
  float sums[2][4][4] = {};
  load_stage(stages[0], a, b, m, n, k, 0);
  mmk::cp_async_commit_group();
  for (int64_t depth = 0; depth < k; depth += kDepth) {
    const int64_t next = depth + kDepth;
    if (next < k) load_stage(stages[next / kDepth % kStages], a, b, m, n, k, next);
    mmk::cp_async_commit_group();
    if constexpr (Waits) mmk::cp_async_wait_group<1>();
    __syncthreads();
    multiply_stage(stages[depth / kDepth % kStages], sums);
    __syncthreads();
  }
  mmk::cp_async_wait_all();
  store_tile<T>(c, sums, m, n);
}

template <class T, bool Waits = true>
cudaError_t run(const T* a, const T* b, float* c, int64_t m, int64_t n, int64_t k) {
  const dim3 grid(n / kTile, mmk::ceil_div<int64_t>(m, kTile));
  return mmk::launch(gemm<T, Waits>, grid, dim3(kThreads), kStages * sizeof(Stage<T>), nullptr, a, b, c, m, n,
                     k);
}

}  // namespace

extern "C" int gemm_half(const __half* a, const __half* b, float* c, int64_t m, int64_t n, int64_t k) {
  return run(a, b, c, m, n, k);
}
extern "C" int gemm_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int64_t m, int64_t n,
                             int64_t k) {
  return run(a, b, c, m, n, k);
}
extern "C" int gemm_without_wait(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int64_t m,
                                 int64_t n, int64_t k) {
  return run<__nv_bfloat16, false>(a, b, c, m, n, k);
}
