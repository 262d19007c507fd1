#include "cuda/adapter.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/partials.cuh"

namespace mmk::cuda {
namespace {

// ---- column sums of a chunk of g, as a product with ones

// The sums of 8 columns over this warp's part of the rows.
template <class Tile>
struct ColumnSums {
  static constexpr int kVectors = Tile::kChunk / 8;
  static constexpr int kParts = kAdapterThreads / kWarpSize / kVectors;  // of the rows, one warp each
  static constexpr int kPartRows = Tile::kRows / kParts;
  static_assert(kPartRows % 32 == 0, "whole fragments");

  float sums[4] = {};

  MMK_DEVICE void add(const typename Tile::T* chunk) {
    using T = typename Tile::T;
    const int part = warp_index() / kVectors;
    const uint32_t one = packed_pair<T>(1.0f, 1.0f);
    const uint32_t ones[4] = {one, one, one, one};
#pragma unroll
    for (int row = 0; row < kPartRows; row += 32) {
      uint32_t b[4];
      const int place = swizzled<kVectors>(part * kPartRows + row + lane_index(), warp_index() % kVectors);
      ldmatrix<4, true>(b, chunk + place);
      mma_m16n8k16<T>(sums, ones, {b[0], b[1]});
      mma_m16n8k16<T>(sums, ones, {b[2], b[3]});
    }
  }

  // partial: [kParts][width], from the chunk's first column on, of which `columns` exist.
  MMK_DEVICE void store(float* partial, int64_t width, int columns) const {
    const int column = warp_index() % kVectors * 8 + lane_index() * 2;  // the first four lanes hold the sums
    float* target = partial + warp_index() / kVectors * width + column;
    if (lane_index() < 4 && column < columns) *reinterpret_cast<float2*>(target) = {sums[0], sums[1]};
  }
};

// ---- from the first product to the gradients at z

// Always sum a row's pull over four parts of the hidden columns, for the same result with every tile size.
inline constexpr int kPullParts = 4;

template <class Tile>
struct GradientScratch {
  array_t<float, Tile::kRowWarps, Tile::kBottleneck> bias;
  array_t<float, kPullParts, Tile::kRows> pull;
};

// Loads this lane's elements of the saved z; zero beyond the last row and column.
template <class Tile>
MMK_DEVICE void load_hidden(const AdapterBackward& args, int64_t first_row, int rows,
                            typename Tile::HiddenWords& words) {
  using T = typename Tile::T;
#pragma unroll
  for (int block = 0; block < Tile::kHiddenBlocks; ++block) {
    const int column = Tile::hidden_column(block);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = Tile::row(i, h);
        words[i][block][h] = 0;
        if (row >= rows || column >= args.shape.bottleneck) continue;
        const T* pair =
            static_cast<const T*>(args.hidden) + (first_row + row) * args.shape.bottleneck + column;
        words[i][block][h] = __ldg(reinterpret_cast<const uint32_t*>(pair));
      }
    }
  }
}

