// Checks and outputs that the CPU and the CUDA glue of segment_pool share. The schema is in
// mmkernels/ops/segment_pool/schema.py.
#pragma once

#include <limits>
#include <tuple>

#include "mmkernels/segment_pool.h"
#include "torch/glue.h"

namespace mmk::glue {

// The segments of a call, kept alive for its duration, and its sizes.
struct SegmentPoolInputs {
  Tensor ends;
  OptionalTensor scores, counts;
  SegmentPoolShape shape;

  // `like` has the batch, the width and the type: x, or the gradient of the result.
  SegmentPoolInputs(const Tensor& like, const Tensor& given_ends, const OptionalTensor& given_scores,
                    const OptionalTensor& given_counts, int64_t frames, int64_t reduce) {
    STD_TORCH_CHECK(given_ends.dim() == 2, "ends: expected (batch, segments), got ", given_ends.dim(),
                    " dimensions");
    STD_TORCH_CHECK(reduce >= 0 && reduce <= static_cast<int64_t>(Reduction::kAttention),
                    "reduce: expected 0 to ", static_cast<int64_t>(Reduction::kAttention), ", got ", reduce);
    STD_TORCH_CHECK(frames >= 0 && frames <= std::numeric_limits<int32_t>::max(),
                    "frames: expected at most 2147483647, got ", frames);
    shape = {dtype_of(like, "x"), static_cast<Reduction>(reduce), like.size(0), frames, given_ends.size(1),
             like.size(2)};
    ends = checked(given_ends, {shape.batch, shape.segments}, ScalarType::Long, like, "ends");
    scores = checked(given_scores, {shape.batch, shape.frames}, accumulate(), like, "scores");
    counts = checked(given_counts, {shape.batch}, ScalarType::Long, like, "counts");
    STD_TORCH_CHECK(scores.has_value() == attention(), "scores: expected for attention, and for it alone");
  }

  bool attention() const { return shape.reduce == Reduction::kAttention; }
  bool max() const { return shape.reduce == Reduction::kMax; }
  ScalarType accumulate() const { return accumulate_type(shape.dtype); }
  const int64_t* ends_data() const { return static_cast<const int64_t*>(ends.const_data_ptr()); }
  const int64_t* counts_data() const { return static_cast<const int64_t*>(data_or_null(counts)); }
};

inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

struct SegmentPoolResults {
  Tensor x, out, stats, index;
  SegmentPoolForward args;

  SegmentPoolResults(const SegmentPoolInputs& inputs, const Tensor& given_x, bool save)
      : x(dense_rows(given_x)) {
    const SegmentPoolShape& shape = inputs.shape;
    const int64_t held = save && inputs.attention() ? shape.batch : 0;
    const int64_t indexed = save && inputs.max() ? shape.batch : 0;
    out = new_empty(x, {shape.batch, shape.segments, shape.width}, x.scalar_type());
    stats = new_empty(x, {held, shape.segments, 2}, inputs.accumulate());
    index = new_empty(x, {indexed, shape.segments, shape.width}, ScalarType::Int);
    args = {};
    args.shape = shape;
    args.x = x.const_data_ptr();
    args.batch_stride = stride_of(x, 0);
    args.frame_stride = stride_of(x, 1);
    args.scores = data_or_null(inputs.scores);
    args.out = out.mutable_data_ptr();
    args.stats = mutable_or_null(stats);
    args.index = static_cast<int32_t*>(mutable_or_null(index));
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {out, stats, index}; }
};

struct SegmentPoolGradients {
  Tensor grad, stats, index, dx, d_scores;
  OptionalTensor x;
  SegmentPoolBackward args;

  SegmentPoolGradients(const SegmentPoolInputs& inputs, const Tensor& given_grad,
                       const OptionalTensor& given_x, const Tensor& given_stats, const Tensor& given_index,
                       bool need_x, bool need_scores)
      : grad(dense_rows(given_grad)) {
    const SegmentPoolShape& shape = inputs.shape;
    STD_TORCH_CHECK(!need_scores || (inputs.attention() && given_x.has_value()),
                    "need_scores: expected attention, and x");
    args = {};
    args.shape = shape;
    args.grad = grad.const_data_ptr();
    args.grad_batch_stride = stride_of(grad, 0);
    args.grad_segment_stride = stride_of(grad, 1);
    if (need_scores) {
      check_shape(*given_x, {shape.batch, shape.frames, shape.width}, "x");
      check_same_device(*given_x, grad, "x");
      STD_TORCH_CHECK(given_x->scalar_type() == grad.scalar_type(), "x: expected the dtype of grad");
      x = dense_rows(*given_x);
      args.x = x->const_data_ptr();
      args.batch_stride = stride_of(*x, 0);
      args.frame_stride = stride_of(*x, 1);
    }
    if (inputs.attention()) {
      stats = checked(given_stats, {shape.batch, shape.segments, 2}, inputs.accumulate(), grad, "stats");
      args.stats = stats.const_data_ptr();
    }
    if (inputs.max()) {
      index =
          checked(given_index, {shape.batch, shape.segments, shape.width}, ScalarType::Int, grad, "index");
      args.index = static_cast<const int32_t*>(index.const_data_ptr());
    }
    args.scores = data_or_null(inputs.scores);
    dx = new_empty(grad, {need_x ? shape.batch : 0, shape.frames, shape.width}, grad.scalar_type());
    d_scores = new_empty(grad, {need_scores ? shape.batch : 0, shape.frames}, inputs.accumulate());
    args.dx = mutable_or_null(dx);
    args.d_scores = mutable_or_null(d_scores);
  }

  std::tuple<Tensor, Tensor> outputs() const { return {dx, d_scores}; }
};

}  // namespace mmk::glue
