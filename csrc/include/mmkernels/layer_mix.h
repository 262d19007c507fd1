// layer_mix: out[b, t] = sum_l weights[l] * N_l(layer_l[b, t]), N_l the identity or the LayerNorm of layer l.
//
// Rows are the pairs (b, t). Layers are read in place, through one pointer and two strides each. Frames from
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
  const int64_t* lengths;  // [batch] or null
  const void* weights;     // [layers], float (double for kFloat64), like all statistics and sums below
  bool norm;
  const void* norm_weight;  // [layers, width] or null
  const void* norm_bias;    // [layers, width] or null
  double eps;
};

struct LayerMixForward {
  LayerMixParams mix;
  void* out;    // [batch, frames, width]
  void* stats;  // [batch * frames, layers, 2] mean and 1 / standard deviation (zero for padding), or null
  void* mixed_bias =
      nullptr;  // CUDA: scratch [width] for sum_l weights[l] * norm_bias[l]; null without norm_bias
};

struct LayerMixBackward {
  LayerMixParams mix;
  const void* grad;  // [batch, frames, width] with the two strides below
  int64_t grad_batch_stride;
  int64_t grad_frame_stride;
  const void* stats;                  // as the forward pass saved it; null without norm
  void* d_layer[kLayerMixMaxLayers];  // contiguous [batch, frames, width] each, or null if not needed
  bool need_weights;                  // the sums below are written only if needed
  bool need_affine;
  void* partial_dot;    // [chunks, layers]         sum over rows of grad . N_l(layer)
  void* partial_scale;  // [chunks, layers, width]  sum over rows of grad * normalised layer
  void* partial_shift;  // [chunks, width]          sum over rows of grad
  void* d_weights;      // [layers]
  void* d_norm_weight;  // [layers, width]
  void* d_norm_bias;    // [layers, width]
};

// The backward pass sums rows in chunks and adds the chunks in order. Their size depends on the problem
// alone, not on the number of threads, so that every run gives the same bits.
struct LayerMixChunks {
  int64_t rows_per_chunk;
  int64_t chunks;
};

constexpr LayerMixChunks layer_mix_chunks(int64_t rows, bool need_affine) {
  // Partial sums of the affine parameters are wide: few chunks bound their memory.
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

// The most layers whose gradient sums fit a block's registers, and the lanes that share a slice of columns.
constexpr int32_t kLayerMixGroup = 8;
constexpr int64_t kLayerMixLanes = 32;

// Backward sums over rows: a block adds the rows of one chunk, for one slice of columns and one group of
// layers. As on the CPU the plan depends on the problem alone, so that results do not depend on the GPU.
struct LayerMixSums {
  int64_t rows_per_chunk;
  int64_t chunks;
  int64_t slice_columns;
  int64_t slices;
  int32_t groups;  // group g holds the layers [g * layers / groups, (g + 1) * layers / groups)

  constexpr int64_t blocks() const { return chunks * slices * groups; }
};

constexpr LayerMixSums layer_mix_sums(DType dtype, int64_t rows, int64_t width, int32_t layers) {
  const auto ceil_div = [](int64_t a, int64_t b) { return a / b + (a % b != 0); };
  // Fills the largest GPUs a few times, and bounds the partial sums to some 16 MB.
  const int64_t wanted_blocks = 2048;
  const int64_t least_rows = 16;
  LayerMixSums plan = {};
  plan.slice_columns = kLayerMixLanes * 16 / element_size(dtype);
  plan.slices = ceil_div(width, plan.slice_columns);
  plan.groups = static_cast<int32_t>(ceil_div(layers, kLayerMixGroup));
  const int64_t blocks_per_chunk = plan.slices * plan.groups;
  const int64_t most_chunks = blocks_per_chunk == 0 ? 1 : ceil_div(wanted_blocks, blocks_per_chunk);
  const int64_t rows_per_chunk = ceil_div(rows, most_chunks);
  plan.rows_per_chunk = rows_per_chunk < least_rows ? least_rows : rows_per_chunk;
  plan.chunks = plan.slices == 0 ? 0 : ceil_div(rows, plan.rows_per_chunk);
  return plan;
}

// Which kernels a backward pass launches, and the sizes of their partial sums.
struct LayerMixBackwardPlan {
  bool sums;           // the sums over rows, by LayerMixSums
  bool gradients;      // the gradients of layers
  bool gradients_dot;  // the same kernel computes the sums for d_weights: it reads the layers anyway
  LayerMixSums sum_plan;
  int64_t rows_per_block;  // of the gradients
  int64_t gradient_blocks;
  int64_t dot_partials;     // LayerMixBackward::partial_dot is [dot_partials, layers]
  int64_t affine_partials;  // partial_scale is [affine_partials, layers, width], partial_shift
                            // [affine_partials, width]
};

constexpr LayerMixBackwardPlan layer_mix_backward_plan(DType dtype, int64_t rows, int64_t width,
                                                       int32_t layers, bool norm, bool need_weights,
                                                       bool need_affine, bool need_layers) {
  const int64_t wanted_blocks = 2048;
  LayerMixBackwardPlan plan = {};
  plan.gradients = need_layers;
  plan.gradients_dot = need_weights && !need_affine && need_layers && norm;
  plan.sums = need_affine || (need_weights && !plan.gradients_dot);
  plan.sum_plan = layer_mix_sums(dtype, rows, width, layers);
  // A multiple of four, the most rows that a block processes at a time.
  plan.rows_per_block = ((rows + wanted_blocks - 1) / wanted_blocks + 3) / 4 * 4;
  plan.gradient_blocks = rows == 0 || width == 0 ? 0 : (rows + plan.rows_per_block - 1) / plan.rows_per_block;
  plan.dot_partials = !need_weights        ? 0
                      : plan.gradients_dot ? plan.gradient_blocks
                                           : plan.sum_plan.chunks * plan.sum_plan.slices;
  plan.affine_partials = need_affine ? plan.sum_plan.chunks : 0;
  return plan;
}

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int layer_mix_forward(const LayerMixForward& args, CudaStream stream);
int layer_mix_backward(const LayerMixBackward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
