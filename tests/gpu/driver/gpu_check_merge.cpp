#include "gpu/driver/gpu_check.h"
#include "mmkernels/merge.h"

namespace mmk::check {
namespace {

struct Case {
  std::vector<int64_t> sizes;
  int64_t groups;
  int64_t offset;  // elements from an aligned address to the first one
};

// Tensors on host and device, rounded to the type of the device.
template <class T>
struct Tensors {
  Tensors(const Case& c, Random* random) : offset(c.offset) {
    for (const int64_t size : c.sizes) {
      const Values zeros(static_cast<size_t>(size));
      host.push_back(random == nullptr ? zeros : rounded<T>(random->normal(size)));
      Values stored(static_cast<size_t>(offset));
      stored.insert(stored.end(), host.back().begin(), host.back().end());
      device.emplace_back(stored);
    }
  }

  T* data(size_t k) const { return device[k].data() + offset; }

  std::vector<void*> pointers() const {
    std::vector<void*> result;
    for (size_t k = 0; k < device.size(); ++k) result.push_back(data(k));
    return result;
  }

  Values values(size_t k) const {
    const Values stored = device[k].values();
    return Values(stored.begin() + offset, stored.end());
  }

  int64_t offset;
  std::vector<Values> host;
  std::vector<DeviceArray<T>> device;
};

template <class Target, class Source, class Result>
struct Problem {
  explicit Problem(const Case& c)
      : shape(c), random(23), target(c, &random), source(c, &random), grad(c, &random) {
    // Both ends, and weights on either side of the middle.
    for (int64_t g = 0; g < c.groups; ++g) lam.push_back(g < 2 ? g : 0.9 / static_cast<double>(g - 1));
    lam = rounded<float>(lam);
    int64_t begin = 0;
    for (size_t k = 0; k < c.sizes.size(); ++k) {
      const int64_t group = static_cast<int64_t>(k * 7) % c.groups;
      pairs.push_back({target.data(k), source.data(k), c.sizes[k], group, begin});
      begin += c.sizes[k];
    }
  }

  MergeTypes types() const { return {dtype_of<Target>(), dtype_of<Source>(), dtype_of<Result>()}; }
  double weight(size_t k) const { return lam[pairs[k].group]; }

  std::string name() const {
    return std::string("merge ") + dtype_name<Target>() + " " + dtype_name<Source>() + " " +
           dtype_name<Result>() + " x " + std::to_string(pairs.size()) +
           " offset=" + std::to_string(shape.offset) + " ";
  }

