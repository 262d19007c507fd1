#include "torch/merge.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
constexpr int64_t kGrain = 32768;

void run(const MergeInputs& inputs, const std::vector<void*>& out) {
  const MergeForward args = merge_forward_args(inputs, out);
  torch::stable::parallel_for(0, inputs.elements, kGrain,
                              [&](int64_t begin, int64_t end) { cpu::merge_forward(args, begin, end); });
}

std::vector<Tensor> forward(const std::vector<Tensor>& target, const std::vector<Tensor>& source,
                            const Tensor& lam, const std::vector<int64_t>& groups, ScalarType dtype) {
  const MergeInputs inputs(target, source, lam, groups, dtype, true);
  std::vector<Tensor> results = merge_results(inputs);
  run(inputs, merge_out_data(inputs, results, false));
  return results;
}

void forward_out(const std::vector<Tensor>& target, const std::vector<Tensor>& source, const Tensor& lam,
                 const std::vector<int64_t>& groups, const std::vector<Tensor>& out) {
  const MergeInputs inputs(target, source, lam, groups, merge_out_type(out, lam), true);
  run(inputs, merge_out_data(inputs, out, true));
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(
    const std::vector<Tensor>& grad, const std::vector<Tensor>& target, const std::vector<Tensor>& source,
    const Tensor& lam, const std::vector<int64_t>& groups, bool need_lam,
    const std::vector<int64_t>& need_target, const std::vector<int64_t>& need_source) {
  const MergeInputs inputs(target, source, lam, groups, merge_out_type(grad, lam), need_lam);
  const MergeGradients gradients(inputs, grad, need_lam, need_target, need_source);
  torch::stable::parallel_for(0, inputs.elements, kGrain, [&](int64_t begin, int64_t end) {
    cpu::merge_backward(gradients.args, begin, end);
  });
  if (need_lam) cpu::merge_reduce(gradients.args);
  return gradients.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("merge_fwd", TORCH_BOX(&forward));
  m.impl("merge_out", TORCH_BOX(&forward_out));
  m.impl("merge_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
