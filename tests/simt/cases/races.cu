// Planted races; with the template parameter Fixed, each is repaired. Most give the right result in every
// order of threads.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 2;

MMK_DEVICE int place() {
  return static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
}

template <bool Fixed>
__global__ void read_before_barrier(const float* in, float* out, float*) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (Fixed) __syncthreads();
  out[place()] = tile[kThreads - 1 - threadIdx.x];
}

// Overwrites a value that another thread may have yet to read.
template <bool Fixed>
__global__ void write_before_barrier(const float* in, float* out, float*) {
  MMK_SHARED(float, tile, kThreads);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    sum += tile[(threadIdx.x + 32) % kThreads];
    if constexpr (Fixed) __syncthreads();
  }
  out[place()] = sum;
}

// All threads write the same value to the same place: a race all the same.
template <bool Fixed>
__global__ void same_value(const float* in, float* out, float*) {
  MMK_SHARED(float, value, 1);
  if (!Fixed || threadIdx.x == 0) value[0] = in[0];
  __syncthreads();
  out[place()] = value[0];
}

// A shuffle makes lanes meet, but orders none of their accesses.
template <bool Fixed>
__global__ void shuffle_for_barrier(const float* in, float* out, float*) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  const float other = __shfl_xor_sync(mmk::kFullMask, in[threadIdx.x], 1);
  if constexpr (Fixed) __syncwarp();
  out[place()] = tile[threadIdx.x ^ 1] + other;
}

// The lanes of each half meet, but read what the other half wrote.
template <bool Fixed>
__global__ void barrier_of_half_a_warp(const float* in, float* out, float*) {
  MMK_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  __syncwarp(Fixed ? mmk::kFullMask : half);
  out[place()] = tile[threadIdx.x ^ 16];
}

template <bool Fixed>
__global__ void matrix_of_other_lanes(const float* in, float* out, float*) {
  MMK_SHARED(uint16_t, tile, kThreads / 32, 8, 8);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 2; ++i) tile[warp][lane % 8][lane / 8 * 2 + i] = 0;
  if constexpr (Fixed) __syncwarp();
  uint32_t fragment[1];
  mmk::ldmatrix<1>(fragment, tile[warp][lane % 8]);
  out[place()] = in[threadIdx.x] + static_cast<float>(fragment[0]);
}

// A ring of stages: the copy for the next round overwrites a stage that others may still read.
template <bool Fixed>
__global__ void copy_to_a_stage_in_use(const float* in, float* out, float*) {
  constexpr int kStages = Fixed ? 3 : 2;
  MMK_SHARED(float, stage, kStages, kThreads);
  float sum = 0.0f;
  mmk::cp_async<4>(&stage[0][threadIdx.x], in + threadIdx.x);
  mmk::cp_async_commit_group();
  for (int round = 0; round < 4; ++round) {
    mmk::cp_async<4>(&stage[(round + 1) % kStages][threadIdx.x], in + threadIdx.x);
    mmk::cp_async_commit_group();
    mmk::cp_async_wait_group<1>();
    __syncthreads();
    sum += stage[round % kStages][kThreads - 1 - threadIdx.x];
  }
  mmk::cp_async_wait_all();
  out[place()] = sum;
}

// Writes to the source of a copy in flight.
template <bool Fixed>
__global__ void write_to_a_copied_place(const float* in, float* out, float* scratch) {
  MMK_SHARED(float, tile, kThreads);
  float* own = scratch + blockIdx.x * kThreads;
  own[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  mmk::cp_async<4>(&tile[threadIdx.x], own + threadIdx.x);
  if constexpr (Fixed) mmk::cp_async_wait_all();
  __syncthreads();
  own[(threadIdx.x + 1) % kThreads] = 0.0f;
  if constexpr (!Fixed) mmk::cp_async_wait_all();
  out[place()] = tile[threadIdx.x];
}

template <bool Fixed>
__global__ void blocks_write_the_same(const float* in, float* out, float*) {
  out[place()] = in[threadIdx.x];
  if (!Fixed || blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
}

template <bool Fixed>
__global__ void read_of_another_block(const float* in, float* out, float* scratch) {
  if (blockIdx.x == 0) scratch[threadIdx.x] = in[threadIdx.x];
  out[place()] = Fixed || blockIdx.x == 0 ? in[threadIdx.x] : scratch[threadIdx.x];
}

// The last block to arrive sums what all blocks wrote.
template <bool Fixed>
__global__ void ticket_without_fence(const float* in, float* out, float* scratch) {
  MMK_SHARED(int, last, 1);
  unsigned* ticket = reinterpret_cast<unsigned*>(scratch + kBlocks * kThreads);
  scratch[place()] = in[threadIdx.x];
  if constexpr (Fixed) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(ticket, 1u) == kBlocks - 1;
  __syncthreads();
  if (last[0] == 0) return;
  for (int block = 0; block < kBlocks; ++block) {
    out[block * kThreads + threadIdx.x] = scratch[block * kThreads + threadIdx.x];
  }
}

template <bool Fixed>
__global__ void atomic_and_plain(const float* in, float* out, float*) {
  MMK_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  if constexpr (Fixed) __syncthreads();
  atomicAdd(&count[0], 1);
  __syncthreads();
  out[place()] = in[threadIdx.x] + static_cast<float>(count[0]);
}

// The second kernel starts while the first may still write scratch.
__global__ void write_scratch(const float* in, float* scratch) {
  mmk::grid_dependency_launch();
  scratch[place()] = in[threadIdx.x];
}
template <bool Fixed>
__global__ void read_before_grid_dependency(const float*, float* out, float* scratch) {
  out[place()] = 0.0f;  // a page that is new to the detector, before one of the previous grid
  const float early = Fixed ? 0.0f : scratch[place()];
  mmk::grid_dependency_wait();
  out[place()] = Fixed ? scratch[place()] : early;
}

using Kernel = void (*)(const float*, float*, float*);

cudaError_t run(Kernel kernel, const float* in, float* out, float* scratch) {
  return mmk::launch(kernel, dim3(kBlocks), dim3(kThreads), 0, nullptr, in, out, scratch);
}

}  // namespace

// `in` has 64 floats, `out` 128, `scratch` 129, the last of them zero.
#define RACE(name)                                                                         \
  extern "C" int name##_race(const float* in, float* out, float* scratch, int64_t fixed) { \
    return run(fixed != 0 ? name<true> : name<false>, in, out, scratch);                   \
  }

RACE(read_before_barrier)
RACE(write_before_barrier)
RACE(same_value)
RACE(shuffle_for_barrier)
RACE(barrier_of_half_a_warp)
RACE(matrix_of_other_lanes)
RACE(copy_to_a_stage_in_use)
RACE(write_to_a_copied_place)
RACE(blocks_write_the_same)
RACE(read_of_another_block)
RACE(ticket_without_fence)
RACE(atomic_and_plain)

extern "C" int read_before_grid_dependency_race(const float* in, float* out, float* scratch, int64_t fixed) {
  const cudaError_t error =
      mmk::launch(write_scratch, dim3(kBlocks), dim3(kThreads), 0, nullptr, in, scratch);
  if (error != cudaSuccess) return error;
  const Kernel kernel = fixed != 0 ? read_before_grid_dependency<true> : read_before_grid_dependency<false>;
  return mmk::launch_overlapping(kernel, dim3(kBlocks), dim3(kThreads), 0, nullptr, in, out, scratch);
}
