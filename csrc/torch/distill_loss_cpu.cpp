#include "cpu/pages.h"
#include "torch/distill_loss.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
int64_t grain_of(const DistillLossParams& params) {
  return 1 + 32768 / (2 * params.width + 1);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& pred, const Tensor& table, const Tensor& ids,
                                           const OptionalTensor& counts, double cosine_weight) {
  const DistillLossForwardCall call(pred, table, ids, counts, cosine_weight);
  const DistillLossParams& p = call.args.params;
  torch::stable::parallel_for(0, p.batch * p.tokens, grain_of(p), [&](int64_t begin, int64_t end) {
    cpu::distill_loss_tokens(call.args, begin, end);
  });
  cpu::distill_loss_mean(call.args);
  return call.outputs();
}

Tensor backward(const Tensor& grad, const Tensor& pred, const Tensor& table, const Tensor& ids,
                const OptionalTensor& counts, const Tensor& dots, const Tensor& count, double cosine_weight) {
  const DistillLossBackwardCall call(grad, pred, table, ids, counts, dots, count, cosine_weight);
  const DistillLossParams& p = call.args.params;
  cpu::prepare_result(call.args.d_pred, call.d_pred.numel() * element_size(p.dtype));
  torch::stable::parallel_for(0, p.batch * p.tokens, grain_of(p), [&](int64_t begin, int64_t end) {
    cpu::distill_loss_backward(call.args, begin, end);
  });
  return call.d_pred;
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("distill_loss_fwd", TORCH_BOX(&forward));
  m.impl("distill_loss_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
