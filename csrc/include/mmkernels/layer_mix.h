// layer_mix: out[b, t] = sum_l weights[l] * N_l(layer_l[b, t]), N_l the identity or a LayerNorm of its own.
//
// Rows are the pairs (b, t); layers are read where they lie, through one pointer and two strides each. Frames from
// lengths[b] on are padding: never read, and written as zero.
#pragma once

#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

constexpr int kLayerMixMaxLayers = 64;

// Plain data, so that it can be a kernel parameter. Strides count elements; the last dimension has stride 1.
struct LayerMixParams {
  DType dtype;
  int32_t layers;
  int64_t batch;
  int64_t frames;
  int64_t width;
  const void* layer[kLayerMixMaxLayers];
  int64_t batch_stride[kLayerMixMaxLayers];
  int64_t frame_stride[kLayerMixMaxLayers];
  const int64_t* lengths;   // [batch] or null
  const void* weights;      // [layers], float (double for kFloat64), like all statistics and sums below
  bool norm;
  const void* norm_weight;  // [layers, width] or null
  const void* norm_bias;    // [layers, width] or null
  double eps;
};

struct LayerMixForward {
  LayerMixParams mix;
  void* out;    // [batch, frames, width]
  void* stats;  // [batch * frames, layers, 2] mean and 1 / standard deviation (zero for padding), or null
  void* mixed_bias = nullptr;  // CUDA: scratch [width] for sum_l weights[l] * norm_bias[l]; null without norm_bias
};

struct LayerMixBackward {
  LayerMixParams mix;
  const void* grad;  // [batch, frames, width] by the two strides
  int64_t grad_batch_stride;
  int64_t grad_frame_stride;
  const void* stats;            // as the forward pass saved it; null without norm
  void* d_layer[kLayerMixMaxLayers];  // contiguous [batch, frames, width] each, or null where not asked for
  bool need_weights;            // sums below are written only where asked for
  bool need_affine;
  void* partial_dot;     // [chunks, layers]         sum over rows of grad . N_l(layer)
  void* partial_scale;   // [chunks, layers, width]  sum over rows of grad * normalised layer
  void* partial_shift;   // [chunks, width]          sum over rows of grad
  void* d_weights;       // [layers]
  void* d_norm_weight;   // [layers, width]
  void* d_norm_bias;     // [layers, width]
};

// Backward sums run over chunks of rows whose size depends on the problem alone, never on the number of threads, and chunks
// are added in order: results are the same bit for bit on every run.
struct LayerMixChunks {
  int64_t rows_per_chunk;
  int64_t chunks;
};

constexpr LayerMixChunks layer_mix_chunks(int64_t rows, bool need_affine) {
  // Partial sums of the affine parameters are wide, so there may be only a few of them.
  const int64_t most_chunks = need_affine ? 32 : 256;
  const int64_t least_rows = 16;
  int64_t rows_per_chunk = (rows + most_chunks - 1) / most_chunks;
  if (rows_per_chunk < least_rows) rows_per_chunk = least_rows;
  return {rows_per_chunk, (rows + rows_per_chunk - 1) / rows_per_chunk};
}

namespace cpu {

// Rows [begin, end) of batch * frames.
void layer_mix_forward(const LayerMixForward& args, int64_t begin, int64_t end);
// Chunks [begin, end) of layer_mix_chunks.
void layer_mix_backward(const LayerMixBackward& args, int64_t begin, int64_t end);
// Adds the partial sums in order; call once, after all chunks.
void layer_mix_reduce(const LayerMixBackward& args);

}  // namespace cpu

namespace cuda {

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int layer_mix_forward(const LayerMixForward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
