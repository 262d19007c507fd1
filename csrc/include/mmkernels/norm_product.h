// A product with a LayerNorm before it, folded into the weight; layer_project and adapter share it:
// z[n, l] = LN_l(x[n, l]) W_l^T + b_l, one product per tap l.
//
// With V = W * gamma and its rows centred, Vc = V - mean_c(V),
//   LN(x) W^T + b = rstd * (x Vc^T) + b',   b' = b + W beta,
// exactly, since (x - mean(x) 1) V^T = x Vc^T. The product reads x itself, and no normalised copy is stored.
// Backwards, with g = dL/dz * rstd, dVc = g^T x, and
//   dV = dVc - mean_c(dVc),  dW = dV * gamma + db' beta^T,  dgamma = sum_o dV * W,  dbeta = W^T db',
//   dx = g Vc - pull * (x - mean),  pull = rstd^2 / C * sum_o dz * (z - b').
// The gradient of the gain thus needs no gradient of x. Without norm_weight, Vc is W, rstd is 1 and pull 0.
// `pull` is the factor of x - mean in dx: a row's gradient through the variance.
//
// On CUDA Vc is rounded to the type of x. Its rows then sum to folded_sum instead of 0, an error that a large
// mean of x would amplify, so z = rstd * (x Vc^T - mean(x) folded_sum^T) + b'.
//
// Tensors without strides are contiguous. Parameters, statistics and sums are float, or double on the CPU; on
// CUDA x, y, z, their gradients and Vc have the type of x, and parameters and their gradients float or the
// type of x.
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct NormProductShape {
  int64_t rows;     // N
  int64_t taps;     // L
  int64_t inputs;   // C
  int64_t outputs;  // C_out
};

// x (N, L, C) with two strides and a dense last dimension.
struct NormProductInput {
  const void* data;
  int64_t row_stride;
  int64_t tap_stride;
};

// A parameter that kernels read in another type than the caller's. A null target means no conversion.
struct NormProductConversion {
  const void* source = nullptr;
  void* target = nullptr;
  int64_t count = 0;
};

struct NormProductFold {
  NormProductShape shape;
  const void* weight;       // [L, C_out, C]
  const void* bias;         // [L, C_out] or null
  const void* norm_weight;  // [L, C] or null; without it the CPU writes no folded_weight
  const void* norm_bias;    // [L, C] or null
  void* folded_weight;      // [L, C_out, C]  Vc
  void* folded_bias;        // [L, C_out]     b'
  // CUDA only.
  void* folded_sum = nullptr;              // [L, C_out] sums of the rows of Vc; null without norm_weight
  DType parameter_type = DType::kFloat32;  // of the parameters
  // In the same launch, for a product that follows: its weight to the type of x, and its bias to float.
  NormProductConversion next_weight = {};
  NormProductConversion next_bias = {};
};

struct NormProductStats {
  NormProductShape shape;
  NormProductInput x;
  double eps;
  void* stats;  // [N, L, 2] mean and 1 / standard deviation
};

struct NormProductActivate {
  NormProductShape shape;
  Activation activation;
  const void* stats;                 // null without norm
  const void* folded_bias;           // [L, C_out]
  void* y;                           // [N, L, C_out] in: x Vc^T, out: act(z)
  void* preactivation;               // [N, L, C_out] out: z; null where y determines the derivative
  const void* folded_sum = nullptr;  // [L, C_out] CUDA, null without norm
};

struct NormProductGradient {
  NormProductShape shape;
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

struct NormProductInputGradient {
  NormProductShape shape;
  NormProductInput x;
  const void* stats;
  const void* pull;
  void* dx;  // [N, L, C] in: g Vc, out: the gradient
};

struct NormProductUnfold {
  NormProductShape shape;
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

namespace cpu {

// dtype is kFloat32 or kFloat64. [begin, end) counts rows of the weight (L * C_out) in fold, taps in unfold.
// The steps for the rows of x are in the files of each op.
void norm_product_fold(DType dtype, const NormProductFold& args, int64_t begin, int64_t end);
void norm_product_unfold(DType dtype, const NormProductUnfold& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// The rows of a partial sum of norm_product_gradient, and of one of its blocks: few, so that the blocks of a
// small batch fill a GPU. The chunks are added in order.
constexpr int64_t kNormProductChunk = 64;

constexpr int64_t norm_product_chunks(int64_t rows) {
  return (rows + kNormProductChunk - 1) / kNormProductChunk;
}

// Launchers run on the current device and return a cudaError_t. dtype, that of x, is float, half or bfloat16.
// A launch_overlapping() kernel may follow norm_product_fold.
int norm_product_fold(DType dtype, const NormProductFold& args, CudaStream stream);
int norm_product_stats(DType dtype, const NormProductStats& args, CudaStream stream);
int norm_product_activate(DType dtype, const NormProductActivate& args, CudaStream stream);
int norm_product_gradient(DType dtype, const NormProductGradient& args, CudaStream stream);
int norm_product_input_gradient(DType dtype, const NormProductInputGradient& args, CudaStream stream);
int norm_product_unfold(const NormProductUnfold& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
