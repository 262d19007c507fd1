#include <algorithm>
#include <limits>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/ctc_align.h"

namespace mmk::check {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Case {
  int64_t batch, frames, classes, tokens;
  int64_t valid;  // tokens of the first utterance; the others have a few less
};

struct Paths {
  Values path, ends;
  double total = kNever;
};

// The definition for one utterance, with all moves kept, in float as the kernels compute it.
Paths aligned(const Values& log_probs, const Values& target, int64_t classes, int64_t frames,
              int64_t tokens) {
  const int64_t states = 2 * tokens + 1;
  const auto label = [&](int64_t s) { return s % 2 == 0 ? int64_t{0} : static_cast<int64_t>(target[s / 2]); };
  std::vector<float> best(static_cast<size_t>(states), kNever);
  std::vector<int8_t> moves(static_cast<size_t>(frames * states));
  best[0] = 0;
  for (int64_t t = 0; t < frames; ++t) {
    std::vector<float> next(best.size());
    float largest = kNever;
    for (int64_t s = 0; s < states; ++s) {
      const float one = s > 0 ? best[s - 1] : kNever;
      const float two = s % 2 == 1 && s > 1 && label(s) != label(s - 2) ? best[s - 2] : kNever;
      const int8_t move = two > one && two > best[s] ? 2 : one > best[s] ? 1 : 0;
      moves[t * states + s] = move;
      next[s] = best[s - move] + static_cast<float>(log_probs[t * classes + label(s)]);
      const int64_t pair = s / 2;
      if (pair <= t && pair >= tokens - frames + t) largest = std::max(largest, next[s]);
    }
    if ((t + 1) % kCtcRescale == 0 && largest > kNever) {
      for (float& value : next) value -= largest;
    }
    best = next;
  }
  int64_t s = tokens > 0 && !(best[states - 1] > best[states - 2]) ? states - 2 : states - 1;
  Paths result = {Values(static_cast<size_t>(frames), -1), Values(static_cast<size_t>(tokens), 0)};
  if (!(best[s] > kNever)) return result;
  std::fill(result.ends.begin(), result.ends.end(), static_cast<double>(frames));
  result.total = 0;
  for (int64_t t = frames - 1; t >= 0; --t) {
    result.path[t] = static_cast<double>(label(s));
    result.total += log_probs[t * classes + label(s)];
    const int8_t move = moves[t * states + s];
    if (s % 2 == 1 && move > 0 && s > 1) result.ends[s / 2 - 1] = static_cast<double>(t);
    s -= move;
  }
  return result;
}

template <class T>
void check_case(Report& report, const Case& c) {
  Random random(31);
  const std::string name = std::string("ctc_align ") + dtype_name<T>() + " U=" + std::to_string(c.tokens) +
                           " valid=" + std::to_string(c.valid) + " ";
  // A grid of values, so that many sums are equal.
  Values log_probs = random.normal(c.batch * c.frames * c.classes, -3.0);
  for (double& value : log_probs) value = std::round(value * 2) / 2;
  Values targets, frames, tokens;
  for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
    targets.push_back(1.0 + static_cast<double>(i * i % (c.classes - 1)));
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    frames.push_back(static_cast<double>(std::max<int64_t>(c.frames - 5 * b, 0)));
    tokens.push_back(static_cast<double>(std::max<int64_t>(c.valid - 2 * b, 0)));
  }
  const DeviceArray<T> device_log_probs(log_probs);
  const DeviceArray<int64_t> device_targets(targets), device_frames(frames), device_tokens(tokens);
  const DeviceArray<int64_t> paths(c.batch * c.frames), ends(c.batch * c.tokens);
  const DeviceArray<float> totals(c.batch);
  const DeviceArray<uint8_t> workspace(
      static_cast<int64_t>(cuda::ctc_align_workspace(c.batch, c.frames, c.tokens)));
  const CtcAlign args = {dtype_of<T>(),
                         c.batch,
                         c.frames,
                         c.classes,
                         c.tokens,
                         0,
                         device_log_probs.data(),
                         c.frames * c.classes,
                         c.classes,
                         device_targets.data(),
                         device_frames.data(),
                         device_tokens.data(),
                         paths.data(),
                         ends.data(),
                         totals.data()};
  require(cuda::ctc_align(args, workspace.data(), nullptr), "ctc_align");
  const Values found_paths = paths.values(), found_ends = ends.values(), found_totals = totals.values();
  const auto part = [](const Values& values, int64_t begin, int64_t count) {
    return Values(values.begin() + begin, values.begin() + begin + count);
  };
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t length = static_cast<int64_t>(frames[b]), count = static_cast<int64_t>(tokens[b]);
    const Paths expected = aligned(part(log_probs, b * c.frames * c.classes, length * c.classes),
                                   part(targets, b * c.tokens, count), c.classes, length, count);
    report.compare(name + "path", part(found_paths, b * c.frames, length), expected.path, 0);
    report.compare(name + "ends", part(found_ends, b * c.tokens, count), expected.ends, 0);
    const bool feasible = expected.total > kNever;
    report.compare(name + "feasible", {found_totals[b] > kNever ? 1.0 : 0.0}, {feasible ? 1.0 : 0.0}, 0);
    if (feasible) report.compare(name + "total", {found_totals[b]}, {expected.total}, 1e-6, 1.0);
  }
}

}  // namespace

void check_ctc_align(Report& report) {
  // A target for each kernel: one warp; warps that overlap; scores in device memory. Some are infeasible.
  for (const Case& c :
       {Case{3, 70, 7, 40, 40}, Case{3, 250, 9, 200, 200}, Case{2, 120, 9, 480, 60}, Case{2, 80, 9, 900, 40},
        Case{2, 60, 9, 1900, 30}, Case{2, 90, 9, 2100, 50}, Case{4, 10, 5, 8, 8}, Case{2, 33, 4, 0, 0}}) {
    report.check("ctc_align", [&] {
      check_case<float>(report, c);
      check_case<__half>(report, c);
      check_case<__nv_bfloat16>(report, c);
    });
  }
}

}  // namespace mmk::check
