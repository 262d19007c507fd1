#include "cuda/segment_pool.cuh"

namespace mmk::cuda {
namespace {

template <class T>
MMK_DEVICE const T* grad_row(const SegmentPoolBackward& args, const PoolPiece& piece) {
  return static_cast<const T*>(args.grad) + piece.row * args.grad_batch_stride +
         piece.segment * args.grad_segment_stride;
}

template <class T>
MMK_DEVICE T* frame_row(const SegmentPoolBackward& args, int64_t row, int64_t frame) {
  return static_cast<T*>(args.dx) + (row * args.shape.frames + frame) * args.shape.width;
}

// Frames of a unit that are in no segment: those of its tile, from the last stop on.
struct Uncovered {
  int64_t first;
  int64_t last;

  MMK_DEVICE Uncovered(const PoolUnits& units, const SegmentPoolShape& shape, int64_t row, int64_t unit) {
    const int64_t tile = unit - row * (units.segments + units.tiles) - units.segments;
    const int64_t covered = units.segments == 0 ? 0 : units.stops_of(row)[units.segments - 1];
    first = tile * kSegmentPiece;
    last = first + kSegmentPiece < shape.frames ? first + kSegmentPiece : shape.frames;
    if (tile < 0) first = last;
    if (first < covered) first = covered;
  }
};

MMK_DEVICE LaneScores attention_weights(const SegmentPoolBackward& args, const PoolPiece& piece) {
  const SegmentPoolShape& shape = args.shape;
  LaneScores weights(static_cast<const float*>(args.scores) + piece.row * shape.frames + piece.first,
                     piece.rows);
  float2 stats = {0.0f, 0.0f};
  if (piece.rows > 0) {
    stats = static_cast<const float2*>(args.stats)[piece.row * shape.segments + piece.segment];
  }
  weights.exponentials(stats.x, stats.y, piece.rows);
  return weights;
}

// ---- dx alone: a warp takes a slice of the columns of a unit, and writes its frames

template <class T, Reduction kReduce, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads)
    spread_pieces(const __grid_constant__ SegmentPoolBackward args, int64_t tiles, int64_t slices) {
  constexpr int kWidth = kVectorWidth<T>;
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_wait();
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kPoolWarps + warp_index();
  const int64_t unit = warp / slices;
  const int64_t column = ((warp - unit * slices) * kWarpSize + lane_index()) * kWidth;
  const PoolUnits units(shape, args.stops, tiles);
  if (unit >= shape.batch * (shape.segments + tiles)) return;
  const PoolPiece piece = units.piece(unit);
  const auto write = [&](int64_t frame, const Vec<T, kWidth>& value) {
    store_columns<kAligned>(frame_row<T>(args, piece.row, frame), column, shape.width, value);
  };
  const Uncovered uncovered(units, shape, piece.row, unit);
  for (int64_t frame = uncovered.first; frame < uncovered.last; ++frame) write(frame, {});
  if (piece.rows == 0) return;

  const Vec<T, kWidth> grad = load_columns<kAligned, kWidth>(grad_row<T>(args, piece), column, shape.width);
  const int64_t place = piece.row * shape.segments + piece.segment;
  if constexpr (kReduce == Reduction::kMean || kReduce == Reduction::kSum) {
    Vec<T, kWidth> value = grad;
    if constexpr (kReduce == Reduction::kMean) {
      Vec<float, kWidth> share = to_accumulator(grad);
      const float divisor = static_cast<float>(units.frames_of(piece.row, piece.segment));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) share[i] /= divisor;
      value = from_accumulator<T>(share);
    }
#pragma unroll 4
    for (int row = 0; row < piece.rows; ++row) write(piece.first + row, value);
  } else if constexpr (kReduce == Reduction::kLast) {
    const int64_t last = args.stops[place] - 1;
#pragma unroll 4
    for (int row = 0; row < piece.rows; ++row) {
      write(piece.first + row, piece.first + row == last ? grad : Vec<T, kWidth>{});
    }
  } else if constexpr (kReduce == Reduction::kMax) {
    const auto index = load_columns<kAligned, kWidth>(args.index + place * shape.width, column, shape.width);
#pragma unroll 4
    for (int row = 0; row < piece.rows; ++row) {
      const int32_t frame = static_cast<int32_t>(piece.first) + row;
      Vec<T, kWidth> value = {};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (index[i] == frame) value[i] = grad[i];
      }
      write(frame, value);
    }
  } else {
    const LaneScores weights = attention_weights(args, piece);
    const Vec<float, kWidth> wide = to_accumulator(grad);
#pragma unroll 4
    for (int row = 0; row < piece.rows; ++row) {
      const float weight = weights.of(row);
      Vec<float, kWidth> value;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] = weight * wide[i];
      write(piece.first + row, from_accumulator<T>(value));
    }
  }
}

