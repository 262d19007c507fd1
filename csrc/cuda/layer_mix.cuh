// Shared by the forward and the backward kernels of layer_mix.
#pragma once

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/layer_mix.h"

namespace mmk::cuda {

inline constexpr int kPlainThreads = 256;  // of a block of the kernels with one thread per vector

struct MixRow {
  int64_t batch;
  int64_t frame;
  bool valid;
};

// Clamps lengths: with a negative one no frame is valid, with too large a one all are.
MMK_DEVICE int64_t valid_frames(const LayerMixParams& p, int64_t batch) {
  return p.lengths == nullptr ? p.frames : min(p.lengths[batch], p.frames);
}

MMK_DEVICE MixRow locate(const LayerMixParams& p, int64_t index) {
  const int64_t batch = index / p.frames;
  const int64_t frame = index - batch * p.frames;
  return {batch, frame, frame < valid_frames(p, batch)};
}

template <class T>
MMK_DEVICE const T* layer_row(const LayerMixParams& p, int layer, const MixRow& row) {
  return static_cast<const T*>(p.layer[layer]) + row.batch * p.batch_stride[layer] +
         row.frame * p.frame_stride[layer];
}

MMK_DEVICE const float* parameter_row(const void* parameter, int64_t layer, int64_t width) {
  return parameter == nullptr ? nullptr : static_cast<const float*>(parameter) + layer * width;
}

template <class T>
bool is_aligned(const LayerMixParams& p) {
  bool aligned = rows_aligned<float>(p.norm_weight) && rows_aligned<float>(p.norm_bias);
  for (int l = 0; l < p.layers; ++l) {
    aligned = aligned && rows_aligned<T>(p.layer[l], p.width, p.batch_stride[l], p.frame_stride[l]);
  }
  return aligned;
}

}  // namespace mmk::cuda
