// Tiles of 16-bit elements in shared memory for products on the tensor cores: swizzle, copies with zero fill,
// fragments. A tile has rows of 8 * kVectors elements, and starts at a 128-byte boundary.
#pragma once

#include <type_traits>

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

// Calls body(constant<bool>), to have code without tests for full tiles and a second copy for others.
template <class Body>
MMK_DEVICE void dispatch_full(bool full, Body&& body) {
  if (full) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// Starts copies of kRows rows, `stride` elements apart, by kThreads threads of which this is `thread`: zeros
// from row `rows` and from column `columns` on, a multiple of 8. Rows start at 16-byte boundaries. kRagged:
// many tiles are not full, so that one unrolled copy with tests serves all.
template <int kRows, int kVectors, int kThreads, bool kRagged = false, class T>
MMK_DEVICE void copy_tile(T* tile, const T* source, int64_t stride, int64_t rows, int columns, int thread) {
  // Vectors of a row that are copied together, so that those of a thread have the same swizzle.
  constexpr bool kWhole = kThreads % kVectors == 0 && kThreads / kVectors % 8 == 0;
  constexpr int kAcross = kWhole ? kVectors : 8;
  constexpr int kStep = kThreads / kAcross;
  static_assert(kVectors % kAcross == 0 && kStep % 8 == 0 && kRows % kStep == 0, "periods of the swizzle");
  const int row = thread / kAcross;
  const int vector = thread % kAcross;
  T* target = tile + swizzled<kVectors>(row, vector);
  const T* from = source + row * stride + vector * 8;
  if (!kRagged && rows >= kRows && columns >= kVectors * 8) {
#pragma unroll
    for (int v = 0; v < kVectors; v += kAcross) {
#pragma unroll
      for (int r = 0; r < kRows; r += kStep) {
        cp_async<16>(target + r * kVectors * 8 + v * 8, from + r * stride + v * 8);
      }
    }
    return;
  }
#pragma unroll(kRagged ? kRows : 1)
  for (int v = 0; v < kVectors; v += kAcross) {
#pragma unroll(kRagged ? kRows : 1)
    for (int r = 0; r < kRows; r += kStep) {
      const bool inside = row + r < rows && (vector + v) * 8 < columns;
      const T* at = inside ? from + r * stride + v * 8 : source;
      cp_async_zfill<16>(target + r * kVectors * 8 + v * 8, at, inside);
    }
  }
}

// The index of a vector in the same row as `place`, of which bits `vector` of the vector's number are 0. The
// swizzle is an exclusive or, so a lane computes its place once and reaches the others by constants.
template <int kVectors>
MMK_DEVICE int moved(int place, int vector) {
  constexpr int kLine = kVectors < 8 ? kVectors : 8;
  return (place ^ vector % kLine * 8) + vector / kLine * kLine * 8;
}

// Factors of mma_m16n8k16, of which `inner`, a multiple of 16, is the dimension that the product sums over.

// The left factor: kCount times 16 rows from `row` on of a tile [rows][inner].
template <int kVectors, int kCount, class T>
class RowFragments {
 public:
  MMK_DEVICE RowFragments(const T* tile, int row)
      : tile_(tile), place_(swizzled<kVectors>(row + lane_index() % 16, lane_index() / 16)) {}

  MMK_DEVICE void load(uint32_t (&a)[kCount][4], int inner) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      ldmatrix<4, false>(a[i], tile_ + moved<kVectors>(place_, inner / 8) + i * 16 * kVectors * 8);
    }
  }

 private:
  const T* tile_;
  int place_;
};

// The right factor: kCount blocks of 8 columns (1, or an even number) from block `first`, a multiple of
// kCount, on, of a tile [columns][inner], or [inner][columns] if kTransposed.
template <bool kTransposed, int kVectors, int kCount, class T>
class ColumnFragments {
 public:
  MMK_DEVICE ColumnFragments(const T* tile, int first) : tile_(tile) {
    const int lane = lane_index();
    const int second = kCount > 1 ? lane / 16 : 0;
#pragma unroll
    for (int pair = 0; pair < kPlaces; ++pair) {
      const int block = first + 2 * pair + second;
      places_[pair] = kTransposed ? swizzled<kVectors>(lane % 16, block)
                                  : swizzled<kVectors>(block * 8 + lane % 8, lane / 8 % 2);
    }
  }

