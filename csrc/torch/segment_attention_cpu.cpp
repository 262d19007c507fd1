#include "cpu/pages.h"
#include "torch/segment_attention.h"

namespace mmk::glue {
namespace {

// Grain size: starting a thread pays off from about 500,000 products on; a unit of work has 128 * size.
int64_t grain_of(const SegmentAttentionShape& shape) {
  return 1 + 4096 / (shape.size + 1);
}

void check_ends(const SegmentAttentionResults& results) {
  const SegmentAttentionShape& shape = results.args.shape;
  const int64_t segments = results.ends.size(1);
  for (int64_t row = 0; row < shape.batch; ++row) {
    int64_t stop = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t end = results.ends_data()[row * segments + segment];
      STD_TORCH_CHECK(end >= stop && end <= shape.frames, "ends[", row, ", ", segment, "]: expected ", stop,
                      " to ", shape.frames, ", got ", end);
      stop = end;
    }
  }
}

// Calls body(begin, end) for the blocks of a plan, in parallel, by their work.
template <class Body>
void for_blocks(const cpu::AttentionPlan& plan, const SegmentAttentionShape& shape, Body&& body) {
  torch::stable::parallel_for(0, plan.work(), grain_of(shape), [&](int64_t begin, int64_t end) {
    const int64_t first = plan.index_of(begin), last = plan.index_of(end);
    if (first < last) body(first, last);
  });
}

void prepare(void* data, const Tensor& tensor, DType dtype) {
  cpu::prepare_result(data, tensor.numel() * element_size(dtype));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& ends, int64_t lookback, std::optional<double> scale,
                                           bool save) {
  const SegmentAttentionInputs inputs(q, k, v, scale);
  const SegmentAttentionShape& shape = inputs.shape;
  const SegmentAttentionResults results(inputs, ends, lookback, save);
  check_ends(results);
  for (int64_t row = 0; row < shape.batch; ++row) {
    cpu::segment_extents(results.ends_data() + row * ends.size(1), ends.size(1), shape.frames, lookback,
                         results.extents_data() + row * 2 * shape.frames);
  }
  if (inputs.empty()) return results.outputs();
  prepare(results.args.out, results.out, shape.dtype);
  const cpu::AttentionPlan plan = cpu::plan_queries(shape, results.args.extents);
  for_blocks(plan, shape,
             [&](int64_t begin, int64_t end) { cpu::segment_attention_forward(results.args, begin, end); });
  return results.outputs();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& extents, std::optional<double> scale, bool need_q,
                                            bool need_k, bool need_v) {
  const SegmentAttentionInputs inputs(q, k, v, scale);
  const SegmentAttentionShape& shape = inputs.shape;
  const SegmentAttentionGradients gradients(inputs, grad, out, lse, extents, need_q, need_k, need_v);
  const SegmentAttentionBackward& args = gradients.args;
  if (inputs.empty()) return gradients.outputs();
  prepare(args.dq, gradients.dq, shape.dtype);
  prepare(args.dk, gradients.dk, shape.dtype);
  prepare(args.dv, gradients.dv, shape.dtype);
  for_blocks(cpu::plan_queries(shape, args.extents), shape,
             [&](int64_t begin, int64_t end) { cpu::segment_attention_backward_queries(args, begin, end); });
  if (!need_k && !need_v) return gradients.outputs();
  for_blocks(cpu::plan_keys(shape, args.extents), shape,
             [&](int64_t begin, int64_t end) { cpu::segment_attention_backward_keys(args, begin, end); });
  return gradients.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("segment_attention_fwd", TORCH_BOX(&forward));
  m.impl("segment_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
