#include "cuda/common/scan.cuh"
#include "cuda/segment_pool.cuh"

namespace mmk::cuda {
namespace {

// ---- stops

constexpr int kStopThreads = 256;

// A block takes one row.
__global__ void __launch_bounds__(kStopThreads)
    segment_stops(const SegmentPoolShape shape, const __grid_constant__ SegmentEnds ends) {
  grid_dependency_launch();
  const int64_t row = blockIdx.x;
  const int64_t count = ends.counts == nullptr ? shape.segments : ends.counts[row];
  int64_t before = 0;
  for (int64_t first = 0; first < shape.segments; first += kStopThreads) {
    const int64_t segment = first + threadIdx.x;
    int64_t stop = 0;
    if (segment < shape.segments && segment < count) {
      const int64_t end = ends.ends[row * shape.segments + segment];
      stop = end > shape.frames ? shape.frames : end;
    }
    int64_t largest;
    stop = block_scan<kStopThreads>(stop, Max(), &largest);
    if (segment < shape.segments) ends.stops[row * shape.segments + segment] = Max()(stop, before);
    before = Max()(largest, before);
  }
}

// ---- pieces

// A thread's columns of a piece: the sums, or the largest values and their frames.
template <class T, Reduction kReduce>
struct Columns {
  static constexpr int kWidth = kVectorWidth<T>;
  Vec<float, kWidth> value = {};
  Vec<int32_t, kReduce == Reduction::kMax ? kWidth : 1> frame = {};

