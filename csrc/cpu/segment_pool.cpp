#include "cpu/segment_pool.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace mmk::cpu {
namespace {

// Rows added at a time, with the sums in registers. More rows are too many streams for the prefetcher.
constexpr int64_t kRowsAtOnce = 10;

// Prefetch distance in rows, about 32 KB: the hardware prefetcher restarts on every page.
template <class T>
MMK_INLINE int64_t rows_ahead(int64_t width) {
  return std::clamp<int64_t>((int64_t{32} << 10) / (width * static_cast<int64_t>(sizeof(T)) + 1), 4, 64);
}

// Rows of one piece, each times its weight if there are weights.
template <class T>
struct RowSum {
  Rows<T> x;
  const acc_t<T>* weights;
  int64_t ahead;

  MMK_INLINE RowSum from(int64_t r) const { return {{x.row(r), x.stride}, weights + r, ahead}; }
};

// Adds `rows` rows of kVectors vectors to `sum`, or starts it with them (kStart). Calls place(offset, total).
template <class T, bool kStart, bool kWeighted, int kVectors, class Place>
MMK_INLINE void add_vectors(const acc_t<T>* sum, const RowSum<T>& of, int64_t column, int64_t rows,
                            Place&& place) {
  using A = acc_t<T>;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  vec_t<A> total[kVectors];
  const auto add = [&](int64_t r, auto start) MMK_LAMBDA {
    const T* row = of.x.row(r) + column;
    const T* later = row + of.ahead * of.x.stride;
    for (int64_t j = 0; j < kVectors * kLanes<A>; j += kLine) prefetch(later + j);
    for (int v = 0; v < kVectors; ++v) {
      vec_t<A> term = load(row + v * kLanes<A>);
      if constexpr (kWeighted) term = of.weights[r] * term;
      total[v] = start ? term : total[v] + term;
    }
  };
  if constexpr (!kStart) {
    for (int v = 0; v < kVectors; ++v) total[v] = load(sum + column + v * kLanes<A>);
  }
  add(0, std::bool_constant<kStart>{});
  for (int64_t r = 1; r < rows; ++r) add(r, std::false_type{});
  for (int v = 0; v < kVectors; ++v) place(v * kLanes<A>, total[v]);
}

// As add_vectors, for all columns: writes to `sum`, or divided by `divisor` to `out` if it is not null.
template <class T, bool kStart, bool kWeighted>
MMK_INLINE void add_rows(acc_t<T>* sum, acc_t<T>* out, acc_t<T> divisor, const RowSum<T>& of, int64_t rows,
                         int64_t width) {
  using A = acc_t<T>;
  const auto add = [&](int64_t column, auto vectors) MMK_LAMBDA {
    add_vectors<T, kStart, kWeighted, decltype(vectors)::value>(
        sum, of, column, rows, [&](int64_t j, const vec_t<A>& total) MMK_LAMBDA {
          if (out == nullptr) {
            store(sum + column + j, total);
          } else {
            store(out + column + j, total / divisor);
          }
        });
  };
  int64_t j = 0;
  for (; j + 4 * kLanes<A> <= width; j += 4 * kLanes<A>) add(j, std::integral_constant<int, 4>{});
  for (; j + kLanes<A> <= width; j += kLanes<A>) add(j, std::integral_constant<int, 1>{});
  for (; j < width; ++j) {
    A total = kStart ? A(0) : sum[j];
    for (int64_t r = 0; r < rows; ++r) {
      A term = convert(of.x.row(r)[j]);
      if constexpr (kWeighted) term = of.weights[r] * term;
      total = kStart && r == 0 ? term : total + term;
    }
    if (out == nullptr) {
      sum[j] = total;
    } else {
      out[j] = total / divisor;
    }
  }
}

template <class T>
MMK_INLINE void write(T* out, const acc_t<T>* values, acc_t<T> divisor, int64_t width) {
  for_columns<T>(
      width, [&](int64_t j) MMK_LAMBDA { store(out + j, load(values + j) / divisor); },
      [&](int64_t j) MMK_LAMBDA { out[j] = round_to<T>(values[j] / divisor); });
}

// The sum of at least one row: to `sum`, or divided and rounded to `out` if it is not null.
template <class T, bool kWeighted>
MMK_INLINE void sum_rows(acc_t<T>* sum, T* out, acc_t<T> divisor, const RowSum<T>& of, int64_t rows,
                         int64_t width) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<T, Half>) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = of.x.row(r);
      const A weight = kWeighted ? of.weights[r] : A(1);
      const auto term = [&](int64_t j)
                            MMK_LAMBDA { return kWeighted ? weight * convert(row[j]) : convert(row[j]); };
      if (r == 0) {
        for (int64_t j = 0; j < width; ++j) sum[j] = term(j);
      } else {
        for (int64_t j = 0; j < width; ++j) sum[j] += term(j);
      }
    }
  } else {
    // Groups of almost equal size: a last one of a single row would be slow.
    int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    const auto target = [&]() MMK_LAMBDA {
      if constexpr (std::is_same_v<T, A>) return groups == 0 ? out : nullptr;
      return static_cast<A*>(nullptr);
    };
    int64_t count = rows / groups--;
    add_rows<T, true, kWeighted>(sum, target(), divisor, of, count, width);
    for (int64_t r = count; r < rows; r += count) {
      count = (rows - r) / groups--;
      add_rows<T, false, kWeighted>(sum, target(), divisor, of.from(r), count, width);
    }
  }
  if (!std::is_same_v<T, A> && out != nullptr) write(out, sum, divisor, width);
}

