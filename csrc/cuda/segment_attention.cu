// The forward pass of segment_attention.
#include <algorithm>
#include <cmath>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/scan.cuh"
#include "cuda/segment_attention.cuh"

namespace mmk::cuda {
namespace {

constexpr int kExtentThreads = 256;
constexpr int kWindow = 1024;  // frames of a block

// Extents of a window of frames. Each segment writes those of its frames, and those of the keys whose last
// query lies in it.
__global__ void __launch_bounds__(kExtentThreads)
    attention_extents(const int64_t* ends, int64_t segments, int64_t frames, int64_t lookback,
                      int32_t* extents) {
  MMK_SHARED(int32_t, starts, kWindow);
  MMK_SHARED(int32_t, stops, kWindow);
  MMK_SHARED(int64_t, scanned, kExtentThreads);
  const int64_t windows = ceil_div(frames, static_cast<int64_t>(kWindow));
  const int64_t row = blockIdx.x / windows;
  const int64_t first = blockIdx.x % windows * kWindow;
  const int64_t last = min(first + kWindow, frames);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kWindow; i += kExtentThreads) {
    starts[i] = static_cast<int32_t>(frames);
    stops[i] = 0;
  }
  int64_t carry = 0;
  for (int64_t chunk = 0; chunk < segments; chunk += kExtentThreads) {
    const int64_t end = chunk + thread < segments ? ends[row * segments + chunk + thread] : 0;
    int64_t total;
    const int64_t stop = block_scan<kExtentThreads>(min(max(end, carry), frames), Max(), &total);
    scanned[thread] = stop;
    __syncthreads();
    const int64_t start = thread == 0 ? carry : scanned[thread - 1];
    if (start < stop) {
      const int32_t key = static_cast<int32_t>(max(start - lookback, int64_t{0}));
      for (int64_t frame = max(start, first); frame < min(stop, last); ++frame) starts[frame - first] = key;
      for (int64_t frame = max(start - lookback, first); frame < min(stop - lookback, last); ++frame) {
        stops[frame - first] = static_cast<int32_t>(stop);
      }
    }
    carry = total;
    __syncthreads();
  }
  __syncthreads();
  int32_t* of_row = extents + row * 2 * frames;
  for (int64_t frame = first + thread; frame < last; frame += kExtentThreads) {
    const int32_t stop = stops[frame - first];
    of_row[frame] = starts[frame - first];
    of_row[frames + frame] = frame >= carry ? 0 : stop == 0 ? static_cast<int32_t>(carry) : stop;
  }
}

template <class Tiles>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attend(const __grid_constant__ SegmentAttentionForward args) {
  using T = typename Tiles::T;
  constexpr float kLowest = -INFINITY;
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const SegmentAttentionShape& shape = args.shape;
  const AttentionBlock block = attention_block<Tiles, true>(shape, shape.heads, args.extents);
  const int32_t* starts = args.extents + block.row * 2 * shape.frames + block.first;
  const int64_t key_head = block.head / (shape.heads / shape.key_heads);
  const int64_t end = block.first + block.count;
  const int64_t begin = block.count > 0 ? clamped(starts[0], 0, block.first) : end;
  const int64_t latest = block.count > 0 ? starts[block.count - 1] : 0;
  const int steps = static_cast<int>((end - begin + Tiles::kStep - 1) / Tiles::kStep);

  Tiles tiles(buffer, shape.size, block.column);
  const auto fetch = [&](int step) {
    const int64_t key = begin + static_cast<int64_t>(step) * Tiles::kStep;
    tiles.fetch(step, rows_of<T>(args.k, block.row, key_head, key, end - key),
                rows_of<T>(args.v, block.row, key_head, key, end - key));
  };
  if (steps > 0) {
    tiles.template keep<0>(rows_of<T>(args.q, block.row, block.head, block.first, block.count));
    fetch(0);
  }
  // Keys count from `begin`, so that they fit 32 bits.
  int32_t from[Tiles::kRows], to[Tiles::kRows];
  float largest[Tiles::kRows], total[Tiles::kRows];
#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const bool sees = Tiles::row(r) < block.count;
    from[r] = sees ? static_cast<int32_t>(starts[Tiles::row(r)] - begin) : 0;
    to[r] = sees ? static_cast<int32_t>(block.first - begin) + Tiles::row(r) : -1;
    largest[r] = kLowest;
    total[r] = 0.0f;
  }
  const float scale = static_cast<float>(args.scale) * kLog2E;
  typename Tiles::Sums sums;
  Tiles::clear(sums);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    tiles.wait(step);
    if (step + 1 < steps) fetch(step + 1);
    typename Tiles::Cells cells;
    tiles.template multiply<0>(cells);
    const int32_t key = step * Tiles::kStep;
    const bool whole = block.count == kAttentionRows && begin + key >= latest &&
                       begin + key + Tiles::kStep <= block.first + 1;
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tiles::kColumns; ++c) Tiles::cell(cells, r, c) *= scale;
    }
    if (!whole) {
#pragma unroll
      for (int r = 0; r < Tiles::kRows; ++r) {
#pragma unroll
        for (int c = 0; c < Tiles::kColumns; ++c) {
          const int32_t at = key + Tiles::column(c);
          if (at < from[r] || at > to[r]) Tiles::cell(cells, r, c) = kLowest;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) {
      float most = largest[r];
#pragma unroll
      for (int c = 0; c < Tiles::kColumns; ++c) most = fmaxf(most, Tiles::cell(cells, r, c));
      most = warp_reduce<Tiles::kLanes>(most, [](float a, float b) { return fmaxf(a, b); });
      // Where all scores so far are -inf, their exponentials are 0.
      const float shift = most == kLowest ? 0.0f : most;
      const float factor = exp2f(largest[r] - shift);
      largest[r] = most;
      total[r] *= factor;
#pragma unroll
      for (int c = 0; c < Tiles::kColumns; ++c) {
        float& cell = Tiles::cell(cells, r, c);
        cell = exp2f(cell - shift);
        total[r] += cell;
      }
      Tiles::scale(sums, r, factor);
    }
    tiles.template add<1>(sums, cells);
  }

#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const float all = warp_reduce<Tiles::kLanes>(total[r], Sum());
    const int64_t frame = block.first + Tiles::row(r);
    if (frame >= shape.frames) continue;
    const bool sees = Tiles::row(r) < block.count;
    Tiles::scale(sums, r, 1.0f / (sees ? all : 1.0f));
    T* out = static_cast<T*>(args.out);
    tiles.store(sums, r, out + ((block.row * shape.frames + frame) * shape.heads + block.head) * shape.size);
    if (args.lse != nullptr && block.column == 0 && threadIdx.x % Tiles::kLanes == 0) {
      float* lse = static_cast<float*>(args.lse) + (block.row * shape.heads + block.head) * shape.frames;
      lse[frame] = sees ? (largest[r] + log2f(all)) / kLog2E : 0.0f;
    }
  }
}

