// The backward pass of segment_attention: dots, then dq by blocks of queries, and dk and dv by blocks of
// keys. In float, dots are sums of the products that they are subtracted from: with the rounded result an
// error would remain where a query sees few keys and both are nearly equal.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/segment_attention.cuh"

namespace mmk::cuda {
namespace {

constexpr int kDotLanes = 8;  // that share a row

// grad . out of each query of each head.
template <bool kAligned, class T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dots(const __grid_constant__ SegmentAttentionBackward args) {
  constexpr int kWidth = kVectorWidth<T>;
  const SegmentAttentionShape& shape = args.shape;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kAttentionThreads + threadIdx.x) / kDotLanes;
  const int64_t rows = shape.batch * shape.frames * shape.heads;
  const int64_t clamped_index = min(index, rows - 1);  // all lanes take part in the sum
  const int64_t head = clamped_index % shape.heads;
  const int64_t frame = clamped_index / shape.heads % shape.frames;
  const int64_t row = clamped_index / shape.heads / shape.frames;
  const auto grad = rows_of<T>(args.grad, row, head, frame, 1),
             out = rows_of<T>(args.out, row, head, frame, 1);
  float sum = 0.0f;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) % kDotLanes * kWidth; column < shape.size;
       column += kDotLanes * kWidth) {
    const auto a = to_accumulator(load_columns<kAligned, kWidth>(grad.data, column, shape.size));
    const auto b = to_accumulator(load_columns<kAligned, kWidth>(out.data, column, shape.size));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += a[i] * b[i];
  }
  sum = warp_sum<kDotLanes>(sum);
  if (index < rows && threadIdx.x % kDotLanes == 0) {
    static_cast<float*>(args.dots)[(row * shape.heads + head) * shape.frames + frame] = sum;
  }
}

template <class T>
constexpr bool kDotsOfProducts = sizeof(T) == 4;

// Also writes the dots, where these are of products.
template <class Tiles>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    query_gradients(const __grid_constant__ SegmentAttentionBackward args) {
  using T = typename Tiles::T;
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const SegmentAttentionShape& shape = args.shape;
  const AttentionBlock block = attention_block<Tiles, true>(shape, shape.heads, args.extents);
  const int32_t* starts = args.extents + block.row * 2 * shape.frames + block.first;
  const int64_t key_head = block.head / (shape.heads / shape.key_heads);
  const int64_t end = block.first + block.count;
  const int64_t begin = block.count > 0 ? clamped(starts[0], 0, block.first) : end;
  const int steps = static_cast<int>((end - begin + Tiles::kStep - 1) / Tiles::kStep);

  Tiles tiles(buffer, shape.size, block.column);
  const auto fetch = [&](int step) {
    const int64_t key = begin + static_cast<int64_t>(step) * Tiles::kStep;
    tiles.fetch(step, rows_of<T>(args.k, block.row, key_head, key, end - key),
                rows_of<T>(args.v, block.row, key_head, key, end - key));
  };
  if (steps > 0) {
    tiles.template keep<0>(rows_of<T>(args.q, block.row, block.head, block.first, block.count));
    tiles.template keep<1>(rows_of<T>(args.grad, block.row, block.head, block.first, block.count));
    fetch(0);
  }
  const int64_t place = (block.row * shape.heads + block.head) * shape.frames + block.first;
  int32_t from[Tiles::kRows], to[Tiles::kRows];
  float lse[Tiles::kRows], dot[Tiles::kRows];
#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const bool sees = Tiles::row(r) < block.count;
    from[r] = sees ? static_cast<int32_t>(starts[Tiles::row(r)] - begin) : 0;
    to[r] = sees ? static_cast<int32_t>(block.first - begin) + Tiles::row(r) : -1;
    lse[r] = sees ? static_cast<const float*>(args.lse)[place + Tiles::row(r)] * kLog2E : 0.0f;
    dot[r] = 0.0f;
    if (sees && !kDotsOfProducts<T>) dot[r] = static_cast<const float*>(args.dots)[place + Tiles::row(r)];
  }
  const float scale = static_cast<float>(args.scale) * kLog2E;
  if constexpr (kDotsOfProducts<T>) {
    // The weights add up to 1 but for the rounding of lse.
    float total[Tiles::kRows] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      tiles.wait(step);
      typename Tiles::Cells scores, products;
      tiles.template multiply<0>(scores);
      tiles.template multiply<1>(products);
#pragma unroll
      for (int r = 0; r < Tiles::kRows; ++r) {
#pragma unroll
        for (int c = 0; c < Tiles::kColumns; ++c) {
          const int32_t at = step * Tiles::kStep + Tiles::column(c);
          const bool seen = at >= from[r] && at <= to[r];
          const float p = seen ? exp2f(Tiles::cell(scores, r, c) * scale - lse[r]) : 0.0f;
          total[r] += p;
          dot[r] += seen ? p * Tiles::cell(products, r, c) : 0.0f;
        }
      }
      fetch(step + 1 < steps ? step + 1 : 0);
    }
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) {
      dot[r] = warp_sum<Tiles::kLanes>(dot[r]) / warp_sum<Tiles::kLanes>(total[r]);
      // Every block of columns has the same sums.
      if (to[r] >= 0 && block.column == 0 && Tiles::column(0) == 0) {
        static_cast<float*>(args.dots)[place + Tiles::row(r)] = dot[r];
      }
    }
    if (args.dq == nullptr) return;
  }
  typename Tiles::Sums sums;
  Tiles::clear(sums);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    tiles.wait(step);
    if (step + 1 < steps) fetch(step + 1);
    typename Tiles::Cells scores, products;
    tiles.template multiply<0>(scores);
    tiles.template multiply<1>(products);
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tiles::kColumns; ++c) {
        const int32_t at = step * Tiles::kStep + Tiles::column(c);
        const float p = exp2f(Tiles::cell(scores, r, c) * scale - lse[r]);
        float& product = Tiles::cell(products, r, c);
        product = at < from[r] || at > to[r] ? 0.0f : p * (product - dot[r]);
      }
    }
    tiles.template add<0>(sums, products);
  }