  MMK_DEVICE void add(const Vec<T, kWidth>& row, float weight, int32_t at, bool first) {
    const Vec<float, kWidth> x = to_accumulator(row);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (kReduce == Reduction::kMax) {
        const bool take = first || replaces(x[i], value[i]);
        value[i] = take ? x[i] : value[i];
        frame[i] = take ? at : frame[i];
      } else if constexpr (kReduce == Reduction::kAttention) {
        value[i] += weight * x[i];
      } else {
        value[i] += x[i];
      }
    }
  }
};

// Adds kCount rows from `row` on; all are loaded before the first is used, to hide their latency.
template <int kCount, bool kAligned, class T, Reduction kReduce>
MMK_DEVICE void add_rows(Columns<T, kReduce>& columns, const SegmentPoolForward& args, const T* x,
                         const PoolPiece& piece, const LaneScores& weights, int row, int64_t column) {
  constexpr int kWidth = kVectorWidth<T>;
  Vec<T, kWidth> values[kCount];
  // Past the end of a row a thread loads the row's first columns, which are not stored: a branch would
  // wait for each load.
  const T* first = x + row * args.frame_stride + (kAligned && column < args.shape.width ? column : 0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T* source = first + i * args.frame_stride;
    if constexpr (kAligned) {
      values[i] = load_streaming<kWidth>(source);
    } else {
      values[i] = load_columns<false, kWidth>(source, column, args.shape.width);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float weight = 1.0f;
    if constexpr (kReduce == Reduction::kAttention) weight = weights.of(row + i);
    columns.add(values[i], weight, static_cast<int32_t>(piece.first) + row + i, row + i == 0);
  }
}

// Unaligned rows are loaded element by element, and fewer together.
template <bool kAligned, class T, Reduction kReduce>
MMK_DEVICE void add_piece(Columns<T, kReduce>& columns, const SegmentPoolForward& args, const T* x,
                          const PoolPiece& piece, const LaneScores& weights, int64_t column) {
  constexpr int kRows = kAligned ? 8 : 2;
  int row = 0;
#pragma unroll 1
  for (; row + kRows <= piece.rows; row += kRows) {
    add_rows<kRows, kAligned>(columns, args, x, piece, weights, row, column);
  }
  if constexpr (kRows > 4) {
    if (piece.rows & 4) add_rows<4, kAligned>(columns, args, x, piece, weights, row, column);
    row += piece.rows & 4;
  }
  if constexpr (kRows > 2) {
    if (piece.rows & 2) add_rows<2, kAligned>(columns, args, x, piece, weights, row, column);
    row += piece.rows & 2;
  }
  if (piece.rows & 1) add_rows<1, kAligned>(columns, args, x, piece, weights, row, column);
}

// Blocks per multiprocessor for which the eight rows in flight fit the registers.
constexpr int pool_blocks(Reduction reduce) {
  return reduce == Reduction::kMax || reduce == Reduction::kAttention ? 4 : 6;
}

// A warp takes a slice of the columns of a unit.
template <class T, Reduction kReduce, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, pool_blocks(kReduce))
    pool_pieces(const __grid_constant__ SegmentPoolForward args, int64_t tiles, int64_t slices) {
  constexpr int kWidth = kVectorWidth<T>;
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kPoolWarps + warp_index();
  const int64_t unit = warp / slices, slice = warp - unit * slices;
  const PoolUnits units(shape, args.stops, tiles);
  if (unit >= shape.batch * (shape.segments + tiles)) return;
  const PoolPiece piece = units.piece(unit);
  if (piece.rows == 0 && unit - piece.row * (shape.segments + tiles) >= shape.segments) return;

  const float* scores = static_cast<const float*>(args.scores) + piece.row * shape.frames + piece.first;
  LaneScores weights(scores, kReduce == Reduction::kAttention ? piece.rows : 0);
  float divisor = 1.0f;
  if constexpr (kReduce == Reduction::kMean) {
    if (piece.rows > 0) divisor = static_cast<float>(piece.rows);
  }
  if constexpr (kReduce == Reduction::kAttention) {
    const float largest = finite_largest(
        warp_max(weights.low > weights.high || weights.low != weights.low ? weights.low : weights.high));
    weights.exponentials(largest, 1.0f, piece.rows);
    const float sum = warp_sum(weights.low + weights.high);
    divisor = divisor_of(sum);
    if (slice == 0 && lane_index() == 0) {
      if (piece.partial >= 0) {
        static_cast<float2*>(args.partial_stats)[piece.partial] = {largest, sum};
      } else if (args.stats != nullptr) {
        static_cast<float2*>(args.stats)[piece.row * shape.segments + piece.segment] = {largest,
                                                                                        1.0f / divisor};
      }
    }
  }

  const int64_t column = (slice * kWarpSize + lane_index()) * kWidth;
  Columns<T, kReduce> columns;
  const T* x =
      static_cast<const T*>(args.x) + piece.row * args.batch_stride + piece.first * args.frame_stride;
  add_piece<kAligned>(columns, args, x, piece, weights, column);
  const bool whole = piece.partial < 0;
  const int64_t place = whole ? piece.row * shape.segments + piece.segment : piece.partial;
  if constexpr (kReduce == Reduction::kMax) {
    int32_t* index = whole ? args.index : args.partial_index;
    if (piece.rows == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) columns.frame[i] = -1;
    }
    if (index != nullptr) {
      store_columns<kAligned>(index + place * shape.width, column, shape.width, columns.frame);
    }
  }
  if (whole) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) columns.value[i] /= divisor;
    T* out = static_cast<T*>(args.out) + place * shape.width;
    store_columns<kAligned>(out, column, shape.width, from_accumulator<T>(columns.value));
  } else {
    float* partial = static_cast<float*>(args.partial) + place * shape.width;
    store_columns<kAligned>(partial, column, shape.width, columns.value);
  }
}

// The last frame of each segment. A thread takes one vector.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads)
    take_last(const __grid_constant__ SegmentPoolForward args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_wait();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x;
  const int64_t place = index / vectors_per_row;
  if (place >= shape.batch * shape.segments) return;
  const int64_t row = place / shape.segments, segment = place - row * shape.segments;
  const int64_t column = (index - place * vectors_per_row) * kWidth;
  const PoolUnits units(shape, args.stops, 0);
  Vec<T, kWidth> value = {};
  if (units.frames_of(row, segment) > 0) {
    const T* x =
        static_cast<const T*>(args.x) + row * args.batch_stride + (args.stops[place] - 1) * args.frame_stride;
    value = load_columns<kAligned, kWidth>(x, column, shape.width);
  }
  store_columns<kAligned>(static_cast<T*>(args.out) + place * shape.width, column, shape.width, value);
}

// ---- segments of several pieces

constexpr int kCombineThreads = 256;
constexpr int kCombineWarps = kCombineThreads / kWarpSize;
constexpr int kCombineWidth = 4;  // columns of a lane
constexpr int64_t kCombineColumns = kWarpSize * kCombineWidth;