template <class Tiles>
cudaError_t launch_attend(const SegmentAttentionForward& args, cudaStream_t stream) {
  dim3 grid;
  if (!make_grid(attention_blocks<Tiles>(args.shape, args.shape.heads), &grid)) return cudaErrorInvalidValue;
  return launch(attend<Tiles>, grid, dim3(kAttentionThreads), Tiles::kBytes, stream, args);
}

template <class T>
cudaError_t attend_with(const SegmentAttentionForward& args, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (args.shape.size <= 128 && rows_aligned(args.q) && rows_aligned(args.k) && rows_aligned(args.v)) {
      return args.shape.size <= 64 ? launch_attend<TensorTiles<T, 64, 64, 1>>(args, stream)
                                   : launch_attend<TensorTiles<T, 128, 64, 1>>(args, stream);
    }
  }
  return launch_attend<PlainTiles<T, 1>>(args, stream);
}

}  // namespace

int segment_attention_forward(const SegmentAttentionForward& args, const AttentionSegments& segments,
                              CudaStream stream) {
  const SegmentAttentionShape& shape = args.shape;
  if (shape.batch * shape.frames == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(shape.batch * ceil_div(shape.frames, static_cast<int64_t>(kWindow)), &grid)) {
    return cudaErrorInvalidValue;
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      launch(attention_extents, grid, dim3(kExtentThreads), 0, cuda_stream, segments.ends, segments.segments,
             shape.frames, std::min(segments.lookback, shape.frames), segments.extents);
  if (error != cudaSuccess || shape.heads * shape.size == 0) return error;
  return dispatch(shape.dtype,
                  [&](auto element) { return attend_with<decltype(element)>(args, cuda_stream); });
}

}  // namespace mmk::cuda
