#include <algorithm>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/monotonic_align.h"

namespace mmk::check {
namespace {

struct Case {
  int64_t frames;
  int64_t tokens;
  int64_t offset;  // elements from an aligned address to the first one
};

// Durations of one utterance by the definition; scores are float, as in the kernel.
Values durations_of(const double* log_probs, int64_t stride, int64_t frames, int64_t tokens) {
  Values durations(static_cast<size_t>(tokens));
  std::vector<std::vector<float>> score(static_cast<size_t>(frames), std::vector<float>(tokens, -INFINITY));
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t u = 0; u < tokens; ++u) {
      const float start = t == 0 && u == 0 ? 0.0f : -INFINITY;
      const float same = t == 0 ? start : score[t - 1][u];
      const float before = t == 0 || u == 0 ? start : score[t - 1][u - 1];
      score[t][u] = static_cast<float>(log_probs[t * stride + u]) + std::max(before, same);
    }
  }
  int64_t u = tokens - 1;
  for (int64_t t = frames - 1; t >= 0; --t) {
    durations[u] += 1;
    if (u > 0 && (u == t || score[t - 1][u - 1] >= score[t - 1][u])) --u;
  }
  return durations;
}

template <class T>
void check_case(Report& report, const Case& c) {
  constexpr int64_t kBatch = 3;
  const std::string name = std::string("monotonic_align ") + dtype_name<T>() + " " +
                           std::to_string(c.frames) + " x " + std::to_string(c.tokens) +
                           " offset=" + std::to_string(c.offset);
  report.check(name, [&] {
    Random random(11);
    Values stored = random.normal(c.offset + kBatch * c.frames * c.tokens);
    // Many paths are equally good.
    for (double& value : stored) value = std::round(value * 2) / 2;
    const DeviceArray<T> log_probs(stored);
    // A whole utterance, a shorter one, and one without a path.
    const Values frames = {static_cast<double>(c.frames), static_cast<double>(c.frames - c.frames / 3), 1};
    const Values tokens = {static_cast<double>(c.tokens), static_cast<double>((c.tokens + 1) / 2), 2};
    Values expected;
    for (int64_t row = 0; row < kBatch; ++row) {
      Values one(static_cast<size_t>(c.tokens));
      if (frames[row] >= tokens[row]) {
        const double* first = stored.data() + c.offset + row * c.frames * c.tokens;
        const Values found = durations_of(first, c.tokens, static_cast<int64_t>(frames[row]),
                                          static_cast<int64_t>(tokens[row]));
        std::copy(found.begin(), found.end(), one.begin());
      }
      expected.insert(expected.end(), one.begin(), one.end());
    }
    const DeviceArray<int64_t> frame_lengths(frames), token_lengths(tokens), durations(kBatch * c.tokens);
    const MonotonicWords size = monotonic_words(dtype_of<T>(), c.frames, c.tokens);
    const DeviceArray<uint32_t> words(kBatch * size.rows * size.columns);
    const DeviceArray<float> states(kBatch * cuda::monotonic_align_states(c.frames, c.tokens));
    const MonotonicAlign args = {dtype_of<T>(),
                                 log_probs.data() + c.offset,
                                 kBatch,
                                 c.frames,
                                 c.tokens,
                                 c.frames * c.tokens,
                                 c.tokens,
                                 frame_lengths.data(),
                                 token_lengths.data(),
                                 durations.data(),
                                 words.data(),
                                 states.data()};
    require(cuda::monotonic_align(args, nullptr), "monotonic_align");
    report.compare(name, durations.values(), expected, 0.0);
  });
}

}  // namespace

void check_monotonic_align(Report& report) {
  // Whole and begun rows of words, one warp and several, aligned or not, and more tokens than a block holds.
  for (const Case& c : {Case{40, 8, 0}, Case{40, 8, 1}, Case{33, 7, 0}, Case{200, 160, 0}}) {
    check_case<float>(report, c);
    check_case<__half>(report, c);
    check_case<__nv_bfloat16>(report, c);
  }
  check_case<float>(report, {2000, 1988, 0});
}

}  // namespace mmk::check