#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int64_t frame = block.first + Tiles::row(r);
    if (frame >= shape.frames) continue;
    Tiles::scale(sums, r, static_cast<float>(args.scale));
    T* dq = static_cast<T*>(args.dq);
    tiles.store(sums, r, dq + ((block.row * shape.frames + frame) * shape.heads + block.head) * shape.size);
  }
}

template <class Tiles>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_gradients(const __grid_constant__ SegmentAttentionBackward args) {
  using T = typename Tiles::T;
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const SegmentAttentionShape& shape = args.shape;
  const AttentionBlock block = attention_block<Tiles, false>(shape, shape.key_heads, args.extents);
  const int32_t* stops = args.extents + (block.row * 2 + 1) * shape.frames + block.first;
  const int sharing = static_cast<int>(shape.heads / shape.key_heads);
  const int64_t last = block.first + block.count;
  const int64_t end = block.count > 0 ? clamped(stops[block.count - 1], last, shape.frames) : block.first;
  const int span = static_cast<int>(end - block.first);
  const int steps = (span + Tiles::kStep - 1) / Tiles::kStep * sharing;

  Tiles tiles(buffer, shape.size, block.column);
  // lse and dot of the queries of two steps. Copy them with the tiles: the products leave few registers, so
  // that loads would wait for each other after them.
  using Statistics = Vec<float, 2>;
  MMK_SHARED(Statistics, statistics, 2, Tiles::kStep);
  static_assert(2 * Tiles::kStep <= kAttentionThreads, "a copy a thread");
  int64_t next_head = block.head * sharing;
  int next_query = 0;  // from the block's first frame on
  const auto fetch = [&](int step) {
    const int64_t query = block.first + next_query;
    tiles.fetch(step, rows_of<T>(args.q, block.row, next_head, query, end - query),
                rows_of<T>(args.grad, block.row, next_head, query, end - query));
    const int which = static_cast<int>(threadIdx.x) / Tiles::kStep;
    const int column = static_cast<int>(threadIdx.x) % Tiles::kStep;
    if (which < 2) {
      const bool inside = next_query + column < span;
      const float* source = static_cast<const float*>(which == 0 ? args.lse : args.dots);
      const int64_t place = (block.row * shape.heads + next_head) * shape.frames + query;
      cp_async_zfill<4>(&statistics[step % 2][column][which], source + (inside ? place + column : 0), inside);
    }
    next_query += Tiles::kStep;
    if (next_query >= span) {
      next_query = 0;
      ++next_head;
    }
  };
  if (steps > 0) {
    tiles.template keep<0>(rows_of<T>(args.k, block.row, block.head, block.first, block.count));
    tiles.template keep<1>(rows_of<T>(args.v, block.row, block.head, block.first, block.count));
    fetch(0);
  }
  // Queries count from the block's first frame; a key is seen from its own frame on.
  int32_t until[Tiles::kRows];
#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int row = Tiles::row(r);
    until[r] = row < block.count
                   ? static_cast<int32_t>(clamped(stops[row], block.first + row + 1, end) - block.first)
                   : 0;
  }
  const float scale = static_cast<float>(args.scale) * kLog2E;
  const bool need_k = args.dk != nullptr, need_v = args.dv != nullptr;
  typename Tiles::Sums dk, dv;
  Tiles::clear(dk);
  Tiles::clear(dv);
  int32_t query = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    tiles.wait(step);
    if (step + 1 < steps) fetch(step + 1);
    typename Tiles::Cells weights, products;
    tiles.template multiply<0>(weights);
    if (need_k) tiles.template multiply<1>(products);
