#include "torch/ctc_align.h"
#include "torch/cuda.h"

namespace mmk::glue {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& log_probs, const Tensor& targets,
                                           const OptionalTensor& input_lengths,
                                           const OptionalTensor& target_lengths, int64_t blank) {
  const CudaScope scope(log_probs);
  const CtcAlignCall call(log_probs, targets, input_lengths, target_lengths, blank);
  const CtcAlign& args = call.args;
  const size_t bytes = cuda::ctc_align_workspace(args.batch, args.frames, args.tokens);
  const Tensor workspace = new_empty(log_probs, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check_launch(cuda::ctc_align(args, mutable_or_null(workspace), scope.stream()), "ctc_align_fwd");
  return call.outputs();
}

MMK_CUDA_KERNELS(m) {
  m.impl("ctc_align_fwd", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace mmk::glue
