// segment_pool: out[b, j] = a reduction of the frames [stop[b, j - 1], stop[b, j]) of row b.
//
// `stops` are ends clamped to [0, frames] and to their running maximum, and equal from the first segment past
// the row's count on: they are safe for any values of the ends, and segments past the count have no frames.
// A segment is cut into pieces of kSegmentPiece frames. Several pieces go through partial results, combined
// in order: the order of a sum depends on the segment alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

// In the order of REDUCTIONS in mmkernels/ops/segment_pool/schema.py.
enum class Reduction : int32_t { kMean, kSum, kMax, kLast, kAttention };

constexpr int64_t kSegmentPiece = 64;  // frames

struct SegmentPoolShape {
  DType dtype;
  Reduction reduce;
  int64_t batch;
  int64_t frames;
  int64_t segments;
  int64_t width;
};

// Strides count elements; the last dimension has stride 1.
struct SegmentPoolForward {
  SegmentPoolShape shape;
  const void* x;  // [batch, frames, width]
  int64_t batch_stride;
  int64_t frame_stride;
  const int64_t* stops;  // [batch, segments]
  const void* scores;    // [batch, frames], float (double for kFloat64), like all statistics and sums below
  void* out;             // [batch, segments, width]
  void* stats;           // attention: [batch, segments, 2] largest score and 1 / sum of exponentials, or null
  int32_t* index;        // max: [batch, segments, width] the frame of the value, -1 for none, or null
  void* partial;         // [partials, width] sums or values of pieces
  int32_t* partial_index;  // max with index: [partials, width]
  void* partial_stats;     // attention: [partials, 2] largest score and sum of exponentials
};

struct SegmentPoolBackward {
  SegmentPoolShape shape;
  const void* grad;  // [batch, segments, width] with the two strides below
  int64_t grad_batch_stride;
  int64_t grad_segment_stride;
  const void* x;  // only for d_scores; else null
  int64_t batch_stride;
  int64_t frame_stride;
  const int64_t* stops;
  const void* scores;
  const void* stats;
  const int32_t* index;
  void* dx;           // [batch, frames, width] or null
  void* d_scores;     // [batch, frames] or null
  void* partial_dot;  // [partials] sum over a piece of weight * (grad . x)
};

namespace cpu {

// Frames [first, last) of segment `segment` of a row, or of no segment if it is -1.
struct SegmentPiece {
  int64_t row;
  int64_t segment;
  int64_t first;
  int64_t last;
  int64_t partial;  // its place among the partial results; -1 if it is its whole segment
  int64_t begin;    // work of all pieces before this one
};

// A segment of several pieces, whose partial results lie at [first, last).
struct LongSegment {
  int64_t row;
  int64_t segment;
  int64_t first;
  int64_t last;
};

struct SegmentPlan {
  std::vector<SegmentPiece> pieces;
  std::vector<LongSegment> long_segments;
  int64_t partials = 0;
  int64_t work = 0;

  // The pieces that begin in [begin, end) of the work are those from index_of(begin) to index_of(end).
  int64_t index_of(int64_t at) const {
    const auto before = [](const SegmentPiece& piece, int64_t value) { return piece.begin < value; };
    return std::lower_bound(pieces.begin(), pieces.end(), at, before) - pieces.begin();
  }
};

// Pieces of all segments, including empty ones, and with `uncovered` of the frames in no segment.
SegmentPlan segment_plan(const SegmentPoolShape& shape, const int64_t* stops, bool uncovered);

// Pieces [begin, end) of the plan; then, once all are done, the long segments [begin, end).
void segment_pool_forward(const SegmentPoolForward& args, const SegmentPlan& plan, int64_t begin,
                          int64_t end);
void segment_pool_combine(const SegmentPoolForward& args, const SegmentPlan& plan, int64_t begin,
                          int64_t end);
// With `stream`, stores to dx bypass the caches.
void segment_pool_backward(const SegmentPoolBackward& args, const SegmentPlan& plan, int64_t begin,
                           int64_t end, bool stream);
// Completes d_scores of the long segments [begin, end).
void segment_pool_finish_scores(const SegmentPoolBackward& args, const SegmentPlan& plan, int64_t begin,
                                int64_t end);

}  // namespace cpu

namespace cuda {

// The given segments of a call, and the memory of their stops.
struct SegmentEnds {
  const int64_t* ends;    // [batch, segments]
  const int64_t* counts;  // [batch] or null
  int64_t* stops;         // [batch, segments], also `stops` of the other arguments
};

// Tiles of a row in which pieces of long segments may start; partial results have 2 * batch * tiles places.
constexpr int64_t segment_pool_tiles(int64_t frames) {
  return frames <= kSegmentPiece ? 0 : (frames + kSegmentPiece - 1) / kSegmentPiece;
}

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int segment_pool_forward(const SegmentPoolForward& args, const SegmentEnds& ends, CudaStream stream);
int segment_pool_backward(const SegmentPoolBackward& args, const SegmentEnds& ends, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
