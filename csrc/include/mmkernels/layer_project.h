// layer_project: y[n, l] = act(LN_l(x[n, l]) W_l^T + b_l), one product per tap l.
//
// The LayerNorm is folded into the product. With V = W * gamma and its rows centred, Vc = V - mean_c(V),
//   LN(x) W^T + b = rstd * (x Vc^T) + b',   b' = b + W beta,
// exactly, since (x - mean(x) 1) V^T = x Vc^T. The product reads x itself, and no normalised copy is stored.
// Backwards, with g = dL/dz * rstd for the value z before the activation, dVc = g^T x, and
//   dV = dVc - mean_c(dVc),  dW = dV * gamma + db' beta^T,  dgamma = sum_o dV * W,  dbeta = W^T db',
//   dx = g Vc - pull * (x - mean),  pull = rstd^2 / C * sum_o dz * (z - b').
// The gradient of the gain thus needs no gradient of x. Without norm_weight, Vc is W, rstd is 1 and pull 0.
// `pull` is the factor of a row's x - mean in dx: the part of the gradient that comes from the variance.
//
// On CUDA Vc is rounded to the type of x. Its rows then sum to folded_sum instead of 0, which a large mean of
// x would multiply, so z = rstd * (x Vc^T - mean(x) folded_sum^T) + b'.
//
// The device's BLAS computes the products, except for the forward product in half precision on CUDA; the
// functions here do everything around them. Tensors without strides are contiguous. Parameters, statistics
// and sums are float, or double on the CPU; on CUDA x, y, z, their gradients and Vc have the type of x, and
// parameters and their gradients float or the type of x.
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct LayerProjectShape {
  int64_t rows;     // N
  int64_t taps;     // L
  int64_t inputs;   // C
  int64_t outputs;  // C_out
};

// x (N, L, C) with two strides and a dense last dimension.
struct LayerProjectInput {
  const void* data;
  int64_t row_stride;
  int64_t tap_stride;
};

struct LayerProjectFold {
  LayerProjectShape shape;
  const void* weight;       // [L, C_out, C]
  const void* bias;         // [L, C_out] or null
  const void* norm_weight;  // [L, C]; with it, folded_weight is written
  const void* norm_bias;    // [L, C] or null
  void* folded_weight;      // [L, C_out, C]  Vc
  void* folded_bias;        // [L, C_out]     b'
  // CUDA only.
  void* folded_sum = nullptr;              // [L, C_out] sums of the rows of Vc; null without norm_weight
  DType parameter_type = DType::kFloat32;  // of the first four
};

struct LayerProjectStats {
  LayerProjectShape shape;
  LayerProjectInput x;
  double eps;
  void* stats;  // [N, L, 2] mean and 1 / standard deviation
};

struct LayerProjectActivate {
  LayerProjectShape shape;
  Activation activation;
  const void* stats;                 // null without norm
  const void* folded_bias;           // [L, C_out]
  void* y;                           // [N, L, C_out] in: x Vc^T, out: act(z)
  void* preactivation;               // [N, L, C_out] out: z; null where y determines the derivative
  const void* folded_sum = nullptr;  // [L, C_out] CUDA, null without norm
};

struct LayerProjectGradient {
  LayerProjectShape shape;
  Activation activation;
  const void* grad;         // [N, L, C_out]
  const void* value;        // [N, L, C_out] z, or y where y determines the derivative
  const void* stats;        // null without norm
  const void* folded_bias;  // [L, C_out]; read only for pull
  void* scaled_grad;        // g: [N, C_out] of one tap; on CUDA [N, L, C_out]
  void* pull;               // [N, L] or null
  void* partial_bias;       // [chunks, L, C_out] sums of dz over the rows of a chunk
  double scale = 1.0;       // CUDA: multiplies grad
};

struct LayerProjectInputGradient {
  LayerProjectShape shape;
  LayerProjectInput x;
  const void* stats;
  const void* pull;
  void* dx;  // [N, L, C] in: g Vc, out: the gradient
};

