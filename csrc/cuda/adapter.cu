#include "cuda/adapter.cuh"
#include "cuda/common/dispatch.cuh"

namespace mmk::cuda {
namespace {

// ---- LayerNorm statistics from the fragments of the first product

// Sums of x - x[0] and of its square, for the four rows of a lane, so that a large mean does not cancel. The
// variance loses about log2(1 + ((mean - x[0]) / std)^2) bits, and never more than log2(width).
//
// Always two warps share the columns of a row: its statistics are then the same for every tile size.
inline constexpr int kMomentWarps = 2;

struct ShiftedSums {
  float shift[2][2];
  float sum[2][2];
  float square[2][2];
};

template <class T>
MMK_DEVICE void add_pair(ShiftedSums& sums, int i, int h, uint32_t word) {
  const float2 x = unpack<T>(word);
  const float low = x.x - sums.shift[i][h];
  const float high = x.y - sums.shift[i][h];
  sums.sum[i][h] += low + high;
  sums.square[i][h] += low * low + high * high;
}

template <class Tile>
MMK_DEVICE void start_sums(ShiftedSums& sums, const typename Tile::T* first_chunk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int index = swizzled<Tile::kChunk / 8>(Tile::row(i, h), 0);
      sums.shift[i][h] = to_accumulator(first_chunk[index]);
      sums.sum[i][h] = 0.0f;
      sums.square[i][h] = 0.0f;
    }
  }
}

// Writes mean and 1 / standard deviation of all rows of the tile to `moments`, and of the first `rows` to
// `stats`. `scratch` may be the exchange. All threads must call it; it ends with a barrier.
template <class Tile>
MMK_DEVICE void finish_moments(const ShiftedSums& sums, int64_t width, float eps, float2* scratch,
                               float2* moments, float2* stats, int rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = Tile::row(i, h);
      const float2 total = {warp_sum<4>(sums.sum[i][h]), warp_sum<4>(sums.square[i][h])};
      if (lane_index() % 4 != 0) continue;
      if (Tile::column_warp() < kMomentWarps) scratch[Tile::column_warp() * Tile::kRows + row] = total;
      if (Tile::column_warp() == 0) moments[row].x = sums.shift[i][h];
    }
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row < Tile::kRows) {
    float2 total = {0.0f, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kMomentWarps; ++warp) {
      total.x += scratch[warp * Tile::kRows + row].x;
      total.y += scratch[warp * Tile::kRows + row].y;
    }
    const float inverse = 1.0f / static_cast<float>(width);
    const float offset = total.x * inverse;
    const float variance = total.y * inverse - offset * offset;
    // A comparison, not fmaxf, which would drop a NaN.
    const float2 result = {moments[row].x + offset, rsqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
    moments[row] = result;
    if (stats != nullptr && row < rows) stats[row] = result;
  }
  __syncthreads();
}

// ---- the kernel

enum class Residual : int { kNone, kHeld, kHalf, kFloat };

template <class Tile>
MMK_DEVICE void forward_hidden(const AdapterForward& args, const float2* moments, int64_t first_row, int rows,
                               typename Tile::HiddenSums& sums, typename Tile::HiddenWords& words) {
  using T = typename Tile::T;
  const bool norm = args.folded_sum != nullptr;
  float2 row_moments[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_moments[i][h] = norm ? moments[Tile::row(i, h)] : float2{0.0f, 1.0f};
    }
  }
  const auto finish = [&](int block, const float (&top)[4], const float (&bottom)[4],
                          uint32_t (&finished)[2][2]) {
    const int column = Tile::hidden_column(block);
    const bool inside = column < args.shape.bottleneck;
    float2 bias = {0.0f, 0.0f};
    float2 sum = {0.0f, 0.0f};
    if (inside)
      bias = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.folded_bias) + column));
    if (inside && norm) {
      sum = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.folded_sum) + column));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 m = row_moments[i][h];
        const float low = m.y * ((i == 0 ? top : bottom)[2 * h] - m.x * sum.x) + bias.x;
        const float high = m.y * ((i == 0 ? top : bottom)[2 * h + 1] - m.x * sum.y) + bias.y;
        const int row = Tile::row(i, h);
        if (args.hidden != nullptr && inside && row < rows) {
          T* target = static_cast<T*>(args.hidden) + (first_row + row) * args.shape.bottleneck + column;
          *reinterpret_cast<uint32_t*>(target) = pack<T>(low, high);
        }
        // Zero the padding columns: an Inf in x would turn them into NaN.
        finished[i][h] =
            inside ? pack<T>(activate(args.activation, low), activate(args.activation, high)) : 0;
      }
    }
  };
  finish_hidden<Tile>(sums, words, finish);
}

