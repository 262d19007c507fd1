// layer_project: y[n, l] = act(LN_l(x[n, l]) W_l^T + b_l), one product per tap l, with the LayerNorm folded
// into the product (norm_product.h).
//
// The device's BLAS computes the products, except for a forward product that layer_project_fuses accepts; the
// functions here and those of norm_product.h do everything around them.
#pragma once

#include "mmkernels/norm_product.h"

namespace mmk {

namespace cpu {

// Rows are summed in chunks of this many, and the chunks are added in order.
constexpr int64_t kLayerProjectChunk = 256;

constexpr int64_t layer_project_chunks(int64_t rows) {
  return (rows + kLayerProjectChunk - 1) / kLayerProjectChunk;
}

// dtype is kFloat32 or kFloat64. [begin, end) counts chunks of one tap in gradient, and rows of one tap
// elsewhere.
void layer_project_stats(DType dtype, const NormProductStats& args, int64_t tap, int64_t begin, int64_t end);
// product: x Vc^T of the tap's rows from `first` on; y is written, not read.
void layer_project_activate(DType dtype, const NormProductActivate& args, int64_t tap, const void* product,
                            int64_t first, int64_t begin, int64_t end);
void layer_project_gradient(DType dtype, const NormProductGradient& args, int64_t tap, int64_t begin,
                            int64_t end);
// product: g Vc of the tap's rows from `first` on; dx is written, not read. Without norm dx is the product.
void layer_project_input_gradient(DType dtype, const NormProductInputGradient& args, int64_t tap,
                                  const void* product, int64_t first, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// The tiles of the fused product: a block computes tile_rows x tile_outputs of one tap.
struct LayerProjectTiles {
  int64_t tile_rows;
  int64_t tile_outputs;
  int64_t row_tiles;
  int64_t output_tiles;
  int64_t taps;

  constexpr int64_t blocks() const { return row_tiles * output_tiles * taps; }
};

constexpr LayerProjectTiles layer_project_tiles(const NormProductShape& shape) {
  LayerProjectTiles tiles = {128, shape.outputs <= 64 ? 64 : 128, 0, 0, shape.taps};
  tiles.row_tiles = shape.rows / tiles.tile_rows + (shape.rows % tiles.tile_rows != 0);
  tiles.output_tiles = shape.outputs / tiles.tile_outputs + (shape.outputs % tiles.tile_outputs != 0);
  return tiles;
}

// y = act(z) directly from x, in one kernel.
struct LayerProjectProduct {
  NormProductInput x;
  const void* folded_weight;  // [L, C_out, C]
  NormProductActivate rest;
};

// Whether layer_project_product supports a problem: half precision, at least one input, rows of whole 16-byte
// vectors.
bool layer_project_fuses(DType dtype, const NormProductShape& shape, const NormProductInput& x);
// Runs on the current device and returns a cudaError_t.
int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
