// Accesses whose wavefronts, sectors and outstanding copies are known. One block of a warp each.
#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"

namespace {

// Rows of a tile are written, columns read: all 32 words of a column are in one bank unless rows are padded.
template <int kStride>
__global__ void transpose(const float* in, float* out) {
  MMK_SHARED(float, tile, 32, kStride);
  const auto lane = threadIdx.x;
  for (int row = 0; row < 32; ++row) tile[row][lane] = in[row * 32 + lane];
  __syncwarp();
  for (int row = 0; row < 32; ++row) out[row * 32 + lane] = tile[lane][row];
}

// Eight rows of 16 bytes each, kRowBytes apart: four tiles below each other.
template <int kRowBytes>
__global__ void matrix_rows(const float* in, float* out) {
  MMK_SHARED(float, tile, 32, kRowBytes / 4);
  for (int i = 0; i < kRowBytes / 4; ++i) tile[threadIdx.x][i] = in[0];
  __syncwarp();
  uint32_t words[4];
  mmk::ldmatrix<4>(words, tile[threadIdx.x]);
  out[threadIdx.x] = static_cast<float>(words[0] ^ words[1] ^ words[2] ^ words[3]);
}

__global__ void strided_loads(const float* in, float* out, int stride) {
  out[threadIdx.x] = in[threadIdx.x * stride];
}

// Each lane loads 16 bytes at a step of kStep floats, in one access or in four scalar ones.
template <int kStep, bool kVectors>
__global__ void vectors_in_shared_memory(const float* in, float* out) {
  MMK_SHARED(float, tile, 32, kStep);
  for (int i = static_cast<int>(threadIdx.x); i < 32 * kStep; i += 32) (&tile[0][0])[i] = in[i % 32];
  __syncwarp();
  float sum = 0.0f;
  if constexpr (kVectors) {
    const auto vector = mmk::load<4>(tile[threadIdx.x]);
    sum = vector[0] + vector[1] + vector[2] + vector[3];
  } else {
    for (int i = 0; i < 4; ++i) sum += tile[threadIdx.x][i];
  }
  out[threadIdx.x] = sum;
}

// All lanes read one word; half of them write a pair each.
__global__ void pairs(const float* in, float* out) {
  MMK_SHARED(float, tile, 64);
  const float value = in[0];
  if (threadIdx.x < 16) *reinterpret_cast<float2*>(&tile[2 * threadIdx.x]) = {value, value + 1.0f};
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x];
}

// Copies rows of 64 bytes into rows of kStride bytes, three stages ahead of the wait; the last lanes read
// nothing. Local arrays and the launch's parameters are no device memory.
template <int kStride>
__global__ void copies(const float* in, float* out) {
  MMK_SHARED(float, tile, 3, 8, kStride / 4);
  float sums[3] = {};
  const int row = static_cast<int>(threadIdx.x) / 4;
  const int column = static_cast<int>(threadIdx.x) % 4 * 4;
  for (int stage = 0; stage < 3; ++stage) {
    mmk::cp_async_zfill<16>(&tile[stage][row][column], in + (stage * 8 + row) * 16 + column, row < 7);
    mmk::cp_async_commit_group();
  }
  mmk::cp_async_wait_all();
  for (int stage = 0; stage < 3; ++stage) sums[stage] = tile[stage][row][column];
  out[threadIdx.x] = sums[0] + sums[1] + sums[2];
}

using Kernel = void (*)(const float*, float*);

constexpr Kernel kKernels[] = {
    transpose<32>,
    transpose<33>,
    matrix_rows<64>,
    matrix_rows<80>,
    vectors_in_shared_memory<4, true>,
    vectors_in_shared_memory<8, true>,
    vectors_in_shared_memory<8, false>,
    pairs,
    copies<64>,
    copies<80>,
};

}  // namespace

// 1,024 floats each.
extern "C" int memory_traffic(int64_t index, const float* in, float* out) {
  return mmk::launch(kKernels[index], 1, 32, 0, nullptr, in, out);
}

extern "C" int strided_traffic(const float* in, float* out, int64_t stride) {
  return mmk::launch(strided_loads, 1, 32, 0, nullptr, in, out, static_cast<int>(stride));
}