// Whether `value` takes the place of `best`: the first of equal values stays, and the first NaN.
template <class A>
MMK_INLINE bool replaces(A value, A best) {
  return !(value <= best) & (best == best);
}

// best, at = the largest value of each column and its frame; rows are the frames from `first` on.
template <class T>
MMK_INLINE void max_rows(acc_t<T>* best, int32_t* at, Rows<T> x, int64_t first, int64_t rows, int64_t width) {
  for (int64_t j = 0; j < width; ++j) best[j] = convert(x.data[j]);
  for (int64_t j = 0; j < width; ++j) at[j] = static_cast<int32_t>(first);
  for (int64_t r = 1; r < rows; ++r) {
    const T* row = x.row(r);
    const int32_t frame = static_cast<int32_t>(first + r);
    for (int64_t j = 0; j < width; ++j) {
      const acc_t<T> value = convert(row[j]);
      const bool take = replaces(value, best[j]);
      best[j] = take ? value : best[j];
      at[j] = take ? frame : at[j];
    }
  }
}

// The largest score, 0 if all are -inf, and the sum of the exponentials of the differences to it.
template <class A>
struct Softmax {
  A largest;
  A sum;

  MMK_INLINE A divisor() const { return sum == 0 ? A(1) : sum; }
};

template <class A>
MMK_INLINE Softmax<A> exponentials(const A* scores, int64_t count, A* result) {
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t r = 0; r < count; ++r) largest = replaces(scores[r], largest) ? scores[r] : largest;
  if (largest == -std::numeric_limits<A>::infinity()) largest = 0;
  A sum = 0;
  for (int64_t r = 0; r < count; ++r) {
    result[r] = std::exp(scores[r] - largest);
    sum += result[r];
  }
  return {largest, sum};
}

template <class A>
MMK_INLINE void save(void* stats, int64_t place, A first, A second) {
  if (stats == nullptr) return;
  static_cast<A*>(stats)[2 * place] = first;
  static_cast<A*>(stats)[2 * place + 1] = second;
}