  Case shape;
  Random random;
  Tensors<Target> target;
  Tensors<Source> source;
  Tensors<Result> grad;
  Values lam;
  std::vector<MergePair> pairs;
};

template <class Target, class Source, class Result>
Values merged(const Problem<Target, Source, Result>& problem, size_t k) {
  const double lam = problem.weight(k);
  Values result;
  for (size_t i = 0; i < problem.target.host[k].size(); ++i) {
    result.push_back((1 - lam) * problem.target.host[k][i] + lam * problem.source.host[k][i]);
  }
  return result;
}

Values scaled(Values grad, double factor) {
  for (double& value : grad) value *= factor;
  return grad;
}

template <class Target, class Source, class Result>
void check_forward(Report& report, const Problem<Target, Source, Result>& problem) {
  const DeviceArray<float> lam(problem.lam);
  const int64_t count = static_cast<int64_t>(problem.pairs.size());
  const auto run = [&](const Tensors<Result>& out, const char* what) {
    const std::vector<void*> pointers = out.pointers();
    require(cuda::merge_forward({problem.types(), lam.data(), problem.pairs.data(), pointers.data(), count},
                                nullptr),
            "merge_forward");
    for (size_t k = 0; k < problem.pairs.size(); ++k) {
      report.compare(problem.name() + what, out.values(k), merged(problem, k), epsilon<Result>() + 1e-6, 1.0);
    }
  };
  run(Tensors<Result>(problem.shape, nullptr), "out");
  if constexpr (std::is_same_v<Target, Result>) run(problem.target, "in place");
}

template <class Target, class Source, class Result>
void check_backward(Report& report, const Problem<Target, Source, Result>& problem, bool need_lam) {
  const Case& c = problem.shape;
  const int64_t count = static_cast<int64_t>(problem.pairs.size());
  const DeviceArray<float> lam(problem.lam), d_lam(need_lam ? c.groups : 0);
  const Tensors<Target> d_target(c, nullptr);
  const Tensors<Source> d_source(c, nullptr);
  std::vector<MergeGradient> gradients;
  Values sums(need_lam ? c.groups : 0);
  double elements = 0;
  for (size_t k = 0; k < problem.pairs.size(); ++k) {
    // Each third pair lacks one of the two.
    gradients.push_back({problem.grad.data(k), k % 3 == 1 ? nullptr : d_target.data(k),
                         k % 3 == 2 ? nullptr : d_source.data(k), 0});
    elements += static_cast<double>(c.sizes[k]);
    for (int64_t i = 0; need_lam && i < c.sizes[k]; ++i) {
      sums[problem.pairs[k].group] +=
          problem.grad.host[k][i] * (problem.source.host[k][i] - problem.target.host[k][i]);
    }
  }
  const std::vector<int64_t> begin = merge_partials(problem.pairs.data(), count, c.groups, gradients.data());
  const DeviceArray<float> partial(need_lam ? begin.back() : 0);
  const MergeBackward args = {problem.types(), lam.data(), problem.pairs.data(), gradients.data(), count,
                              begin.data(),    c.groups,   partial.data(),       d_lam.data()};
  require(cuda::merge_backward(args, nullptr), "merge_backward");
  report.compare(problem.name() + "d_lam", d_lam.values(), sums, 1e-6, std::sqrt(elements));
  for (size_t k = 0; k < problem.pairs.size(); ++k) {
    const Values& grad = problem.grad.host[k];
    const Values to_target = scaled(grad, k % 3 == 1 ? 0 : 1 - problem.weight(k));
    const Values to_source = scaled(grad, k % 3 == 2 ? 0 : problem.weight(k));
    report.compare(problem.name() + "d_target", d_target.values(k), to_target, epsilon<Target>() + 1e-6);
    report.compare(problem.name() + "d_source", d_source.values(k), to_source, epsilon<Source>() + 1e-6);
  }
}

template <class Target, class Source, class Result>
void check_case(Report& report, const Case& c) {
  const Problem<Target, Source, Result> problem(c);
  report.check(problem.name(), [&] {
    for (const bool need_lam : {false, true}) check_backward(report, problem, need_lam);
    check_forward(report, problem);  // the last: it overwrites the targets
  });
}

// Calls check_case for the types that come with one half type.
template <class Half>
void check_types(Report& report, const Case& c) {
  check_case<float, float, Half>(report, c);
  check_case<float, Half, float>(report, c);
  check_case<float, Half, Half>(report, c);
  check_case<Half, float, float>(report, c);
  check_case<Half, float, Half>(report, c);
  check_case<Half, Half, float>(report, c);
  check_case<Half, Half, Half>(report, c);
}

}  // namespace

void check_merge(Report& report) {
  // Whole chunks, a rest, no elements; more pairs than one launch takes, more groups than pairs.
  const std::vector<int64_t> sizes = {kMergeChunk, 7, 0, kMergeChunk + 100, 1, 2 * kMergeChunk, 1000};
  std::vector<int64_t> many;
  for (int64_t k = 0; k < 150; ++k) many.push_back(k % 5);
  for (const Case& c : {Case{sizes, 4, 0}, Case{sizes, 9, 1}, Case{many, 300, 0}}) {
    check_case<float, float, float>(report, c);
    check_types<__half>(report, c);
    check_types<__nv_bfloat16>(report, c);
  }
}

}  // namespace mmk::check