// Turns z in `words` into s. Writes s and scale * act(z) to device memory, and to scratch the sums of dz over
// rows and of pull over columns.
template <class Tile, Activation kActivation>
MMK_DEVICE void gradient_hidden(const AdapterBackward& args, int64_t first_row, int rows,
                                typename Tile::HiddenSums& sums, typename Tile::HiddenWords& words,
                                GradientScratch<Tile>& scratch) {
  using T = typename Tile::T;
  const float scale = static_cast<float>(args.scale);
  const int64_t bottleneck = args.shape.bottleneck;
  const bool wants_pull = args.stats != nullptr && args.dx != nullptr;
  float rstd[2][2];
  constexpr int kParts = kPullParts / Tile::kColumnWarps;  // of this warp
  float pull[kParts][2][2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rstd[i][h] = 1.0f;
      if (args.stats == nullptr || Tile::row(i, h) >= rows) continue;
      rstd[i][h] = __ldg(static_cast<const float2*>(args.stats) + first_row + Tile::row(i, h)).y;
    }
  }
  const auto finish = [&](int block, const float (&top)[4], const float (&bottom)[4],
                          uint32_t (&finished)[2][2]) {
    const int column = Tile::hidden_column(block);
    const bool inside = column < bottleneck;
    float2 bias = {0.0f, 0.0f};
    if (inside && wants_pull) {
      bias = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.folded_bias) + column));
    }
    float2 total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = Tile::row(i, h);
        const bool present = inside && row < rows;
        const float (&da)[4] = i == 0 ? top : bottom;
        const float2 z = unpacked_pair<T>(finished[i][h]);
        const float low = present ? scale * da[2 * h] * activation_slope<kActivation>(z.x) : 0.0f;
        const float high = present ? scale * da[2 * h + 1] * activation_slope<kActivation>(z.y) : 0.0f;
        total.x += low;
        total.y += high;
        const float pulled = low * (z.x - bias.x) + high * (z.y - bias.y);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          // A select instead of a branch, which would move the array to local memory.
          pull[part][i][h] += block / (Tile::kHiddenBlocks / kParts) == part ? pulled : 0.0f;
        }
        finished[i][h] = packed_pair<T>(low * rstd[i][h], high * rstd[i][h]);
        if (!present) continue;
        const int64_t index = (first_row + row) * bottleneck + column;
        if (args.scaled_grad != nullptr) {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(args.scaled_grad) + index) = finished[i][h];
        }
        if (args.activated != nullptr) {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(args.activated) + index) =
              packed_pair<T>(scale * activate<kActivation>(z.x), scale * activate<kActivation>(z.y));
        }
      }
    }
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      total.x += __shfl_xor_sync(kFullMask, total.x, offset);
      total.y += __shfl_xor_sync(kFullMask, total.y, offset);
    }
    if (lane_index() < 4) {
      scratch.bias[Tile::row_warp()][column] = total.x;
      scratch.bias[Tile::row_warp()][column + 1] = total.y;
    }
  };
  finish_hidden<Tile>(sums, words, finish);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float total = warp_sum<4>(pull[part][i][h]);
        if (lane_index() % 4 != 0) continue;
        scratch.pull[Tile::column_warp() * kParts + part][Tile::row(i, h)] = total;
      }
    }
  }
}

// Adds the warps' sums in scratch: writes the tile's part of the bias gradient, and (mean, pull) of each row
// to row_values. All threads must call it; it begins and ends with a barrier.
template <class Tile>
MMK_DEVICE void finish_sums(const AdapterBackward& args, const GradientScratch<Tile>& scratch, int64_t tile,
                            int64_t first_row, int rows, float2* row_values) {
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (args.partial_bias != nullptr && thread < args.shape.bottleneck) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Tile::kRowWarps; ++warp) total += scratch.bias[warp][thread];
    static_cast<float*>(args.partial_bias)[tile * args.shape.bottleneck + thread] = total;
  }
  if (args.stats != nullptr && thread < rows) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < kPullParts; ++part) total += scratch.pull[part][thread];
    const float2 moments = __ldg(static_cast<const float2*>(args.stats) + first_row + thread);
    const float pull = moments.y * moments.y / static_cast<float>(args.shape.width) * total;
    row_values[thread] = {moments.x, pull};
  }
  __syncthreads();
}

// ---- the second product

// Loads pairs of elements of a matrix of T, all before the first is used.
template <class Tile, bool kFull>
MMK_DEVICE void load_pairs(ChunkWords<Tile>& words, const AdapterRows& from, int64_t first_row, int rows,
                           int64_t column, int64_t width) {
  const int64_t stride = from.row_stride;
  const auto* first = static_cast<const typename Tile::T*>(from.data) +
                      (first_row + Tile::row(0, 0)) * stride + pair_column<Tile>(column, 0);
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int, int64_t) {
    const auto* pair = first + (i * 16 + h * 8) * stride + j * 8;
    words[i][j][h] = __ldg(reinterpret_cast<const uint32_t*>(pair));
  });
}