// ---- attention, with the gradient of the scores: a block takes a unit, its warps the frames one by one

// Adds kCount vectors of a lane, 32 vectors apart, to grad . x of a frame; with kNeedX it writes dx too. All
// loads are issued before the first is used and before a store, which no load may pass.
template <int kCount, bool kAligned, bool kNeedX, class T>
MMK_DEVICE void add_products(float& dot, const T* grad, const T* x, T* dx, float weight, int64_t column,
                             int64_t width) {
  constexpr int kWidth = kVectorWidth<T>, kStride = kWarpSize * kWidth;
  Vec<T, kWidth> of_grad[kCount], of_x[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    of_grad[k] = load_columns<kAligned, kWidth>(grad, column + k * kStride, width);
    of_x[k] = load_columns<kAligned, kWidth>(x, column + k * kStride, width);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const auto a = to_accumulator(of_grad[k]), b = to_accumulator(of_x[k]);
    Vec<float, kWidth> value;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      dot += a[i] * b[i];
      value[i] = weight * a[i];
    }
    if constexpr (kNeedX) {
      store_columns<kAligned>(dx, column + k * kStride, width, from_accumulator<T>(value));
    }
  }
}

// grad . x of a frame, to all lanes of the warp; with kNeedX it writes dx too. Unaligned rows are loaded
// element by element, and fewer together.
template <class T, bool kAligned, bool kNeedX>
MMK_DEVICE float frame_dot(const SegmentPoolBackward& args, const PoolPiece& piece, const T* grad, int row,
                           float weight) {
  constexpr int kWidth = kVectorWidth<T>, kStride = kWarpSize * kWidth;
  constexpr int kCount = kAligned ? 4 : 2;
  const int64_t width = args.shape.width, frame = piece.first + row;
  const T* x = static_cast<const T*>(args.x) + piece.row * args.batch_stride + frame * args.frame_stride;
  T* dx = kNeedX ? frame_row<T>(args, piece.row, frame) : nullptr;
  float dot = 0.0f;
  int64_t column = lane_index() * kWidth;
#pragma unroll 1
  for (; column + (kCount - 1) * kStride + kWidth <= width; column += kCount * kStride) {
    // With this end the compiler sees that all columns are inside, and drops the comparisons.
    add_products<kCount, kAligned, kNeedX>(dot, grad, x, dx, weight, column, column + kCount * kStride);
  }
#pragma unroll 1
  for (; column < width; column += kStride) {
    add_products<1, kAligned, kNeedX>(dot, grad, x, dx, weight, column, width);
  }
  return warp_sum(dot);
}

template <class T, bool kAligned, bool kNeedX>
__global__ void __launch_bounds__(kPoolThreads, 5)
    score_gradients(const __grid_constant__ SegmentPoolBackward args, int64_t tiles) {
  constexpr int kWidth = kVectorWidth<T>;
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t unit = blockIdx.x;
  const PoolUnits units(shape, args.stops, tiles);
  const PoolPiece piece = units.piece(unit);
  float* d_scores = static_cast<float*>(args.d_scores) + piece.row * shape.frames;
  const Uncovered uncovered(units, shape, piece.row, unit);
  for (int64_t frame = uncovered.first + warp_index(); frame < uncovered.last; frame += kPoolWarps) {
    if (lane_index() == 0) d_scores[frame] = 0.0f;
    if constexpr (kNeedX) {
      for (int64_t column = lane_index() * kWidth; column < shape.width; column += kWarpSize * kWidth) {
        store_columns<kAligned>(frame_row<T>(args, piece.row, frame), column, shape.width, Vec<T, kWidth>{});
      }
    }
  }
  if (piece.rows == 0) return;

  const LaneScores weights = attention_weights(args, piece);
  const T* grad = grad_row<T>(args, piece);
  MMK_SHARED(float, dots, kSegmentPiece);
#pragma unroll 1
  for (int row = warp_index(); row < piece.rows; row += kPoolWarps) {
    const float dot = frame_dot<T, kAligned, kNeedX>(args, piece, grad, row, weights.of(row));
    if (lane_index() == 0) dots[row] = dot;
  }
  __syncthreads();
  if (warp_index() > 0) return;
  const int low = lane_index(), high = low + kWarpSize;
  const float low_dot = low < piece.rows ? dots[low] : 0.0f, high_dot = high < piece.rows ? dots[high] : 0.0f;
  const float mean = warp_sum(weights.low * low_dot + weights.high * high_dot);
  const bool whole = piece.partial < 0;
  if (!whole && low == 0) static_cast<float*>(args.partial_dot)[piece.partial] = mean;
  // finish_scores completes those of long segments, with the mean over all their pieces.
  if (low < piece.rows) d_scores[piece.first + low] = whole ? weights.low * (low_dot - mean) : low_dot;
  if (high < piece.rows) d_scores[piece.first + high] = whole ? weights.high * (high_dot - mean) : high_dot;
}

