#include "torch/monotonic_align.h"

namespace mmk::glue {
namespace {

Tensor forward(const Tensor& log_probs, const OptionalTensor& frame_lengths,
               const OptionalTensor& token_lengths) {
  const MonotonicAlignCall call(log_probs, frame_lengths, token_lengths,
                                [](int64_t, int64_t tokens) { return cpu::monotonic_align_states(tokens); });
  // Starting a thread pays off from about 32,000 log-probabilities on.
  const int64_t grain = 1 + 32768 / (1 + call.args.frames * call.args.tokens);
  torch::stable::parallel_for(0, call.args.batch, grain, [&](int64_t begin, int64_t end) {
    cpu::monotonic_align(call.args, begin, end);
  });
  return call.durations;
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("monotonic_align_fwd", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace mmk::glue