// One step of the second product, for the columns of the output from `column` on. Every load is issued before
// the product, which hides part of its latency.
template <class Tile, Residual kResidual, bool kFull>
MMK_DEVICE void forward_step(const AdapterForward& args, int64_t first_row, int rows, int64_t column,
                             const typename Tile::HiddenFragments& hidden, const typename Tile::T* weights,
                             typename Tile::T* place) {
  using T = typename Tile::T;
  const int64_t width = args.shape.width;
  const float scale = static_cast<float>(args.scale);
  ChunkWords<Tile> words = {};
  float2 wide[kResidual == Residual::kFloat ? 2 : 1][Tile::kChunkBlocks][2] = {};
  if constexpr (kResidual == Residual::kHalf) {
    load_pairs<Tile, kFull>(words, args.residual, first_row, rows, column, width);
  }
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int row, int64_t c) {
    if constexpr (kResidual == Residual::kHeld) words[i][j][h] = chunk_pair<Tile>(place, i, j, h);
    if constexpr (kResidual == Residual::kFloat) {
      const float* data = static_cast<const float*>(args.residual.data);
      const float* pair = data + (first_row + row) * args.residual.row_stride + c;
      wide[i][j][h] = __ldg(reinterpret_cast<const float2*>(pair));
    }
  });
  float2 bias[Tile::kChunkBlocks] = {};
#pragma unroll
  for (int j = 0; j < Tile::kChunkBlocks; ++j) {
    const int64_t c = pair_column<Tile>(column, j);
    if (args.up_bias == nullptr || (!kFull && c >= width)) continue;
    // up_bias is the caller's tensor, aligned to 4 bytes only: no float2.
    const float* pair = static_cast<const float*>(args.up_bias) + c;
    bias[j] = {__ldg(pair), __ldg(pair + 1)};
  }
  typename Tile::ChunkSums sums = {};
  second_product<Tile, false>(sums, hidden, weights);
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int row, int64_t c) {
    float2 value = {scale * (sums[i][j][2 * h] + bias[j].x), scale * (sums[i][j][2 * h + 1] + bias[j].y)};
    if constexpr (kResidual == Residual::kFloat) {
      value.x += wide[i][j][h].x;
      value.y += wide[i][j][h].y;
      float* target = static_cast<float*>(args.out) + (first_row + row) * width + c;
      *reinterpret_cast<float2*>(target) = value;
    } else {
      const float2 added = unpack<T>(words[i][j][h]);
      value.x += added.x;
      value.y += added.y;
      chunk_pair<Tile>(place, i, j, h) = pack<T>(value.x, value.y);
    }
  });
  if constexpr (kResidual != Residual::kFloat) {
    write_chunk<Tile, kFull>(static_cast<T*>(args.out), place, first_row, rows, column, width);
  }
}

