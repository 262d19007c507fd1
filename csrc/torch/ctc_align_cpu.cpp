#include "torch/ctc_align.h"

namespace mmk::glue {
namespace {

// The largest lengths among the utterances [begin, end).
std::pair<int64_t, int64_t> longest(const CtcAlign& args, int64_t begin, int64_t end) {
  const auto of = [&](const int64_t* lengths, int64_t most) {
    if (lengths == nullptr) return most;
    return std::clamp<int64_t>(*std::max_element(lengths + begin, lengths + end), 0, most);
  };
  return {of(args.input_lengths, args.frames), of(args.target_lengths, args.tokens)};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& log_probs, const Tensor& targets,
                                           const OptionalTensor& input_lengths,
                                           const OptionalTensor& target_lengths, int64_t blank) {
  const CtcAlignCall call(log_probs, targets, input_lengths, target_lengths, blank);
  const CtcAlign& args = call.args;
  // Starting a thread pays off from about 32,000 scores on.
  const int64_t grain = 1 + 32768 / (1 + args.frames * (args.tokens + 1));
  const Place place(log_probs);
  torch::stable::parallel_for(0, args.batch, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kAlignment = 64;
    const auto [frames, tokens] = longest(args, begin, end);
    const size_t bytes = cpu::ctc_align_scratch(args.dtype, frames, tokens, args.classes);
    const int64_t size = static_cast<int64_t>(bytes) + kAlignment;
    const Tensor scratch = new_empty(place, &size, 1, ScalarType::Byte);
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
    const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
    cpu::ctc_align(args, begin, end, reinterpret_cast<void*>(aligned));
  });
  return call.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("ctc_align_fwd", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace mmk::glue
