#include "mmkernels/cif.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

MMK_INLINE int64_t length_of(const CifParams& params, int64_t row) {
  return params.lengths == nullptr ? params.frames
                                   : std::clamp<int64_t>(params.lengths[row], 0, params.frames);
}

template <class A>
MMK_INLINE double weight_of(A alpha) {
  return alpha > 0 && alpha < std::numeric_limits<A>::infinity() ? static_cast<double>(alpha) : 0.0;
}

constexpr int64_t kMostTokens = 2'000'000'000;  // token numbers are int32

// The end of a row's line (mmkernels/cif.h), and the scale of the weights on it.
struct Line {
  double scale;   // of alpha
  int64_t count;  // tokens
  int64_t last;   // token in which the last frame ends
  int64_t tail;   // token whose weights are scaled, or -1
  double tail_factor;
};

MMK_INLINE Line line_of(const CifForward& args, int64_t row, double total, double* facts) {
  const double beta = args.params.beta;
  if (args.target_lengths != nullptr) {
    const int64_t count = std::clamp<int64_t>(args.target_lengths[row], 0, kMostTokens);
    const double inverse = total > 0 ? 1 / total : 0.0;
    const double scale = beta * static_cast<double>(count) * inverse;
    facts[0] = scale;
    facts[1] = inverse;
    return {scale, count, total > 0 ? count : 0, -1, 1.0};
  }
  const double whole = std::min(std::floor(total / beta), static_cast<double>(kMostTokens));
  const double rest = total - whole * beta;
  const bool fires = rest >= args.tail_threshold * beta && rest > 0;
  const int64_t last = static_cast<int64_t>(whole);
  facts[0] = fires ? beta / rest : 1.0;
  facts[1] = fires ? 1.0 : 0.0;
  return {1.0, last + fires, last, fires ? last : -1, facts[0]};
}

template <class A>
MMK_INLINE void plan_row(const CifForward& args, int64_t row) {
  const CifParams& p = args.params;
  const int64_t length = length_of(p, row);
  const A* alpha = at<A>(p.alpha, row * p.frames);
  int32_t* token = args.plan.token + row * (p.frames + 1);
  A* weights = at<A>(args.plan.weights, row * p.frames * 2);
  int64_t* ends = args.ends + row * p.tokens;
  double total = 0;
  for (int64_t t = 0; t < length; ++t) total += weight_of(alpha[t]);
  const Line line = line_of(args, row, total, args.plan.facts + row * 2);
  args.plan.counts[row] = std::min(line.count, p.tokens);

  double sum = 0, start = 0;
  int64_t first = 0, fired = 0;
  token[0] = 0;
  for (int64_t t = 0; t < length; ++t) {
    sum += weight_of(alpha[t]);
    const double end = sum * line.scale;
    int64_t last = line.last;
    if (t + 1 < length) {
      const int64_t most = args.target_lengths == nullptr ? line.last : std::max<int64_t>(line.count - 1, 0);
      last = std::min(
          static_cast<int64_t>(std::min(std::floor(end / p.beta), static_cast<double>(kMostTokens))), most);
    }
    const double factor = first == line.tail ? line.tail_factor : 1.0;
    const double of_last = last == line.tail ? line.tail_factor : 1.0;
    const double into_first = last == first ? end - start : static_cast<double>(first + 1) * p.beta - start;
    const double into_last = last == first ? end - start : end - static_cast<double>(last) * p.beta;
    weights[2 * t] = static_cast<A>(factor * std::max(into_first, 0.0));
    weights[2 * t + 1] = static_cast<A>(of_last * std::max(into_last, 0.0));
    for (; fired < std::min(last, p.tokens); ++fired) ends[fired] = t + 1;
    token[t + 1] = static_cast<int32_t>(last);
    first = last;
    start = end;
  }
  std::fill(ends + fired, ends + p.tokens, length);
  std::fill(token + length + 1, token + p.frames + 1, static_cast<int32_t>(first));
  std::fill(weights + 2 * length, weights + 2 * p.frames, A{0});
}

// Weight of frame t in token j: saved where t begins or ends in j, beta in the tokens between, else 0.
template <class A>
MMK_INLINE A weight_in(const int32_t* token, const A* weights, int64_t t, int64_t j, double beta) {
  if (j == token[t + 1]) return weights[2 * t + 1];
  if (j == token[t]) return weights[2 * t];
  return j > token[t] && j < token[t + 1] ? static_cast<A>(beta) : A{0};
}

