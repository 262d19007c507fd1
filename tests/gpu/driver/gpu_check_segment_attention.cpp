#include <algorithm>
#include <limits>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/segment_attention.h"

namespace mmk::check {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kLowest = std::numeric_limits<int64_t>::min(),
                  kHighest = std::numeric_limits<int64_t>::max();

struct Case {
  int64_t frames, heads, key_heads, size;
  std::vector<std::vector<int64_t>> ends;  // of each row
  int64_t lookback;
  int64_t offset;  // elements from an aligned address to the first row
};

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

// Inputs on host and device, rounded to the type of the device, in the order [row][frame][head][size]. Frames
// in no segment hold NaN.
template <class T>
struct Problem {
  explicit Problem(const Case& given)
      : c(given),
        batch(static_cast<int64_t>(given.ends.size())),
        random(37),
        q(make(c.heads)),
        k(make(c.key_heads)),
        v(make(c.key_heads)),
        grad(make(c.heads)) {
    for (int64_t row = 0; row < batch; ++row) {
      int64_t frame = 0;
      for (int64_t end : c.ends[row]) {
        const int64_t stop = std::min(std::max(end, frame), c.frames);
        for (int64_t t = frame; t < stop; ++t) starts.push_back(std::max<int64_t>(frame - c.lookback, 0));
        frame = stop;
      }
      for (; frame < c.frames; ++frame) {
        starts.push_back(c.frames);
        for (Values* values : {&q, &k, &v, &grad}) {
          const int64_t width = static_cast<int64_t>(values->size()) / (batch * c.frames);
          std::fill_n(values->begin() + (row * c.frames + frame) * width, width, kNaN);
        }
      }
    }
  }

  Values make(int64_t heads) { return rounded<T>(random.normal(batch * c.frames * heads * c.size)); }

  int64_t at(int64_t row, int64_t frame, int64_t head, int64_t heads) const {
    return ((row * c.frames + frame) * heads + head) * c.size;
  }

  SegmentAttentionShape shape() const {
    return {dtype_of<T>(), batch, c.heads, c.key_heads, c.frames, c.size};
  }

  std::string name() const {
    return std::string("segment_attention ") + dtype_name<T>() + " T=" + std::to_string(c.frames) +
           " d=" + std::to_string(c.size) + " lookback=" + std::to_string(c.lookback) +
           " offset=" + std::to_string(c.offset) + " ";
  }

  Case c;
  int64_t batch;
  Random random;
  Values q, k, v, grad;
  std::vector<int64_t> starts;  // of each row and frame
};

struct Expected {
  Values out, dq, dk, dv;
};

double dot(const Values& a, int64_t at_a, const Values& b, int64_t at_b, int64_t size) {
  double sum = 0.0;
  for (int64_t c = 0; c < size; ++c) sum += a[at_a + c] * b[at_b + c];
  return sum;
}

void add(Values& to, int64_t at_to, double factor, const Values& from, int64_t at_from, int64_t size) {
  for (int64_t c = 0; c < size; ++c) to[at_to + c] += factor * from[at_from + c];
}

// The result and the gradients of one query of one head.
template <class T>
void attend(const Problem<T>& problem, double scale, int64_t row, int64_t head, int64_t query, Expected& e) {
  const Case& c = problem.c;
  const int64_t start = problem.starts[row * c.frames + query], key_head = head / (c.heads / c.key_heads);
  const int64_t mine = problem.at(row, query, head, c.heads);
  const auto other = [&](int64_t key) { return problem.at(row, key, key_head, c.key_heads); };
  Values weights, products;
  double total = 0.0, mean = 0.0;
  for (int64_t key = start; key <= query; ++key) {
    weights.push_back(std::exp(scale * dot(problem.q, mine, problem.k, other(key), c.size)));
    products.push_back(dot(problem.grad, mine, problem.v, other(key), c.size));
    total += weights.back();
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] /= total;
    mean += weights[i] * products[i];
  }
  for (int64_t key = start; key <= query; ++key) {
    const double weight = weights[key - start];
    const double slope = scale * weight * (products[key - start] - mean);
    add(e.out, mine, weight, problem.v, other(key), c.size);
    add(e.dv, other(key), weight, problem.grad, mine, c.size);
    add(e.dq, mine, slope, problem.k, other(key), c.size);
    add(e.dk, other(key), slope, problem.q, mine, c.size);
  }
}

