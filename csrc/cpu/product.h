// Matrix products of a few rows with a matrix that stays in cache, for products with one small dimension,
// where a general BLAS is slow. Tiles of kTileRows x kPanel sums stay in registers.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace mmk::cpu {

constexpr int kTileRows = 6;
template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;

template <class A>
constexpr int64_t panels(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A>;
}

// A matrix B (depth, columns) in panels of kPanel columns, each dense by rows; zero past the last column.
template <class A>
struct Packed {
  const A* data;
  int64_t depth;
  int64_t columns;

  MMK_INLINE const A* panel(int64_t index) const { return data + index * depth * kPanel<A>; }
};

template <class A>
constexpr int64_t packed_size(int64_t depth, int64_t columns) {
  return panels<A>(columns) * kPanel<A> * depth;
}

// Writes panels [begin, end) of B, whose element (k, n) is
// factor * source[k * depth_stride + n * column_stride].
template <class A>
MMK_INLINE void pack(const A* source, int64_t depth_stride, int64_t column_stride, A factor,
                     const Packed<A>& layout, A* packed, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * kPanel<A>;
    const int64_t count = std::min(kPanel<A>, layout.columns - first);
    A* panel = packed + index * layout.depth * kPanel<A>;
    for (int64_t k = 0; k < layout.depth; ++k) {
      const A* cells = source + k * depth_stride + first * column_stride;
      A* row = panel + k * kPanel<A>;
      for (int64_t n = 0; n < count; ++n) row[n] = factor * cells[n * column_stride];
      std::fill(row + count, row + kPanel<A>, A(0));
    }
  }
}

template <class A>
struct Tile {
  vec_t<A> sums[kTileRows][2];
};

// sums[i] = sum_k a[i][k] * panel[k]. Callers repeat the last row to fill a tile.
template <class A>
MMK_INLINE void multiply(Tile<A>& tile, const A* const (&a)[kTileRows], const A* panel, int64_t depth) {
  // Named sums: the compiler would keep an array in memory.
  const A *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  vec_t<A> s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {};
  vec_t<A> s30 = {}, s31 = {}, s40 = {}, s41 = {}, s50 = {}, s51 = {};
#pragma GCC unroll 4  // loop instructions compete with the FMAs
  for (int64_t k = 0; k < depth; ++k) {
    const vec_t<A> b0 = load(panel + k * kPanel<A>), b1 = load(panel + k * kPanel<A> + kLanes<A>);
    s00 += a0[k] * b0;
    s01 += a0[k] * b1;
    s10 += a1[k] * b0;
    s11 += a1[k] * b1;
    s20 += a2[k] * b0;
    s21 += a2[k] * b1;
    s30 += a3[k] * b0;
    s31 += a3[k] * b1;
    s40 += a4[k] * b0;
    s41 += a4[k] * b1;
    s50 += a5[k] * b0;
    s51 += a5[k] * b1;
  }
  tile = {{{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}, {s40, s41}, {s50, s51}}};
}

// The number of strips of a matrix (rows, columns): kTileRows columns each, dense by rows, so that its
// transpose can be the left factor of a product.
constexpr int64_t strips(int64_t columns) {
  return (columns + kTileRows - 1) / kTileRows;
}

// sums[i] = sum_k strip[k][i] * panel[k].
template <class A>
MMK_INLINE void multiply_strip(Tile<A>& tile, const A* strip, const A* panel, int64_t depth) {
  vec_t<A> s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {};
  vec_t<A> s30 = {}, s31 = {}, s40 = {}, s41 = {}, s50 = {}, s51 = {};
#pragma GCC unroll 4  // loop instructions compete with the FMAs
  for (int64_t k = 0; k < depth; ++k) {
    const vec_t<A> b0 = load(panel + k * kPanel<A>), b1 = load(panel + k * kPanel<A> + kLanes<A>);
    const A* row = strip + k * kTileRows;
    s00 += row[0] * b0;
    s01 += row[0] * b1;
    s10 += row[1] * b0;
    s11 += row[1] * b1;
    s20 += row[2] * b0;
    s21 += row[2] * b1;
    s30 += row[3] * b0;
    s31 += row[3] * b1;
    s40 += row[4] * b0;
    s41 += row[4] * b1;
    s50 += row[5] * b0;
    s51 += row[5] * b1;
  }
  tile = {{{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}, {s40, s41}, {s50, s51}}};
}

// out = rows [0, rows) of a, row_stride apart, times B. All rows use a panel before the next one is read. out
// has room for whole tiles; its contents past the last row and column are undefined.
template <class A>
MMK_INLINE void product(const A* a, int64_t row_stride, int64_t rows, const Packed<A>& b, A* out,
                        int64_t out_stride) {
  for (int64_t index = 0; index < panels<A>(b.columns); ++index) {
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const A* of_rows[kTileRows];
      for (int i = 0; i < kTileRows; ++i) of_rows[i] = a + std::min(first + i, rows - 1) * row_stride;
      Tile<A> tile;
      multiply(tile, of_rows, b.panel(index), b.depth);
      A* cells = out + first * out_stride + index * kPanel<A>;
#pragma GCC unroll 6  // so that the sums stay in registers
      for (int i = 0; i < kTileRows; ++i) {
        store(cells + i * out_stride, tile.sums[i][0]);
        store(cells + i * out_stride + kLanes<A>, tile.sums[i][1]);
      }
    }
  }
}

}  // namespace mmk::cpu
