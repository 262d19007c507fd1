// segment_attention: softmax attention in which query i sees the keys [start[i], i].
//
// `extents` has two rows of frames for each batch row: start[i], `frames` for a query that sees nothing, and
// stop[j], the end of the queries that see key j, 0 for none. Neither falls from one frame in a segment to
// the next, and the frames in segments come first: a block of queries sees contiguous keys, and a block of
// keys is seen by contiguous queries. Kernels clamp the extents, so that no value of them leads out of
// bounds.
#pragma once

#include <cstdint>
#include <vector>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct SegmentAttentionShape {
  DType dtype;
  int64_t batch;
  int64_t heads;      // of queries
  int64_t key_heads;  // of keys and values; they divide the heads
  int64_t frames;
  int64_t size;  // of a head, a multiple of 8
};

// [batch, heads, frames, size]; strides count elements, the last dimension has stride 1.
struct HeadRows {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t frame_stride;
};

struct SegmentAttentionForward {
  SegmentAttentionShape shape;
  HeadRows q, k, v;
  const int32_t* extents;  // [batch, 2, frames]
  double scale;
  void* out;  // [batch, frames, heads, size]
  void* lse;  // [batch, heads, frames] log of the sum of exponentials, float (double for kFloat64), or null
};

struct SegmentAttentionBackward {
  SegmentAttentionShape shape;
  HeadRows q, k, v;
  const int32_t* extents;
  double scale;
  HeadRows grad;    // of the result
  HeadRows out;     // the result
  const void* lse;  // [batch, heads, frames]
  void* dots;       // scratch of the same shape and type: grad . out
  void* dq;         // [batch, frames, heads, size] or null
  void* dk;         // [batch, frames, key_heads, size] or null
  void* dv;         // the same
};

namespace cpu {

constexpr int64_t kAttentionBlock = 64;  // frames

// The extents of one row of segments, whose ends are clamped to the frames and to their running maximum.
void segment_extents(const int64_t* ends, int64_t segments, int64_t frames, int64_t lookback,
                     int32_t* extents);

// Blocks of frames of every row and head. begin[i]: the work of all blocks before i; begin.back(): of all.
struct AttentionPlan {
  std::vector<int64_t> begin;

  int64_t work() const { return begin.back(); }
  // The blocks that begin in [begin, end) of the work are those from index_of(begin) to index_of(end).
  int64_t index_of(int64_t at) const;
};

// Blocks of queries with the keys that they see, or of keys with the queries that see them.
AttentionPlan plan_queries(const SegmentAttentionShape& shape, const int32_t* extents);
AttentionPlan plan_keys(const SegmentAttentionShape& shape, const int32_t* extents);

// Blocks [begin, end) of plan_queries.
void segment_attention_forward(const SegmentAttentionForward& args, int64_t begin, int64_t end);
// Writes dots, and dq if wanted: blocks of plan_queries. Then dk and dv: blocks of plan_keys.
void segment_attention_backward_queries(const SegmentAttentionBackward& args, int64_t begin, int64_t end);
void segment_attention_backward_keys(const SegmentAttentionBackward& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// The given ends of segments, and the memory of the extents.
struct AttentionSegments {
  const int64_t* ends;  // [batch, segments]
  int64_t segments;
  int64_t lookback;
  int32_t* extents;  // also `extents` of the other arguments
};

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int segment_attention_forward(const SegmentAttentionForward& args, const AttentionSegments& segments,
                              CudaStream stream);
int segment_attention_backward(const SegmentAttentionBackward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
