// Shared by the forward and the backward kernels of merge: a block takes one chunk of a pair, which it finds
// in a table among the kernel's parameters.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/merge.h"

namespace mmk::cuda {

inline constexpr int kMergeThreads = 256;
// Pairs of one launch, a power of two. Parameters may take 32,764 bytes.
inline constexpr int kMergeTable = 128;

// Elements of a thread's access: the widest type takes 16 bytes.
template <class... Types>
inline constexpr int kMergeWidth = std::min({kVectorWidth<Types>...});

// Vectors of each tensor that a thread loads before it uses the first.
inline constexpr int kMergeVectors = 4;

template <class Pair>
struct MergeTable {
  int32_t first_block[kMergeTable];  // of a pair; the largest integer in entries without one
  Pair pair[kMergeTable];

  // The last pair whose first block is not after `block`.
  MMK_DEVICE int find(int32_t block) const {
    int index = 0;
#pragma unroll
    for (int step = kMergeTable / 2; step > 0; step /= 2) {
      if (first_block[index + step] <= block) index += step;
    }
    return index;
  }
};

// Calls body(target, source, result) with values of the element types.
template <class Body>
cudaError_t dispatch(MergeTypes types, Body&& body) {
  if (!merge_supports(types)) return cudaErrorInvalidValue;
  const auto with_half = [&](auto half) {
    const auto either = [&](DType type, auto&& next) {
      return type == DType::kFloat32 ? next(float{}) : next(half);
    };
    return either(types.target, [&](auto target) {
      return either(types.source, [&](auto source) {
        return either(types.result, [&](auto result) { return body(target, source, result); });
      });
    });
  };
  for (const DType type : {types.target, types.source, types.result}) {
    if (type == DType::kFloat64) return cudaErrorInvalidValue;
    if (type == DType::kFloat16) return with_half(__half{});
    if (type == DType::kBFloat16) return with_half(__nv_bfloat16{});
  }
  return body(float{}, float{}, float{});
}

// Calls start(table, blocks) for tables that hold all pairs with elements for which make(k, &pair) is true.
template <class Pair, class Make, class Start>
cudaError_t launch_tables(const MergePair* pairs, int64_t count, Make&& make, Start&& start) {
  constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
  MergeTable<Pair> table = {};
  int64_t entries = 0, blocks = 0;
  const auto flush = [&] {
    if (entries == 0) return cudaSuccess;
    std::fill(table.first_block + entries, table.first_block + kMergeTable,
              static_cast<int32_t>(kMostBlocks));
    const cudaError_t error = start(table, dim3(static_cast<unsigned>(blocks)));
    entries = blocks = 0;
    return error;
  };
  for (int64_t k = 0; k < count; ++k) {
    const int64_t chunks = merge_chunks(pairs[k].size);
    if (chunks >= kMostBlocks) return cudaErrorInvalidConfiguration;
    if (entries == kMergeTable || blocks + chunks >= kMostBlocks) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    if (chunks == 0 || !make(k, &table.pair[entries])) continue;
    table.first_block[entries++] = static_cast<int32_t>(blocks);
    blocks += chunks;
  }
  return flush();
}

// A thread's part of a chunk. kFull promises whole chunks and vector-aligned pointers: kMergeVectors vectors
// are then in flight together, else elements are loaded one by one. Both assign an element to the same
// thread, so that a sum has one order.
template <bool kFull, int kWidth>
struct MergeLanes {
  static constexpr int kCount = kFull ? kMergeVectors : 1;
  static constexpr int kStride = kMergeThreads * kWidth;
  static_assert(kMergeChunk % (kCount * kStride) == 0, "whole steps");

  template <class T>
  MMK_DEVICE static void load(Vec<T, kWidth> (&values)[kCount], const T* chunk, int first, int size) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kFull) {
        values[i] = load_once<kWidth>(chunk + first + i * kStride);
      } else {
        values[i] = load_columns<false, kWidth>(chunk, first, size);
      }
    }
  }

  // Vector i of those of a step.
  template <class T>
  MMK_DEVICE static void store(const Vec<float, kWidth>& values, T* chunk, int first, int i, int size) {
    const Vec<T, kWidth> rounded = from_accumulator<T>(values);
    if constexpr (kFull) {
      store_streaming(chunk + first + i * kStride, rounded);
    } else {
      store_columns<false>(chunk, first, size, rounded);
    }
  }

  // Calls body(first) for the thread's steps of a chunk.
  template <class Body>
  MMK_DEVICE static void for_each(int size, Body&& body) {
    const int end = kFull ? static_cast<int>(kMergeChunk) : size;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x) * kWidth; first < end; first += kCount * kStride)
      body(first);
  }
};

template <class Pair>
MMK_DEVICE bool is_full(const Pair& pair, int64_t first) {
  return pair.aligned && pair.size - first >= kMergeChunk;
}

template <class T>
MMK_HOST_DEVICE T* at(T* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}

}  // namespace mmk::cuda
