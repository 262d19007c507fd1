// The products of segment_attention. A block keeps 64 rows of one or two matrices, and streams tiles of kStep
// rows of two others past them:
//   cells     cells[row][column] = rows[row] . tile[column]
//   sums      sums[row] += cells[row][column] * tile[column]
// For the result and for dq the rows are queries, and keys are streamed; for dk and dv the reverse.
// TensorTiles uses the tensor cores in half precision, PlainTiles multiplies in float.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/common/vector.cuh"
#include "mmkernels/segment_attention.h"

namespace mmk::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kAttentionRows = 64;
inline constexpr float kLog2E = 1.4426950408889634f;

// Rows of a head from one frame on, of which the first `count` are read; zeros take the place of others.
template <class T>
struct AttentionRows {
  const T* data;
  int64_t stride;
  int64_t count;
};

template <class T>
MMK_DEVICE AttentionRows<T> rows_of(const HeadRows& rows, int64_t row, int64_t head, int64_t frame,
                                    int64_t count) {
  const T* data = static_cast<const T*>(rows.data) + row * rows.batch_stride + head * rows.head_stride;
  return {data + frame * rows.frame_stride, rows.frame_stride, count};
}

// Heads of at most kPaddedSize columns whose rows start at 16-byte boundaries. Each warp has 16 of the rows.
template <class Element, int kPaddedSize, int kStreamRows, int kKept>
class TensorTiles {
 public:
  using T = Element;
  static constexpr int kStep = kStreamRows;
  static constexpr int kRows = 2;             // of a thread
  static constexpr int kColumns = kStep / 4;  // of a thread
  static constexpr int kLanes = 4;            // that share a row
  static constexpr int kWidth = kPaddedSize;  // columns of sums of a block
  using Cells = float[kStep / 8][4];
  using Sums = float[kPaddedSize / 8][4];

 private:
  static constexpr int kVectors = kPaddedSize / 8;
  static constexpr int kKeptElements = kAttentionRows * kPaddedSize;
  static constexpr int kTileElements = kStep * kPaddedSize;

 public:
  static constexpr int kBytes = (kKept * kKeptElements + 4 * kTileElements) * static_cast<int>(sizeof(T));

  MMK_DEVICE TensorTiles(unsigned char* buffer, int64_t size, int64_t)
      : kept_(reinterpret_cast<T*>(buffer)), size_(static_cast<int>(size)) {}

  MMK_DEVICE static int row(int r) { return warp_index() * 16 + r * 8 + lane_index() / 4; }
  MMK_DEVICE static int column(int c) { return c / 2 * 8 + lane_index() % 4 * 2 + c % 2; }
  MMK_DEVICE static float& cell(Cells& cells, int r, int c) { return cells[c / 2][r * 2 + c % 2]; }

  template <int kIndex>
  MMK_DEVICE void keep(const AttentionRows<T>& rows) {
    copy<kAttentionRows>(kept_ + kIndex * kKeptElements, rows);
  }

  // Starts the copies of one step's tiles. Call it for the first step right after keep().
  MMK_DEVICE void fetch(int step, const AttentionRows<T>& first, const AttentionRows<T>& second) {
    T* tiles = stage(step);
    copy<kStep>(tiles, first);
    copy<kStep>(tiles + kTileElements, second);
  }
  // Makes the tiles of a step visible, and frees those of the step before for fetch().
  MMK_DEVICE void wait(int step) {
    cp_async_wait_all();
    __syncthreads();
    step_ = step;
  }

  template <int kIndex>
  MMK_DEVICE void multiply(Cells& cells) const {
    const RowFragments<kVectors, 1, T> rows(kept_ + kIndex * kKeptElements, warp_index() * 16);
    const ColumnFragments<false, kVectors, kStep / 8, T> columns(stage(step_) + kIndex * kTileElements, 0);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) cells[n][i] = 0.0f;
    }