// Largest score and sum of exponentials of a long segment, from the statistics of its pieces.
MMK_DEVICE float2 combine_stats(const float2* stats, int64_t first, int64_t pieces) {
  const auto at = [&](int64_t k) { return stats[first + 2 * k + (k > 0 ? 1 : 0)]; };
  float largest = -kInfinity;
  for (int64_t k = threadIdx.x; k < pieces; k += kCombineThreads) {
    if (at(k).y != 0.0f) largest = Max()(at(k).x, largest);
  }
  largest = finite_largest(block_max<kCombineThreads>(largest));
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < pieces; k += kCombineThreads) {
    if (at(k).y != 0.0f) sum += expf(at(k).x - largest) * at(k).y;
  }
  return {largest, block_sum<kCombineThreads>(sum)};
}

// A block takes 128 columns of the long segment that starts in a tile, if there is one. Each of its eight
// warps takes a range of the pieces; the ranges are then combined in order.
template <class T, Reduction kReduce>
__global__ void __launch_bounds__(kCombineThreads)
    combine_pieces(const __grid_constant__ SegmentPoolForward args, int64_t tiles, int64_t slices) {
  const SegmentPoolShape& shape = args.shape;
  grid_dependency_wait();
  const int64_t unit = blockIdx.x / slices, slice = blockIdx.x - unit * slices;
  const int64_t row = unit / tiles, tile = unit - row * tiles;
  const PoolUnits units(shape, args.stops, tiles);
  // A segment of more than one piece that starts in this tile has the first frame of the next.
  const int64_t segment = find_segment(units.stops_of(row), shape.segments, (tile + 1) * kSegmentPiece);
  if (segment == shape.segments) return;
  const int64_t frames = units.frames_of(row, segment), start = units.start_of(row, segment);
  if (start / kSegmentPiece != tile || frames <= kSegmentPiece) return;

  const int64_t pieces = ceil_div<int64_t>(frames, kSegmentPiece);
  const int64_t first = units.partial(row, start, 0), place = row * shape.segments + segment;
  const int64_t column = slice * kCombineColumns + lane_index() * kCombineWidth;
  const float2* stats = static_cast<const float2*>(args.partial_stats);
  float divisor = kReduce == Reduction::kMean ? static_cast<float>(frames) : 1.0f;
  float largest = 0.0f;
  if constexpr (kReduce == Reduction::kAttention) {
    const float2 whole = combine_stats(stats, first, pieces);
    largest = whole.x;
    divisor = divisor_of(whole.y);
    if (args.stats != nullptr && slice == 0 && threadIdx.x == 0) {
      static_cast<float2*>(args.stats)[place] = {largest, 1.0f / divisor};
    }
  }

  Columns<float, kReduce> columns;
  const int64_t begin = pieces * warp_index() / kCombineWarps;
  const int64_t end = pieces * (warp_index() + 1) / kCombineWarps;
#pragma unroll(kReduce == Reduction::kMax ? 2 : 8)
  for (int64_t k = begin; k < end; ++k) {
    const int64_t p = first + 2 * k + (k > 0 ? 1 : 0);
    const float* partial = static_cast<const float*>(args.partial) + p * shape.width;
    const Vec<float, kCombineWidth> value = load_columns<false, kCombineWidth>(partial, column, shape.width);
    if constexpr (kReduce == Reduction::kMax) {
      Vec<int32_t, kCombineWidth> frame = {};
      if (args.index != nullptr) {
        frame = load_columns<false, kCombineWidth>(args.partial_index + p * shape.width, column, shape.width);
      }
      // Selects: a branch for each column would wait for it.
#pragma unroll
      for (int i = 0; i < kCombineWidth; ++i) {
        const bool take = k == begin || replaces(value[i], columns.value[i]);
        columns.value[i] = take ? value[i] : columns.value[i];
        columns.frame[i] = take ? frame[i] : columns.frame[i];
      }
    } else {
      float weight = 1.0f;
      if constexpr (kReduce == Reduction::kAttention) {
        weight = stats[p].y == 0.0f ? 0.0f : expf(stats[p].x - largest);
      }
#pragma unroll
      for (int i = 0; i < kCombineWidth; ++i) columns.value[i] += weight * value[i];
    }
  }
  using Shared = Columns<float, kReduce>;
  MMK_SHARED(Shared, of_warp, kCombineWarps, kWarpSize);
  of_warp[warp_index()][lane_index()] = columns;
  __syncthreads();
  if (warp_index() > 0) return;
  bool none = begin == end;
#pragma unroll 1
  for (int warp = 1; warp < kCombineWarps; ++warp) {
    // With fewer pieces than warps some ranges are empty.
    if (pieces * warp / kCombineWarps == pieces * (warp + 1) / kCombineWarps) continue;
    const Columns<float, kReduce>& other = of_warp[warp][lane_index()];
#pragma unroll
    for (int i = 0; i < kCombineWidth; ++i) {
      if constexpr (kReduce == Reduction::kMax) {
        if (!none && !replaces(other.value[i], columns.value[i])) continue;
        columns.value[i] = other.value[i];
        columns.frame[i] = other.frame[i];
      } else {
        columns.value[i] += other.value[i];
      }
    }
    none = false;
  }
  Vec<T, kCombineWidth> result;
#pragma unroll
  for (int i = 0; i < kCombineWidth; ++i) result[i] = from_accumulator<T>(columns.value[i] / divisor);
  store_columns<false>(static_cast<T*>(args.out) + place * shape.width, column, shape.width, result);
  if constexpr (kReduce == Reduction::kMax) {
    if (args.index != nullptr) {
      store_columns<false>(args.index + place * shape.width, column, shape.width, columns.frame);
    }
  }
}

