#include "mmkernels/distill_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

// kLanes<A> consecutive elements of any type.
template <class A, class U>
MMK_INLINE vec_t<A> load_as(const U* p) {
  if constexpr (std::is_same_v<acc_t<U>, A>) {
    return load(p);
  } else {
    A converted[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) converted[i] = static_cast<A>(convert(p[i]));
    vec_t<A> v;
    std::memcpy(&v, converted, sizeof(v));
    return v;
  }
}

template <class A>
struct Sums {
  A squares;  // of the differences
  A dots[kDistillLossDots];
};

// Prefetch distances in bytes: the backward pass, which writes too, is slower with more. The hardware
// prefetcher stops at the end of a page, and cannot know which row of the table comes next.
constexpr int64_t kForwardAhead = 4096, kBackwardAhead = 2048;

template <int64_t kAhead, class T>
MMK_INLINE void prefetch_ahead(const T* row, const T* next, int64_t j, int64_t width, int64_t elements) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = j + kAhead / static_cast<int64_t>(sizeof(T)), end = i + elements; i < end; i += kLine) {
    prefetch(i < width ? row + i : next + std::min(i - width, width - 1));
  }
}

// Both rows are read once. Two sums of each kind hide the latency of additions.
template <class T, class U>
MMK_INLINE Sums<acc_t<T>> measure(const T* z, const U* h, const T* next_z, const U* next_h, int64_t width) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 2 * kLanes<A>;
  // Elements between two prefetches: a whole line of the narrowest type.
  constexpr int64_t kBlock = 32;
  static_assert(kBlock % kStep == 0);
  vec_t<A> squares[2] = {}, pred_pred[2] = {}, pred_row[2] = {}, row_row[2] = {};
  const auto add = [&](int half, int64_t j) MMK_LAMBDA {
    const vec_t<A> a = load_as<A>(z + j), b = load_as<A>(h + j), d = a - b;
    squares[half] += d * d;
    pred_pred[half] += a * a;
    pred_row[half] += a * b;
    row_row[half] += b * b;
  };
  int64_t j = 0;
  for (; j + kBlock <= width; j += kBlock) {
    prefetch_ahead<kForwardAhead>(z, next_z, j, width, kBlock);
    prefetch_ahead<kForwardAhead>(h, next_h, j, width, kBlock);
    for (int64_t i = 0; i < kBlock; i += kStep) {
      add(0, j + i);
      add(1, j + i + kLanes<A>);
    }
  }
  Sums<A> rest = {};
  for (; j < width; ++j) {
    const A a = convert(z[j]), b = static_cast<A>(convert(h[j])), d = a - b;
    rest.squares += d * d;
    rest.dots[kPredPred] += a * a;
    rest.dots[kPredRow] += a * b;
    rest.dots[kRowRow] += b * b;
  }
  return {sum_lanes<A>(squares[0] + squares[1]) + rest.squares,
          {sum_lanes<A>(pred_pred[0] + pred_pred[1]) + rest.dots[kPredPred],
           sum_lanes<A>(pred_row[0] + pred_row[1]) + rest.dots[kPredRow],
           sum_lanes<A>(row_row[0] + row_row[1]) + rest.dots[kRowRow]}};
}

// The cosine, and the inverse norms; zeros where a vector has no direction.
template <class A>
struct Angle {
  A cosine, inverse_pred, inverse_row;
};

template <class A>
MMK_INLINE Angle<A> angle_of(const A* dots) {
  constexpr A kLeast = std::numeric_limits<A>::min();
  // NaN fails both comparisons, and so reaches the result.
  if (dots[kPredPred] < kLeast || dots[kRowRow] < kLeast) return {0, 0, 0};
  const A pred = std::sqrt(dots[kPredPred]), row = std::sqrt(dots[kRowRow]);
  return {dots[kPredRow] / pred / row, 1 / pred, 1 / row};
}

MMK_INLINE int64_t count_of(const DistillLossParams& params, int64_t row) {
  return params.counts == nullptr ? params.tokens : std::clamp<int64_t>(params.counts[row], 0, params.tokens);
}

template <class T, class U>
struct Token {
  bool valid;   // before the count
  bool inside;  // the table; null pointers if not
  const T* pred;
  const U* row;
};

template <class T, class U>
MMK_INLINE Token<T, U> token_at(const DistillLossParams& p, int64_t index) {
  const int64_t batch = index / p.tokens, j = index - batch * p.tokens;
  if (j >= count_of(p, batch)) return {false, false, nullptr, nullptr};
  const int64_t id = p.ids[index];
  if (id < 0 || id >= p.vocabulary) return {true, false, nullptr, nullptr};
  return {true, true, at<T>(p.pred, batch * p.batch_stride + j * p.token_stride),
          at<U>(p.table, id * p.row_stride)};
}

// Calls body(token, next, index) for the tokens [begin, end); body prefetches `next`.
template <class T, class U, class Body>
MMK_INLINE void for_tokens(const DistillLossParams& p, int64_t begin, int64_t end, Body&& body) {
  if (begin >= end) return;
  Token<T, U> token = token_at<T, U>(p, begin);
  for (int64_t index = begin; index < end; ++index) {
    Token<T, U> following = token;
    if (index + 1 < end) following = token_at<T, U>(p, index + 1);
    body(token, following.inside ? following : token, index);
    token = following;
  }
}

