// The launchers of segment_pool with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/segment_pool.h"

namespace {

mmk::SegmentPoolShape make_shape(const int64_t* sizes) {
  return {static_cast<mmk::DType>(sizes[0]),
          static_cast<mmk::Reduction>(sizes[1]),
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5]};
}

}  // namespace

// sizes: dtype, reduce, batch, frames, segments, width; strides of two dimensions. stats or index: null if
// not wanted. partial results: 2 * batch * segment_pool_tiles(frames) of them.
extern "C" int segment_pool_forward(const int64_t* sizes, const int64_t* ends, const int64_t* counts,
                                    int64_t* stops, const void* x, const int64_t* strides,
                                    const float* scores, void* out, float* stats, int32_t* index,
                                    float* partial, int32_t* partial_index, float* partial_stats) {
  const mmk::SegmentPoolForward args = {
      make_shape(sizes), x, strides[0], strides[1], stops, scores, out, stats, index, partial, partial_index,
      partial_stats};
  return mmk::cuda::segment_pool_forward(args, {ends, counts, stops}, nullptr);
}

// dx or d_scores: null if not wanted; x is read for d_scores only.
extern "C" int segment_pool_backward(const int64_t* sizes, const int64_t* ends, const int64_t* counts,
                                     int64_t* stops, const void* grad, const int64_t* grad_strides,
                                     const void* x, const int64_t* strides, const float* scores,
                                     const float* stats, const int32_t* index, void* dx, float* d_scores,
                                     float* partial_dot) {
  const mmk::SegmentPoolBackward args = {
      make_shape(sizes), grad,       grad_strides[0], grad_strides[1], x,     strides[0],
      strides[1],        stops,      scores,          stats,           index, dx,
      d_scores,          partial_dot};
  return mmk::cuda::segment_pool_backward(args, {ends, counts, stops}, nullptr);
}
