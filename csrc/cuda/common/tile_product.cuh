// One tile of a matrix product on the tensor cores: A (rows, k) times the transpose of B (columns, k), both
// dense along k.
#pragma once

#include "cuda/common/tile.cuh"

namespace mmk {

// A matrix of 16-bit elements in global memory, not empty. Rows are 16-byte aligned; `inner` is a multiple
// of 8.
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t rows;
  int64_t inner;
};

// One thread's copies of kRows rows of a matrix, 64 columns at a time, to tiles in shared memory. Rows past
// the matrix repeat its last one; their products are not used.
template <class T, int kRows, int kThreads>
class TileSource {
  static constexpr int kVectors = 8;  // of a row of a tile
  static constexpr int kStep = kThreads / kVectors;
  static constexpr int kCount = kRows / kStep;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0, "rows of a thread have one swizzle");

 public:
  static constexpr int kPitch = kVectors * 16;  // bytes from row to row of a tile
  static constexpr int kBytes = kRows * kPitch;

  MMK_DEVICE TileSource(const MatrixView<T>& matrix, int64_t first_row) {
    const int row = static_cast<int>(threadIdx.x) / kVectors;
    const int vector = static_cast<int>(threadIdx.x) % kVectors;
    place_ = swizzled<kVectors>(row, vector) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t index = min(first_row + row + i * kStep, matrix.rows - 1);
      rows_[i] = matrix.data + index * matrix.row_stride + vector * 8;
    }
  }

  // Starts the copies of the 64 columns of a step. inside: whether the thread's vector of them is in the
  // matrix.
  MMK_DEVICE void copy(unsigned char* tile, int step, bool inside) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      cp_async_zfill<16>(tile + place_ + i * kStep * kPitch, rows_[i] + int64_t{step} * (kVectors * 8),
                         inside);
    }
  }

 private:
  const T* rows_[kCount];
  int place_;
};

// Eight warps compute kRows x kColumns of the product. T is __half or __nv_bfloat16, sums are float.
template <class T, int kRows, int kColumns>
class TileProduct {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kResultStride = kColumns + 8;  // floats; avoids bank conflicts in a warp's stores

 private:
  static constexpr int kInner = 64;  // of a step
  using Rows = TileSource<T, kRows, kThreads>;
  using Columns = TileSource<T, kColumns, kThreads>;
  // Rows of A may come from DRAM: prefetch them two steps ahead. Those of B, which many blocks read, hit L2:
  // one step ahead. Two blocks then fit the 164 KB of an sm_80 multiprocessor.
  static constexpr int kRowTiles = 3;
  static constexpr int kColumnTiles = 2;
  static constexpr int kWarpsAcross = kColumns / 32;
  static constexpr int kWarpRows = kRows / (kThreads / kWarpSize / kWarpsAcross);
  static constexpr int kRowFragments = kWarpRows / 16;
  static constexpr int kColumnFragments = 4;
  static_assert(kColumns % 32 == 0 && kWarpRows % 16 == 0, "whole fragments");
  using Sums = float[kRowFragments][kColumnFragments][4];

 public:
  static constexpr int kTileBytes = kRowTiles * Rows::kBytes + kColumnTiles * Columns::kBytes;
  static constexpr int kResultBytes = kRows * kResultStride * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kTileBytes > kResultBytes ? kTileBytes : kResultBytes;

  // Computes rows from first_row and columns from first_column on, and writes them to buffer (kBytes of
  // shared memory) as float [kRows][kResultStride]; those past the matrices are undefined. All threads must
  // call it; it ends with a barrier.
  MMK_DEVICE static void run(unsigned char* buffer, const MatrixView<T>& a, int64_t first_row,
                             const MatrixView<T>& b, int64_t first_column) {
    const Rows rows(a, first_row);
    const Columns columns(b, first_column);
    const int count = static_cast<int>((a.inner + kInner - 1) / kInner);
    // Steps in which the thread's vector is in the matrix.
    const int vector_end = static_cast<int>(threadIdx.x) % (kInner / 8) * 8 + 8;
    const int full = vector_end <= a.inner - (count - 1) * int64_t{kInner} ? count : count - 1;
    constexpr int kColumnsAt = kRowTiles * Rows::kBytes;

    Sums sums = {};
    columns.copy(buffer + kColumnsAt, 0, 0 < full);
    rows.copy(buffer, 0, 0 < full);
    cp_async_commit_group();
    if (count > 1) rows.copy(buffer + Rows::kBytes, 1, 1 < full);
    cp_async_commit_group();
    int row_tile = 0;  // of the step
    for (int step = 0; step < count; ++step) {
      cp_async_wait_group<1>();  // all but the rows of the next step
      __syncthreads();           // makes the tiles visible, and frees those of the previous step to be filled
      const int column_tile = step % 2 * Columns::kBytes;
      const int next_column_tile = Columns::kBytes - column_tile;
      if (step + 1 < count) columns.copy(buffer + kColumnsAt + next_column_tile, step + 1, step + 1 < full);
      cp_async_commit_group();
      const int free_row_tile = row_tile == 0 ? 2 * Rows::kBytes : row_tile - Rows::kBytes;
      if (step + 2 < count) rows.copy(buffer + free_row_tile, step + 2, step + 2 < full);
      cp_async_commit_group();
      multiply(sums, reinterpret_cast<const T*>(buffer + row_tile),
               reinterpret_cast<const T*>(buffer + kColumnsAt + column_tile));
      row_tile = row_tile == 2 * Rows::kBytes ? 0 : row_tile + Rows::kBytes;
    }
    __syncthreads();  // no copy is in flight: the last groups were empty
    store_sums(reinterpret_cast<float*>(buffer), sums);
    __syncthreads();
  }

 private:
  MMK_DEVICE static int warp_row() { return warp_index() / kWarpsAcross * kWarpRows; }
  MMK_DEVICE static int warp_column() { return warp_index() % kWarpsAcross * 32; }

  MMK_DEVICE static void multiply(Sums& sums, const T* row_tile, const T* column_tile) {
    constexpr int kVectors = kInner / 8;
    const RowFragments<kVectors, kRowFragments, T> rows(row_tile, warp_row());
    const ColumnFragments<false, kVectors, kColumnFragments, T> columns(column_tile, warp_column() / 8);
#pragma unroll
    for (int inner = 0; inner < kInner; inner += 16) {
      uint32_t a[kRowFragments][4];
      uint32_t b[kColumnFragments][2];
      columns.load(b, inner);
      rows.load(a, inner);
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) mma_m16n8k16<T>(sums[i][j], a[i], b[j]);
      }
    }
  }

  MMK_DEVICE static void store_sums(float* result, const Sums& sums) {
    const int row = warp_row() + lane_index() / 4;
    const int column = warp_column() + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) {
        float* target = result + (row + i * 16) * kResultStride + column + j * 8;
        *reinterpret_cast<float2*>(target) = {sums[i][j][0], sums[i][j][1]};
        *reinterpret_cast<float2*>(target + 8 * kResultStride) = {sums[i][j][2], sums[i][j][3]};
      }
    }
  }
};

}  // namespace mmk
