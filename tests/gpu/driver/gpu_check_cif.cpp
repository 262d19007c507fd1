#include <algorithm>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/cif.h"

namespace mmk::check {
namespace {

struct Case {
  int64_t frames;
  int64_t width;
  int64_t tokens;
  bool scaled;
  double high;     // alpha is up to this share of beta
  int64_t offset;  // elements from an aligned address to the first one
};

constexpr int64_t kBatch = 2;
constexpr double kBeta = 0.8;
constexpr double kThreshold = 0.5;

// One row in double: the dense weights of frames in tokens.
struct Row {
  int64_t length;
  int64_t count;
  Values ends;
  std::vector<Values> weights;  // [tokens][frames]
};

// `alpha` of the valid frames.
Row integrate(Values alpha, const Case& c, int64_t target) {
  const int64_t length = static_cast<int64_t>(alpha.size());
  double total = 0;
  for (const double value : alpha) total += value;
  if (c.scaled && total > 0) {
    for (double& value : alpha) value *= kBeta * static_cast<double>(target) / total;
    total = kBeta * static_cast<double>(target);
  }
  const double whole = c.scaled ? static_cast<double>(target) : std::floor(total / kBeta);
  const double rest = total - whole * kBeta;
  const bool tail = !c.scaled && rest >= kThreshold * kBeta && rest > 0;
  Row row = {length, static_cast<int64_t>(whole) + tail, {}, {}};
  for (int64_t j = 0; j < c.tokens; ++j) {
    const double low = kBeta * static_cast<double>(j), high = low + kBeta;
    Values weights(static_cast<size_t>(c.frames));
    double start = 0, end = static_cast<double>(length);
    for (int64_t t = 0; t < length; ++t) {
      const double stop = start + alpha[t];
      const double overlap = std::fmin(stop, high) - std::fmax(start, low);
      const double factor = tail && j == static_cast<int64_t>(whole) ? kBeta / rest : 1.0;
      if (j < row.count) weights[t] = factor * std::fmax(overlap, 0.0);
      const bool last = c.scaled && j + 1 >= row.count;
      if (stop >= high && start < high && !last) end = static_cast<double>(t + 1);
      start = stop;
    }
    row.weights.push_back(weights);
    row.ends.push_back(end);
  }
  return row;
}

template <class T>
struct Problem {
  explicit Problem(const Case& given) : c(given), random(5) {
    x = rounded<T>(random.normal(c.offset + kBatch * c.frames * c.width));
    grad = rounded<T>(random.normal(c.offset + kBatch * c.tokens * c.width));
    Values raw = random.normal(kBatch * c.frames);
    for (double& value : raw) value = kBeta * (0.05 + c.high * (0.5 + 0.5 * std::tanh(value)));
    alpha = rounded<float>(raw);
    lengths = {static_cast<double>(c.frames), static_cast<double>(c.frames - c.frames / 3)};
    targets = {static_cast<double>(c.tokens), static_cast<double>((c.tokens + 1) / 2)};
    for (int64_t row = 0; row < kBatch; ++row) rows.push_back(integrate(of_row(row), c, target(row)));
  }

  int64_t target(int64_t row) const { return static_cast<int64_t>(targets[row]); }
  double* frame(int64_t row, int64_t t) { return x.data() + c.offset + (row * c.frames + t) * c.width; }
  double* token(int64_t row, int64_t j) { return grad.data() + c.offset + (row * c.tokens + j) * c.width; }

  Values of_row(int64_t row) const {
    const auto first = alpha.begin() + row * c.frames;
    return Values(first, first + static_cast<int64_t>(lengths[row]));
  }

  // The sum of the features times the incoming gradients, for weights of a row.
  double loss(int64_t row, const Values& weights) {
    const Row moved = integrate(weights, c, target(row));
    double sum = 0;
    for (int64_t j = 0; j < std::min(moved.count, c.tokens); ++j) {
      for (int64_t t = 0; t < moved.length; ++t) {
        if (moved.weights[j][t] == 0) continue;
        for (int64_t d = 0; d < c.width; ++d)
          sum += moved.weights[j][t] * frame(row, t)[d] * token(row, j)[d];
      }
    }
    return sum;
  }

