// Planted faults; with the template parameter Fixed, each is repaired.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"

namespace {

constexpr int kThreads = 64;

// Reads a value that another thread wrote before.
template <bool Fixed>
__global__ void missing_barrier(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (Fixed) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Overwrites a value that another thread has yet to read. All memory is written, so no NaN shows.
template <bool Fixed>
__global__ void missing_second_barrier(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] * static_cast<float>(round + 1);
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if constexpr (Fixed) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Lanes of one warp exchange through shared memory.
template <bool Fixed>
__global__ void missing_warp_barrier(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (Fixed) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool Fixed>
__global__ void divergent_barrier(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (Fixed) {
    __syncthreads();
    out[threadIdx.x] = tile[0];
  } else if (threadIdx.x < 40) {
    __syncthreads();
    out[threadIdx.x] = tile[0];
  } else {
    __syncthreads();
    out[threadIdx.x] = tile[1];
  }
}

template <bool Fixed>
__global__ void lost_lanes(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (Fixed || threadIdx.x % 32 != 5) value += __shfl_xor_sync(mmk::kFullMask, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

// The lanes from 48 on have exited.
template <bool Fixed>
__global__ void exited_lanes(const float* in, float* out) {
  if (threadIdx.x >= 48 && !Fixed) return;
  out[threadIdx.x] = __shfl_xor_sync(mmk::kFullMask, in[threadIdx.x], 16);
}

template <bool Fixed>
__global__ void lane_not_in_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_sync(Fixed ? mmk::kFullMask : 0x7fffffffu, in[threadIdx.x], 0);
}

template <bool Fixed>
__global__ void unwritten_shared(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  if (Fixed || threadIdx.x != 7) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Fixed>
__global__ void past_static_shared(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x + (Fixed ? 0 : 1)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Fixed>
__global__ void past_dynamic_shared(const float* in, float* out) {
  MMK_DYNAMIC_SMEM(float, tile);
  tile[threadIdx.x + (Fixed ? 0 : 1)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

// 48 KiB of dynamic shared memory are allowed without opt-in, but not with static memory as well.
template <bool Fixed>
__global__ void no_opt_in(const float* in, float* out) {
  MMK_DYNAMIC_SMEM(float, rows);
  MMK_SHARED(float, tile, kThreads);
  rows[threadIdx.x] = in[threadIdx.x];
  tile[threadIdx.x] = rows[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Fixed>
__global__ void past_global(const float* in, float* out) {
  out[threadIdx.x + (Fixed ? 0 : 1)] = in[threadIdx.x];
}

template <bool Fixed>
__global__ void copy_not_awaited(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  mmk::cp_async<4>(&tile[threadIdx.x], in + threadIdx.x);
  mmk::cp_async_commit_group();
  if constexpr (Fixed) mmk::cp_async_wait_group<0>();
  out[threadIdx.x] = tile[threadIdx.x];
  mmk::cp_async_wait_all();
}

// Waits for the second to last group, but reads the last.
template <bool Fixed>
__global__ void wrong_group_awaited(const float* in, float* out) {
  MMK_SHARED(float, tile, 2, kThreads);
  for (int group = 0; group < 2; ++group) {
    mmk::cp_async<4>(&tile[group][threadIdx.x], in + threadIdx.x);
    mmk::cp_async_commit_group();
  }
  mmk::cp_async_wait_group<Fixed ? 0 : 1>();
  out[threadIdx.x] = tile[1][threadIdx.x];
  mmk::cp_async_wait_all();
}

template <bool Fixed>
__global__ void copy_left_behind(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads);
  mmk::cp_async<4>(&tile[threadIdx.x], in + threadIdx.x);
  if constexpr (Fixed) mmk::cp_async_wait_all();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Fixed>
__global__ void misaligned_copy(const float* in, float* out) {
  MMK_SHARED(float, tile, kThreads + 4);
  if (threadIdx.x == 3) {
    mmk::cp_async<16>(&tile[Fixed ? 0 : 1], in);
    mmk::cp_async_wait_all();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Fixed>
__global__ void partial_warp_matrix(const float* in, float* out) {
  MMK_SHARED(uint16_t, tile, 8, 8);
  if (threadIdx.x < 8) {
    for (int i = 0; i < 8; ++i) tile[threadIdx.x][i] = 0;
  }
  __syncthreads();
  uint32_t fragment[1] = {};
  if (Fixed || threadIdx.x < 16) mmk::ldmatrix<1>(fragment, tile[threadIdx.x % 8]);
  out[threadIdx.x] = in[threadIdx.x] + static_cast<float>(fragment[0]);
}

template <bool Fixed>
__global__ void endless_wait(const float* in, float* out) {
  MMK_SHARED(int, ready, 1);
  if (threadIdx.x == 0) ready[0] = 0;
  __syncthreads();
  if (threadIdx.x == 1 && Fixed) atomicExch(&ready[0], 1);
  while (threadIdx.x == 0 && atomicAdd(&ready[0], 0) == 0) {
  }
  out[threadIdx.x] = in[threadIdx.x];
}

using Kernel = void (*)(const float*, float*);

cudaError_t run(Kernel kernel, const float* in, float* out, size_t dynamic_smem_bytes = 0) {
  return mmk::launch(kernel, dim3(2), dim3(kThreads), dynamic_smem_bytes, nullptr, in, out);
}

__global__ void nothing(const float*, float*) {}

}  // namespace

#define FAULT(name)                                                         \
  extern "C" int name##_fault(const float* in, float* out, int64_t fixed) { \
    return run(fixed != 0 ? name<true> : name<false>, in, out);             \
  }

FAULT(missing_barrier)
FAULT(missing_second_barrier)
FAULT(missing_warp_barrier)
FAULT(divergent_barrier)
FAULT(lost_lanes)
FAULT(exited_lanes)
FAULT(lane_not_in_mask)
FAULT(unwritten_shared)
FAULT(past_static_shared)
FAULT(past_global)
FAULT(copy_not_awaited)
FAULT(wrong_group_awaited)
FAULT(copy_left_behind)
FAULT(misaligned_copy)
FAULT(partial_warp_matrix)
FAULT(endless_wait)

extern "C" int past_dynamic_shared_fault(const float* in, float* out, int64_t fixed) {
  return run(fixed != 0 ? past_dynamic_shared<true> : past_dynamic_shared<false>, in, out,
             kThreads * sizeof(float));
}

#ifdef MMK_SIMT  // mmk::launch always opts in
extern "C" int no_opt_in_fault(const float* in, float* out, int64_t fixed) {
  constexpr size_t kBytes = 48 * 1024;
  if (fixed != 0) return mmk::launch(no_opt_in<true>, dim3(1), dim3(kThreads), kBytes, nullptr, in, out);
  return mmk::simt::launch(false, no_opt_in<false>, dim3(1), dim3(kThreads), kBytes, nullptr, in, out);
}
#endif

// Dynamic shared memory besides 256 bytes of static.
extern "C" int static_and_dynamic(const float* in, float* out, int64_t dynamic_smem_bytes) {
  return mmk::launch(no_opt_in<true>, dim3(1), dim3(kThreads), static_cast<size_t>(dynamic_smem_bytes),
                     nullptr, in, out);
}

// A kernel that does nothing, to try launch geometries.
extern "C" int launch_nothing(int64_t grid_x, int64_t grid_y, int64_t grid_z, int64_t block_x,
                              int64_t block_y, int64_t block_z, int64_t dynamic_smem_bytes) {
  const auto extent = [](int64_t size) { return static_cast<unsigned>(size); };
  return mmk::launch(nothing, dim3(extent(grid_x), extent(grid_y), extent(grid_z)),
                     dim3(extent(block_x), extent(block_y), extent(block_z)), dynamic_smem_bytes, nullptr,
                     nullptr, nullptr);
}