#pragma unroll
    for (int c = 0; c < Tiles::kColumns; ++c) {
      const int column = Tiles::column(c);
      const Statistics of_query = load<2>(&statistics[step % 2][column][0]);
      const float lse = of_query[0] * kLog2E, dot = of_query[1];
#pragma unroll
      for (int r = 0; r < Tiles::kRows; ++r) {
        const bool sees = query + column >= Tiles::row(r) && query + column < until[r];
        float& weight = Tiles::cell(weights, r, c);
        float& product = Tiles::cell(products, r, c);
        weight = sees ? exp2f(weight * scale - lse) : 0.0f;
        if (need_k) product = sees ? weight * (product - dot) : 0.0f;
      }
    }
    if (need_v) tiles.template add<1>(dv, weights);
    if (need_k) tiles.template add<0>(dk, products);
    query = query + Tiles::kStep < span ? query + Tiles::kStep : 0;
  }

#pragma unroll
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int64_t frame = block.first + Tiles::row(r);
    if (frame >= shape.frames) continue;
    const int64_t place = ((block.row * shape.frames + frame) * shape.key_heads + block.head) * shape.size;
    Tiles::scale(dk, r, static_cast<float>(args.scale));
    if (need_k) tiles.store(dk, r, static_cast<T*>(args.dk) + place);
    if (need_v) tiles.store(dv, r, static_cast<T*>(args.dv) + place);
  }
}

template <class T>
cudaError_t launch_dots(const SegmentAttentionBackward& args, cudaStream_t stream) {
  const SegmentAttentionShape& shape = args.shape;
  const int64_t rows = shape.batch * shape.heads * shape.frames;
  dim3 grid;
  if (!make_grid(ceil_div(rows * kDotLanes, int64_t{kAttentionThreads}), &grid)) return cudaErrorInvalidValue;
  const bool aligned = rows_aligned(args.grad) && rows_aligned(args.out);
  const auto kernel = aligned ? attention_dots<true, T> : attention_dots<false, T>;
  return launch(kernel, grid, dim3(kAttentionThreads), 0, stream, args);
}

template <class Tiles, class KeyTiles>
cudaError_t launch_gradients(const SegmentAttentionBackward& args, cudaStream_t stream) {
  const SegmentAttentionShape& shape = args.shape;
  dim3 grid;
  if (shape.heads > 0 && (args.dq != nullptr || kDotsOfProducts<typename Tiles::T>)) {
    if (!make_grid(attention_blocks<Tiles>(shape, shape.heads), &grid)) return cudaErrorInvalidValue;
    const cudaError_t error =
        launch(query_gradients<Tiles>, grid, dim3(kAttentionThreads), Tiles::kBytes, stream, args);
    if (error != cudaSuccess) return error;
  }
  if (args.dk == nullptr && args.dv == nullptr) return cudaSuccess;
  if (!make_grid(attention_blocks<KeyTiles>(shape, shape.key_heads), &grid)) return cudaErrorInvalidValue;
  return launch(key_gradients<KeyTiles>, grid, dim3(kAttentionThreads), KeyTiles::kBytes, stream, args);
}

template <class T>
cudaError_t differentiate(const SegmentAttentionBackward& args, cudaStream_t stream) {
  if constexpr (!kDotsOfProducts<T>) {
    if (args.shape.heads > 0) {
      if (const cudaError_t error = launch_dots<T>(args, stream); error != cudaSuccess) return error;
    }
  }
  if constexpr (sizeof(T) == 2) {
    if (args.shape.size <= 128 && rows_aligned(args.q) && rows_aligned(args.k) && rows_aligned(args.v) &&
        rows_aligned(args.grad)) {
      if (args.shape.size <= 64) {
        using Tiles = TensorTiles<T, 64, 32, 2>;
        return launch_gradients<Tiles, Tiles>(args, stream);
      }
      // Sums of both gradients take half of the registers.
      return launch_gradients<TensorTiles<T, 128, 32, 2>, TensorTiles<T, 128, 16, 2>>(args, stream);
    }
  }
  return launch_gradients<PlainTiles<T, 2>, PlainTiles<T, 2>>(args, stream);
}

}  // namespace

int segment_attention_backward(const SegmentAttentionBackward& args, CudaStream stream) {
  const SegmentAttentionShape& shape = args.shape;
  if (shape.batch * shape.key_heads * shape.frames * shape.size == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return dispatch(shape.dtype,
                  [&](auto element) { return differentiate<decltype(element)>(args, cuda_stream); });
}

}  // namespace mmk::cuda
