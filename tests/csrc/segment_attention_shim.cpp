// The launchers of segment_attention with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/segment_attention.h"

namespace {

mmk::SegmentAttentionShape make_shape(const int64_t* sizes) {
  return {static_cast<mmk::DType>(sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
}

mmk::HeadRows rows(const void* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2]};
}

}  // namespace

// sizes: dtype, batch, heads, key heads, frames, size, segments, lookback. strides: three each of q, k and v.
extern "C" int segment_attention_forward(const int64_t* sizes, const int64_t* ends, int32_t* extents,
                                         const void* q, const void* k, const void* v, const int64_t* strides,
                                         double scale, void* out, float* lse) {
  const mmk::SegmentAttentionForward args = {make_shape(sizes),
                                             rows(q, strides),
                                             rows(k, strides + 3),
                                             rows(v, strides + 6),
                                             extents,
                                             scale,
                                             out,
                                             lse};
  return mmk::cuda::segment_attention_forward(args, {ends, sizes[6], sizes[7], extents}, nullptr);
}

// strides: three each of q, k, v, grad and out. Gradients that are null are not computed.
extern "C" int segment_attention_backward(const int64_t* sizes, const int32_t* extents, const void* q,
                                          const void* k, const void* v, const void* grad, const void* out,
                                          const int64_t* strides, double scale, const float* lse, float* dots,
                                          void* dq, void* dk, void* dv) {
  const mmk::SegmentAttentionBackward args = {make_shape(sizes),
                                              rows(q, strides),
                                              rows(k, strides + 3),
                                              rows(v, strides + 6),
                                              extents,
                                              scale,
                                              rows(grad, strides + 9),
                                              rows(out, strides + 12),
                                              lse,
                                              dots,
                                              dq,
                                              dk,
                                              dv};
  return mmk::cuda::segment_attention_backward(args, nullptr);
}