struct LayerProjectUnfold {
  LayerProjectShape shape;
  int64_t chunks;
  const void* partial_bias;  // [chunks, L, C_out]
  const void* weight;        // [L, C_out, C]
  const void* norm_weight;   // null without norm
  const void* norm_bias;
  void* d_weight;       // [L, C_out, C] dW, on the CPU in: dVc; null if not needed
  void* d_bias;         // [L, C_out]
  void* d_norm_weight;  // [L, C] or null
  void* d_norm_bias;    // [L, C] or null
  // CUDA only.
  const void* product = nullptr;           // [L, C_out, C] dVc, float; it may be d_weight. Null without norm.
  void* row_sums = nullptr;                // scratch [L, C_out, 2] float: db', and the mean of a row of dVc
  DType parameter_type = DType::kFloat32;  // that of the parameters and of their gradients
};

// Rows are summed in chunks of this many, and the chunks are added in order.
constexpr int64_t kLayerProjectChunk = 256;

constexpr int64_t layer_project_chunks(int64_t rows) {
  return (rows + kLayerProjectChunk - 1) / kLayerProjectChunk;
}

namespace cpu {

// dtype is kFloat32 or kFloat64. [begin, end) counts rows of the weight (L * C_out) in fold, taps in unfold,
// chunks of one tap in gradient, and rows of one tap elsewhere.
void layer_project_fold(DType dtype, const LayerProjectFold& args, int64_t begin, int64_t end);
void layer_project_stats(DType dtype, const LayerProjectStats& args, int64_t tap, int64_t begin, int64_t end);
// product: x Vc^T of the tap's rows from `first` on; y is written, not read.
void layer_project_activate(DType dtype, const LayerProjectActivate& args, int64_t tap, const void* product,
                            int64_t first, int64_t begin, int64_t end);
void layer_project_gradient(DType dtype, const LayerProjectGradient& args, int64_t tap, int64_t begin,
                            int64_t end);
// product: g Vc of the tap's rows from `first` on; dx is written, not read. Without norm dx is the product.
void layer_project_input_gradient(DType dtype, const LayerProjectInputGradient& args, int64_t tap,
                                  const void* product, int64_t first, int64_t begin, int64_t end);
void layer_project_unfold(DType dtype, const LayerProjectUnfold& args, int64_t begin, int64_t end);

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

constexpr LayerProjectTiles layer_project_tiles(const LayerProjectShape& shape) {
  LayerProjectTiles tiles = {128, shape.outputs <= 64 ? 64 : 128, 0, 0, shape.taps};
  tiles.row_tiles = shape.rows / tiles.tile_rows + (shape.rows % tiles.tile_rows != 0);
  tiles.output_tiles = shape.outputs / tiles.tile_outputs + (shape.outputs % tiles.tile_outputs != 0);
  return tiles;
}

// y = act(z) directly from x, in one kernel.
struct LayerProjectProduct {
  LayerProjectInput x;
  const void* folded_weight;  // [L, C_out, C]
  LayerProjectActivate rest;
};

// Launchers run on the current device and return a cudaError_t. dtype, that of x, is float, half or bfloat16.
int layer_project_fold(DType dtype, const LayerProjectFold& args, CudaStream stream);
int layer_project_stats(DType dtype, const LayerProjectStats& args, CudaStream stream);
// Whether layer_project_product supports a problem: half precision, at least one input, rows of whole 16-byte
// vectors.
bool layer_project_fuses(DType dtype, const LayerProjectShape& shape, const LayerProjectInput& x);
int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream);
int layer_project_activate(DType dtype, const LayerProjectActivate& args, CudaStream stream);
int layer_project_gradient(DType dtype, const LayerProjectGradient& args, CudaStream stream);
int layer_project_input_gradient(DType dtype, const LayerProjectInputGradient& args, CudaStream stream);
int layer_project_unfold(const LayerProjectUnfold& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
