#include "torch/cuda.h"
#include "torch/distill_loss.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& pred, const Tensor& table, const Tensor& ids,
                                           const OptionalTensor& counts, double cosine_weight) {
  const CudaScope scope(pred);
  const DistillLossForwardCall call(pred, table, ids, counts, cosine_weight);
  check_launch(cuda::distill_loss_forward(call.args, scope.stream()), "distill_loss_fwd");
  return call.outputs();
}

Tensor backward(const Tensor& grad, const Tensor& pred, const Tensor& table, const Tensor& ids,
                const OptionalTensor& counts, const Tensor& dots, const Tensor& count, double cosine_weight) {
  const CudaScope scope(pred);
  const DistillLossBackwardCall call(grad, pred, table, ids, counts, dots, count, cosine_weight);
  check_launch(cuda::distill_loss_backward(call.args, scope.stream()), "distill_loss_bwd");
  return call.d_pred;
}

MMK_CUDA_KERNELS(m) {
  m.impl("distill_loss_fwd", TORCH_BOX(&forward));
  m.impl("distill_loss_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
