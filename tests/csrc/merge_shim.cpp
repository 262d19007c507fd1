// The launchers of merge with arguments that ctypes can pass: arrays of pointers instead of structures.
#include <cstdint>
#include <vector>

#include "mmkernels/merge.h"

namespace {

mmk::MergeTypes make_types(const int64_t* types) {
  const auto type = [&](int i) { return static_cast<mmk::DType>(types[i]); };
  return {type(0), type(1), type(2)};
}

std::vector<mmk::MergePair> make_pairs(int64_t count, const int64_t* sizes, const int64_t* groups,
                                       const void* const* target, const void* const* source) {
  std::vector<mmk::MergePair> pairs;
  int64_t begin = 0;
  for (int64_t k = 0; k < count; ++k) {
    pairs.push_back({target[k], source[k], sizes[k], groups[k], begin});
    begin += sizes[k];
  }
  return pairs;
}

}  // namespace

// types: of target, source, result
extern "C" int merge_forward(const int64_t* types, int64_t count, const int64_t* sizes, const int64_t* groups,
                             const void* const* target, const void* const* source, const float* lam,
                             void* const* out) {
  const std::vector<mmk::MergePair> pairs = make_pairs(count, sizes, groups, target, source);
  return mmk::cuda::merge_forward({make_types(types), lam, pairs.data(), out, count}, nullptr);
}

// d_target, d_source: null if not needed; d_lam [lams] is, and then `partial` need not be anything.
extern "C" int merge_backward(const int64_t* types, int64_t count, const int64_t* sizes,
                              const int64_t* groups, const void* const* target, const void* const* source,
                              const float* lam, int64_t lams, const void* const* grad, void* const* d_target,
                              void* const* d_source, float* partial, float* d_lam) {
  const std::vector<mmk::MergePair> pairs = make_pairs(count, sizes, groups, target, source);
  std::vector<mmk::MergeGradient> gradients;
  for (int64_t k = 0; k < count; ++k) gradients.push_back({grad[k], d_target[k], d_source[k], 0});
  const std::vector<int64_t> begin = mmk::merge_partials(pairs.data(), count, lams, gradients.data());
  const mmk::MergeBackward args = {
      make_types(types), lam, pairs.data(), gradients.data(), count, begin.data(), lams, partial, d_lam};
  return mmk::cuda::merge_backward(args, nullptr);
}
