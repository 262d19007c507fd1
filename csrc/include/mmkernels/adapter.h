// adapter: out = residual + scale * (act(LN(x) V^T + b) U^T + c), x (rows, width), V (bottleneck, width),
// U (width, bottleneck).
//
// The LayerNorm is folded into V as in layer_project.h. With W = V * gamma, Vc = W - mean(W) of each row,
//   z = LN(x) V^T + b = rstd * (x Vc^T) + b',   b' = b + V beta.
// Backwards, with g = dL/dout and a = act(z),
//   dz = (scale g U) * act'(z),  dU = scale g^T a,  dc = scale sum_r g,  db = db' = sum_r dz,
//   s = dz * rstd,  dVc = s^T x,  dW = dVc - mean(dVc),  dV = dW * gamma + db' beta^T,
//   dgamma = sum_o dW * V,  dbeta = V^T db',
//   dx = s Vc - pull * (x - mean) [+ g where x is the residual],  pull = rstd^2 / width * sum_o dz (z - b').
// Without norm_weight, Vc is V, rstd is 1, and mean and pull drop out.
//
// Saved for the backward pass: x, z (rounded to the type of x) and, with LayerNorm, mean and rstd of each
// row.
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct AdapterShape {
  int64_t rows;
  int64_t width;
  int64_t bottleneck;
};

// (rows, width) by the stride of its rows; the last one is 1.
struct AdapterRows {
  const void* data;
  int64_t row_stride;
};

// Of the accumulation type of x, contiguous; null where absent. The LayerNorm is there iff norm_weight is.
struct AdapterParameters {
  const void* down_weight;  // [bottleneck, width]
  const void* down_bias;    // [bottleneck]
  const void* up_weight;    // [width, bottleneck]
  const void* up_bias;      // [width]
  const void* norm_weight;  // [width]
  const void* norm_bias;    // [width]
};

namespace cpu {

// Rows of a chunk are summed one after the other, chunks are added in order. Their number depends on the problem
// alone, and their sums take at most half of the memory of x.
struct AdapterChunks {
  int64_t rows_per_chunk;
  int64_t chunks;
};

constexpr int64_t kAdapterBlock = 48;  // rows that are worked on at once, so that they stay in cache

constexpr AdapterChunks adapter_chunks(const AdapterShape& shape) {
  const int64_t blocks = (shape.rows + kAdapterBlock - 1) / kAdapterBlock;
  int64_t most = shape.rows / (4 * shape.bottleneck + 1);
  most = most < 1 ? 1 : most > 32 ? 32 : most;
  const int64_t blocks_per_chunk = (blocks + most - 1) / most;
  if (blocks == 0) return {kAdapterBlock, 0};
  return {blocks_per_chunk * kAdapterBlock, (blocks + blocks_per_chunk - 1) / blocks_per_chunk};
}

// A matrix (depth, columns) laid out for the products; see cpu/product.h.
struct AdapterPack {
  const void* source;  // element (k, n) is source[k * depth_stride + n * column_stride]
  int64_t depth_stride, column_stride;
  int64_t depth, columns;
  void* packed;
};

struct AdapterForward {
  AdapterShape shape;
  Activation activation;
  double scale, eps;
  bool norm;
  AdapterRows x;
  AdapterRows residual;  // null for none
  const void* down;         // Vc^T, packed
  const void* up;           // U^T, packed
  const void* hidden_bias;  // [bottleneck] b'
  const void* up_bias;      // [width] or null
  void* out;                // [rows, width]
  void* hidden;             // [rows, bottleneck] z, or null
  void* stats;              // [rows, 2] or null
};

struct AdapterBackward {
  AdapterShape shape;
  Activation activation;
  double scale;
  bool add_input;
  AdapterRows grad;
  AdapterRows x;
  const void* hidden;       // [rows, bottleneck]
  const void* stats;        // [rows, 2], null without norm
  const void* up;           // U, packed
  const void* down;         // Vc, packed; null where dx is
  const void* hidden_bias;  // [bottleneck]; read for dx with norm
  void* dx;                 // [rows, width] or null
  // Sums over the rows of each chunk; null where not asked for.
  void* partial_down;         // [chunks, bottleneck, width] s^T x
  void* partial_hidden_bias;  // [chunks, bottleneck]        dz; always
  void* partial_up;           // [chunks, bottleneck, width] a^T g
  void* partial_up_bias;      // [chunks, width]             g
};

struct AdapterReduce {
  AdapterShape shape;
  double scale;
  const void* partial_down;
  const void* partial_up;
  const void* partial_up_bias;
  void* d_down;     // [bottleneck, width] dVc, or null
  void* d_up;       // [width, bottleneck], or null
  void* d_up_bias;  // [width], null with d_up
};

// dtype is kFloat32 or kFloat64; ranges are of panels, of rows, of chunks, and of columns of x.
int64_t adapter_panels(DType dtype, int64_t columns);
int64_t adapter_packed_size(DType dtype, int64_t depth, int64_t columns);
void adapter_pack(DType dtype, const AdapterPack& args, int64_t begin, int64_t end);
void adapter_forward(DType dtype, const AdapterForward& args, int64_t begin, int64_t end);
void adapter_backward(DType dtype, const AdapterBackward& args, int64_t begin, int64_t end);
void adapter_reduce(DType dtype, const AdapterReduce& args, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace mmk