// Elements of a token summed at a time, so that the sums stay in the L1 cache.
constexpr int64_t kTile = 1024;

template <class T>
MMK_INLINE void sum_token(const CifForward& args, int64_t row, int64_t j) {
  using A = acc_t<T>;
  const CifParams& p = args.params;
  T* out = at<T>(args.features, (row * p.tokens + j) * p.width);
  if (j >= args.plan.counts[row]) {
    std::fill_n(out, p.width, T{});
    return;
  }
  const T* x = at<T>(p.x, row * p.batch_stride);
  const int32_t* token = args.plan.token + row * (p.frames + 1);
  const A* weights = at<A>(args.plan.weights, row * p.frames * 2);
  const int64_t* ends = args.ends + row * p.tokens;
  // The frame in which the previous token fires is also the first of this one.
  const int64_t begin = j == 0 ? 0 : std::max<int64_t>(ends[j - 1] - 1, 0);
  for (int64_t column = 0; column < p.width; column += kTile) {
    const int64_t size = std::min(kTile, p.width - column);
    A sum[kTile];
    std::fill_n(sum, size, A{0});
    for (int64_t t = begin; t < ends[j]; ++t) {
      const A weight = weight_in(token, weights, t, j, p.beta);
      if (weight == 0) continue;  // the frame may hold NaN or infinity
      const T* frame = x + t * p.frame_stride + column;
      sweep<A>(
          size, [&](int64_t i) MMK_LAMBDA { store(sum + i, load(sum + i) + weight * load(frame + i)); },
          [&](int64_t i) MMK_LAMBDA { sum[i] += weight * convert(frame[i]); });
    }
    sweep<A>(
        size, [&](int64_t i) MMK_LAMBDA { store(out + column + i, load(sum + i)); },
        [&](int64_t i) MMK_LAMBDA { out[column + i] = round_to<T>(sum[i]); });
  }
}

// A frame in the backward pass, with the consecutive tokens that have a gradient.
template <class T>
struct Frame {
  using A = acc_t<T>;
  const T* grad;  // of the first token
  int64_t grad_stride;
  int64_t tokens;
  int64_t width;
  A first_weight;
  A middle_weight;
  A last_weight;  // of the last token, if there are several
  T* dx;
};

// Writes dx. kTokens: the number of tokens, or 0 if only frame.tokens has it.
template <int64_t kTokens, class T>
MMK_INLINE void frame_gradient(const Frame<T>& frame) {
  using A = acc_t<T>;
  const int64_t tokens = kTokens > 0 ? kTokens : frame.tokens;
  const auto sum = [&](auto&& value, int64_t i) MMK_LAMBDA {
    auto total = frame.first_weight * value(frame.grad + i);
    for (int64_t k = 1; k + 1 < tokens; ++k) {
      total += frame.middle_weight * value(frame.grad + k * frame.grad_stride + i);
    }
    if (tokens > 1) total += frame.last_weight * value(frame.grad + (tokens - 1) * frame.grad_stride + i);
    return total;
  };
  sweep<A>(
      frame.width,
      [&](int64_t i)
          MMK_LAMBDA { store(frame.dx + i, sum([](const T* g) MMK_LAMBDA { return load(g); }, i)); },
      [&](int64_t i) MMK_LAMBDA {
        frame.dx[i] = round_to<T>(sum([](const T* g) MMK_LAMBDA { return convert(*g); }, i));
      });
}

template <class T>
MMK_INLINE acc_t<T> dot_of(const T* a, const T* b, int64_t width) {
  return sum_over<acc_t<T>>(
      width, [&](int64_t i) MMK_LAMBDA { return load(a + i) * load(b + i); },
      [&](int64_t i) MMK_LAMBDA { return convert(a[i]) * convert(b[i]); });
}

