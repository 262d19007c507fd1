// Checks and outputs that the CPU and the CUDA glue of segment_attention share. The schema is in
// mmkernels/ops/segment_attention/schema.py.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "mmkernels/segment_attention.h"
#include "torch/glue.h"

namespace mmk::glue {

inline Tensor dense_heads(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// [batch, heads, frames, size], or with the two in the middle exchanged.
inline HeadRows head_rows(const Tensor& tensor, bool frames_first = false) {
  return {tensor.const_data_ptr(), stride_of(tensor, 0), stride_of(tensor, frames_first ? 2 : 1),
          stride_of(tensor, frames_first ? 1 : 2)};
}

// The tensors of a call, kept alive for its duration, and its sizes.
struct SegmentAttentionInputs {
  Tensor q, k, v;
  SegmentAttentionShape shape;
  double scale;

  SegmentAttentionInputs(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                         std::optional<double> given_scale) {
    STD_TORCH_CHECK(given_q.dim() == 4, "q: expected (batch, heads, frames, size), got ", given_q.dim(),
                    " dimensions");
    STD_TORCH_CHECK(given_k.dim() == 4, "k: expected (batch, heads, frames, size), got ", given_k.dim(),
                    " dimensions");
    shape = {dtype_of(given_q, "q"), given_q.size(0), given_q.size(1),
             given_k.size(1),        given_q.size(2), given_q.size(3)};
    STD_TORCH_CHECK(shape.size % 8 == 0, "q: expected a size that is a multiple of 8, got ", shape.size);
    STD_TORCH_CHECK(shape.key_heads == 0 ? shape.heads == 0 : shape.heads % shape.key_heads == 0,
                    "q: expected heads that are a multiple of ", shape.key_heads, ", got ", shape.heads);
    STD_TORCH_CHECK(shape.frames < std::numeric_limits<int32_t>::max(),
                    "q: expected less than 2147483647 frames, got ", shape.frames);
    const auto take = [&](const Tensor& tensor, int64_t heads, const char* name) {
      check_shape(tensor, {shape.batch, heads, shape.frames, shape.size}, name);
      check_same_device(tensor, given_q, name);
      STD_TORCH_CHECK(tensor.scalar_type() == given_q.scalar_type(), name, ": expected the dtype of q");
      return dense_heads(tensor);
    };
    q = take(given_q, shape.heads, "q");
    k = take(given_k, shape.key_heads, "k");
    v = take(given_v, shape.key_heads, "v");
    scale = given_scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(shape.size, 1))));
  }

  ScalarType accumulate() const { return accumulate_type(shape.dtype); }
  // Without query heads the gradients of keys are zeros, which must still be written.
  bool empty() const { return shape.batch * shape.key_heads * shape.frames * shape.size == 0; }
};

struct SegmentAttentionResults {
  Tensor ends, out, lse, extents;
  SegmentAttentionForward args;

  SegmentAttentionResults(const SegmentAttentionInputs& inputs, const Tensor& given_ends, int64_t lookback,
                          bool save) {
    const SegmentAttentionShape& shape = inputs.shape;
    STD_TORCH_CHECK(given_ends.dim() == 2, "ends: expected (batch, segments), got ", given_ends.dim(),
                    " dimensions");
    STD_TORCH_CHECK(lookback >= 0, "lookback: expected at least 0, got ", lookback);
    ends = checked(given_ends, {shape.batch, given_ends.size(1)}, ScalarType::Long, inputs.q, "ends");
    out = new_empty(inputs.q, {shape.batch, shape.frames, shape.heads, shape.size}, inputs.q.scalar_type());
    lse = new_empty(inputs.q, {save ? shape.batch : 0, shape.heads, shape.frames}, inputs.accumulate());
    extents = new_empty(inputs.q, {shape.batch, 2, shape.frames}, ScalarType::Int);
    args = {shape,
            head_rows(inputs.q),
            head_rows(inputs.k),
            head_rows(inputs.v),
            static_cast<const int32_t*>(extents.const_data_ptr()),
            inputs.scale,
            mutable_or_null(out),
            mutable_or_null(lse)};
  }

  const int64_t* ends_data() const { return static_cast<const int64_t*>(ends.const_data_ptr()); }
  int32_t* extents_data() const { return static_cast<int32_t*>(extents.mutable_data_ptr()); }
  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {out, lse, extents}; }
};

struct SegmentAttentionGradients {
  Tensor grad, out, lse, extents, dots, dq, dk, dv;
  SegmentAttentionBackward args;

  SegmentAttentionGradients(const SegmentAttentionInputs& inputs, const Tensor& given_grad,
                            const Tensor& given_out, const Tensor& given_lse, const Tensor& given_extents,
                            bool need_q, bool need_k, bool need_v) {
    const SegmentAttentionShape& shape = inputs.shape;
    const auto take = [&](const Tensor& tensor, const char* name) {
      check_shape(tensor, {shape.batch, shape.frames, shape.heads, shape.size}, name);
      check_same_device(tensor, inputs.q, name);
      STD_TORCH_CHECK(tensor.scalar_type() == inputs.q.scalar_type(), name, ": expected the dtype of q");
      return dense_heads(tensor);
    };
    grad = take(given_grad, "grad");
    out = take(given_out, "out");
    lse = checked(given_lse, {shape.batch, shape.heads, shape.frames}, inputs.accumulate(), inputs.q, "lse");
    extents = checked(given_extents, {shape.batch, 2, shape.frames}, ScalarType::Int, inputs.q, "extents");
    const ScalarType type = inputs.q.scalar_type();
    dots = new_empty(inputs.q, {shape.batch, shape.heads, shape.frames}, inputs.accumulate());
    dq = new_empty(inputs.q, {need_q ? shape.batch : 0, shape.frames, shape.heads, shape.size}, type);
    dk = new_empty(inputs.q, {need_k ? shape.batch : 0, shape.frames, shape.key_heads, shape.size}, type);
    dv = new_empty(inputs.q, {need_v ? shape.batch : 0, shape.frames, shape.key_heads, shape.size}, type);
    args = {shape,
            head_rows(inputs.q),
            head_rows(inputs.k),
            head_rows(inputs.v),
            static_cast<const int32_t*>(extents.const_data_ptr()),
            inputs.scale,
            head_rows(grad, true),
            head_rows(out, true),
            lse.const_data_ptr(),
            mutable_or_null(dots),
            mutable_or_null(dq),
            mutable_or_null(dk),
            mutable_or_null(dv)};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {dq, dk, dv}; }
};

}  // namespace mmk::glue