// One step, for the columns of dx from `column` on. Every load is issued before the product, which hides part
// of its latency. The chunk in `place` is added, if `adds`.
template <class Tile, bool kNorm, bool kFull>
MMK_DEVICE void gradient_step(const AdapterBackward& args, bool adds, const float2* row_values,
                              int64_t first_row, int rows, int64_t column,
                              const typename Tile::HiddenFragments& hidden, const typename Tile::T* weights,
                              typename Tile::T* place) {
  using T = typename Tile::T;
  const int64_t width = args.shape.width;
  ChunkWords<Tile> x = {};
  ChunkWords<Tile> grad = {};  // zero where it is not added
  if constexpr (kNorm) load_pairs<Tile, kFull>(x, args.x, first_row, rows, column, width);
  if (adds) load_words<Tile>(grad, place);
  typename Tile::ChunkSums sums = {};
  second_product<Tile, true>(sums, hidden, weights);
  float2 moments[2][2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (kNorm && (kFull || Tile::row(i, h) < rows)) moments[i][h] = row_values[Tile::row(i, h)];
    }
  }
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int, int64_t) {
    float2 value = {sums[i][j][2 * h], sums[i][j][2 * h + 1]};
    if constexpr (kNorm) {
      const float2 pair = unpacked_pair<T>(x[i][j][h]);
      value.x -= moments[i][h].y * (pair.x - moments[i][h].x);
      value.y -= moments[i][h].y * (pair.y - moments[i][h].x);
    }
    const float2 added = unpacked_pair<T>(grad[i][j][h]);
    chunk_pair<Tile>(place, i, j, h) = packed_pair<T>(value.x + added.x, value.y + added.y);
  });
  write_chunk<Tile, kFull>(args.dx, place, first_row, rows, column, width);
}

template <class Tile, bool kNorm>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapt_backward(const __grid_constant__ AdapterBackward args, const __grid_constant__ AdapterTiles tiles) {
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const AdapterShared<Tile> shared(buffer);
  const bool second = args.dx != nullptr;
  const AdapterRows added = {args.add_input ? args.grad.data : nullptr, args.grad.row_stride};
  AdapterStream<Tile, true> stream(shared.stages, tiles, args.shape, args.grad, added, args.down_weight,
                                   args.up_weight, second);
  static_assert(sizeof(GradientScratch<Tile>) <= Tile::kExchangeElements * sizeof(typename Tile::T));
  auto& scratch = *reinterpret_cast<GradientScratch<Tile>*>(shared.exchange);
  const int width = static_cast<int>(args.shape.width);
  const int chunks = static_cast<int>(tiles.chunks);
#pragma unroll 1
  for (int tile = 0; tile < tiles.tiles_per_block; ++tile) {
    const int64_t first_row = stream.first_row(tile);
    const int rows = stream.rows(tile);
    const bool live = Tile::live(rows);
    const int64_t tile_index = static_cast<int64_t>(blockIdx.x) * tiles.tiles_per_block + tile;
    float* partial = static_cast<float*>(args.partial_up_bias);
    if (partial != nullptr) partial += tile_index * ColumnSums<Tile>::kParts * args.shape.width;
    typename Tile::HiddenWords words;
    // Before the product, to hide their latency, unless it leaves no registers for them.
    constexpr bool kEarly = Tile::kHiddenBlocks < 8;
    if constexpr (kEarly) load_hidden<Tile>(args, first_row, rows, words);
    typename Tile::HiddenSums sums = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.next();
      const auto product = [&] {
        first_product<Tile, true>(sums, stream.chunk(), stream.weights(),
                                  [](int, const uint32_t (&)[2][2][4]) {});
      };
      if (partial == nullptr) {
        if (live) product();
        continue;
      }
      ColumnSums<Tile> column_sums;
      if (live) {  // no branch between the products, so that their instructions interleave
        column_sums.add(stream.chunk());
        product();
      } else {
        column_sums.add(stream.chunk());
      }
      const int column = chunk * Tile::kChunk;
      column_sums.store(partial + column, width, width - column);
    }
    if constexpr (!kEarly) load_hidden<Tile>(args, first_row, rows, words);
    dispatch_activation(args.activation, [&](auto activation) {
      gradient_hidden<Tile, decltype(activation)::value>(args, first_row, rows, sums, words, scratch);
    });
    finish_sums<Tile>(args, scratch, tile_index, first_row, rows, shared.rows);
    if (!second) continue;
    typename Tile::HiddenFragments hidden;
    exchange_hidden<Tile>(shared.exchange, words, hidden);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.next();
      if (!live) continue;
      const int column = chunk * Tile::kChunk;
      dispatch_full(rows == Tile::kRows && column + Tile::kChunk <= width, [&](auto full) {
        gradient_step<Tile, kNorm, decltype(full)::value>(args, stream.adds(), shared.rows, first_row, rows,
                                                          column, hidden, stream.weights(), stream.place());
      });
    }
  }
}

