// layer_project: y[n, l] = act(LN_l(x[n, l]) W_l^T + b_l), one product per tap l.
//
// The LayerNorm is folded into the product. With V = W * gamma and its rows centred, Vc = V - mean_c(V),
//   LN(x) W^T + b = rstd * (x Vc^T) + b',   b' = b + W beta,
// exactly, since (x - mean(x) 1) V^T = x Vc^T. So x itself feeds the product, and no normalised copy exists. Backwards, with
// g = dL/dz * rstd for the value z before the activation, dVc = g^T x, and
//   dV = dVc - mean_c(dVc),  dW = dV * gamma + db' beta^T,  dgamma = sum_o dV * W,  dbeta = W^T db',
//   dx = g Vc - pull * (x - mean),  pull = rstd^2 / C * sum_o dz * (z - b').
// The gain's gradient thus needs no gradient of x. Without norm_weight, Vc is W, and rstd and pull drop out.
//
// The products come from the BLAS of the device; the functions here do everything around them. Tensors are contiguous
// unless strides are given; types are float or double (CPU) for parameters, statistics and sums.
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"

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
  const void* weight;       // [L, C_out, C]
  const void* bias;         // [L, C_out] or null
  const void* norm_weight;  // [L, C]; with it, folded_weight is written
  const void* norm_bias;    // [L, C] or null
  void* folded_weight;      // [L, C_out, C]  Vc
  void* folded_bias;        // [L, C_out]     b'
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
  const void* stats;        // null without norm
  const void* folded_bias;  // [L, C_out]
  void* y;                  // [N, L, C_out] in: x Vc^T, out: act(z)
  void* preactivation;      // [N, L, C_out] out: z; null where y determines the derivative
};

struct LayerProjectGradient {
  LayerProjectShape shape;
  Activation activation;
  const void* grad;         // [N, L, C_out]
  const void* value;        // [N, L, C_out] z, or y where y determines the derivative
  const void* stats;        // null without norm
  const void* folded_bias;  // [L, C_out]
  void* scaled_grad;        // [N, C_out] g of one tap
  void* pull;               // [N, L] or null
  void* partial_bias;       // [chunks, L, C_out] sums of dz over the rows of a chunk
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
  void* d_weight;            // [L, C_out, C] in: dVc, out: dW; null where not asked for
  void* d_bias;              // [L, C_out]
  void* d_norm_weight;       // [L, C] or null
  void* d_norm_bias;         // [L, C] or null
};

// Sums over rows run over chunks of this many rows, added in order.
constexpr int64_t kLayerProjectChunk = 256;

constexpr int64_t layer_project_chunks(int64_t rows) {
  return (rows + kLayerProjectChunk - 1) / kLayerProjectChunk;
}

namespace cpu {

// dtype is kFloat32 or kFloat64. Ranges are of L * C_out, of rows of one tap, of chunks of one tap, or of taps.
void layer_project_fold(DType dtype, const LayerProjectFold& args, int64_t begin, int64_t end);
void layer_project_stats(DType dtype, const LayerProjectStats& args, int64_t tap, int64_t begin, int64_t end);
void layer_project_activate(DType dtype, const LayerProjectActivate& args, int64_t tap, int64_t begin,
                            int64_t end);
void layer_project_gradient(DType dtype, const LayerProjectGradient& args, int64_t tap, int64_t begin,
                            int64_t end);
void layer_project_input_gradient(DType dtype, const LayerProjectInputGradient& args, int64_t tap,
                                  int64_t begin, int64_t end);
void layer_project_unfold(DType dtype, const LayerProjectUnfold& args, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace mmk
