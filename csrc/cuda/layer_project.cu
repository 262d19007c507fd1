#include "cuda/common/tile_product.cuh"
#include "cuda/norm_product.cuh"
#include "mmkernels/layer_project.h"

namespace mmk::cuda {
namespace {

// The product on the tensor cores, one tile of one tap per block. Statistics, bias and activation are applied
// while the tile is in shared memory.
template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(TileProduct<T, kRows, kColumns>::kThreads, 2)
    project(const __grid_constant__ LayerProjectProduct args,
            const __grid_constant__ LayerProjectTiles tiles) {
  using Tile = TileProduct<T, kRows, kColumns>;
  const NormProductShape& shape = args.rest.shape;
  // Neighbouring blocks read the same rows of x.
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) % tiles.output_tiles * kColumns;
  const int64_t rest = static_cast<int64_t>(blockIdx.x) / tiles.output_tiles;
  const int64_t first_row = rest % tiles.row_tiles * kRows;
  const int64_t tap = rest / tiles.row_tiles;
  const MatrixView<T> x = {static_cast<const T*>(args.x.data) + tap * args.x.tap_stride, args.x.row_stride,
                           shape.rows, shape.inputs};
  const MatrixView<T> weight = {
      static_cast<const T*>(args.folded_weight) + tap * shape.outputs * shape.inputs, shape.inputs,
      shape.outputs, shape.inputs};
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  Tile::run(buffer, x, first_row, weight, first_column);

  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kVectors = kColumns / kWidth;  // of a row
  const float* result = reinterpret_cast<const float*>(buffer);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += Tile::kThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * kWidth;
    if (first_row + row >= shape.rows || first_column + column >= shape.outputs) continue;
    const auto value = load<kWidth>(result + row * Tile::kResultStride + column);
    finish_columns<T, true>(args.rest, (first_row + row) * shape.taps + tap, tap, first_column + column,
                            value);
  }
}

template <class T, int kColumns>
cudaError_t launch_project(const LayerProjectProduct& args, const LayerProjectTiles& tiles,
                           CudaStream stream) {
  using Tile = TileProduct<T, 128, kColumns>;
  dim3 grid;
  if (!make_grid(tiles.blocks(), &grid)) return cudaErrorInvalidConfiguration;
  return launch(project<T, 128, kColumns>, grid, dim3(Tile::kThreads), Tile::kBytes, stream, args, tiles);
}

template <class T>
cudaError_t launch_project(const LayerProjectProduct& args, CudaStream stream) {
  const LayerProjectTiles tiles = layer_project_tiles(args.rest.shape);
  return tiles.tile_outputs == 64 ? launch_project<T, 64>(args, tiles, stream)
                                  : launch_project<T, 128>(args, tiles, stream);
}

}  // namespace

bool layer_project_fuses(DType dtype, const NormProductShape& shape, const NormProductInput& x) {
  return (dtype == DType::kFloat16 || dtype == DType::kBFloat16) && shape.inputs > 0 &&
         shape.outputs % 8 == 0 && rows_aligned<__half>(x, shape.inputs);
}

int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream) {
  const NormProductShape& shape = args.rest.shape;
  if (!layer_project_fuses(dtype, shape, args.x)) return cudaErrorInvalidValue;
  if (shape.rows * shape.taps * shape.outputs == 0) return cudaSuccess;
  return dtype == DType::kFloat16 ? launch_project<__half>(args, stream)
                                  : launch_project<__nv_bfloat16>(args, stream);
}

}  // namespace mmk::cuda