template <class Tile, Residual kResidual>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapt(const __grid_constant__ AdapterForward args, const __grid_constant__ AdapterTiles tiles) {
  using T = typename Tile::T;
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const AdapterShared<Tile> shared(buffer);
  AdapterStream<Tile, false> stream(buffer, tiles, args.shape, args.x, args.down_weight, args.up_weight,
                                    true);
  const bool norm = args.folded_sum != nullptr;
  const int width = static_cast<int>(args.shape.width);
  const int chunks = static_cast<int>(tiles.chunks);
#pragma unroll 1
  for (int tile = 0; tile < tiles.tiles_per_block; ++tile) {
    const int64_t first_row = stream.first_row(tile);
    const int rows = stream.rows(tile);
    const bool live = Tile::live(rows);
    typename Tile::HiddenSums sums = {};
    ShiftedSums shifted = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.next();
      if (!live) continue;
      if (norm && chunk == 0) start_sums<Tile>(shifted, stream.chunk());
      first_product<Tile, false>(sums, stream.chunk(), stream.weights(),
                                 [&](int i, int inner, const uint32_t (&a)[4]) {
                                   const int column = chunk * Tile::kChunk + inner;
                                   if (!norm || column / 16 % kMomentWarps != Tile::column_warp()) return;
#pragma unroll
                                   for (int h = 0; h < 2; ++h) {
                                     if (column < width) add_pair<T>(shifted, i, h, a[h]);
                                     if (column + 8 < width) add_pair<T>(shifted, i, h, a[2 + h]);
                                   }
                                 });
    }
    if (norm) {
      float2* stats = args.stats == nullptr ? nullptr : static_cast<float2*>(args.stats) + first_row;
      finish_moments<Tile>(shifted, width, static_cast<float>(args.eps),
                           reinterpret_cast<float2*>(shared.exchange), shared.rows, stats, rows);
    }
    typename Tile::HiddenWords words = {};
    if (live) forward_hidden<Tile>(args, shared.rows, first_row, rows, sums, words);
    typename Tile::HiddenFragments hidden;
    exchange_hidden<Tile>(shared.exchange, words, hidden);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.next();
      if (!live) continue;
      const int64_t column = chunk * Tile::kChunk;
      dispatch_full<Tile>(rows, column, width, [&](auto full) {
        forward_step<Tile, kResidual, decltype(full)::value>(args, first_row, rows, column, hidden,
                                                             stream.weights(), stream.place());
      });
    }
  }
}

// ---- elementwise steps around library products: one thread per vector

inline constexpr int kElementThreads = 256;
inline constexpr int kFinishWidth = 4;  // 16 bytes of the product

template <class T, bool kAligned>
__global__ void __launch_bounds__(kElementThreads)
    activate_hidden(const __grid_constant__ AdapterActivate args) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t count = args.shape.rows * args.shape.bottleneck;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * kWidth;
  if (first >= count) return;
  auto value =
      to_accumulator(load_columns<kAligned, kWidth>(static_cast<const T*>(args.hidden), first, count));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    value[i] = static_cast<float>(args.scale) * activate(args.activation, value[i]);
  }
  store_columns<kAligned>(static_cast<T*>(args.activated), first, count, from_accumulator<T>(value));
}

template <class T, class Out, bool kAligned>
__global__ void __launch_bounds__(kElementThreads)
    finish_rows(const __grid_constant__ AdapterFinish args, int64_t vectors_per_row) {
  constexpr int kWidth = kFinishWidth;
  const int64_t width = args.shape.width;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  const int64_t row = vector / vectors_per_row;
  if (row >= args.shape.rows) return;
  const int64_t column = (vector - row * vectors_per_row) * kWidth;
  auto value =
      load_columns<kAligned, kWidth>(static_cast<const float*>(args.product) + row * width, column, width);
  Vec<float, kWidth> bias = {};
  if (args.bias != nullptr) {
    bias = load_columns<kAligned, kWidth>(static_cast<const float*>(args.bias), column, width);
  }
  Vec<float, kWidth> addend = {};
  if (args.addend.data != nullptr) {
    const Out* addend_row = static_cast<const Out*>(args.addend.data) + row * args.addend.row_stride;
    addend = to_accumulator(load_columns<kAligned, kWidth>(addend_row, column, width));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    value[i] = static_cast<float>(args.scale) * (value[i] + bias[i]) + addend[i];
  }
  if (args.pull != nullptr) {
    const T* x_row = static_cast<const T*>(args.x.data) + row * args.x.row_stride;
    const auto x = to_accumulator(load_columns<kAligned, kWidth>(x_row, column, width));
    const float mean = __ldg(static_cast<const float2*>(args.stats) + row).x;
    const float pull = __ldg(static_cast<const float*>(args.pull) + row);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] -= pull * (x[i] - mean);
  }
  store_columns<kAligned>(static_cast<Out*>(args.out) + row * width, column, width,
                          from_accumulator<Out>(value));
}

// ---- plan and launchers

