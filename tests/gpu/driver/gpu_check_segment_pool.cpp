#include <algorithm>
#include <limits>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/segment_pool.h"

namespace mmk::check {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kLowest = std::numeric_limits<int64_t>::min(),
                  kHighest = std::numeric_limits<int64_t>::max();

struct Case {
  Reduction reduce;
  int64_t frames, width;
  std::vector<std::vector<int64_t>> ends;  // of each row
  std::vector<int64_t> counts;             // none: all segments
  int64_t offset;                          // elements from an aligned address to the first row
};

std::vector<int64_t> joined(const std::vector<std::vector<int64_t>>& rows) {
  std::vector<int64_t> result;
  for (const auto& row : rows) result.insert(result.end(), row.begin(), row.end());
  return result;
}

// Integers that a double does not hold stay as they are.
DeviceArray<int64_t> on_device(const std::vector<int64_t>& values) {
  DeviceArray<int64_t> array(static_cast<int64_t>(values.size()));
#ifdef MMK_SIMT
  std::copy(values.begin(), values.end(), array.data());
#else
  require(cudaMemcpy(array.data(), values.data(), values.size() * sizeof(int64_t), cudaMemcpyHostToDevice),
          "cudaMemcpy");
#endif
  return array;
}

template <class T>
DeviceArray<T> shifted(const Values& values, int64_t offset) {
  Values stored(static_cast<size_t>(offset));
  stored.insert(stored.end(), values.begin(), values.end());
  return DeviceArray<T>(stored);
}

// Inputs on host and device, rounded to the type of the device. Frames in no segment hold NaN.
template <class T>
struct Problem {
  explicit Problem(const Case& given)
      : c(given),
        batch(static_cast<int64_t>(given.ends.size())),
        segments(static_cast<int64_t>(given.ends[0].size())),
        random(31),
        x(rounded<T>(random.normal(batch * c.frames * c.width))),
        grad(rounded<T>(random.normal(batch * segments * c.width))),
        scores(rounded<float>(random.normal(batch * c.frames))) {
    for (int64_t row = 0; row < batch; ++row) {
      int64_t stop = 0;
      for (int64_t segment = 0; segment < segments; ++segment) {
        const bool valid = c.counts.empty() || segment < c.counts[row];
        if (valid) stop = std::max(stop, std::min(c.ends[row][segment], c.frames));
        stops.push_back(stop);
      }
      for (int64_t t = stop; t < c.frames; ++t) {
        scores[row * c.frames + t] = kNaN;
        std::fill_n(x.begin() + (row * c.frames + t) * c.width, c.width, kNaN);
      }
    }
  }

  SegmentPoolShape shape() const { return {dtype_of<T>(), c.reduce, batch, c.frames, segments, c.width}; }
  int64_t start(int64_t row, int64_t segment) const {
    return segment == 0 ? 0 : stops[row * segments + segment - 1];
  }
  bool attention() const { return c.reduce == Reduction::kAttention; }
  bool max() const { return c.reduce == Reduction::kMax; }

  std::string name() const {
    return std::string("segment_pool ") + dtype_name<T>() +
           " reduce=" + std::to_string(static_cast<int>(c.reduce)) + " T=" + std::to_string(c.frames) +
           " D=" + std::to_string(c.width) + " offset=" + std::to_string(c.offset) + " ";
  }

