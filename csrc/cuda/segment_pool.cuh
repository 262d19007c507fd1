// Shared by the forward and the backward kernels of segment_pool.
//
// The units of a row are its segments, then its tiles of kSegmentPiece frames. The unit of a segment takes
// its first piece; the unit of a tile the later piece that starts in it. There is at most one: pieces of a
// segment start kSegmentPiece frames apart, and the next segment's second piece as far after its end. So no
// count of pieces is needed, and the grid depends on the sizes alone.
#pragma once

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/segment_pool.h"

namespace mmk::cuda {

inline constexpr int kPoolThreads = 128;
inline constexpr int kPoolWarps = kPoolThreads / kWarpSize;
inline constexpr float kInfinity = __builtin_huge_valf();

struct PoolPiece {
  int64_t row;
  int64_t segment;
  int64_t first;  // frames [first, first + rows)
  int rows;
  int64_t partial;  // its place among the partial results; -1 if it is its whole segment
};

// The first segment of a row that ends after the frame, or the number of segments.
MMK_DEVICE int64_t find_segment(const int64_t* stops, int64_t segments, int64_t frame) {
  int64_t low = 0, high = segments;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (stops[middle] > frame) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

struct PoolUnits {
  const int64_t* stops;
  int64_t segments;
  int64_t tiles;

  MMK_DEVICE PoolUnits(const SegmentPoolShape& shape, const int64_t* given_stops, int64_t given_tiles)
      : stops(given_stops), segments(shape.segments), tiles(given_tiles) {}

  MMK_DEVICE const int64_t* stops_of(int64_t row) const { return stops + row * segments; }
  MMK_DEVICE int64_t start_of(int64_t row, int64_t segment) const {
    return segment == 0 ? 0 : stops_of(row)[segment - 1];
  }
  MMK_DEVICE int64_t frames_of(int64_t row, int64_t segment) const {
    return stops_of(row)[segment] - start_of(row, segment);
  }
  // The place of piece k of a segment that starts at `start`.
  MMK_DEVICE int64_t partial(int64_t row, int64_t start, int64_t k) const {
    return 2 * (row * tiles + start / kSegmentPiece + k) + (k > 0 ? 1 : 0);
  }

  // The piece of a unit; it has no rows where there is none.
  MMK_DEVICE PoolPiece piece(int64_t unit) const {
    const int64_t row = unit / (segments + tiles);
    const int64_t place = unit - row * (segments + tiles);
    return place < segments ? first_piece(row, place) : later_piece(row, place - segments);
  }

 private:
  MMK_DEVICE PoolPiece first_piece(int64_t row, int64_t segment) const {
    const int64_t start = start_of(row, segment), frames = stops_of(row)[segment] - start;
    const bool whole = frames <= kSegmentPiece;
    return {row, segment, start, static_cast<int>(whole ? frames : kSegmentPiece),
            whole ? -1 : partial(row, start, 0)};
  }

  MMK_DEVICE PoolPiece later_piece(int64_t row, int64_t tile) const {
    const int64_t frame = tile * kSegmentPiece;
    const int64_t segment = find_segment(stops_of(row), segments, frame);
    PoolPiece piece = {row, segment, frame, 0, -1};
    if (segment == segments) return piece;
    const int64_t start = start_of(row, segment), stop = stops_of(row)[segment];
    const int64_t k = ceil_div<int64_t>(frame - start, kSegmentPiece);
    piece.first = start + k * kSegmentPiece;
    if (k < 1 || piece.first >= stop) return piece;
    piece.rows = static_cast<int>(stop - piece.first < kSegmentPiece ? stop - piece.first : kSegmentPiece);
    piece.partial = partial(row, start, k);
    return piece;
  }
};

// The scores of a piece in a warp: lane l has those of frames l and l + 32 of it.
struct LaneScores {
  float low;
  float high;

  MMK_DEVICE LaneScores(const float* scores, int rows) {
    const int lane = lane_index();
    low = lane < rows ? scores[lane] : -kInfinity;
    high = lane + kWarpSize < rows ? scores[lane + kWarpSize] : -kInfinity;
  }

  // Replaces scores by exp(score - largest) * factor, 0 past the rows of the piece.
  MMK_DEVICE void exponentials(float largest, float factor, int rows) {
    const int lane = lane_index();
    low = lane < rows ? expf(low - largest) * factor : 0.0f;
    high = lane + kWarpSize < rows ? expf(high - largest) * factor : 0.0f;
  }

  // Broadcasts the score of a row. All lanes must call it.
  MMK_DEVICE float of(int row) const {
    return __shfl_sync(kFullMask, row < kWarpSize ? low : high, row % kWarpSize);
  }
};

// Where all scores are -inf the softmax subtracts 0: -inf - -inf is NaN.
MMK_DEVICE float finite_largest(float largest) {
  return largest == -kInfinity ? 0.0f : largest;
}

MMK_DEVICE float divisor_of(float sum) {
  return sum == 0.0f ? 1.0f : sum;
}

// Whether `value` takes the place of `best`: the first of equal values stays, and the first NaN.
MMK_DEVICE bool replaces(float value, float best) {
  return !(value <= best) && best == best;
}

// Writes the stops of all rows. The kernel after it may be launched by launch_overlapping.
cudaError_t launch_stops(const SegmentPoolShape& shape, const SegmentEnds& ends, CudaStream stream);

// Calls body(constant) with the reduction as a constant.
template <class Body>
cudaError_t dispatch_reduction(Reduction reduce, Body&& body) {
  const auto with = [&](auto constant) { return body(constant); };
  switch (reduce) {
    case Reduction::kMean:
      return with(std::integral_constant<Reduction, Reduction::kMean>{});
    case Reduction::kSum:
      return with(std::integral_constant<Reduction, Reduction::kSum>{});
    case Reduction::kMax:
      return with(std::integral_constant<Reduction, Reduction::kMax>{});
    case Reduction::kLast:
      return with(std::integral_constant<Reduction, Reduction::kLast>{});
    case Reduction::kAttention:
      return with(std::integral_constant<Reduction, Reduction::kAttention>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmk::cuda