  Case c;
  Random random;
  Values x, grad, alpha, lengths, targets;
  std::vector<Row> rows;
};

template <class T>
Values features_of(Problem<T>& problem) {
  const Case& c = problem.c;
  Values features;
  for (int64_t row = 0; row < kBatch; ++row) {
    for (int64_t j = 0; j < c.tokens; ++j) {
      for (int64_t d = 0; d < c.width; ++d) {
        double sum = 0;
        for (int64_t t = 0; t < problem.rows[row].length; ++t) {
          sum += problem.rows[row].weights[j][t] * problem.frame(row, t)[d];
        }
        features.push_back(sum);
      }
    }
  }
  return features;
}

template <class T>
Values gradient_of_x(Problem<T>& problem) {
  const Case& c = problem.c;
  Values dx;
  for (int64_t row = 0; row < kBatch; ++row) {
    for (int64_t t = 0; t < c.frames; ++t) {
      for (int64_t d = 0; d < c.width; ++d) {
        double sum = 0;
        for (int64_t j = 0; j < c.tokens; ++j)
          sum += problem.rows[row].weights[j][t] * problem.token(row, j)[d];
        dx.push_back(sum);
      }
    }
  }
  return dx;
}

// By differences.
template <class T>
Values gradient_of_alpha(Problem<T>& problem) {
  const double step = 1e-7;
  Values d_alpha;
  for (int64_t row = 0; row < kBatch; ++row) {
    const Values alpha = problem.of_row(row);
    for (int64_t t = 0; t < problem.c.frames; ++t) {
      if (t >= problem.rows[row].length) {
        d_alpha.push_back(0);
        continue;
      }
      Values less = alpha, more = alpha;
      less[t] -= step;
      more[t] += step;
      d_alpha.push_back((problem.loss(row, more) - problem.loss(row, less)) / (2 * step));
    }
  }
  return d_alpha;
}

template <class T>
void check_case(Report& report, const Case& c) {
  const std::string name = std::string("cif ") + dtype_name<T>() + " " + std::to_string(c.frames) + " x " +
                           std::to_string(c.width) + (c.scaled ? " scaled" : "") +
                           " offset=" + std::to_string(c.offset) + " ";
  report.check(name, [&] {
    Problem<T> problem(c);
    const DeviceArray<T> x(problem.x), grad(problem.grad);
    const DeviceArray<float> alpha(problem.alpha);
    const DeviceArray<int64_t> lengths(problem.lengths), targets(problem.targets);
    const DeviceArray<T> features(kBatch * c.tokens * c.width), dx(kBatch * c.frames * c.width);
    const DeviceArray<int64_t> counts(kBatch), ends(kBatch * c.tokens);
    const DeviceArray<int32_t> token(kBatch * (c.frames + 1));
    const DeviceArray<float> weights(kBatch * c.frames * 2), d_alpha(kBatch * c.frames);
    const DeviceArray<float> dots(kBatch * c.frames * 2);
    const DeviceArray<double> facts(kBatch * 2), sums(kBatch * c.frames);
    const CifParams params = {
        dtype_of<T>(),      kBatch,  c.frames,     c.width,       c.tokens, kBeta, x.data() + c.offset,
        c.frames * c.width, c.width, alpha.data(), lengths.data()};
    const CifPlan plan = {counts.data(), token.data(), weights.data(), facts.data()};
    require(cuda::cif_forward({params, plan, c.scaled ? targets.data() : nullptr, kThreshold, features.data(),
                               ends.data(), sums.data()},
                              nullptr),
            "cif_forward");
    require(cuda::cif_backward({params, plan, c.scaled, grad.data() + c.offset, c.tokens * c.width, c.width,
                                dx.data(), d_alpha.data(), dots.data(), sums.data()},
                               nullptr),
            "cif_backward");
    Values expected_counts, expected_ends;
    for (const Row& row : problem.rows) {
      expected_counts.push_back(static_cast<double>(std::min(row.count, c.tokens)));
      expected_ends.insert(expected_ends.end(), row.ends.begin(), row.ends.end());
    }
    report.compare(name + "counts", counts.values(), expected_counts, 0.0);
    report.compare(name + "ends", ends.values(), expected_ends, 0.0);
    report.compare(name + "features", features.values(), features_of(problem), epsilon<T>() + 1e-6, 1.0);
    report.compare(name + "dx", dx.values(), gradient_of_x(problem), epsilon<T>() + 1e-6, 1.0);
    report.compare(name + "d_alpha", d_alpha.values(), gradient_of_alpha(problem), 1e-5, 1.0);
  });
}

}  // namespace

void check_cif(Report& report) {
  // One warp of columns and two, aligned or not, tokens of many frames, and several from one.
  for (const bool scaled : {false, true}) {
    for (const Case& c : {Case{20, 24, 9, scaled, 0.8, 0}, Case{20, 24, 9, scaled, 0.8, 1},
                          Case{9, 300, 12, scaled, 3.0, 0}, Case{80, 5, 3, scaled, 0.03, 0}}) {
      check_case<float>(report, c);
      check_case<__half>(report, c);
      check_case<__nv_bfloat16>(report, c);
    }
  }
  // More frames than a block takes at a time.
  check_case<float>(report, {300, 2, 160, false, 0.8, 0});
}

}  // namespace mmk::check