  MMK_DEVICE void load(uint32_t (&b)[kCount][2], int inner) const {
    if constexpr (kCount == 1) {
      ldmatrix<2, kTransposed>(b[0], tile_ + place(0, inner));
    } else {
#pragma unroll
      for (int pair = 0; pair < kCount / 2; ++pair) load_pair(b[2 * pair], b[2 * pair + 1], pair, inner);
    }
  }

  // The blocks 2 * pair and 2 * pair + 1.
  MMK_DEVICE void load_pair(uint32_t (&first)[2], uint32_t (&second)[2], int pair, int inner) const {
    uint32_t words[4];
    ldmatrix<4, kTransposed>(words, tile_ + place(pair, inner));
    first[0] = words[0], first[1] = words[1];
    second[0] = words[2], second[1] = words[3];
  }

 private:
  static_assert(kCount == 1 || kCount % 2 == 0, "one block or pairs");
  // Along the columns the swizzle repeats every 8 rows. Across them, one place leads to all of a power of
  // two.
  static constexpr bool kPower = (kCount & (kCount - 1)) == 0;
  static constexpr int kPlaces = kTransposed && !kPower ? kCount / 2 : 1;

  MMK_DEVICE int place(int pair, int inner) const {
    if constexpr (!kTransposed) {
      return moved<kVectors>(places_[0], inner / 8) + pair * 16 * kVectors * 8;
    } else if constexpr (kPlaces == 1) {
      return moved<kVectors>(places_[0], 2 * pair) + inner * kVectors * 8;
    } else {
      return places_[pair] + inner * kVectors * 8;
    }
  }

  const T* tile_;
  int places_[kPlaces];
};

template <class T>
MMK_DEVICE uint32_t packed_pair(float low, float high) {
  const Vec<T, 2> pair = from_accumulator<T>(Vec<float, 2>{{low, high}});
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
MMK_DEVICE float2 unpacked_pair(uint32_t word) {
  const auto pair = to_accumulator(reinterpret_cast<const Vec<T, 2>&>(word));
  return {pair[0], pair[1]};
}

// Two blocks of 8 columns of results, rounded to T, are a left factor of 16 inner columns.
template <class T>
MMK_DEVICE void as_row_fragment(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = packed_pair<T>(first[0], first[1]);
  a[1] = packed_pair<T>(first[2], first[3]);
  a[2] = packed_pair<T>(second[0], second[1]);
  a[3] = packed_pair<T>(second[2], second[3]);
}

// Results of a warp in shared memory: 32 rows from `row` on of kBlocks blocks of 8 columns from `block` on, a
// power of two that divides `block`.

// This lane's pair of the results of mma_m16n8k16 `down` rows, a multiple of 8, below the first ones in block
// `block + j`.
template <int kVectors, int kBlocks, class T>
MMK_DEVICE uint32_t& block_pair(T* tile, int row, int block, int down, int j) {
  static_assert((kBlocks & (kBlocks - 1)) == 0, "a power of two");
  const int first = swizzled<kVectors>(row + lane_index() / 4, block) + lane_index() % 4 * 2;
  return *reinterpret_cast<uint32_t*>(tile + moved<kVectors>(first, j) + down * kVectors * 8);
}

// Writes them to a matrix, of which the tile's first element is `target`, in 16-byte stores; without tests if
// kFull, else what is inside `rows` and `columns` of the tile. Eight neighbouring lanes, whose loads are
// served together, have a share of a line of 128 bytes each, from lines whose swizzles put the shares into
// different banks.
template <int kVectors, int kBlocks, bool kFull, class T>
MMK_DEVICE void store_blocks(T* target, int64_t stride, int rows, int columns, const T* tile, int row,
                             int block) {
  static_assert(kVectors == 4 || kVectors == 8, "lines of one or two rows");
  constexpr int kLineRows = 8 / kVectors;
  constexpr int kShare = kBlocks * kLineRows;
  constexpr int kStep = 32 / kBlocks;  // rows of one store of the warp
  const int place = lane_index() % 8;
  const int group = lane_index() / 8;
  row += group / kBlocks * 8 + (place / kShare * kBlocks + group % kBlocks) * kLineRows;
  row += place % kShare / kBlocks;
  block += place % kBlocks;
  tile += swizzled<kVectors>(row, block);
  target += row * stride + block * 8;
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    if (!kFull && (row + k * kStep >= rows || block * 8 >= columns)) continue;
    const auto value = load<8>(tile + k * kStep * kVectors * 8);
    store_global_16(target + k * kStep * stride, reinterpret_cast<const uint4&>(value));
  }
}

}  // namespace mmk
