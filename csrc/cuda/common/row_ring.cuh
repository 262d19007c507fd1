// Rows in registers, and the ring in shared memory that prefetches them.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/rows.cuh"

namespace mmk {

inline constexpr int kRowBlockThreads = 128;

// Code for Blackwell takes some 20 more registers: kernels request fewer blocks per multiprocessor there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr bool kFewerBlocks = true;
#else
inline constexpr bool kFewerBlocks = false;
#endif

// A row in registers: kVectors vectors in each of kRowThreads threads (a warp or the whole block). A row of a
// full shape has exactly as many columns as the shape: kernels that take their width from it test no bounds.
template <class T, int kRowThreads, int kVectors, bool kAligned, bool kFull = false>
struct RowShape {
  static_assert(kAligned || !kFull, "a full row consists of whole vectors");
  using Element = T;
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlockThreads = kRowThreads == kWarpSize ? kRowBlockThreads : kRowThreads;
  static constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
  static constexpr int kCount = kVectors;
  static constexpr int kWidth = kVectorWidth<T>;
  static constexpr int kElements = kVectors * kWidth;
  static constexpr int kColumns = kElements * kRowThreads;
  static constexpr bool kIsAligned = kAligned;
  static constexpr bool kIsFull = kFull;
  using Part = Vec<float, kWidth>[kVectors];

  MMK_DEVICE static int width(int64_t columns) { return kFull ? kColumns : static_cast<int>(columns); }
  MMK_DEVICE static int thread() { return static_cast<int>(threadIdx.x) % kThreads; }
  MMK_DEVICE static int slot() { return static_cast<int>(threadIdx.x) / kThreads; }
  MMK_DEVICE static int column(int vector) { return (vector * kThreads + thread()) * kWidth; }
  MMK_DEVICE static bool inside(int vector, int i, int width) {
    return column(vector) + (kAligned ? 0 : i) < width;
  }
};

// Prefetches rows: kStages - 1 are in flight while the kernel processes one. A thread reads back only its own
// copies, so no barrier is needed.
template <class Shape>
class RowRing {
 public:
  using T = typename Shape::Element;
  static constexpr int kInFlight = 8 / Shape::kCount < 2 ? 2 : 8 / Shape::kCount > 6 ? 6 : 8 / Shape::kCount;
  static constexpr int kStages = kInFlight + 1;
  static constexpr int kBytes = kStages * Shape::kCount * Shape::kBlockThreads * 16;

  MMK_DEVICE explicit RowRing(T* buffer) : buffer_(buffer) {}

  // Starts the copy of the next row. Null copies nothing, but takes a stage too.
  MMK_DEVICE void push(const T* row, int width) {
    if (row != nullptr) {
#pragma unroll
      for (int v = 0; v < Shape::kCount; ++v) {
        const int column = Shape::column(v);
        if constexpr (Shape::kIsFull) {
          cp_async<16>(place(head_, v), row + column);
        } else if constexpr (Shape::kIsAligned) {
          const bool inside = column < width;
          cp_async_zfill<16>(place(head_, v), inside ? row + column : row, inside);
        } else {
          store(place(head_, v), load_columns<false, Shape::kWidth>(row, column, width));
        }
      }
    }
    cp_async_commit_group();
    head_ = head_ + 1 == kStages ? 0 : head_ + 1;
  }

  // Waits for the oldest row and loads it. Needs at least kInFlight rows in the ring, including this one.
  MMK_DEVICE void peek(typename Shape::Part& part) const {
    cp_async_wait_group<kInFlight - 1>();
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
      part[v] = unpack(load<Shape::kWidth>(place(tail_, v)));
    }
  }

  MMK_DEVICE void pop() { tail_ = tail_ + 1 == kStages ? 0 : tail_ + 1; }

  // Drops all rows that were pushed and not popped.
  MMK_DEVICE void drain() { tail_ = head_; }

 private:
  MMK_DEVICE T* place(int stage, int vector) const {
    return buffer_ +
           ((stage * Shape::kCount + vector) * Shape::kBlockThreads + static_cast<int>(threadIdx.x)) *
               Shape::kWidth;
  }

  T* buffer_;
  int head_ = 0;
  int tail_ = 0;
};

// Calls body(RowShape) with the narrowest shape that fits a row, or wide() if none does. Unaligned rows have
// few shapes: they are rare, and each shape costs compile time.
template <class T, bool kAligned, class Body, class Wide>
cudaError_t dispatch_row_shape(int64_t width, Body&& body, Wide&& wide) {
  constexpr int kPer8 = 8 / kVectorWidth<T>;
  if constexpr (kAligned) {
    if (width <= 256) return body(RowShape<T, 32, 1 * kPer8, true>{});
    if (width <= 512) return body(RowShape<T, 32, 2 * kPer8, true>{});
    if (width <= 768) return body(RowShape<T, 32, 3 * kPer8, true>{});
    if (width <= 1024) return body(RowShape<T, 32, 4 * kPer8, true>{});
    if (width <= 1280) return body(RowShape<T, 32, 5 * kPer8, true>{});
  } else {
    if (width <= 512) return body(RowShape<T, 32, 2 * kPer8, false>{});
  }
  if (width <= 4096) return body(RowShape<T, kRowBlockThreads, 4 * kPer8, kAligned>{});
  return wide();
}

// As dispatch_row_shape, for kernels that read many rows and have to keep enough bytes in flight: they have
// blocks of Shape::kBlockThreads, two warps for rows of medium width, and full shapes for the usual widths.
template <class T, bool kAligned, class Body, class Wide>
cudaError_t dispatch_streamed_row_shape(int64_t width, Body&& body, Wide&& wide) {
  constexpr int kPer8 = 8 / kVectorWidth<T>;
  if constexpr (kAligned) {
    constexpr int kPair = 2 * kWarpSize;
    if (width == 512) return body(RowShape<T, 32, 2 * kPer8, true, true>{});
    if (width == 768) return body(RowShape<T, 32, 3 * kPer8, true, true>{});
    if (width == 1024) return body(RowShape<T, 32, 4 * kPer8, true, true>{});
    if (width == 1280) return body(RowShape<T, 32, 5 * kPer8, true, true>{});
    if (width == 2048) return body(RowShape<T, kPair, 4 * kPer8, true, true>{});
    if (width > 1280 && width <= 1536) return body(RowShape<T, kPair, 3 * kPer8, true>{});
    if (width > 1536 && width <= 2048) return body(RowShape<T, kPair, 4 * kPer8, true>{});
  }
  return dispatch_row_shape<T, kAligned>(width, body, wide);
}

}  // namespace mmk