constexpr int64_t fixed_bytes(int64_t tile_rows, int64_t bottleneck) {
  const int64_t chunk = adapter_chunk_columns(tile_rows, bottleneck);
  return tile_rows * 8 + 2 * (3 * bottleneck * chunk + tile_rows * kAdapterExchange);
}
static_assert(fixed_bytes(128, 128) == AdapterTile<__half, 128, 128>::kFixedBytes);
static_assert(fixed_bytes(64, 256) == AdapterTile<__half, 64, 256>::kFixedBytes);

// The plan for one tile size. Where it does not fit, its shared_bytes exceeds shared_limit.
AdapterTiles tiles_of(const AdapterShape& shape, int64_t tile_rows, bool held, int64_t shared_limit) {
  constexpr int64_t kLeastSlots = 3;     // weights arrive two steps ahead, so rows must too
  constexpr int64_t kRingColumns = 384;  // of a ring that does not hold the tile, if they fit
  AdapterTiles tiles = {};
  tiles.tile_rows = tile_rows;
  tiles.bottleneck = max(ceil_div<int64_t>(shape.bottleneck, 64), int64_t{1}) * 64;
  tiles.chunk_columns = adapter_chunk_columns(tile_rows, tiles.bottleneck);
  tiles.chunks = max(ceil_div(shape.width, tiles.chunk_columns), kLeastSlots);
  tiles.held = held;
  const int64_t slot_bytes = 2 * tile_rows * tiles.chunk_columns;
  // A held tile is overwritten by the result, which otherwise needs one more slot.
  const int64_t other_bytes = fixed_bytes(tile_rows, tiles.bottleneck) + (held ? 0 : slot_bytes);
  const int64_t most = (shared_limit - other_bytes) / slot_bytes;
  tiles.slots = held ? tiles.chunks : max(kLeastSlots, min(most, kRingColumns / tiles.chunk_columns));
  tiles.shared_bytes = other_bytes + tiles.slots * slot_bytes;
  return tiles;
}

bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

template <class T>
cudaError_t launch_forward(const AdapterForward& args, const AdapterTiles& tiles, CudaStream stream) {
  const Residual residual = args.add_input && tiles.held       ? Residual::kHeld
                            : args.residual.data == nullptr    ? Residual::kNone
                            : args.out_type == DType::kFloat32 ? Residual::kFloat
                                                               : Residual::kHalf;
  return dispatch_adapter_tile<T>(tiles, [&](auto tile) {
    using Tile = decltype(tile);
    const auto run = [&](auto kernel) {
      return launch_overlapping(kernel, dim3(static_cast<unsigned>(tiles.blocks)), dim3(kAdapterThreads),
                                static_cast<size_t>(tiles.shared_bytes), stream, args, tiles);
    };
    switch (residual) {
      case Residual::kHeld:
        return run(adapt<Tile, Residual::kHeld>);
      case Residual::kHalf:
        return run(adapt<Tile, Residual::kHalf>);
      case Residual::kFloat:
        return run(adapt<Tile, Residual::kFloat>);
      default:
        return run(adapt<Tile, Residual::kNone>);
    }
  });
}

template <class T, class Out>
cudaError_t launch_finish(const AdapterFinish& args, int64_t vectors_per_row, dim3 grid, CudaStream stream) {
  const int64_t width = args.shape.width;
  const auto aligned = [](const auto* data, int64_t stride) {
    return is_vector_aligned(data, stride, kFinishWidth);
  };
  const bool all = aligned(static_cast<const float*>(args.product), width) &&
                   aligned(static_cast<const float*>(args.bias), 0) &&
                   aligned(static_cast<const Out*>(args.addend.data), args.addend.row_stride) &&
                   aligned(static_cast<const T*>(args.x.data), args.x.row_stride) &&
                   aligned(static_cast<const Out*>(args.out), width);
  const auto kernel = all ? finish_rows<T, Out, true> : finish_rows<T, Out, false>;
  return launch(kernel, grid, dim3(kElementThreads), 0, stream, args, vectors_per_row);
}

}  // namespace

