#include "torch/cuda.h"
#include "torch/segment_attention.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& ends, int64_t lookback, std::optional<double> scale,
                                           bool save) {
  const CudaScope scope(q);
  const SegmentAttentionInputs inputs(q, k, v, scale);
  const SegmentAttentionResults results(inputs, ends, lookback, save);
  const cuda::AttentionSegments segments = {results.ends_data(), results.ends.size(1), lookback,
                                            results.extents_data()};
  check_launch(cuda::segment_attention_forward(results.args, segments, scope.stream()),
               "segment_attention_fwd");
  return results.outputs();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& extents, std::optional<double> scale, bool need_q,
                                            bool need_k, bool need_v) {
  const CudaScope scope(grad);
  const SegmentAttentionInputs inputs(q, k, v, scale);
  const SegmentAttentionGradients gradients(inputs, grad, out, lse, extents, need_q, need_k, need_v);
  check_launch(cuda::segment_attention_backward(gradients.args, scope.stream()), "segment_attention_bwd");
  return gradients.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("segment_attention_fwd", TORCH_BOX(&forward));
  m.impl("segment_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