// One piece of the forward pass: its segment's result, or its partial result.
template <class T>
MMK_INLINE void pool_piece(const SegmentPoolForward& args, const SegmentPiece& piece) {
  using A = acc_t<T>;
  const SegmentPoolShape& shape = args.shape;
  const int64_t place = piece.row * shape.segments + piece.segment;
  const int64_t frames = piece.last - piece.first;
  T* out = at<T>(args.out, place * shape.width);
  if (frames == 0) {
    std::memset(out, 0, static_cast<size_t>(shape.width) * sizeof(T));
    if (args.index != nullptr) std::fill_n(args.index + place * shape.width, shape.width, -1);
    save(args.stats, place, A(0), A(0));
    return;
  }
  Rows<T> x = frames_of<T>(args.x, args.batch_stride, args.frame_stride, piece);
  if (shape.reduce == Reduction::kLast) {
    std::memcpy(out, x.row(frames - 1), static_cast<size_t>(shape.width) * sizeof(T));
    return;
  }
  A weights[kSegmentPiece];
  Softmax<A> softmax = {};
  if (shape.reduce == Reduction::kAttention) {
    const A* scores = static_cast<const A*>(args.scores) + piece.row * shape.frames + piece.first;
    softmax = exponentials(scores, frames, weights);
    if (piece.partial >= 0) {
      save(args.partial_stats, piece.partial, softmax.largest, softmax.sum);
    } else {
      save(args.stats, place, softmax.largest, A(1) / softmax.divisor());
    }
  }
  A values[kTile];
  int32_t found[kTile];
  const A divisor = shape.reduce == Reduction::kAttention
                        ? softmax.divisor()
                        : mean_divisor<A>(shape, args.stops, piece.row, piece.segment);
  const int64_t ahead = rows_ahead<T>(shape.width);
  for (int64_t column = 0; column < shape.width; column += kTile, x.data += kTile) {
    const int64_t width = std::min(kTile, shape.width - column);
    // Compute partial results in place.
    const bool whole = piece.partial < 0;
    A* sum = whole ? values : at<A>(args.partial, piece.partial * shape.width + column);
    T* result = whole ? out + column : nullptr;
    const RowSum<T> of = {x, weights, ahead};
    if (shape.reduce == Reduction::kMax) {
      const bool kept = !whole && args.partial_index != nullptr;
      int32_t* index = kept                    ? args.partial_index + piece.partial * shape.width + column
                       : args.index == nullptr ? found
                                               : args.index + place * shape.width + column;
      max_rows<T>(sum, index, x, piece.first, frames, width);
      if (whole) write(result, sum, A(1), width);
    } else if (shape.reduce == Reduction::kAttention) {
      sum_rows<T, true>(sum, result, divisor, of, frames, width);
    } else {
      sum_rows<T, false>(sum, result, divisor, of, frames, width);
    }
  }
}

// Adds the sums of a long segment's pieces in order. For attention each gets a factor, since pieces have
// different largest scores.
template <class T>
MMK_INLINE void combine_sums(const SegmentPoolForward& args, const LongSegment& segment) {
  using A = acc_t<T>;
  const SegmentPoolShape& shape = args.shape;
  const int64_t place = segment.row * shape.segments + segment.segment;
  const bool attention = shape.reduce == Reduction::kAttention;
  const A* stats = static_cast<const A*>(args.partial_stats);
  Softmax<A> whole = {-std::numeric_limits<A>::infinity(), A(0)};
  for (int64_t p = segment.first; attention && p < segment.last; ++p) {
    if (stats[2 * p + 1] != 0 && replaces(stats[2 * p], whole.largest)) whole.largest = stats[2 * p];
  }
  if (whole.largest == -std::numeric_limits<A>::infinity()) whole.largest = 0;
  const auto factor = [&](int64_t p) MMK_LAMBDA {
    return attention ? (stats[2 * p + 1] == 0 ? A(0) : std::exp(stats[2 * p] - whole.largest)) : A(1);
  };
  for (int64_t p = segment.first; attention && p < segment.last; ++p)
    whole.sum += factor(p) * stats[2 * p + 1];
  A divisor = mean_divisor<A>(shape, args.stops, segment.row, segment.segment);
  if (attention) {
    divisor = whole.divisor();
    save(args.stats, place, whole.largest, A(1) / divisor);
  }
  A values[kTile];
  for (int64_t column = 0; column < shape.width; column += kTile) {
    const int64_t width = std::min(kTile, shape.width - column);
    std::fill_n(values, width, A(0));
    for (int64_t p = segment.first; p < segment.last; ++p) {
      const A* sum = static_cast<const A*>(args.partial) + p * shape.width + column;
      const A weight = factor(p);
      sweep<A>(
          width, [&](int64_t j) MMK_LAMBDA { store(values + j, load(values + j) + weight * load(sum + j)); },
          [&](int64_t j) MMK_LAMBDA { values[j] += weight * sum[j]; });
    }
    write(at<T>(args.out, place * shape.width + column), values, divisor, width);
  }
}

