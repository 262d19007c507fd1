#include "mmkernels/ctc_align.h"

#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace mmk::cpu {
namespace {

template <class A>
constexpr A kNever = -std::numeric_limits<A>::infinity();

// Room around the pairs of a row, for whole vectors at its end and the left neighbour of its first pair.
template <class A>
constexpr int64_t kMargin = kLanes<A>;

// Scores of the pairs of one frame; index -1 is readable.
template <class A>
struct Scores {
  A* even;
  A* odd;
};

// Scratch memory of one utterance.
template <class A>
struct Scratch {
  int64_t stride;         // elements of a row of all pairs, with its margins
  int64_t window_stride;  // of a row of the pairs that the backtrace passes in one block
  int32_t* labels;        // class of token i; the number of classes where there is none
  A* skip;                // 0 if token i may follow token i - 1 without a blank, else -inf
  A* emission;            // of token i in the current frame
  A* frame;               // the current frame: all classes, and -inf behind them
  A* shift;               // subtracted after frame kCtcRescale * (i + 1) - 1
  A* rows;                // [2][even, odd][stride]
  A* checkpoints;         // [count][even, odd][stride]
  A* window;              // [block + 1][even, odd][window_stride]
  size_t bytes;

  Scratch(void* memory, int64_t frames, int64_t tokens, int64_t classes) {
    const CtcCheckpoints plan = ctc_checkpoints(frames, tokens);
    stride = tokens + 1 + 2 * kMargin<A>;
    window_stride = std::min(plan.block, tokens) + 1 + 2 * kMargin<A>;
    bytes = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = memory == nullptr ? nullptr
                                  : reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
                                        static_cast<char*>(memory) + bytes);
      bytes += (static_cast<size_t>(count) * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(labels, stride);
    take(skip, stride);
    take(emission, stride);
    take(frame, classes + 1);
    take(shift, frames / kCtcRescale + 1);
    take(rows, 4 * stride);
    take(checkpoints, plan.count * 2 * stride);
    take(window, (std::min(plan.block, frames) + 1) * 2 * window_stride);
  }

  Scores<A> row(int64_t index) const { return at(rows, index, stride); }
  Scores<A> checkpoint(int64_t index) const { return at(checkpoints, index, stride); }
  Scores<A> window_row(int64_t index) const { return at(window, index, window_stride); }

 private:
  static Scores<A> at(A* data, int64_t index, int64_t stride) {
    A* even = data + 2 * index * stride + kMargin<A>;
    return {even, even + stride};
  }
};

// NaN and +inf, which are not log-probabilities, count as -inf.
template <class A>
MMK_INLINE A usable(A value) {
  return value < std::numeric_limits<A>::infinity() ? value : kNever<A>;
}

template <class A>
MMK_INLINE vec_t<A> larger(vec_t<A> a, vec_t<A> b) {
  return a > b ? a : b;
}

template <class T>
struct Utterance {
  using A = acc_t<T>;
  const T* log_probs;
  int64_t frame_stride;
  int64_t frames, tokens, classes, blank;
  Scratch<A> scratch;

  MMK_INLINE const T* frame(int64_t t) const { return log_probs + t * frame_stride; }

  MMK_INLINE void read_target(const int64_t* target) {
    for (int64_t i = -kMargin<A>; i < scratch.stride - kMargin<A>; ++i) {
      const bool valid = i >= 0 && i < tokens && target[i] >= 0 && target[i] < classes && target[i] != blank;
      scratch.labels[i + kMargin<A>] = static_cast<int32_t>(valid ? target[i] : classes);
      scratch.skip[i + kMargin<A>] = i > 0 && i < tokens && target[i] != target[i - 1] ? A(0) : kNever<A>;
      scratch.emission[i + kMargin<A>] = kNever<A>;
    }
    scratch.labels += kMargin<A>;
    scratch.skip += kMargin<A>;
    scratch.emission += kMargin<A>;
    scratch.frame[classes] = kNever<A>;
  }

