#include <algorithm>

#include "gpu/driver/gpu_check.h"
#include "mmkernels/distill_loss.h"

namespace mmk::check {
namespace {

struct Case {
  int64_t tokens;
  int64_t width;
  int64_t offset;  // elements from an aligned address to the first one
};

constexpr int64_t kBatch = 2;
constexpr int64_t kVocabulary = 5;
constexpr double kWeight = 5.0;
constexpr double kGrad = 0.7;

template <class T, class U>
struct Problem {
  explicit Problem(const Case& c) {
    Random random(5);
    const int64_t tokens = kBatch * c.tokens;
    pred = rounded<T>(random.normal(c.offset + tokens * c.width));
    table = rounded<U>(random.normal(c.offset + kVocabulary * c.width));
    counts = {static_cast<double>(c.tokens), static_cast<double>(c.tokens / 2)};
    const double count = counts[0] + counts[1];
    d_pred.resize(static_cast<size_t>(tokens * c.width));
    for (int64_t index = 0; index < tokens; ++index) {
      const int64_t row = index / c.tokens, id = (3 * index + 1) % kVocabulary;
      const bool valid = index - row * c.tokens < static_cast<int64_t>(counts[row]);
      // Ids past the counts are not looked at.
      ids.push_back(static_cast<double>(valid ? id : int64_t{1} << 40));
      if (!valid) continue;
      const double* z = pred.data() + c.offset + index * c.width;
      const double* h = table.data() + c.offset + id * c.width;
      double squares = 0, zz = 0, zh = 0, hh = 0;
      for (int64_t d = 0; d < c.width; ++d) {
        squares += (z[d] - h[d]) * (z[d] - h[d]);
        zz += z[d] * z[d];
        zh += z[d] * h[d];
        hh += h[d] * h[d];
      }
      const double norms = std::sqrt(zz * hh), cosine = zh / norms;
      loss += (squares + kWeight * (1 - cosine)) / count;
      for (int64_t d = 0; d < c.width; ++d) {
        d_pred[index * c.width + d] =
            kGrad / count * (2 * (z[d] - h[d]) - kWeight * (h[d] / norms - cosine * z[d] / zz));
      }
    }
  }

  Values pred, table, ids, counts, d_pred;
  double loss = 0;
};

template <class T, class U>
void check_case(Report& report, const Case& c) {
  const std::string name = std::string("distill_loss ") + dtype_name<T>() + " " + dtype_name<U>() + " " +
                           std::to_string(c.tokens) + " x " + std::to_string(c.width) +
                           " offset=" + std::to_string(c.offset) + " ";
  report.check(name, [&] {
    const Problem<T, U> problem(c);
    const DeviceArray<T> pred(problem.pred), d_pred(kBatch * c.tokens * c.width);
    const DeviceArray<U> table(problem.table);
    const DeviceArray<int64_t> ids(problem.ids), counts(problem.counts), count(1);
    const DeviceArray<float> dots(kBatch * c.tokens * kDistillLossDots), terms(kBatch * c.tokens), loss(1);
    const DeviceArray<float> grad(Values{kGrad});
    const DistillLossParams params = {dtype_of<T>(),
                                      dtype_of<U>(),
                                      kBatch,
                                      c.tokens,
                                      c.width,
                                      kVocabulary,
                                      kWeight,
                                      pred.data() + c.offset,
                                      c.tokens * c.width,
                                      c.width,
                                      table.data() + c.offset,
                                      c.width,
                                      ids.data(),
                                      counts.data()};
    require(
        cuda::distill_loss_forward({params, dots.data(), terms.data(), loss.data(), count.data()}, nullptr),
        "distill_loss_forward");
    require(
        cuda::distill_loss_backward({params, dots.data(), count.data(), grad.data(), d_pred.data()}, nullptr),
        "distill_loss_backward");
    report.compare(name + "loss", loss.values(), {problem.loss}, 1e-5);
    report.compare(name + "d_pred", d_pred.values(), problem.d_pred, epsilon<T>() + 1e-5);
  });
}

}  // namespace

void check_distill_loss(Report& report) {
  // A warp to a token and a block, of one step and of several, aligned or not; more tokens than threads.
  for (const Case& c : {Case{3, 24, 0}, Case{3, 24, 1}, Case{3, 7, 0}, Case{2, 1000, 0}, Case{1, 1032, 0},
                        Case{1, 4104, 0}, Case{150, 4, 0}}) {
    check_case<float, float>(report, c);
    check_case<__half, __half>(report, c);
    check_case<__nv_bfloat16, __nv_bfloat16>(report, c);
    check_case<__nv_bfloat16, float>(report, c);
    check_case<float, __nv_bfloat16>(report, c);
  }
}

}  // namespace mmk::check