// A warp takes a piece of a long segment.
__global__ void __launch_bounds__(kPoolThreads)
    finish_scores(const __grid_constant__ SegmentPoolBackward args, int64_t tiles) {
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_wait();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kPoolWarps + warp_index();
  if (unit >= shape.batch * (shape.segments + tiles)) return;
  const PoolUnits units(shape, args.stops, tiles);
  const PoolPiece piece = units.piece(unit);
  if (piece.partial < 0) return;
  const int64_t pieces = ceil_div<int64_t>(units.frames_of(piece.row, piece.segment), kSegmentPiece);
  const int64_t start = units.start_of(piece.row, piece.segment);
  float mean = 0.0f;
#pragma unroll 4
  for (int64_t k = lane_index(); k < pieces; k += kWarpSize) {
    mean += static_cast<const float*>(args.partial_dot)[units.partial(piece.row, start, k)];
  }
  mean = warp_sum(mean);
  const LaneScores weights = attention_weights(args, piece);
  float* d_scores = static_cast<float*>(args.d_scores) + piece.row * shape.frames + piece.first;
  const int low = lane_index(), high = low + kWarpSize;
  if (low < piece.rows) d_scores[low] = weights.low * (d_scores[low] - mean);
  if (high < piece.rows) d_scores[high] = weights.high * (d_scores[high] - mean);
}

// ---- launchers

template <class T, bool kAligned>
cudaError_t backward_scores(const SegmentPoolBackward& args, CudaStream stream) {
  const SegmentPoolShape& shape = args.shape;
  const int64_t tiles = ceil_div(shape.frames, kSegmentPiece);
  const int64_t units = shape.batch * (shape.segments + tiles);
  dim3 grid;
  if (!make_grid(units, &grid)) return cudaErrorInvalidConfiguration;
  const auto kernel =
      args.dx == nullptr ? score_gradients<T, kAligned, false> : score_gradients<T, kAligned, true>;
  const cudaError_t error = launch_overlapping(kernel, grid, dim3(kPoolThreads), 0, stream, args, tiles);
  if (error != cudaSuccess || segment_pool_tiles(shape.frames) == 0) return error;
  if (!make_grid(ceil_div<int64_t>(units, kPoolWarps), &grid)) return cudaErrorInvalidConfiguration;
  return launch_overlapping(finish_scores, grid, dim3(kPoolThreads), 0, stream, args, tiles);
}

template <class T, bool kAligned>
cudaError_t backward(const SegmentPoolBackward& args, CudaStream stream) {
  const SegmentPoolShape& shape = args.shape;
  if (args.d_scores != nullptr) return backward_scores<T, kAligned>(args, stream);
  const int64_t tiles = ceil_div(shape.frames, kSegmentPiece);
  const int64_t slices = ceil_div<int64_t>(shape.width, kVectorWidth<T> * kWarpSize);
  const int64_t warps = shape.batch * (shape.segments + tiles) * slices;
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(warps, kPoolWarps), &grid)) return cudaErrorInvalidConfiguration;
  return dispatch_reduction(shape.reduce, [&](auto reduce) {
    return launch_overlapping(spread_pieces<T, decltype(reduce)::value, kAligned>, grid, dim3(kPoolThreads),
                              0, stream, args, tiles, slices);
  });
}

}  // namespace

int segment_pool_backward(const SegmentPoolBackward& args, const SegmentEnds& ends, CudaStream stream) {
  const SegmentPoolShape& shape = args.shape;
  if (args.dx == nullptr && args.d_scores == nullptr) return cudaSuccess;
  // Without segments no kernel writes the stops, and none reads them.
  if (shape.segments > 0) {
    const cudaError_t error = launch_stops(shape, ends, stream);
    if (error != cudaSuccess) return error;
  }
  return dispatch(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = shape.width % kVectorWidth<T> == 0 &&
                         rows_aligned<T>(args.grad, args.grad_batch_stride, args.grad_segment_stride) &&
                         rows_aligned<T>(args.x, args.batch_stride, args.frame_stride) &&
                         rows_aligned<T>(args.dx) && rows_aligned<int32_t>(args.index);
    return aligned ? backward<T, true>(args, stream) : backward<T, false>(args, stream);
  });
}

}  // namespace mmk::cuda
