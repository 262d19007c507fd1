#include "torch/cif.h"

namespace mmk::glue {
namespace {

// Grain size of parallel_for: starting a thread pays off from about 32,000 elements on.
constexpr int64_t kGrain = 32768;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& alpha,
                                                                   const OptionalTensor& lengths,
                                                                   const OptionalTensor& target_lengths,
                                                                   double beta, double tail_threshold,
                                                                   int64_t max_length) {
  const CifForwardCall call(x, alpha, lengths, target_lengths, beta, tail_threshold, max_length, false);
  const CifParams& p = call.args.params;
  cpu::cif_plan(call.args, 0, p.batch);
  if (p.width > 0) {
    // Elements that a token sums, on average.
    const int64_t work = 1 + p.frames * p.width / (p.tokens + 1);
    torch::stable::parallel_for(0, p.batch * p.tokens, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
      cpu::cif_features(call.args, begin, end);
    });
  }
  return call.outputs();
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                    const OptionalTensor& lengths, const Tensor& counts, const Tensor& token,
                                    const Tensor& weights, const Tensor& facts, double beta, bool scaled,
                                    bool need_x, bool need_alpha) {
  const CifBackwardCall call(grad, x, alpha, lengths, counts, token, weights, facts, beta, scaled, need_x,
                             need_alpha, false);
  const CifParams& p = call.args.params;
  if (call.args.dx != nullptr || call.args.d_alpha != nullptr) {
    torch::stable::parallel_for(0, p.batch * p.frames, 1 + kGrain / (1 + 2 * p.width),
                                [&](int64_t begin, int64_t end) { cpu::cif_frames(call.args, begin, end); });
  }
  if (call.args.d_alpha != nullptr) cpu::cif_alpha(call.args, 0, p.batch);
  return call.outputs();
}

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cif_fwd", TORCH_BOX(&forward));
  m.impl("cif_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace mmk::glue