#pragma unroll
    for (int inner = 0; inner < kPaddedSize; inner += 16) {
      uint32_t a[1][4];
      rows.load(a, inner);
#pragma unroll
      for (int pair = 0; pair < kStep / 16; ++pair) {
        uint32_t b[2][2];
        columns.load_pair(b[0], b[1], pair, inner);
        mma_m16n8k16<T>(cells[2 * pair], a[0], b[0]);
        mma_m16n8k16<T>(cells[2 * pair + 1], a[0], b[1]);
      }
    }
  }

  template <int kIndex>
  MMK_DEVICE void add(Sums& sums, const Cells& cells) const {
    const ColumnFragments<true, kVectors, kVectors, T> columns(stage(step_) + kIndex * kTileElements, 0);
#pragma unroll
    for (int inner = 0; inner < kStep; inner += 16) {
      uint32_t a[4];
      as_row_fragment<T>(a, cells[inner / 8], cells[inner / 8 + 1]);
#pragma unroll
      for (int pair = 0; pair < kPaddedSize / 16; ++pair) {
        uint32_t b[2][2];
        columns.load_pair(b[0], b[1], pair, inner);
        mma_m16n8k16<T>(sums[2 * pair], a, b[0]);
        mma_m16n8k16<T>(sums[2 * pair + 1], a, b[1]);
      }
    }
  }

  MMK_DEVICE static void clear(Sums& sums) {
#pragma unroll
    for (int n = 0; n < kPaddedSize / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
    }
  }
  MMK_DEVICE static void scale(Sums& sums, int r, float factor) {
#pragma unroll
    for (int n = 0; n < kPaddedSize / 8; ++n) {
      sums[n][2 * r] *= factor;
      sums[n][2 * r + 1] *= factor;
    }
  }
  // Writes sums of a thread's row r, rounded to T, to a row of the result.
  MMK_DEVICE void store(const Sums& sums, int r, T* target) const {
#pragma unroll
    for (int n = 0; n < kPaddedSize / 8; ++n) {
      if (n * 8 >= size_) break;
      const uint32_t word = packed_pair<T>(sums[n][2 * r], sums[n][2 * r + 1]);
      reinterpret_cast<uint32_t*>(target + n * 8)[lane_index() % 4] = word;
    }
  }

 private:
  template <int kCount>
  MMK_DEVICE void copy(T* tile, const AttentionRows<T>& rows) const {
    copy_tile<kCount, kVectors, kAttentionThreads, true>(tile, rows.data, rows.stride, rows.count, size_,
                                                         static_cast<int>(threadIdx.x));
  }
  MMK_DEVICE T* stage(int step) const { return kept_ + kKept * kKeptElements + step % 2 * 2 * kTileElements; }

  T* kept_;
  int size_;
  int step_ = 0;
};

// Heads of any type, size and alignment. A block has kWidth columns of sums; wider heads take several blocks.
template <class Element, int kKept>
class PlainTiles {
 public:
  using T = Element;
  static constexpr int kStep = 32;
  static constexpr int kRows = 4;
  static constexpr int kColumns = 4;
  static constexpr int kLanes = 8;
  static constexpr int kWidth = 64;
  using Cells = float[kRows][kColumns];
  using Sums = float[kRows][kWidth / kLanes];

 private:
  // Rows in shared memory are 4 floats longer, so that 16-byte accesses to 8 of them use different banks.
  static constexpr int kChunk = 32;
  static constexpr int kChunkStride = kChunk + 4;
  static constexpr int kCellStride = kStep + 4;
  static constexpr int kWideStride = kWidth + 4;
  static constexpr int kGroups = kWidth / (4 * kLanes);  // of 4 columns of sums of a thread

 public:
  static constexpr int kBytes =
      ((kAttentionRows + kStep) * kChunkStride + kAttentionRows * kCellStride + kStep * kWideStride) *
      static_cast<int>(sizeof(float));

  MMK_DEVICE PlainTiles(unsigned char* buffer, int64_t size, int64_t first_column)
      : row_chunk_(reinterpret_cast<float*>(buffer)),
        tile_chunk_(row_chunk_ + kAttentionRows * kChunkStride),
        cells_(tile_chunk_ + kStep * kChunkStride),
        wide_(cells_ + kAttentionRows * kCellStride),
        size_(size),
        first_column_(first_column) {}

  MMK_DEVICE static int row(int r) { return static_cast<int>(threadIdx.x) / kLanes + 16 * r; }
  MMK_DEVICE static int column(int c) { return static_cast<int>(threadIdx.x) % kLanes + kLanes * c; }
  MMK_DEVICE static float& cell(Cells& cells, int r, int c) { return cells[r][c]; }

  template <int kIndex>
  MMK_DEVICE void keep(const AttentionRows<T>& rows) {
    kept_[kIndex] = rows;
  }
  MMK_DEVICE void fetch(int, const AttentionRows<T>& first, const AttentionRows<T>& second) {
    next_[0] = first;
    next_[1] = second;
  }
  // multiply() has the barrier that makes copies of the kernel visible.
  MMK_DEVICE void wait(int) {
    cp_async_wait_all();
    tiles_[0] = next_[0];
    tiles_[1] = next_[1];
  }

  template <int kIndex>
  MMK_DEVICE void multiply(Cells& cells) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) cells[r][c] = 0.0f;
    }
#pragma unroll 1
    for (int64_t inner = 0; inner < size_; inner += kChunk) {
      __syncthreads();  // all threads have read the previous chunks
      load_chunk<kAttentionRows, kChunk, kChunkStride>(row_chunk_, kept_[kIndex], inner);
      load_chunk<kStep, kChunk, kChunkStride>(tile_chunk_, tiles_[kIndex], inner);
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < kChunk; i += 4) {
        Vec<float, 4> a[kRows], b[kColumns];
#pragma unroll
        for (int r = 0; r < kRows; ++r) a[r] = load<4>(row_chunk_ + row(r) * kChunkStride + i);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) b[c] = load<4>(tile_chunk_ + column(c) * kChunkStride + i);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
