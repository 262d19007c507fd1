#include "torch/cif.h"
#include "torch/cuda.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& alpha,
                                                                   const OptionalTensor& lengths,
                                                                   const OptionalTensor& target_lengths,
                                                                   double beta, double tail_threshold,
                                                                   int64_t max_length) {
  const CudaScope scope(x);
  const CifForwardCall call(x, alpha, lengths, target_lengths, beta, tail_threshold, max_length, true);
  check_launch(cuda::cif_forward(call.args, scope.stream()), "cif_fwd");
  return call.outputs();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                    const OptionalTensor& lengths, const Tensor& counts, const Tensor& token,
                                    const Tensor& weights, const Tensor& facts, double beta, bool scaled,
                                    bool need_x, bool need_alpha) {
  const CudaScope scope(x);
  const CifBackwardCall call(grad, x, alpha, lengths, counts, token, weights, facts, beta, scaled, need_x,
                             need_alpha, true);
  check_launch(cuda::cif_backward(call.args, scope.stream()), "cif_bwd");
  return call.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("cif_fwd", TORCH_BOX(&forward));
  m.impl("cif_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
