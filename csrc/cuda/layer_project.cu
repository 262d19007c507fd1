#include "cuda/common/activation.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/norm_product.cuh"
#include "mmkernels/layer_project.h"

namespace mmk::cuda {
namespace {

inline constexpr int kProjectThreads = 256;

// The place of a block's tile.
struct TilePlace {
  int row_tile, output_tile, tap;
};

// Writes z and y = act(z) of a tile, kRows x kColumns. result: the product x Vc^T as float, rows kStride
// apart.
template <class T, int kRows, int kColumns, int kStride, Activation kActivation>
MMK_DEVICE void finish_tile(const NormProductActivate& args, const float* result, TilePlace tile) {
  constexpr int kWidth = 4;  // one 16-byte access to the product, and whole lines of y by a warp
  constexpr int kLanes = kColumns / kWidth;
  constexpr int kRowsAtOnce = kProjectThreads / kLanes;
  const auto [rows, taps, inputs, outputs] = args.shape;
  const int64_t first_row = int64_t{tile.row_tile} * kRows;
  const int64_t first_column = int64_t{tile.output_tile} * kColumns;
  const int column = static_cast<int>(threadIdx.x) % kLanes * kWidth;
  if (first_column + column >= outputs) return;
  const int64_t of_tap = tile.tap * outputs + first_column + column;
  const auto shift = load<kWidth>(static_cast<const float*>(args.folded_bias) + of_tap);
  Vec<float, kWidth> sum = {};
  if (args.folded_sum != nullptr) sum = load<kWidth>(static_cast<const float*>(args.folded_sum) + of_tap);

  const int count = static_cast<int>(min(rows - first_row, int64_t{kRows}));
  const int first = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t index = (first_row + first) * taps + tile.tap;
  const int64_t place = index * outputs + first_column + column;
  const int64_t step = kRowsAtOnce * taps;
  const auto* stats = static_cast<const float2*>(args.stats);
  if (stats != nullptr) stats += index;
  T* y = static_cast<T*>(args.y) + place;
  T* preactivation = static_cast<T*>(args.preactivation);
  if (preactivation != nullptr) preactivation += place;
  result += first * kStride + column;
#pragma unroll 4
  for (int row = first; row < count; row += kRowsAtOnce) {
    float2 moments = {0.0f, 1.0f};
    if (stats != nullptr) {
      moments = __ldg(stats);
      stats += step;
    }
    auto value = load<kWidth>(result);
    result += kRowsAtOnce * kStride;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = moments.y * (value[i] - moments.x * sum[i]) + shift[i];
    if (preactivation != nullptr) {
      store(preactivation, from_accumulator<T>(value));
      preactivation += step * outputs;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = activate<kActivation>(value[i]);
    store(y, from_accumulator<T>(value));
    y += step * outputs;
  }
}

// The product on the tensor cores, one tile of one tap per block. Statistics, bias and activation are applied
// while the tile is in shared memory.
template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kProjectThreads, 2)
    project(const __grid_constant__ LayerProjectProduct args,
            const __grid_constant__ LayerProjectTiles tiles) {
  using Tile = TileProduct<T, kRows, kColumns>;
  static_assert(Tile::kThreads == kProjectThreads);
  const NormProductShape& shape = args.rest.shape;
  // Neighbouring blocks read the same rows of x. The number of blocks fits an int, and so do tile indices.
  const int block = static_cast<int>(blockIdx.x);
  const int output_tiles = static_cast<int>(tiles.output_tiles);
  const int row_tiles = static_cast<int>(tiles.row_tiles);
  const TilePlace tile = {block / output_tiles % row_tiles, block % output_tiles,
                          block / output_tiles / row_tiles};
  const MatrixView<T> x = {static_cast<const T*>(args.x.data) + tile.tap * args.x.tap_stride,
                           args.x.row_stride, shape.rows, shape.inputs};
  const MatrixView<T> weight = {
      static_cast<const T*>(args.folded_weight) + tile.tap * shape.outputs * shape.inputs, shape.inputs,
      shape.outputs, shape.inputs};
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  Tile::run(buffer, x, int64_t{tile.row_tile} * kRows, weight, int64_t{tile.output_tile} * kColumns);
  const float* result = reinterpret_cast<const float*>(buffer);
  dispatch_activation(args.rest.activation, [&](auto activation) {
    finish_tile<T, kRows, kColumns, Tile::kResultStride, decltype(activation)::value>(args.rest, result,
                                                                                      tile);
  });
}

// ---- launchers

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
         shape.outputs % 8 == 0 && input_aligned<__half>(x, shape.inputs);
}

int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream) {
  const NormProductShape& shape = args.rest.shape;
  if (!layer_project_fuses(dtype, shape, args.x)) return cudaErrorInvalidValue;
  if (shape.rows * shape.taps * shape.outputs == 0) return cudaSuccess;
  return dtype == DType::kFloat16 ? launch_project<__half>(args, stream)
                                  : launch_project<__nv_bfloat16>(args, stream);
}

}  // namespace mmk::cuda
