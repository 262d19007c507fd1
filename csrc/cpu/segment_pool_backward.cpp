#include <cmath>
#include <cstring>

#include "cpu/segment_pool.h"

namespace mmk::cpu {
namespace {

// Copies a row; with `stream`, bypasses the caches if the target is 16-byte aligned.
template <class T>
MMK_INLINE void copy_row(T* to, const T* from, int64_t width, bool stream) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  if (stream) {
    copy_streaming(to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

// Weights of the frames of a piece, by the statistics of its segment.
template <class A>
MMK_INLINE void attention_weights(const SegmentPoolBackward& args, const SegmentPiece& piece, A* weights) {
  const SegmentPoolShape& shape = args.shape;
  const A* scores = static_cast<const A*>(args.scores) + piece.row * shape.frames + piece.first;
  const A* stats = static_cast<const A*>(args.stats) + 2 * (piece.row * shape.segments + piece.segment);
  for (int64_t r = 0; r < piece.last - piece.first; ++r)
    weights[r] = std::exp(scores[r] - stats[0]) * stats[1];
}

// d_scores of a piece: complete if the piece is a whole segment, else grad . x, with its part of the sum.
template <class T>
MMK_INLINE void score_gradients(const SegmentPoolBackward& args, const SegmentPiece& piece, const T* grad,
                                const acc_t<T>* weights) {
  using A = acc_t<T>;
  const Rows<T> x = frames_of<T>(args.x, args.batch_stride, args.frame_stride, piece);
  A* d_scores = static_cast<A*>(args.d_scores) + piece.row * args.shape.frames + piece.first;
  const int64_t frames = piece.last - piece.first;
  A mean = 0;
  for (int64_t r = 0; r < frames; ++r) {
    const T* row = x.row(r);
    d_scores[r] = sum_over<A>(
        args.shape.width, [&](int64_t j) MMK_LAMBDA { return load(grad + j) * load(row + j); },
        [&](int64_t j) MMK_LAMBDA { return convert(grad[j]) * convert(row[j]); },
        [&](int64_t j) MMK_LAMBDA { prefetch(row + x.stride + j); });
    mean += weights[r] * d_scores[r];
  }
  if (piece.partial >= 0) {
    static_cast<A*>(args.partial_dot)[piece.partial] = mean;
  } else {
    for (int64_t r = 0; r < frames; ++r) d_scores[r] = weights[r] * (d_scores[r] - mean);
  }
}

// dx of a piece of one segment.
template <class T>
MMK_INLINE void frame_gradients(const SegmentPoolBackward& args, const SegmentPiece& piece, const T* grad,
                                const acc_t<T>* weights, bool stream) {
  using A = acc_t<T>;
  const SegmentPoolShape& shape = args.shape;
  const int64_t place = piece.row * shape.segments + piece.segment, frames = piece.last - piece.first;
  T* dx = at<T>(args.dx, (piece.row * shape.frames + piece.first) * shape.width);
  T row[kTile];
  for (int64_t column = 0; column < shape.width; column += kTile, dx += kTile, grad += kTile) {
    const int64_t width = std::min(kTile, shape.width - column);
    switch (shape.reduce) {
      case Reduction::kMean:
      case Reduction::kSum: {
        const A divisor = mean_divisor<A>(shape, args.stops, piece.row, piece.segment);
        for_columns<T>(
            width, [&](int64_t j) MMK_LAMBDA { store(row + j, load(grad + j) / divisor); },
            [&](int64_t j) MMK_LAMBDA { row[j] = round_to<T>(convert(grad[j]) / divisor); });
        for (int64_t r = 0; r < frames; ++r) copy_row(dx + r * shape.width, row, width, stream);
        break;
      }
      case Reduction::kLast: {
        std::memset(row, 0, sizeof row);
        const bool holds_last = piece.last == args.stops[place];
        const int64_t zeros = holds_last ? frames - 1 : frames;
        for (int64_t r = 0; r < zeros; ++r) copy_row(dx + r * shape.width, row, width, stream);
        if (holds_last) copy_row(dx + zeros * shape.width, grad, width, stream);
        break;
      }
      case Reduction::kMax: {
        const int32_t* index = args.index + place * shape.width + column;
        for (int64_t r = 0; r < frames; ++r) {
          const int32_t frame = static_cast<int32_t>(piece.first + r);
          if constexpr (sizeof(T) == 2) {  // as integers, which the compiler vectorises
            for (int64_t j = 0; j < width; ++j)
              row[j].bits = static_cast<uint16_t>(index[j] == frame ? grad[j].bits : 0);
          } else {
            for (int64_t j = 0; j < width; ++j) row[j] = index[j] == frame ? grad[j] : T{};
          }
          copy_row(dx + r * shape.width, row, width, stream);
        }
        break;
      }
      case Reduction::kAttention:
        for (int64_t r = 0; r < frames; ++r) {
          const A weight = weights[r];
          for_columns<T>(
              width, [&](int64_t j) MMK_LAMBDA { store(row + j, weight * load(grad + j)); },
              [&](int64_t j) MMK_LAMBDA { row[j] = round_to<T>(weight * convert(grad[j])); });
          copy_row(dx + r * shape.width, row, width, stream);
        }
        break;
    }
  }
}

template <class T>
MMK_INLINE void spread_piece(const SegmentPoolBackward& args, const SegmentPiece& piece, bool stream) {
  using A = acc_t<T>;
  const SegmentPoolShape& shape = args.shape;
  const int64_t frames = piece.last - piece.first;
  if (frames == 0) return;
  const int64_t first = piece.row * shape.frames + piece.first;
  if (piece.segment < 0) {
    if (args.dx != nullptr) {
      std::memset(at<T>(args.dx, first * shape.width), 0,
                  static_cast<size_t>(frames * shape.width) * sizeof(T));
    }
    if (args.d_scores != nullptr) std::fill_n(static_cast<A*>(args.d_scores) + first, frames, A(0));
    return;
  }
  const T* grad = static_cast<const T*>(args.grad) + piece.row * args.grad_batch_stride +
                  piece.segment * args.grad_segment_stride;
  A weights[kSegmentPiece];
  if (shape.reduce == Reduction::kAttention) attention_weights(args, piece, weights);
  if (args.d_scores != nullptr) score_gradients(args, piece, grad, weights);
  if (args.dx != nullptr) frame_gradients(args, piece, grad, weights, stream);
}

}  // namespace

MMK_MULTIARCH void segment_pool_backward(const SegmentPoolBackward& args, const SegmentPlan& plan,
                                         int64_t begin, int64_t end, bool stream) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    for (int64_t i = begin; i < end; ++i) spread_piece<decltype(element)>(args, plan.pieces[i], stream);
  });
  finish_streaming();
}

void segment_pool_finish_scores(const SegmentPoolBackward& args, const SegmentPlan& plan, int64_t begin,
                                int64_t end) {
  dispatch_wide(args.shape.dtype, [&](auto element) {
    using A = decltype(element);
    const SegmentPoolShape& shape = args.shape;
    for (int64_t i = begin; i < end; ++i) {
      const LongSegment& segment = plan.long_segments[i];
      A mean = 0;
      for (int64_t p = segment.first; p < segment.last; ++p)
        mean += static_cast<const A*>(args.partial_dot)[p];
      const int64_t place = segment.row * shape.segments + segment.segment;
      const int64_t stop = args.stops[place];
      const int64_t start = stop - frames_of_segment(shape, args.stops, segment.row, segment.segment);
      const A* stats = static_cast<const A*>(args.stats) + 2 * place;
      const A* scores = static_cast<const A*>(args.scores) + segment.row * shape.frames;
      A* d_scores = static_cast<A*>(args.d_scores) + segment.row * shape.frames;
      for (int64_t t = start; t < stop; ++t) {
        d_scores[t] = std::exp(scores[t] - stats[0]) * stats[1] * (d_scores[t] - mean);
      }
    }
  });
}

}  // namespace mmk::cpu
