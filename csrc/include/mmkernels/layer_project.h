// layer_project: y[n, l] = act(LN_l(x[n, l]) W_l^T + b_l), one product per tap l.
//
// The LayerNorm is folded into the product. With V = W * gamma and its rows centred, Vc = V - mean_c(V),
//   LN(x) W^T + b = rstd * (x Vc^T) + b',   b' = b + W beta,
// exactly, since (x - mean(x) 1) V^T = x Vc^T. So x itself feeds the product, and no normalised copy exists.
// Backwards, with g = dL/dz * rstd for the value z before the activation, dVc = g^T x, and
//   dV = dVc - mean_c(dVc),  dW = dV * gamma + db' beta^T,  dgamma = sum_o dV * W,  dbeta = W^T db',
//   dx = g Vc - pull * (x - mean),  pull = rstd^2 / C * sum_o dz * (z - b').
// The gain's gradient thus needs no gradient of x. Without norm_weight, Vc is W, and rstd and pull drop out.
//
// On CUDA x may be of half precision, and Vc is rounded to its type. Its rows then sum to s instead of 0, and
// a large mean of x would carry that into the result, so s is kept and z = rstd * (x Vc^T - mean(x) s^T) +
// b'.
//
// The products come from the BLAS of the device, save the forward one of half precision on CUDA; the
// functions here do everything around them. Tensors are contiguous unless strides are given; types are float
// or double (CPU) for parameters, statistics and sums; on CUDA x, y, z, their gradients and Vc are of x's
// type.
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

// x (N, L, C) by two strides, the last one being 1.
struct LayerProjectInput {
  const void* data;
  int64_t row_stride;
  int64_t tap_stride;
};

struct LayerProjectFold {
  LayerProjectShape shape;
  const void* weight;          // [L, C_out, C]
  const void* bias;            // [L, C_out] or null
  const void* norm_weight;     // [L, C]; with it, folded_weight is written
  const void* norm_bias;       // [L, C] or null
  void* folded_weight;         // [L, C_out, C]  Vc
  void* folded_bias;           // [L, C_out]     b'
  void* folded_sum = nullptr;  // [L, C_out] CUDA: s; null without norm_weight
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
  double scale = 1.0;       // CUDA: of grad
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
  void* d_weight;             // [L, C_out, C] in: dVc, out: dW; null where not asked for
  void* d_bias;               // [L, C_out]
  void* d_norm_weight;        // [L, C] or null
  void* d_norm_bias;          // [L, C] or null
  void* row_means = nullptr;  // CUDA: scratch [L, C_out]
};

// Sums over rows run over chunks of this many rows, added in order.
constexpr int64_t kLayerProjectChunk = 256;

constexpr int64_t layer_project_chunks(int64_t rows) {
  return (rows + kLayerProjectChunk - 1) / kLayerProjectChunk;
}

namespace cpu {

// dtype is kFloat32 or kFloat64. Ranges are of L * C_out, of rows of one tap, of chunks of one tap, or of
// taps.
void layer_project_fold(DType dtype, const LayerProjectFold& args, int64_t begin, int64_t end);
void layer_project_stats(DType dtype, const LayerProjectStats& args, int64_t tap, int64_t begin, int64_t end);
// product: x Vc^T of the tap's rows from `first` on; y is only written.
void layer_project_activate(DType dtype, const LayerProjectActivate& args, int64_t tap, const void* product,
                            int64_t first, int64_t begin, int64_t end);
void layer_project_gradient(DType dtype, const LayerProjectGradient& args, int64_t tap, int64_t begin,
                            int64_t end);
// product: g Vc of the tap's rows from `first` on; dx is only written. Without norm it is a copy of the
// product.
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

// y = act(z) from x itself, in one kernel.
struct LayerProjectProduct {
  LayerProjectInput x;
  const void* folded_weight;  // [L, C_out, C]
  LayerProjectActivate rest;
};

// Launchers run on the current device and return a cudaError_t. dtype, that of x, is float, half or bfloat16.
int layer_project_fold(DType dtype, const LayerProjectFold& args, CudaStream stream);
int layer_project_stats(DType dtype, const LayerProjectStats& args, CudaStream stream);
// Whether layer_project_product takes this problem: half precision, at least one input, rows of whole 16-byte
// vectors.
bool layer_project_fuses(DType dtype, const LayerProjectShape& shape, const LayerProjectInput& x);
int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream);
int layer_project_activate(DType dtype, const LayerProjectActivate& args, CudaStream stream);
int layer_project_gradient(DType dtype, const LayerProjectGradient& args, CudaStream stream);
int layer_project_input_gradient(DType dtype, const LayerProjectInputGradient& args, CudaStream stream);
int layer_project_unfold(const LayerProjectUnfold& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