template <class T>
void check_case(Report& report, const Case& c) {
  const Problem<T> problem(c);
  const double scale = 0.5 / std::sqrt(static_cast<double>(c.size));
  Expected expected = {Values(problem.q.size()), Values(problem.q.size()), Values(problem.k.size()),
                       Values(problem.k.size())};
  for (int64_t row = 0; row < problem.batch; ++row) {
    for (int64_t head = 0; head < c.heads; ++head) {
      for (int64_t query = 0; query < c.frames; ++query) attend(problem, scale, row, head, query, expected);
    }
  }
  std::vector<int64_t> all_ends;
  for (const auto& ends : c.ends) all_ends.insert(all_ends.end(), ends.begin(), ends.end());
  const DeviceArray<int64_t> ends = on_device(all_ends);
  const DeviceArray<int32_t> extents(problem.batch * 2 * c.frames);
  const DeviceArray<T> q = shifted<T>(problem.q, c.offset), k = shifted<T>(problem.k, c.offset),
                       v = shifted<T>(problem.v, c.offset), grad = shifted<T>(problem.grad, c.offset);
  const auto count = [](const Values& values) { return static_cast<int64_t>(values.size()); };
  const DeviceArray<T> out(count(problem.q)), dq(count(problem.q)), dk(count(problem.k)),
      dv(count(problem.k));
  const DeviceArray<float> lse(problem.batch * c.heads * c.frames), dots(problem.batch * c.heads * c.frames);
  const auto rows = [&](const T* data, int64_t heads) {
    return HeadRows{data, c.frames * heads * c.size, c.size, heads * c.size};
  };
  const HeadRows of_q = rows(q.data() + c.offset, c.heads), of_k = rows(k.data() + c.offset, c.key_heads),
                 of_v = rows(v.data() + c.offset, c.key_heads);

  const SegmentAttentionForward forward = {problem.shape(), of_q,  of_k,       of_v,
                                           extents.data(),  scale, out.data(), lse.data()};
  const cuda::AttentionSegments segments = {ends.data(), static_cast<int64_t>(c.ends[0].size()), c.lookback,
                                            extents.data()};
  require(cuda::segment_attention_forward(forward, segments, nullptr), "segment_attention_forward");
  const double tolerance = 2 * epsilon<T>() + 1e-5;
  report.compare(problem.name() + "out", out.values(), expected.out, tolerance, 1.0);

  const SegmentAttentionBackward backward = {problem.shape(),
                                             of_q,
                                             of_k,
                                             of_v,
                                             extents.data(),
                                             scale,
                                             rows(grad.data() + c.offset, c.heads),
                                             rows(out.data(), c.heads),
                                             lse.data(),
                                             dots.data(),
                                             dq.data(),
                                             dk.data(),
                                             dv.data()};
  require(cuda::segment_attention_backward(backward, nullptr), "segment_attention_backward");
  report.compare(problem.name() + "dq", dq.values(), expected.dq, tolerance, 1.0);
  report.compare(problem.name() + "dk", dk.values(), expected.dk, tolerance, 1.0);
  report.compare(problem.name() + "dv", dv.values(), expected.dv, tolerance, 1.0);
}

}  // namespace

void check_segment_attention(Report& report) {
  // Segments without frames, of a few and longer than a block; frames in none; ends of any value.
  const std::vector<std::vector<int64_t>> ends = {{3, 3, 20, 99}, {0, 64, 65, 65}, {9, 4, kHighest, kLowest}};
  for (const Case& c :
       {Case{100, 2, 1, 16, ends, 1, 0}, Case{100, 1, 1, 64, ends, 0, 0}, Case{100, 1, 1, 128, ends, 5, 0},
        Case{20, 4, 2, 136, ends, 1, 0}, Case{70, 2, 2, 24, ends, kHighest, 1}}) {
    const auto run = [&](auto element) {
      using T = decltype(element);
      report.check("segment_attention", [&] { check_case<T>(report, c); });
    };
    run(float{});
    run(__half{});
    run(__nv_bfloat16{});
  }
}

}  // namespace mmk::check