  // Emissions of tokens [first, last] in frame t. Converts all classes if there are few, else one per token.
  MMK_INLINE void read_frame(int64_t t, int64_t first, int64_t last) {
    const T* row = frame(t);
    const int32_t* labels = scratch.labels;
    A* emission = scratch.emission;
    if (classes <= 2 * (last - first + 1)) {
      A* all = scratch.frame;
      int64_t c = 0;
      for (; c + kLanes<A> <= classes; c += kLanes<A>) {
        const vec_t<A> value = load(row + c);
        store(all + c, value < std::numeric_limits<A>::infinity() ? value : vec_t<A>{} + kNever<A>);
      }
      for (; c < classes; ++c) all[c] = usable<A>(convert(row[c]));
      for (int64_t i = first; i <= last; ++i) emission[i] = all[labels[i]];
    } else {
      // The emissions of a frame lie far apart; hardware prefetchers do not follow them.
      const T* next = frame(std::min(t + 2, frames - 1));
      for (int64_t i = first; i <= last; ++i) {
        __builtin_prefetch(next + labels[i]);
        emission[i] = labels[i] < classes ? usable<A>(convert(row[labels[i]])) : kNever<A>;
      }
    }
  }

  // The scores after frame t of `count` pairs, from `first` on; `from` and `to` begin at that pair.
  MMK_INLINE void step(int64_t t, Scores<A> from, Scores<A> to, int64_t first, int64_t count) {
    read_frame(t, first, first + count - 1);
    const vec_t<A> blank_emission = vec_t<A>{} + usable<A>(convert(frame(t)[blank]));
    const A* skip = scratch.skip + first;
    const A* emission = scratch.emission + first;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const vec_t<A> even = load(from.even + i), odd = load(from.odd + i), left = load(from.odd + i - 1);
      const vec_t<A> best = larger<A>(larger<A>(odd, even), left + load(skip + i));
      store(to.even + i, larger<A>(even, left) + blank_emission);
      store(to.odd + i, best + load(emission + i));
    }
  }

  MMK_INLINE static void subtract(Scores<A> scores, A shift, int64_t first, int64_t last) {
    for (int64_t i = first; i <= last; ++i) {
      scores.even[i] -= shift;
      scores.odd[i] -= shift;
    }
  }

  MMK_INLINE static A largest(Scores<A> scores, int64_t first, int64_t last) {
    A result = kNever<A>;
    for (int64_t i = first; i <= last; ++i) {
      const A value = scores.even[i] > scores.odd[i] ? scores.even[i] : scores.odd[i];
      result = value > result ? value : result;
    }
    return result > kNever<A> ? result : A(0);
  }

  // Runs all frames, saves the checkpoints, and returns the scores after the last frame.
  MMK_INLINE Scores<A> forward(const CtcCheckpoints& plan) {
    std::fill_n(scratch.rows, 4 * scratch.stride, kNever<A>);
    scratch.row(0).even[0] = 0;
    for (int64_t t = 0; t < frames; ++t) {
      const Scores<A> from = scratch.row(t % 2), to = scratch.row(1 - t % 2);
      if (t % plan.block == 0) {
        const Scores<A> kept = scratch.checkpoint(t / plan.block);
        std::copy_n(from.even, tokens + 1, kept.even);
        std::copy_n(from.odd, tokens + 1, kept.odd);
      }
      // Paths from the start to the end pass these pairs only.
      const int64_t first = std::max<int64_t>(0, tokens - frames + t), last = std::min(tokens, t);
      step(t, {from.even + first, from.odd + first}, {to.even + first, to.odd + first}, first,
           last - first + 1);
      if ((t + 1) % kCtcRescale == 0) {
        A& shift = scratch.shift[t / kCtcRescale];
        shift = largest(to, first, last);
        subtract(to, shift, first, last);
      }
    }
    return scratch.row(frames % 2);
  }

  // Recomputes the scores of frames [begin, end), for `count` pairs from `first` on; the last is the path's
  // pair after them. Row r of the window holds the scores before frame begin + r.
  MMK_INLINE void recompute(Scores<A> kept, int64_t begin, int64_t end, int64_t first, int64_t count) {
    const Scores<A> start = scratch.window_row(0);
    std::copy_n(kept.even + first, count, start.even);
    std::copy_n(kept.odd + first, count, start.odd);
    for (int64_t t = begin; t < end; ++t) {
      const Scores<A> from = scratch.window_row(t - begin);
      from.odd[-1] = kNever<A>;
      if (t > begin && t % kCtcRescale == 0) {
        subtract(from, scratch.shift[t / kCtcRescale - 1], 0, count - 1);
      }
      // The backtrace does not read the scores after the last frame.
      if (t + 1 < end) step(t, from, scratch.window_row(t - begin + 1), first, count);
    }
  }

