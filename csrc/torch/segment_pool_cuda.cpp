#include "torch/cuda.h"
#include "torch/segment_pool.h"

namespace mmk::glue {
namespace {

// Scratch memory for the stops, and the ends and counts that they follow from.
struct Stops {
  Tensor stops;
  cuda::SegmentEnds ends;

  explicit Stops(const SegmentPoolInputs& inputs)
      : stops(new_empty(inputs.ends, {inputs.shape.batch, inputs.shape.segments}, ScalarType::Long)),
        ends{inputs.ends_data(), inputs.counts_data(), static_cast<int64_t*>(stops.mutable_data_ptr())} {}
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& ends, const OptionalTensor& scores,
                                           const OptionalTensor& counts, int64_t reduce, bool save) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (batch, frames, width), got ", x.dim(), " dimensions");
  const CudaScope scope(x);
  const SegmentPoolInputs inputs(x, ends, scores, counts, x.size(1), reduce);
  const SegmentPoolShape& shape = inputs.shape;
  SegmentPoolResults results(inputs, x, save);
  const Stops stops(inputs);
  const int64_t partials =
      shape.reduce == Reduction::kLast ? 0 : 2 * shape.batch * cuda::segment_pool_tiles(shape.frames);
  const int64_t indexed = results.args.index == nullptr ? 0 : partials;
  const Tensor partial = new_empty(x, {partials, shape.width}, ScalarType::Float);
  const Tensor partial_index = new_empty(x, {indexed, shape.width}, ScalarType::Int);
  const Tensor partial_stats = new_empty(x, {inputs.attention() ? partials : 0, 2}, ScalarType::Float);
  results.args.stops = stops.ends.stops;
  results.args.partial = mutable_or_null(partial);
  results.args.partial_index = static_cast<int32_t*>(mutable_or_null(partial_index));
  results.args.partial_stats = mutable_or_null(partial_stats);
  check_launch(cuda::segment_pool_forward(results.args, stops.ends, scope.stream()), "segment_pool_fwd");
  return results.outputs();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& x, const Tensor& ends,
                                    const OptionalTensor& scores, const OptionalTensor& counts,
                                    const Tensor& stats, const Tensor& index, int64_t frames, int64_t reduce,
                                    bool need_x, bool need_scores) {
  STD_TORCH_CHECK(grad.dim() == 3, "grad: expected (batch, segments, width), got ", grad.dim(),
                  " dimensions");
  const CudaScope scope(grad);
  const SegmentPoolInputs inputs(grad, ends, scores, counts, frames, reduce);
  const SegmentPoolShape& shape = inputs.shape;
  check_shape(grad, {shape.batch, shape.segments, shape.width}, "grad");
  SegmentPoolGradients gradients(inputs, grad, x, stats, index, need_x, need_scores);
  // The kernels read pairs of statistics as float2.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(gradients.args.stats) % 8 == 0,
                  "stats: expected 8-byte alignment");
  const Stops stops(inputs);
  const int64_t partials = need_scores ? 2 * shape.batch * cuda::segment_pool_tiles(frames) : 0;
  const Tensor partial_dot = new_empty(grad, {partials}, ScalarType::Float);
  gradients.args.stops = stops.ends.stops;
  gradients.args.partial_dot = mutable_or_null(partial_dot);
  check_launch(cuda::segment_pool_backward(gradients.args, stops.ends, scope.stream()), "segment_pool_bwd");
  return gradients.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&forward));
  m.impl("segment_pool_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