template <class T>
MMK_INLINE void differentiate_frame(const CifBackward& args, int64_t row, int64_t t) {
  using A = acc_t<T>;
  const CifParams& p = args.params;
  const int32_t* token = args.plan.token + row * (p.frames + 1);
  const A* weights = at<A>(args.plan.weights, row * p.frames * 2);
  const int64_t count = args.plan.counts[row], first = token[t], last = token[t + 1];
  const bool valid = t < length_of(p, row);
  T* dx = at<T>(args.dx, (row * p.frames + t) * p.width);
  A* dots = at<A>(args.dots, (row * p.frames + t) * 2);
  const int64_t tokens = valid ? std::min(last + 1, count) - first : 0;
  const T* x = at<T>(p.x, row * p.batch_stride + t * p.frame_stride);
  const T* grad = at<T>(args.grad, row * args.grad_batch_stride + first * args.grad_token_stride);
  if (args.d_alpha != nullptr) {
    dots[0] = tokens > 0 ? dot_of(x, grad, p.width) : A{0};
    const bool ends_inside = tokens > 0 && last < count;
    dots[1] = !ends_inside    ? A{0}
              : last == first ? dots[0]
                              : dot_of(x, grad + (last - first) * args.grad_token_stride, p.width);
  }
  if (dx == nullptr) return;
  if (tokens <= 0) {
    std::fill_n(dx, p.width, T{});
    return;
  }
  const A middle = static_cast<A>(p.beta);
  const A of_first = last == first ? weights[2 * t + 1] : weights[2 * t];
  const Frame<T> frame = {grad,
                          args.grad_token_stride,
                          tokens,
                          p.width,
                          of_first,
                          middle,
                          last < count ? weights[2 * t + 1] : middle,
                          dx};
  if (tokens == 1) {
    frame_gradient<1>(frame);
  } else if (tokens == 2) {
    frame_gradient<2>(frame);
  } else {
    frame_gradient<0>(frame);
  }
}

template <class A>
MMK_INLINE void differentiate_alpha(const CifBackward& args, int64_t row) {
  const CifParams& p = args.params;
  const int64_t length = length_of(p, row);
  const int32_t* token = args.plan.token + row * (p.frames + 1);
  const A* weights = at<A>(args.plan.weights, row * p.frames * 2);
  const A* dots = at<A>(args.dots, row * p.frames * 2);
  const A* alpha = at<A>(p.alpha, row * p.frames);
  A* d_alpha = at<A>(args.d_alpha, row * p.frames);
  const double scale = args.plan.facts[2 * row], inverse = args.plan.facts[2 * row + 1];
  const bool has_tail = !args.scaled && args.plan.facts[2 * row + 1] > 0 && length > 0;
  // Moving the end of frame t shifts weight between t and t + 1, in the token in which t ends.
  double gradient = 0, product = 0;
  if (has_tail) {
    // More weight on the last frame moves the tail, a mean of frames, towards it.
    const double end = dots[2 * length - 1];
    double apart = 0, sum = 0;
    for (int64_t t = 0; t < length; ++t) {
      if (token[t + 1] != token[length]) continue;
      apart += static_cast<double>(weights[2 * t + 1]) * (end - dots[2 * t + 1]);
      sum += weights[2 * t + 1];
    }
    gradient = scale * apart / sum;
  }
  for (int64_t t = length - 1; t >= 0; --t) {
    if (t + 1 < length) {
      const double factor = has_tail && token[t + 1] == token[length] ? scale : 1.0;
      gradient += factor * (static_cast<double>(dots[2 * t + 1]) - static_cast<double>(dots[2 * t + 2]));
    }
    product += weight_of(alpha[t]) * gradient;
    d_alpha[t] = static_cast<A>(gradient);
  }
  if (args.scaled) {
    gradient = 0;
    for (int64_t t = length - 1; t >= 0; --t) {
      if (t + 1 < length) {
        gradient += static_cast<double>(dots[2 * t + 1]) - static_cast<double>(dots[2 * t + 2]);
      }
      d_alpha[t] = static_cast<A>(scale * (gradient - inverse * product));
    }
  }
  std::fill(d_alpha + length, d_alpha + p.frames, A{0});
}

}  // namespace

MMK_MULTIARCH void cif_plan(const CifForward& args, int64_t begin, int64_t end) {
  dispatch_wide(args.params.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t row = begin; row < end; ++row) plan_row<decltype(element)>(args, row);
  });
}

MMK_MULTIARCH void cif_features(const CifForward& args, int64_t begin, int64_t end) {
  dispatch(args.params.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      sum_token<decltype(element)>(args, i / args.params.tokens, i % args.params.tokens);
    }
  });
}

MMK_MULTIARCH void cif_frames(const CifBackward& args, int64_t begin, int64_t end) {
  dispatch(args.params.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      differentiate_frame<decltype(element)>(args, i / args.params.frames, i % args.params.frames);
    }
  });
}

MMK_MULTIARCH void cif_alpha(const CifBackward& args, int64_t begin, int64_t end) {
  dispatch_wide(args.params.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t row = begin; row < end; ++row) differentiate_alpha<decltype(element)>(args, row);
  });
}

}  // namespace mmk::cpu