  Case c;
  int64_t batch, segments;
  Random random;
  Values x, grad, scores;
  std::vector<int64_t> stops;
};

struct Expected {
  Values out, dx, d_scores;
};

// One column of one segment; weights are those of its frames.
template <class T>
void pool_column(const Problem<T>& problem, int64_t row, int64_t segment, int64_t j, const Values& weights,
                 Expected& expected, Values& dots) {
  const Case& c = problem.c;
  const int64_t start = problem.start(row, segment), frames = static_cast<int64_t>(weights.size());
  const int64_t place = (row * problem.segments + segment) * c.width + j;
  const auto at = [&](int64_t t) { return (row * c.frames + start + t) * c.width + j; };
  int64_t largest = 0;
  for (int64_t t = 1; t < frames; ++t) largest = problem.x[at(t)] > problem.x[at(largest)] ? t : largest;
  for (int64_t t = 0; t < frames; ++t) {
    const bool chosen = c.reduce == Reduction::kMax ? t == largest : t == frames - 1;
    const bool chooses = c.reduce == Reduction::kMax || c.reduce == Reduction::kLast;
    const double weight = chooses ? (chosen ? 1.0 : 0.0) : weights[t];
    expected.out[place] += weight * problem.x[at(t)];
    expected.dx[at(t)] = weight * problem.grad[place];
    dots[t] += problem.grad[place] * problem.x[at(t)];
  }
}

template <class T>
Expected reference(const Problem<T>& problem) {
  const Case& c = problem.c;
  Expected expected = {Values(problem.grad.size()), Values(problem.x.size()), Values(problem.scores.size())};
  for (int64_t row = 0; row < problem.batch; ++row) {
    for (int64_t segment = 0; segment < problem.segments; ++segment) {
      const int64_t start = problem.start(row, segment);
      const int64_t frames = problem.stops[row * problem.segments + segment] - start;
      Values weights(static_cast<size_t>(frames),
                     c.reduce == Reduction::kMean ? 1.0 / static_cast<double>(frames) : 1.0);
      double total = 0.0, mean = 0.0;
      for (int64_t t = 0; problem.attention() && t < frames; ++t) {
        weights[t] = std::exp(problem.scores[row * c.frames + start + t]);
        total += weights[t];
      }
      for (int64_t t = 0; problem.attention() && t < frames; ++t) weights[t] /= total;
      Values dots(weights.size());
      for (int64_t j = 0; j < c.width; ++j) pool_column(problem, row, segment, j, weights, expected, dots);
      for (int64_t t = 0; t < frames; ++t) mean += weights[t] * dots[t];
      for (int64_t t = 0; t < frames; ++t) {
        expected.d_scores[row * c.frames + start + t] = weights[t] * (dots[t] - mean);
      }
    }
  }
  return expected;
}

template <class T>
void check_case(Report& report, const Case& c) {
  const Problem<T> problem(c);
  const Expected expected = reference(problem);
  const int64_t segments = problem.batch * problem.segments, frames = problem.batch * c.frames;
  const int64_t partials = 2 * problem.batch * cuda::segment_pool_tiles(c.frames);
  const DeviceArray<int64_t> ends = on_device(joined(c.ends)), counts = on_device(c.counts), stops(segments);
  const DeviceArray<T> x = shifted<T>(problem.x, c.offset), grad = shifted<T>(problem.grad, c.offset);
  const DeviceArray<float> scores(problem.scores), stats(problem.attention() ? 2 * segments : 0);
  const DeviceArray<T> out(segments * c.width), dx(frames * c.width), dx_alone(frames * c.width);
  const DeviceArray<int32_t> index(problem.max() ? segments * c.width : 0);
  const DeviceArray<float> partial(partials * c.width), partial_stats(problem.attention() ? 2 * partials : 0);
  const DeviceArray<int32_t> partial_index(problem.max() ? partials * c.width : 0);
  const DeviceArray<float> d_scores(frames), partial_dot(partials);
  const cuda::SegmentEnds given = {ends.data(), counts.data(), stops.data()};

  const SegmentPoolForward forward = {problem.shape(), x.data() + c.offset,  c.frames * c.width,
                                      c.width,         stops.data(),         scores.data(),
                                      out.data(),      stats.data(),         index.data(),
                                      partial.data(),  partial_index.data(), partial_stats.data()};
  require(cuda::segment_pool_forward(forward, given, nullptr), "segment_pool_forward");
  const double tolerance = epsilon<T>() + 1e-6;
  report.compare(problem.name() + "out", out.values(), expected.out, tolerance, 1.0);

  SegmentPoolBackward backward = {problem.shape(),
                                  grad.data() + c.offset,
                                  problem.segments * c.width,
                                  c.width,
                                  nullptr,
                                  0,
                                  0,
                                  stops.data(),
                                  scores.data(),
                                  stats.data(),
                                  index.data(),
                                  dx_alone.data(),
                                  nullptr,
                                  nullptr};
  require(cuda::segment_pool_backward(backward, given, nullptr), "segment_pool_backward");
  report.compare(problem.name() + "dx", dx_alone.values(), expected.dx, tolerance, 1.0);
  if (!problem.attention()) return;
  backward.x = x.data() + c.offset;
  backward.batch_stride = c.frames * c.width;
  backward.frame_stride = c.width;
  backward.dx = dx.data();
  backward.d_scores = d_scores.data();
  backward.partial_dot = partial_dot.data();
  require(cuda::segment_pool_backward(backward, given, nullptr), "segment_pool_backward");
  report.compare(problem.name() + "dx with d_scores", dx.values(), expected.dx, tolerance, 1.0);
  report.compare(problem.name() + "d_scores", d_scores.values(), expected.d_scores, 1e-5,
                 std::sqrt(static_cast<double>(c.width)));
}

}  // namespace

void check_segment_pool(Report& report) {
  // Segments without frames, of a few, of a piece, of one more and of several; ends and counts of any value.
  const std::vector<std::vector<int64_t>> ends = {
      {3, 3, 67, 132, 140}, {0, 64, 65, 65, 299}, {9, 4, 80, kHighest, kLowest}};
  for (int reduce = 0; reduce <= static_cast<int>(Reduction::kAttention); ++reduce) {
    for (const auto& counts : {std::vector<int64_t>{}, std::vector<int64_t>{4, -3, 99}}) {
      for (const Case& c : {Case{static_cast<Reduction>(reduce), 300, 40, ends, counts, 0},
                            Case{static_cast<Reduction>(reduce), 300, 17, ends, counts, 0},
                            Case{static_cast<Reduction>(reduce), 300, 16, ends, counts, 1},
                            Case{static_cast<Reduction>(reduce), 20, 264, ends, counts, 0}}) {
        const auto run = [&](auto element) {
          using T = decltype(element);
          report.check("segment_pool", [&] { check_case<T>(report, c); });
        };
        run(float{});
        run(__half{});
        run(__nv_bfloat16{});
      }
    }
  }
}

}  // namespace mmk::check
