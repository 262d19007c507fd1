#include "torch/cuda.h"
#include "torch/merge.h"

namespace mmk::glue {
namespace {

void run(const MergeInputs& inputs, const std::vector<void*>& out, const CudaScope& scope) {
  check_launch(cuda::merge_forward(merge_forward_args(inputs, out), scope.stream()), "merge forward");
}

std::vector<Tensor> forward(const std::vector<Tensor>& target, const std::vector<Tensor>& source,
                            const Tensor& lam, const std::vector<int64_t>& groups, ScalarType dtype) {
  const CudaScope scope(lam);
  const MergeInputs inputs(target, source, lam, groups, dtype, true);
  std::vector<Tensor> results = merge_results(inputs);
  run(inputs, merge_out_data(inputs, results, false), scope);
  return results;
}

void forward_out(const std::vector<Tensor>& target, const std::vector<Tensor>& source, const Tensor& lam,
                 const std::vector<int64_t>& groups, const std::vector<Tensor>& out) {
  const CudaScope scope(lam);
  const MergeInputs inputs(target, source, lam, groups, merge_out_type(out, lam), true);
  run(inputs, merge_out_data(inputs, out, true), scope);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(
    const std::vector<Tensor>& grad, const std::vector<Tensor>& target, const std::vector<Tensor>& source,
    const Tensor& lam, const std::vector<int64_t>& groups, bool need_lam,
    const std::vector<int64_t>& need_target, const std::vector<int64_t>& need_source) {
  const CudaScope scope(lam);
  const MergeInputs inputs(target, source, lam, groups, merge_out_type(grad, lam), need_lam);
  const MergeGradients gradients(inputs, grad, need_lam, need_target, need_source);
  check_launch(cuda::merge_backward(gradients.args, scope.stream()), "merge backward");
  return gradients.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("merge_fwd", TORCH_BOX(&forward));
  m.impl("merge_out", TORCH_BOX(&forward_out));
  m.impl("merge_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
