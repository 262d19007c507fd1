// Rows of any width and alignment. A thread takes Width columns at a time, in one 16-byte access if Aligned.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"

namespace mmk {

// Loads columns [column, column + Width) of a row; zero past its end. Aligned promises that the row starts at
// a vector boundary and consists of whole vectors; the order of additions is the same without it.
template <bool Aligned, int Width, class T>
MMK_DEVICE Vec<T, Width> load_columns(const T* row, int64_t column, int64_t columns) {
  Vec<T, Width> value = {};
  if constexpr (Aligned) {
    if (column < columns) value = load<Width>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if (column + i < columns) value[i] = row[column + i];
    }
  }
  return value;
}

template <bool Aligned, int Width, class T>
MMK_DEVICE void store_columns(T* row, int64_t column, int64_t columns, const Vec<T, Width>& value) {
  if constexpr (Aligned) {
    if (column >= columns) return;
    if constexpr (sizeof(value) % 16 == 0) {
      const auto* words = reinterpret_cast<const uint4*>(&value);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(value) / 16); ++i) {
        store_global_16(reinterpret_cast<uint4*>(row + column) + i, words[i]);
      }
    } else {
      store(row + column, value);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if (column + i < columns) row[column + i] = value[i];
    }
  }
}

// Calls body(column, values) for the vectors of a row, distributed over the Threads threads of a block.
template <int Threads, bool Aligned, class T, class Body>
MMK_DEVICE void for_each_vector(const T* row, int64_t columns, Body&& body) {
  constexpr int kWidth = kVectorWidth<T>;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kWidth; column < columns;
       column += Threads * kWidth) {
    body(column, to_accumulator(load_columns<Aligned, kWidth>(row, column, columns)));
  }
}

inline constexpr int kWideThreads = 256;  // of a block that takes one row too wide for the registers

// Sums over the Threads threads that share a row: a warp, or a block of that many threads.
template <int Threads, int Count>
MMK_DEVICE void row_sums(float (&values)[Count]) {
  if constexpr (Threads == kWarpSize) {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = warp_sum(values[i]);
  } else {
    block_sums<Threads>(values);
  }
}

// As row_sums with one barrier instead of two. A block calls it with 0 and 1 in turn: no thread writes a slot
// of shared memory that another still reads, since the barrier of the call between separates them.
template <int Threads, int Count>
MMK_DEVICE void row_sums_in_turn(float (&values)[Count], int turn) {
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] = warp_sum(values[i]);
  if constexpr (Threads > kWarpSize) {
    constexpr int kWarps = Threads / kWarpSize;
    MMK_SHARED(float, partial, 2, kWarps, Count);
    if (lane_index() == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) partial[turn][warp_index()][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      values[i] = partial[turn][0][i];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) values[i] += partial[turn][warp][i];
    }
  }
}

// Makes a one-dimensional grid; false if there are no blocks or more than a GPU accepts.
inline bool make_grid(int64_t blocks, dim3* grid) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (blocks < 1 || blocks > kMostBlocks) return false;
  *grid = dim3(static_cast<unsigned>(blocks));
  return true;
}

}  // namespace mmk