// ---- the up-projection's bias

inline constexpr int kSumThreads = 256;

// One block sums kSumThreads columns over a chunk of rows.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    column_sums(const __grid_constant__ AdapterColumnSums args, int64_t blocks_across) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / blocks_across;
  const int64_t column = static_cast<int64_t>(blockIdx.x) % blocks_across * kSumThreads + threadIdx.x;
  if (column >= args.shape.width) return;
  const int64_t end = min((chunk + 1) * kAdapterSumRows, args.shape.rows);
  constexpr int kSums = 4;  // independent sums: their loads overlap, and each has fewer terms
  float sums[kSums] = {};
  for (int64_t first = chunk * kAdapterSumRows; first < end; first += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (first + i >= end) break;
      const T* row = static_cast<const T*>(args.grad.data) + (first + i) * args.grad.row_stride;
      sums[i] += to_accumulator(row[column]);
    }
  }
  static_cast<float*>(args.partial)[chunk * args.shape.width + column] =
      (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
cudaError_t launch_backward(const AdapterBackward& args, const AdapterTiles& tiles, CudaStream stream) {
  return dispatch_adapter_tile<T>(tiles, [&](auto tile) {
    using Tile = decltype(tile);
    const auto kernel = args.stats != nullptr ? adapt_backward<Tile, true> : adapt_backward<Tile, false>;
    return launch_overlapping(kernel, dim3(static_cast<unsigned>(tiles.blocks)), dim3(kAdapterThreads),
                              static_cast<size_t>(tiles.shared_bytes), stream, args, tiles);
  });
}

}  // namespace

int adapter_backward(DType dtype, const AdapterBackward& args, const AdapterTiles& tiles, CudaStream stream) {
  if (!adapter_fuses(dtype, args.shape) || !adapter_rows_fuse(args.grad) || !adapter_rows_fuse(args.x) ||
      (tiles.held && !args.add_input)) {
    return cudaErrorInvalidValue;
  }
  if (args.shape.rows == 0) return cudaSuccess;
  return dtype == DType::kFloat16 ? launch_backward<__half>(args, tiles, stream)
                                  : launch_backward<__nv_bfloat16>(args, tiles, stream);
}

int adapter_column_sums(DType dtype, const AdapterColumnSums& args, CudaStream stream) {
  const AdapterShape& shape = args.shape;
  if (shape.rows * shape.width == 0) return cudaSuccess;
  const int64_t blocks_across = ceil_div<int64_t>(shape.width, kSumThreads);
  dim3 grid;
  if (!make_grid(blocks_across * ceil_div(shape.rows, kAdapterSumRows), &grid)) {
    return cudaErrorInvalidConfiguration;
  }
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    return launch(column_sums<T>, grid, dim3(kSumThreads), 0, stream, args, blocks_across);
  });
}

int adapter_up_bias(const AdapterUpBias& args, CudaStream stream) {
  return dispatch(args.type, [&](auto parameter) {
    using P = decltype(parameter);
    return reduce_partials(args.partial, args.chunks, args.width, args.scale, static_cast<P*>(args.d_up_bias),
                           stream);
  });
}

}  // namespace mmk::cuda