#pragma unroll
            for (int j = 0; j < 4; ++j) cells[r][c] += a[r][j] * b[c][j];
          }
        }
      }
    }
  }

  template <int kIndex>
  MMK_DEVICE void add(Sums& sums, const Cells& cells) const {
    __syncthreads();  // all threads have read the previous cells and tile
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) cells_[row(r) * kCellStride + column(c)] = cells[r][c];
    }
    load_chunk<kStep, kWidth, kWideStride>(wide_, tiles_[kIndex], first_column_);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kStep; i += 4) {
      Vec<float, 4> weights[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) weights[r] = load<4>(cells_ + row(r) * kCellStride + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const auto values = load<4>(wide_ + (i + j) * kWideStride + group_column(g));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[r][g * 4 + n] += weights[r][j] * values[n];
          }
        }
      }
    }
  }

  MMK_DEVICE static void clear(Sums& sums) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int n = 0; n < kWidth / kLanes; ++n) sums[r][n] = 0.0f;
    }
  }
  MMK_DEVICE static void scale(Sums& sums, int r, float factor) {
#pragma unroll
    for (int n = 0; n < kWidth / kLanes; ++n) sums[r][n] *= factor;
  }
  MMK_DEVICE void store(const Sums& sums, int r, T* target) const {
#pragma unroll
    for (int n = 0; n < kWidth / kLanes; ++n) {
      const int64_t column = first_column_ + group_column(n / 4) + n % 4;
      if (column < size_) target[column] = from_accumulator<T>(sums[r][n]);
    }
  }

 private:
  MMK_DEVICE static int group_column(int g) {
    return g * 4 * kLanes + static_cast<int>(threadIdx.x) % kLanes * 4;
  }

  template <int kCount, int kColumnCount, int kStride>
  MMK_DEVICE void load_chunk(float* chunk, const AttentionRows<T>& rows, int64_t first) const {
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kColumnCount; i += kAttentionThreads) {
      const int r = i / kColumnCount, c = i % kColumnCount;
      const bool inside = r < rows.count && first + c < size_;
      chunk[r * kStride + c] = inside ? to_accumulator(rows.data[r * rows.stride + first + c]) : 0.0f;
    }
  }

  float *row_chunk_, *tile_chunk_, *cells_, *wide_;
  int64_t size_, first_column_;
  AttentionRows<T> kept_[kKept] = {};
  AttentionRows<T> tiles_[2] = {}, next_[2] = {};
};

// The frames of a block. Those in segments come first: `count` of them.
struct AttentionBlock {
  int64_t row, head, first, column;
  int count;
};

template <class Tiles>
int64_t attention_blocks(const SegmentAttentionShape& shape, int64_t heads) {
  const int64_t columns = ceil_div(shape.size, static_cast<int64_t>(Tiles::kWidth));
  return shape.batch * heads * ceil_div(shape.frames, static_cast<int64_t>(kAttentionRows)) * columns;
}

// Blocks of the same frames and of neighbouring heads follow each other: heads of queries share keys.
// kLastFirst: blocks of late frames, which see most keys of a long segment, come first.
template <class Tiles, bool kLastFirst>
MMK_DEVICE AttentionBlock attention_block(const SegmentAttentionShape& shape, int64_t heads,
                                          const int32_t* extents) {
  const int64_t columns = ceil_div(shape.size, static_cast<int64_t>(Tiles::kWidth));
  const int64_t blocks = ceil_div(shape.frames, static_cast<int64_t>(kAttentionRows));
  int64_t index = blockIdx.x;
  AttentionBlock block;
  block.column = index % columns * Tiles::kWidth;
  index /= columns;
  block.head = index % heads;
  index /= heads;
  const int64_t place = index % blocks;
  block.first = (kLastFirst ? blocks - 1 - place : place) * kAttentionRows;
  block.row = index / blocks;
  const int64_t frame = block.first + threadIdx.x;
  const bool covered = threadIdx.x < kAttentionRows && frame < shape.frames &&
                       extents[block.row * 2 * shape.frames + frame] < shape.frames;
  block.count = __syncthreads_count(covered);
  return block;
}

MMK_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Whether the tensor cores can take the rows: 16-byte boundaries, and heads that fit.
inline bool rows_aligned(const HeadRows& rows) {
  return mmk::rows_aligned<__half>(rows.data, rows.batch_stride, rows.head_stride, rows.frame_stride);
}

}  // namespace mmk::cuda