template <class T>
MMK_INLINE void combine_max(const SegmentPoolForward& args, const LongSegment& segment) {
  using A = acc_t<T>;
  const int64_t width = args.shape.width;
  const int64_t place = (segment.row * args.shape.segments + segment.segment) * width;
  for (int64_t j = 0; j < width; ++j) {
    int64_t best = segment.first * width + j;
    const A* values = static_cast<const A*>(args.partial);
    for (int64_t p = segment.first + 1; p < segment.last; ++p) {
      if (replaces(values[p * width + j], values[best])) best = p * width + j;
    }
    static_cast<T*>(args.out)[place + j] = round_to<T>(values[best]);
    if (args.index != nullptr) args.index[place + j] = args.partial_index[best];
  }
}

}  // namespace

SegmentPlan segment_plan(const SegmentPoolShape& shape, const int64_t* stops, bool uncovered) {
  SegmentPlan plan;
  const auto add = [&](int64_t row, int64_t segment, int64_t first, int64_t last, int64_t partial) {
    plan.pieces.push_back({row, segment, first, last, partial, plan.work});
    plan.work += last - first + 1;
  };
  for (int64_t row = 0; row < shape.batch; ++row) {
    int64_t start = 0;
    for (int64_t segment = 0; segment < shape.segments; ++segment) {
      const int64_t stop = stops[row * shape.segments + segment];
      if (shape.reduce == Reduction::kLast && !uncovered) {
        add(row, segment, std::max(start, stop - 1), stop, -1);
      } else if (stop - start <= kSegmentPiece) {
        add(row, segment, start, stop, -1);
      } else {
        const int64_t before = plan.partials;
        for (int64_t first = start; first < stop; first += kSegmentPiece) {
          add(row, segment, first, std::min(first + kSegmentPiece, stop), plan.partials++);
        }
        plan.long_segments.push_back({row, segment, before, plan.partials});
      }
      start = stop;
    }
    for (; uncovered && start < shape.frames; start += kSegmentPiece) {
      add(row, -1, start, std::min(start + kSegmentPiece, shape.frames), -1);
    }
  }
  return plan;
}

MMK_MULTIARCH void segment_pool_forward(const SegmentPoolForward& args, const SegmentPlan& plan,
                                        int64_t begin, int64_t end) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t i = begin; i < end; ++i) pool_piece<decltype(element)>(args, plan.pieces[i]);
  });
}

MMK_MULTIARCH void segment_pool_combine(const SegmentPoolForward& args, const SegmentPlan& plan,
                                        int64_t begin, int64_t end) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t i = begin; i < end; ++i) {
      if (args.shape.reduce == Reduction::kMax) {
        combine_max<decltype(element)>(args, plan.long_segments[i]);
      } else {
        combine_sums<decltype(element)>(args, plan.long_segments[i]);
      }
    }
  });
}

}  // namespace mmk::cpu
