#include "mmkernels/monotonic_align.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

// An unsigned integer as wide as a score.
template <class A>
using word_t = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
template <class A>
constexpr int64_t kBits = 8 * static_cast<int64_t>(sizeof(A));

// The lanes of `right` moved up by one, the first lane filled with the last one of `left`.
template <class A>
MMK_INLINE vec_t<A> shift_in(vec_t<A> left, vec_t<A> right) {
  if constexpr (kLanes<A> == 8) {
    return __builtin_shufflevector(left, right, 7, 8, 9, 10, 11, 12, 13, 14);
  } else {
    return __builtin_shufflevector(left, right, 3, 4, 5, 6);
  }
}

// One utterance: its lengths, scores and back-pointers.
template <class A>
struct Trellis {
  int64_t frames;
  int64_t tokens;
  A* scores;         // [columns]
  word_t<A>* words;  // [rows, columns]
  int64_t columns;
};

// Fills the back-pointers. Returns false if a log-probability is NaN.
template <class T>
MMK_INLINE bool search(const T* log_probs, int64_t frame_stride, const Trellis<acc_t<T>>& trellis) {
  using A = acc_t<T>;
  using Words = typename VectorOf<word_t<A>>::type;
  constexpr A kImpossible = -std::numeric_limits<A>::infinity();
  const int64_t whole = trellis.tokens / kLanes<A> * kLanes<A>;
  std::fill_n(trellis.scores, trellis.columns, kImpossible);
  Words not_numbers = {};
  for (int64_t t = 0; t < trellis.frames; ++t) {
    const T* x = log_probs + t * frame_stride;
    word_t<A>* words = trellis.words + t / kBits<A> * trellis.columns;
    if (t % kBits<A> == 0) std::fill_n(words, trellis.columns, word_t<A>{0});
    const word_t<A> bit = word_t<A>{1} << (t % kBits<A>);
    // The path starts before the first frame and token.
    vec_t<A> before = vec_t<A>{} + (t == 0 ? A{0} : kImpossible);
    const auto advance = [&](int64_t u, vec_t<A> value) MMK_LAMBDA {
      vec_t<A> stay;
      Words marks;
      std::memcpy(&stay, trellis.scores + u, 32);
      std::memcpy(&marks, words + u, 32);
      const vec_t<A> come = shift_in<A>(before, stay);
      const auto comes = come >= stay;
      const vec_t<A> score = value + (comes ? come : stay);
      marks |= reinterpret_cast<Words>(comes) & bit;
      not_numbers |= reinterpret_cast<Words>(value != value);
      std::memcpy(trellis.scores + u, &score, 32);
      std::memcpy(words + u, &marks, 32);
      before = stay;
    };
    for (int64_t u = 0; u < whole; u += kLanes<A>) advance(u, load(x + u));
    if (whole < trellis.tokens) {
      vec_t<A> rest = {};
      for (int64_t u = whole; u < trellis.tokens; ++u) rest[u - whole] = convert(x[u]);
      advance(whole, rest);
    }
  }
  word_t<A> any = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) any |= not_numbers[i];
  return any == 0;
}

// Follows the back-pointers from the end: one step for each token, and one for each row of words.
template <class A>
MMK_INLINE void trace(const Trellis<A>& trellis, int64_t* durations) {
  int64_t u = trellis.tokens - 1, end = trellis.frames;
  int64_t t = trellis.frames - 1;
  while (u > 0) {
    const int64_t row = t / kBits<A>;
    word_t<A> starts = trellis.words[row * trellis.columns + u];
    // Token u starts in frame u at the earliest.
    if (u / kBits<A> == row) starts |= word_t<A>{1} << (u % kBits<A>);
    starts &= ~word_t<A>{0} >> (kBits<A> - 1 - t % kBits<A>);
    if (starts == 0) {
      t = row * kBits<A> - 1;
      continue;
    }
    const int64_t start = row * kBits<A> + kBits<A> - 1 - std::countl_zero(starts);
    durations[u--] = end - start;
    end = start;
    t = start - 1;
  }
  durations[0] = end;
}

MMK_INLINE int64_t length_of(const int64_t* lengths, int64_t row, int64_t most) {
  return lengths == nullptr ? most : std::clamp<int64_t>(lengths[row], 0, most);
}

}  // namespace

MMK_MULTIARCH void monotonic_align(const MonotonicAlign& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto element) MMK_LAMBDA {
    using T = decltype(element);
    using A = acc_t<T>;
    const MonotonicWords words = monotonic_words(args.dtype, args.frames, args.tokens);
    for (int64_t row = begin; row < end; ++row) {
      int64_t* durations = args.durations + row * args.tokens;
      std::fill_n(durations, args.tokens, int64_t{0});
      const Trellis<A> trellis = {length_of(args.frame_lengths, row, args.frames),
                                  length_of(args.token_lengths, row, args.tokens),
                                  at<A>(args.states, row * words.columns),
                                  at<word_t<A>>(args.words, row * words.rows * words.columns), words.columns};
      if (trellis.tokens == 0 || trellis.frames < trellis.tokens) continue;
      if (search(at<T>(args.log_probs, row * args.batch_stride), args.frame_stride, trellis)) {
        trace(trellis, durations);
      }
    }
  });
}

}  // namespace mmk::cpu