// ---- launchers

template <class T, Reduction kReduce, bool kAligned>
cudaError_t forward(const SegmentPoolForward& args, CudaStream stream) {
  const SegmentPoolShape& shape = args.shape;
  const int64_t vectors = ceil_div<int64_t>(shape.width, kVectorWidth<T>);
  dim3 grid;
  if constexpr (kReduce == Reduction::kLast) {
    const int64_t threads = shape.batch * shape.segments * vectors;
    if (!make_grid(ceil_div<int64_t>(threads, kPoolThreads), &grid)) return cudaErrorInvalidConfiguration;
    return launch_overlapping(take_last<T, kAligned>, grid, dim3(kPoolThreads), 0, stream, args, vectors);
  } else {
    const int64_t tiles = segment_pool_tiles(shape.frames);
    const int64_t slices = ceil_div<int64_t>(vectors > 0 ? vectors : 1, kWarpSize);
    const int64_t warps = shape.batch * (shape.segments + tiles) * slices;
    if (!make_grid(ceil_div<int64_t>(warps, kPoolWarps), &grid)) return cudaErrorInvalidConfiguration;
    const cudaError_t error = launch_overlapping(pool_pieces<T, kReduce, kAligned>, grid, dim3(kPoolThreads),
                                                 0, stream, args, tiles, slices);
    if (error != cudaSuccess || tiles == 0) return error;
    const int64_t parts = ceil_div<int64_t>(shape.width > 0 ? shape.width : 1, kCombineColumns);
    if (!make_grid(shape.batch * tiles * parts, &grid)) return cudaErrorInvalidConfiguration;
    return launch_overlapping(combine_pieces<T, kReduce>, grid, dim3(kCombineThreads), 0, stream, args, tiles,
                              parts);
  }
}

}  // namespace

cudaError_t launch_stops(const SegmentPoolShape& shape, const SegmentEnds& ends, CudaStream stream) {
  dim3 grid;
  if (!make_grid(shape.batch, &grid)) return cudaErrorInvalidConfiguration;
  return launch(segment_stops, grid, dim3(kStopThreads), 0, stream, shape, ends);
}

int segment_pool_forward(const SegmentPoolForward& args, const SegmentEnds& ends, CudaStream stream) {
  const SegmentPoolShape& shape = args.shape;
  const bool held = args.stats != nullptr;
  if (shape.batch * shape.segments * (held ? 1 : shape.width) == 0) return cudaSuccess;
  const cudaError_t error = launch_stops(shape, ends, stream);
  if (error != cudaSuccess) return error;
  return dispatch(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = shape.width % kVectorWidth<T> == 0 &&
                         rows_aligned<T>(args.x, args.batch_stride, args.frame_stride) &&
                         rows_aligned<T>(args.out);
    return dispatch_reduction(shape.reduce, [&](auto reduce) {
      constexpr Reduction kReduce = decltype(reduce)::value;
      return aligned ? forward<T, kReduce, true>(args, stream) : forward<T, kReduce, false>(args, stream);
    });
  });
}

}  // namespace mmk::cuda
