// Tiles of 16-bit elements in shared memory for products on the tensor cores: swizzle, copies with zero fill,
// fragments. A tile has rows of 8 * kVectors elements, and starts at a 128-byte boundary.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace mmk {

// Index of a vector of 8 elements. The swizzle puts the same vector of eight neighbouring rows into different
// banks.
template <int kVectors>
MMK_DEVICE int swizzled(int row, int vector) {
  constexpr int kMask = (kVectors < 8 ? kVectors : 8) - 1;
  constexpr int kRowsPerLine = kVectors < 8 ? 8 / kVectors : 1;
  return (row * kVectors + (vector ^ (row / kRowsPerLine & kMask))) * 8;
}

// Starts copies of kRows rows, `stride` elements apart, by the kThreads threads of a block: zeros from row
// `rows` and from column `columns` on, a multiple of 8. Rows start at 16-byte boundaries.
template <int kRows, int kVectors, int kThreads, class T>
MMK_DEVICE void copy_tile(T* tile, const T* source, int64_t stride, int64_t rows, int columns) {
  constexpr int kStep = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && kStep % 8 == 0 && kRows % kStep == 0, "periods of the swizzle");
  // All rows of a thread have the same swizzle, so that targets and sources have constant strides.
  const int row = static_cast<int>(threadIdx.x) / kVectors;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  T* target = tile + swizzled<kVectors>(row, vector);
  const T* from = source + row * stride + vector * 8;
  const int64_t left = vector * 8 < columns ? rows - row : 0;
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    const bool inside = r < left;
    cp_async_zfill<16>(target + r * kVectors * 8, inside ? from + r * stride : source, inside);
  }
}

// The address `vector` vectors to the right of `place`, whose vector is 0 or 1. The swizzle is an exclusive
// or, so a lane computes its place once and reaches the others by constants.
template <int kVectors, class T>
MMK_DEVICE const T* moved(const T* place, int vector) {
  constexpr int kLine = kVectors < 8 ? kVectors : 8;
  const uintptr_t address = reinterpret_cast<uintptr_t>(place) ^ static_cast<uintptr_t>(vector % kLine * 16);
  return reinterpret_cast<const T*>(address) + vector / kLine * kLine * 8;
}

// Factors of mma_m16n8k16, of which `inner`, a multiple of 16, is the dimension that the product sums over.

// The left factor: 16 rows from `row` on of a tile [rows][inner].
template <int kVectors, class T>
class RowFragments {
 public:
  MMK_DEVICE RowFragments(const T* tile, int row)
      : place_(tile + swizzled<kVectors>(row + lane_index() % 16, lane_index() / 16)) {}

  MMK_DEVICE void load(uint32_t (&a)[4], int inner) const {
    ldmatrix<4, false>(a, moved<kVectors>(place_, inner / 8));
  }

 private:
  const T* place_;
};

// The right factor, of two blocks of 8 columns each: of a tile [columns][inner], or [inner][columns] if
// kTransposed.
template <bool kTransposed, int kVectors, class T>
class ColumnFragments {
 public:
  MMK_DEVICE explicit ColumnFragments(const T* tile)
      : place_(tile + (kTransposed ? swizzled<kVectors>(lane_index() % 16, lane_index() / 16)
                                   : swizzled<kVectors>(lane_index() % 8 + lane_index() / 16 * 8,
                                                        lane_index() / 8 % 2))) {}

  // The blocks 2 * pair and 2 * pair + 1.
  MMK_DEVICE void load(uint32_t (&b)[2][2], int pair, int inner) const {
    uint32_t words[4];
    if constexpr (kTransposed) {
      ldmatrix<4, true>(words, moved<kVectors>(place_, 2 * pair) + inner * kVectors * 8);
    } else {
      ldmatrix<4, false>(words, moved<kVectors>(place_, inner / 8) + pair * 16 * kVectors * 8);
    }
    b[0][0] = words[0], b[0][1] = words[1];
    b[1][0] = words[2], b[1][1] = words[3];
  }

 private:
  const T* place_;
};

template <class T>
MMK_DEVICE uint32_t packed_pair(float low, float high) {
  const Vec<T, 2> pair = from_accumulator<T>(Vec<float, 2>{{low, high}});
  return reinterpret_cast<const uint32_t&>(pair);
}

// Two blocks of 8 columns of results, rounded to T, are a left factor of 16 inner columns.
template <class T>
MMK_DEVICE void as_row_fragment(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = packed_pair<T>(first[0], first[1]);
  a[1] = packed_pair<T>(first[2], first[3]);
  a[2] = packed_pair<T>(second[0], second[1]);
  a[3] = packed_pair<T>(second[2], second[3]);
}

}  // namespace mmk
