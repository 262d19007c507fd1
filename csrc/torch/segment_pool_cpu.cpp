#include <cmath>

#include "cpu/pages.h"
#include "torch/segment_pool.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
int64_t grain_of(const SegmentPoolShape& shape) {
  return 1 + 32768 / (shape.width + 1);
}

// Whether stores to an output bypass the caches: if it exceeds them, but not in new memory, whose pages
// the system clears through the caches at the first access.
bool write_around_caches(void* data, int64_t bytes) {
  return cpu::prepare_result(data, bytes);
}

// The stops of all segments; with `strict`, invalid ends and counts are errors.
std::vector<int64_t> stops_of(const SegmentPoolInputs& inputs, bool strict) {
  const SegmentPoolShape& shape = inputs.shape;
  const int64_t* counts = inputs.counts_data();
  std::vector<int64_t> stops(static_cast<size_t>(shape.batch * shape.segments));
  for (int64_t row = 0; row < shape.batch; ++row) {
    const int64_t count = counts == nullptr ? shape.segments : counts[row];
    STD_TORCH_CHECK(!strict || (count >= 0 && count <= shape.segments), "counts[", row, "]: expected 0 to ",
                    shape.segments, ", got ", count);
    int64_t stop = 0;
    for (int64_t segment = 0; segment < shape.segments; ++segment) {
      const int64_t place = row * shape.segments + segment;
      if (segment < count) {
        const int64_t end = inputs.ends_data()[place];
        STD_TORCH_CHECK(!strict || (end >= stop && end <= shape.frames), "ends[", row, ", ", segment,
                        "]: expected ", stop, " to ", shape.frames, ", got ", end);
        stop = std::max(stop, std::min(end, shape.frames));
      }
      stops[place] = stop;
    }
  }
  return stops;
}

// Frames in no segment may have any score.
template <class A>
void check_scores(const SegmentPoolInputs& inputs, const std::vector<int64_t>& stops) {
  const SegmentPoolShape& shape = inputs.shape;
  if (shape.segments == 0) return;
  for (int64_t row = 0; row < shape.batch; ++row) {
    const A* scores = static_cast<const A*>(inputs.scores->const_data_ptr()) + row * shape.frames;
    for (int64_t t = 0; t < stops[(row + 1) * shape.segments - 1]; ++t) {
      STD_TORCH_CHECK(scores[t] < HUGE_VAL, "scores[", row, ", ", t, "]: expected a number or -inf, got ",
                      scores[t]);
    }
  }
}

// Calls body(begin, end) for the pieces, in parallel, by their frames.
template <class Body>
void for_pieces(const cpu::SegmentPlan& plan, const SegmentPoolShape& shape, Body&& body) {
  torch::stable::parallel_for(0, plan.work, grain_of(shape), [&](int64_t begin, int64_t end) {
    body(plan.index_of(begin), plan.index_of(end));
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& ends, const OptionalTensor& scores,
                                           const OptionalTensor& counts, int64_t reduce, bool save) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (batch, frames, width), got ", x.dim(), " dimensions");
  const SegmentPoolInputs inputs(x, ends, scores, counts, x.size(1), reduce);
  const SegmentPoolShape& shape = inputs.shape;
  const std::vector<int64_t> stops = stops_of(inputs, true);
  if (inputs.attention()) {
    shape.dtype == DType::kFloat64 ? check_scores<double>(inputs, stops) : check_scores<float>(inputs, stops);
  }
  SegmentPoolResults results(inputs, x, save);
  const cpu::SegmentPlan plan = cpu::segment_plan(shape, stops.data(), false);
  const int64_t indexed = results.args.index == nullptr ? 0 : plan.partials;
  const Tensor partial = new_empty(x, {plan.partials, shape.width}, inputs.accumulate());
  const Tensor partial_index = new_empty(x, {indexed, shape.width}, ScalarType::Int);
  const Tensor partial_stats = new_empty(x, {inputs.attention() ? plan.partials : 0, 2}, inputs.accumulate());
  results.args.stops = stops.data();
  results.args.partial = mutable_or_null(partial);
  results.args.partial_index = static_cast<int32_t*>(mutable_or_null(partial_index));
  results.args.partial_stats = mutable_or_null(partial_stats);
  if (shape.width > 0 || inputs.attention()) {
    for_pieces(plan, shape, [&](int64_t begin, int64_t end) {
      cpu::segment_pool_forward(results.args, plan, begin, end);
    });
    const int64_t long_segments = static_cast<int64_t>(plan.long_segments.size());
    torch::stable::parallel_for(0, long_segments, 1, [&](int64_t begin, int64_t end) {
      cpu::segment_pool_combine(results.args, plan, begin, end);
    });
  }
  return results.outputs();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& x, const Tensor& ends,
                                    const OptionalTensor& scores, const OptionalTensor& counts,
                                    const Tensor& stats, const Tensor& index, int64_t frames, int64_t reduce,
                                    bool need_x, bool need_scores) {
  STD_TORCH_CHECK(grad.dim() == 3, "grad: expected (batch, segments, width), got ", grad.dim(),
                  " dimensions");
  const SegmentPoolInputs inputs(grad, ends, scores, counts, frames, reduce);
  const SegmentPoolShape& shape = inputs.shape;
  check_shape(grad, {shape.batch, shape.segments, shape.width}, "grad");
  const std::vector<int64_t> stops = stops_of(inputs, false);
  SegmentPoolGradients gradients(inputs, grad, x, stats, index, need_x, need_scores);
  const bool stream =
      write_around_caches(gradients.args.dx, gradients.dx.numel() * element_size(shape.dtype));
  const cpu::SegmentPlan plan = cpu::segment_plan(shape, stops.data(), true);
  const Tensor partial_dot = new_empty(grad, {need_scores ? plan.partials : 0}, inputs.accumulate());
  gradients.args.stops = stops.data();
  gradients.args.partial_dot = mutable_or_null(partial_dot);
  for_pieces(plan, shape, [&](int64_t begin, int64_t end) {
    cpu::segment_pool_backward(gradients.args, plan, begin, end, stream);
  });
  if (need_scores) {
    const int64_t long_segments = static_cast<int64_t>(plan.long_segments.size());
    torch::stable::parallel_for(0, long_segments, 1, [&](int64_t begin, int64_t end) {
      cpu::segment_pool_finish_scores(gradients.args, plan, begin, end);
    });
  }
  return gradients.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&forward));
  m.impl("segment_pool_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