template <class T, class U>
MMK_INLINE void forward(const DistillLossForward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const DistillLossParams& p = args.params;
  const A weight = static_cast<A>(p.cosine_weight);
  constexpr A kNan = std::numeric_limits<A>::quiet_NaN();
  for_tokens<T, U>(p, begin, end,
                   [&](const Token<T, U>& token, const Token<T, U>& next, int64_t index) MMK_LAMBDA {
                     A* term = at<A>(args.terms, index);
                     A* dots = at<A>(args.dots, index * kDistillLossDots);
                     *term = 0;
                     std::fill_n(dots, int{kDistillLossDots}, A{0});
                     if (!token.valid) return;
                     Sums<A> sums = {kNan, {kNan, kNan, kNan}};
                     if (token.inside) {
                       sums = measure(token.pred, token.row, next.pred, next.row, p.width);
                     }
                     std::copy_n(sums.dots, int{kDistillLossDots}, dots);
                     *term = sums.squares + weight * (1 - angle_of(sums.dots).cosine);
                   });
}

// d = g / count * (2 (z - h) - cosine_weight * (h / (|z| |h|) - cos z / |z|^2))
template <class T, class U>
MMK_INLINE void differentiate(const DistillLossBackward& args, const Token<T, U>& token,
                              const Token<T, U>& next, int64_t index, acc_t<T> scale) {
  using A = acc_t<T>;
  const DistillLossParams& p = args.params;
  T* out = at<T>(args.d_pred, index * p.width);
  if (!token.valid) {
    std::fill_n(out, p.width, T{});
    return;
  }
  const T* z = token.pred;
  const U* h = token.row;
  if (!token.inside) {
    std::fill_n(out, p.width, round_to<T>(std::numeric_limits<A>::quiet_NaN()));
    return;
  }
  const Angle<A> angle = angle_of(at<A>(args.dots, index * kDistillLossDots));
  // Multiply by one inverse norm at a time: the product of two may overflow.
  const A twice = 2 * scale, outer = scale * static_cast<A>(p.cosine_weight) * angle.inverse_pred;
  const A of_pred = angle.cosine * angle.inverse_pred, of_row = angle.inverse_row;
  const auto value = [&](auto a, auto b)
                         MMK_LAMBDA { return twice * (a - b) + outer * (of_pred * a - of_row * b); };
  constexpr int64_t kBlock = 32;
  int64_t j = 0;
  for (; j + kBlock <= p.width; j += kBlock) {
    prefetch_ahead<kBackwardAhead>(z, next.pred, j, p.width, kBlock);
    prefetch_ahead<kBackwardAhead>(h, next.row, j, p.width, kBlock);
    for (int64_t i = j; i < j + kBlock; i += kLanes<A>) {
      store(out + i, value(load_as<A>(z + i), load_as<A>(h + i)));
    }
  }
  for (; j < p.width; ++j) out[j] = round_to<T>(value(convert(z[j]), static_cast<A>(convert(h[j]))));
}

template <class T, class U>
MMK_INLINE void backward(const DistillLossBackward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const DistillLossParams& p = args.params;
  const A scale = *args.count > 0 ? *static_cast<const A*>(args.grad) / static_cast<A>(*args.count) : A{0};
  for_tokens<T, U>(p, begin, end,
                   [&](const Token<T, U>& token, const Token<T, U>& next, int64_t index)
                       MMK_LAMBDA { differentiate(args, token, next, index, scale); });
}

// Calls body(T{}, U{}) with the types of predictions and table.
template <class Body>
MMK_INLINE void dispatch_pair(const DistillLossParams& p, Body&& body) {
  dispatch(p.dtype, [&](auto pred) MMK_LAMBDA {
    dispatch(p.table_dtype, [&](auto row) MMK_LAMBDA { body(pred, row); });
  });
}

}  // namespace

MMK_MULTIARCH void distill_loss_tokens(const DistillLossForward& args, int64_t begin, int64_t end) {
  dispatch_pair(args.params, [&](auto pred, auto row)
                                 MMK_LAMBDA { forward<decltype(pred), decltype(row)>(args, begin, end); });
}

void distill_loss_mean(const DistillLossForward& args) {
  const DistillLossParams& p = args.params;
  int64_t count = 0;
  for (int64_t row = 0; row < p.batch; ++row) count += count_of(p, row);
  *args.count = count;
  dispatch_wide(p.dtype, [&](auto element) {
    using A = decltype(element);
    double sum = 0;
    for (int64_t i = 0; i < p.batch * p.tokens; ++i) sum += static_cast<double>(*at<A>(args.terms, i));
    *at<A>(args.loss, 0) = static_cast<A>(count > 0 ? sum / static_cast<double>(count) : 0.0);
  });
}

MMK_MULTIARCH void distill_loss_backward(const DistillLossBackward& args, int64_t begin, int64_t end) {
  dispatch_pair(args.params, [&](auto pred, auto row)
                                 MMK_LAMBDA { backward<decltype(pred), decltype(row)>(args, begin, end); });
}

}  // namespace mmk::cpu
