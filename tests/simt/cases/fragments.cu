// The lane layouts of ldmatrix and mma.sync: one warp writes out its registers lane by lane.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

template <int Tiles, bool Transposed>
__global__ void load_fragments(const uint16_t* tiles, uint32_t* out) {
  MMK_SHARED(uint16_t, shared, 32, 8);
  for (int i = 0; i < 8; ++i) shared[threadIdx.x][i] = tiles[threadIdx.x * 8 + i];
  __syncwarp();
  uint32_t fragment[Tiles];
  mmk::ldmatrix<Tiles, Transposed>(fragment, shared[threadIdx.x % (8 * Tiles)]);
  for (int i = 0; i < Tiles; ++i) out[threadIdx.x * Tiles + i] = fragment[i];
}

template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t lane_a[4];
  uint32_t lane_b[2];
  float lane_d[4];
  for (int i = 0; i < 4; ++i) lane_a[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) lane_b[i] = b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) lane_d[i] = d[threadIdx.x * 4 + i];
  mmk::mma_m16n8k16<T>(lane_d, lane_a, lane_b);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = lane_d[i];
}

template <int Tiles>
cudaError_t load_tiles(const uint16_t* tiles, uint32_t* out, int64_t transposed) {
  const auto kernel = transposed != 0 ? load_fragments<Tiles, true> : load_fragments<Tiles, false>;
  return mmk::launch(kernel, dim3(1), dim3(32), 0, nullptr, tiles, out);
}

}  // namespace

// `tiles` is [32, 8]; `out` is [32, count].
extern "C" int ldmatrix_fragments(const uint16_t* tiles, uint32_t* out, int64_t count, int64_t transposed) {
  if (count == 1) return load_tiles<1>(tiles, out, transposed);
  if (count == 2) return load_tiles<2>(tiles, out, transposed);
  return load_tiles<4>(tiles, out, transposed);
}

// Registers of the lanes: a [32, 4], b [32, 2], d [32, 4].
extern "C" int mma_half(const uint32_t* a, const uint32_t* b, float* d) {
  return mmk::launch(multiply<__half>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
extern "C" int mma_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  return mmk::launch(multiply<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