  // The path's advance in a frame, 0 to 2 states, by the scores before it; `i` counts pairs of the window.
  MMK_INLINE int advance(Scores<A> before, int64_t i, bool odd, A skip) const {
    const A left = before.odd[i - 1];
    if (!odd) return left > before.even[i] ? 1 : 0;
    const A stay = before.odd[i], one = before.even[i], two = left + skip;
    if (two > one && two > stay) return 2;
    return one > stay ? 1 : 0;
  }

  // Writes path and ends; returns the score. The path ends in the given state.
  MMK_INLINE A backtrace(const CtcCheckpoints& plan, const int64_t* target, int64_t pair, bool odd,
                         int64_t* path, int64_t* ends) {
    double total = 0;
    for (int64_t block = plan.count - 1; block >= 0; --block) {
      const int64_t begin = block * plan.block, end = std::min(frames, begin + plan.block);
      const int64_t first = std::max<int64_t>(0, pair - (end - begin));
      recompute(scratch.checkpoint(block), begin, end, first, pair - first + 1);
      for (int64_t t = end - 1; t >= begin; --t) {
        const int64_t token = odd ? target[pair] : blank;
        path[t] = token;
        total += static_cast<double>(usable<A>(convert(frame(t)[token])));
        const int moved = advance(scratch.window_row(t - begin), pair - first, odd, scratch.skip[pair]);
        if (odd && moved > 0 && pair > 0) ends[pair - 1] = t;
        if (moved == 2 || (moved == 1 && !odd)) --pair;
        odd = moved == 1 ? !odd : odd;
      }
    }
    return static_cast<A>(total);
  }
};

MMK_INLINE int64_t length_of(const int64_t* lengths, int64_t b, int64_t most) {
  return lengths == nullptr ? most : std::clamp<int64_t>(lengths[b], 0, most);
}

template <class T>
MMK_INLINE void align(const CtcAlign& args, int64_t b, void* memory) {
  using A = acc_t<T>;
  const int64_t frames = length_of(args.input_lengths, b, args.frames);
  const int64_t tokens = length_of(args.target_lengths, b, args.tokens);
  const int64_t* target = args.targets + b * args.tokens;
  int64_t* path = args.paths + b * args.frames;
  int64_t* ends = args.ends + b * args.tokens;
  A& total = static_cast<A*>(args.totals)[b];
  std::fill_n(path, args.frames, -1);
  std::fill_n(ends, args.tokens, 0);
  total = frames == 0 && tokens == 0 ? A(0) : kNever<A>;
  if (frames == 0 || tokens > frames) return;
  Utterance<T> utterance = {static_cast<const T*>(args.log_probs) + b * args.batch_stride,
                            args.frame_stride,
                            frames,
                            tokens,
                            args.classes,
                            args.blank,
                            Scratch<A>(memory, frames, tokens, args.classes)};
  const CtcCheckpoints plan = ctc_checkpoints(frames, tokens);
  utterance.read_target(target);
  const Scores<A> scores = utterance.forward(plan);
  const A in_blank = scores.even[tokens], in_token = scores.odd[tokens - 1];
  const bool odd = tokens > 0 && !(in_blank > in_token);
  if (!((odd ? in_token : in_blank) > kNever<A>)) return;
  std::fill_n(ends, args.tokens, frames);
  total = utterance.backtrace(plan, target, odd ? tokens - 1 : tokens, odd, path, ends);
}

}  // namespace

size_t ctc_align_scratch(DType dtype, int64_t frames, int64_t tokens, int64_t classes) {
  return dispatch_wide(dtype, [&](auto element) {
    return Scratch<decltype(element)>(nullptr, frames, tokens, classes).bytes;
  });
}

MMK_MULTIARCH void ctc_align(const CtcAlign& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t b = begin; b < end; ++b) align<decltype(element)>(args, b, scratch);
  });
}

}  // namespace mmk::cpu