AdapterTiles adapter_tiles(const AdapterShape& shape, bool hold, int64_t multiprocessors,
                           int64_t shared_limit) {
  // Rows are shared out evenly, in whole fragments; a block has at least the 32 rows of one warp.
  constexpr int64_t kFragmentRows = 16;
  constexpr int64_t kLeastRows = 32;
  const int64_t share = ceil_div(ceil_div(shape.rows, multiprocessors), kFragmentRows) * kFragmentRows;
  const bool tall = share > 64 && shape.bottleneck <= kAdapterTallBottleneck;
  const auto plan = [&](bool is_tall, bool held) {
    return tiles_of(shape, is_tall ? 128 : 64, held, shared_limit);
  };
  AdapterTiles tiles = plan(tall, hold);
  if (tiles.shared_bytes > shared_limit) tiles = plan(false, hold);
  if (tiles.shared_bytes > shared_limit) tiles = plan(tall, false);
  if (tiles.shared_bytes > shared_limit) tiles = plan(false, false);
  tiles.rows_per_block = max(share, kLeastRows);
  tiles.blocks = ceil_div(shape.rows, tiles.rows_per_block);
  tiles.tiles_per_block = ceil_div(tiles.rows_per_block, tiles.tile_rows);
  return tiles;
}

int adapter_tiles(const AdapterShape& shape, bool hold, AdapterTiles* tiles) {
  int multiprocessors = 0;
  int shared_limit = 0;
  if (const cudaError_t error = multiprocessor_count(&multiprocessors); error != cudaSuccess) return error;
  if (const cudaError_t error = shared_memory_limit(&shared_limit); error != cudaSuccess) return error;
  *tiles = adapter_tiles(shape, hold, multiprocessors, shared_limit);
  return cudaSuccess;
}

bool adapter_fuses(DType dtype, const AdapterShape& shape) {
  return is_half(dtype) && shape.width > 0 && shape.width % 8 == 0 && shape.bottleneck > 0 &&
         shape.bottleneck % 8 == 0 && shape.bottleneck <= kAdapterMostBottleneck;
}

bool adapter_rows_fuse(const AdapterRows& rows) {
  return is_vector_aligned(static_cast<const __half*>(rows.data), rows.row_stride, 8);
}

int adapter_forward(DType dtype, const AdapterForward& args, const AdapterTiles& tiles, CudaStream stream) {
  if (!adapter_fuses(dtype, args.shape) || !adapter_rows_fuse(args.x) || !adapter_rows_fuse(args.residual)) {
    return cudaErrorInvalidValue;
  }
  if (args.shape.rows == 0) return cudaSuccess;
  AdapterForward given = args;
  if (args.add_input && !tiles.held) given.residual = args.x;
  return dtype == DType::kFloat16 ? launch_forward<__half>(given, tiles, stream)
                                  : launch_forward<__nv_bfloat16>(given, tiles, stream);
}

int adapter_activate(DType dtype, const AdapterActivate& args, CudaStream stream) {
  const int64_t count = args.shape.rows * args.shape.bottleneck;
  if (count == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kVectorWidth<T>;
    dim3 grid;
    if (!make_grid(ceil_div<int64_t>(count, kElementThreads * kWidth), &grid)) {
      return cudaErrorInvalidConfiguration;
    }
    const bool aligned = is_vector_aligned(static_cast<const T*>(args.hidden), count, kWidth) &&
                         is_vector_aligned(static_cast<const T*>(args.activated), count, kWidth);
    const auto kernel = aligned ? activate_hidden<T, true> : activate_hidden<T, false>;
    return launch(kernel, grid, dim3(kElementThreads), 0, stream, args);
  });
}

int adapter_finish(DType dtype, const AdapterFinish& args, CudaStream stream) {
  if (args.shape.rows * args.shape.width == 0) return cudaSuccess;
  const int64_t vectors_per_row = ceil_div<int64_t>(args.shape.width, kFinishWidth);
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(args.shape.rows * vectors_per_row, kElementThreads), &grid)) {
    return cudaErrorInvalidConfiguration;
  }
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    return args.out_type == DType::kFloat32 ? launch_finish<T, float>(args, vectors_per_row, grid, stream)
                                            : launch_finish<T, T>(args, vectors_per_row, grid, stream);
  });
}

}  // namespace mmk::cuda
