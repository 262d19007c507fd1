// One tile of a matrix product on the tensor cores: A (rows, k) times the transpose of B (columns, k), both
// dense along k.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace mmk {

// A matrix of 16-bit elements in global memory. Rows are 16-byte aligned; `inner` is a multiple of 8.
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t rows;
  int64_t inner;
};

// Eight warps compute kRows x kColumns of the product. T is __half or __nv_bfloat16, sums are float.
template <class T, int kRows, int kColumns>
class TileProduct {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kResultStride = kColumns + 8;  // floats; avoids bank conflicts in a warp's stores

 private:
  static constexpr int kInner = 32;  // of a stage
  static constexpr int kStages = 4;
  // ldmatrix reads 8 rows at a time: 80 bytes apart they share no bank.
  static constexpr int kStride = kInner + 8;
  static constexpr int kStageElements = (kRows + kColumns) * kStride;
  static constexpr int kWarpsAcross = kColumns / 32;
  static constexpr int kWarpRows = kRows / (kThreads / kWarpSize / kWarpsAcross);
  static constexpr int kRowFragments = kWarpRows / 16;
  static constexpr int kColumnFragments = 4;
  static_assert(kColumns % 32 == 0 && kWarpRows % 16 == 0, "whole fragments");

 public:
  static constexpr int kPipelineBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
  static constexpr int kResultBytes = kRows * kResultStride * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kPipelineBytes > kResultBytes ? kPipelineBytes : kResultBytes;

  // Computes rows from first_row and columns from first_column on, zero past the matrices, and writes them to
  // buffer (kBytes of shared memory) as float [kRows][kResultStride]. All threads must call it; it ends with
  // a barrier.
  MMK_DEVICE static void run(void* buffer, const MatrixView<T>& a, int64_t first_row, const MatrixView<T>& b,
                             int64_t first_column) {
    T* stages = static_cast<T*>(buffer);
    float sums[kRowFragments][kColumnFragments][4] = {};
    const int count = static_cast<int>((a.inner + kInner - 1) / kInner);
    const auto fetch = [&](int step) {
      if (step < count) {
        T* stage = stages + step % kStages * kStageElements;
        copy<kRows>(stage, a, first_row, step * kInner);
        copy<kColumns>(stage + kRows * kStride, b, first_column, step * kInner);
      }
      cp_async_commit_group();
    };
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int step = 0; step < count; ++step) {
      cp_async_wait_group<kStages - 2>();
      __syncthreads();  // makes this stage visible, and frees the one before, which is filled next
      fetch(step + kStages - 1);
      multiply(sums, stages + step % kStages * kStageElements);
    }
    __syncthreads();  // no copy is in flight: the last groups were empty
    store_sums(static_cast<float*>(buffer), sums);
    __syncthreads();
  }

 private:
  MMK_DEVICE static int warp_row() { return warp_index() / kWarpsAcross * kWarpRows; }
  MMK_DEVICE static int warp_column() { return warp_index() % kWarpsAcross * 32; }

  template <int kTileRows>
  MMK_DEVICE static void copy(T* tile, const MatrixView<T>& matrix, int64_t first_row, int64_t first_inner) {
    constexpr int kVectors = kInner / 8;  // of a row
#pragma unroll
    for (int i = 0; i < kTileRows * kVectors / kThreads; ++i) {
      const int vector = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = vector / kVectors;
      const int inner = vector % kVectors * 8;
      const bool inside = first_row + row < matrix.rows && first_inner + inner < matrix.inner;
      const T* source = matrix.data + (first_row + row) * matrix.row_stride + first_inner + inner;
      cp_async_zfill<16>(tile + row * kStride + inner, inside ? source : matrix.data, inside);
    }
  }

  MMK_DEVICE static void multiply(float (&sums)[kRowFragments][kColumnFragments][4], const T* stage) {
    const int lane = lane_index();
    const T* a_tile = stage + (warp_row() + lane % 16) * kStride + lane / 16 * 8;
    const T* b_tile = stage + (kRows + warp_column() + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int inner = 0; inner < kInner; inner += 16) {
      uint32_t b[kColumnFragments / 2][4];  // two fragments each
#pragma unroll
      for (int j = 0; j < kColumnFragments / 2; ++j) {
        ldmatrix<4, false>(b[j], b_tile + j * 16 * kStride + inner);
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        uint32_t a[4];
        ldmatrix<4, false>(a, a_tile + i * 16 * kStride + inner);
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<T>(sums[i][j], a, pair);
        }
      }
    }
  }

  MMK_DEVICE static void store_sums(float* result, const float (&sums)[kRowFragments][kColumnFragments][4]) {
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
