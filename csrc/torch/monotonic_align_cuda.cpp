#include "torch/cuda.h"
#include "torch/monotonic_align.h"

namespace mmk::glue {
namespace {

Tensor forward(const Tensor& log_probs, const OptionalTensor& frame_lengths,
               const OptionalTensor& token_lengths) {
  const CudaScope scope(log_probs);
  const MonotonicAlignCall call(log_probs, frame_lengths, token_lengths, cuda::monotonic_align_states);
  check_launch(cuda::monotonic_align(call.args, scope.stream()), "monotonic_align_fwd");
  return call.durations;
}

MMK_CUDA_KERNELS(m) {
  m.impl("monotonic_align_fwd", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace mmk::glue
