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

// Adds this warp's 16 of 32 columns, of which the first `columns` exist; a: their fragments (first_product).
template <class Tile, bool kFull>
MMK_DEVICE void add_columns(ShiftedSums& sums, const uint32_t (&a)[2][2][4], int columns) {
  static_assert(kMomentWarps == 2, "a fragment of 16 columns each");
  const bool odd = Tile::column_warp() % 2 == 1;  // the sums of other warps are not read
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int h = word % 2;
      const float2 x = unpacked_pair<typename Tile::T>(odd ? a[1][i][word] : a[0][i][word]);
      const bool inside = kFull || (odd ? 16 : 0) + word / 2 * 8 < columns;
      const float low = inside ? x.x - sums.shift[i][h] : 0.0f;
      const float high = inside ? x.y - sums.shift[i][h] : 0.0f;
      sums.sum[i][h] += low + high;
      sums.square[i][h] += low * low + high * high;
    }
  }
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

// Hidden values of this warp: z from the sums of the first product, written if saved; act(z) to `words`.
template <class Tile, bool kNorm, Activation kActivation>
MMK_DEVICE void forward_hidden(const AdapterForward& args, const float2* moments, int64_t first_row, int rows,
                               typename Tile::HiddenSums& sums, typename Tile::HiddenWords& words) {
  using T = typename Tile::T;
  float2 row_moments[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) row_moments[i][h] = kNorm ? moments[Tile::row(i, h)] : float2{0.0f, 1.0f};
  }
  T* const saved = static_cast<T*>(args.hidden) + first_row * args.shape.bottleneck;
  const auto finish = [&](int block, const float (&top)[4], const float (&bottom)[4],
                          uint32_t (&finished)[2][2]) {
    const int column = Tile::hidden_column(block);
    const bool inside = column < args.shape.bottleneck;
    float2 bias = {0.0f, 0.0f};
    float2 sum = {0.0f, 0.0f};
    if (inside) {
      bias = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.folded_bias) + column));
      if (kNorm) {
        sum = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.folded_sum) + column));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 m = row_moments[i][h];
        const float low = m.y * ((i == 0 ? top : bottom)[2 * h] - m.x * sum.x) + bias.x;
        const float high = m.y * ((i == 0 ? top : bottom)[2 * h + 1] - m.x * sum.y) + bias.y;
        // Zero the padding columns: an Inf in x would turn them into NaN.
        finished[i][h] = inside ? packed_pair<T>(activate<kActivation>(low), activate<kActivation>(high)) : 0;
        if (args.hidden != nullptr && inside && Tile::row(i, h) < rows) {
          T* target = saved + Tile::row(i, h) * args.shape.bottleneck + column;
          *reinterpret_cast<uint32_t*>(target) = packed_pair<T>(low, high);
        }
      }
    }
  };
  finish_hidden<Tile>(sums, words, finish);
}

// One step of the second product, for the columns of the output from `column` on. Every load is issued before
// the product, which hides part of its latency. kWide: the output and the residual are float; otherwise the
// chunk in `place` is added, if `adds`.
template <class Tile, bool kWide, bool kFull>
MMK_DEVICE void forward_step(const AdapterForward& args, bool adds, int64_t first_row, int rows,
                             int64_t column, const typename Tile::HiddenFragments& hidden,
                             const typename Tile::T* weights, typename Tile::T* place) {
  using T = typename Tile::T;
  const int64_t width = args.shape.width;
  const float scale = static_cast<float>(args.scale);
  ChunkWords<Tile> words = {};
  float2 wide[kWide ? 2 : 1][Tile::kChunkBlocks][2] = {};
  const auto load_wide = [&] {
    const auto* data = static_cast<const float*>(args.residual.data) + first_row * args.residual.row_stride;
    for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int row, int64_t c) {
      wide[i][j][h] = __ldg(reinterpret_cast<const float2*>(data + row * args.residual.row_stride + c));
    });
  };
  constexpr bool kEarly = Tile::kBottleneck < 256;  // more hidden values leave no registers for the addends
  if constexpr (kWide && kEarly) load_wide();
  if (!kWide && adds) load_words<Tile>(words, place);
  float2 bias[Tile::kChunkBlocks] = {};
  if (args.up_bias != nullptr) {
    const float* first = static_cast<const float*>(args.up_bias) + pair_column<Tile>(column, 0);
#pragma unroll
    for (int j = 0; j < Tile::kChunkBlocks; ++j) {
      // up_bias is the caller's tensor, aligned to 4 bytes only: no float2.
      if (kFull || pair_column<Tile>(column, j) < width)
        bias[j] = {__ldg(first + j * 8), __ldg(first + j * 8 + 1)};
    }
  }
  typename Tile::ChunkSums sums = {};
  second_product<Tile, false>(sums, hidden, weights);
  if constexpr (kWide && !kEarly) load_wide();
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int row, int64_t c) {
    const float2 added = kWide ? wide[i][j][h] : unpacked_pair<T>(words[i][j][h]);
    const float2 value = {scale * (sums[i][j][2 * h] + bias[j].x) + added.x,
                          scale * (sums[i][j][2 * h + 1] + bias[j].y) + added.y};
    if constexpr (kWide) {
      *reinterpret_cast<float2*>(static_cast<float*>(args.out) + (first_row + row) * width + c) = value;
    } else {
      chunk_pair<Tile>(place, i, j, h) = packed_pair<T>(value.x, value.y);
    }
  });
  if constexpr (!kWide) {
    write_chunk<Tile, kFull>(args.out, place, first_row, rows, column, width);
  }
}

template <class Tile, bool kNorm, bool kWide>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapt(const __grid_constant__ AdapterForward args, const __grid_constant__ AdapterTiles tiles) {
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  const AdapterShared<Tile> shared(buffer);
  const AdapterRows added = {kWide ? nullptr : args.residual.data, args.residual.row_stride};
  AdapterStream<Tile, false> stream(shared.stages, tiles, args.shape, args.x, added, args.down_weight,
                                    args.up_weight, true);
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
      if constexpr (kNorm) {
        if (chunk == 0) start_sums<Tile>(shifted, stream.chunk());
        const int columns = width - chunk * Tile::kChunk;
        dispatch_full(columns >= Tile::kChunk, [&](auto full) {
          first_product<Tile, false>(sums, stream.chunk(), stream.weights(),
                                     [&](int inner, const uint32_t (&a)[2][2][4]) {
                                       add_columns<Tile, decltype(full)::value>(shifted, a, columns - inner);
                                     });
        });
      } else {
        first_product<Tile, false>(sums, stream.chunk(), stream.weights(),
                                   [](int, const uint32_t (&)[2][2][4]) {});
      }
    }
    if constexpr (kNorm) {
      float2* stats = args.stats == nullptr ? nullptr : static_cast<float2*>(args.stats) + first_row;
      finish_moments<Tile>(shifted, width, static_cast<float>(args.eps),
                           reinterpret_cast<float2*>(shared.exchange), shared.rows, stats, rows);
    }
    typename Tile::HiddenWords words = {};
    if (live) {
      dispatch_activation(args.activation, [&](auto activation) {
        forward_hidden<Tile, kNorm, decltype(activation)::value>(args, shared.rows, first_row, rows, sums,
                                                                 words);
      });
    }
    typename Tile::HiddenFragments hidden;
    exchange_hidden<Tile>(shared.exchange, words, hidden);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.next();
      if (!live) continue;
      const int column = chunk * Tile::kChunk;
      dispatch_full(rows == Tile::kRows && column + Tile::kChunk <= width, [&](auto full) {
        forward_step<Tile, kWide, decltype(full)::value>(args, stream.adds(), first_row, rows, column, hidden,
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
  constexpr int64_t kLeastSlots = 3;     // weights are copied two steps ahead, rows at least as early
  constexpr int64_t kRingColumns = 384;  // of a ring that does not hold the tile, as far as they fit
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
  const bool norm = args.folded_sum != nullptr;
  const bool wide = args.residual.data != nullptr && args.out_type == DType::kFloat32;
  return dispatch_adapter_tile<T>(tiles, [&](auto tile) {
    using Tile = decltype(tile);
    const auto kernel = norm ? (wide ? adapt<Tile, true, true> : adapt<Tile, true, false>)
                             : (wide ? adapt<Tile, false, true> : adapt<Tile, false, false>);
    return launch_overlapping(kernel, dim3(static_cast<unsigned>(tiles.blocks)), dim3(kAdapterThreads),
                              static_cast<size_t>(tiles.shared_bytes), stream, args, tiles);
  });
}

template <class T, class Out>
cudaError_t launch_finish(const AdapterFinish& args, int64_t vectors_per_row, dim3 grid, CudaStream stream) {
  const int64_t width = args.shape.width;
  const bool aligned = rows_aligned<float>(args.product, width) && rows_aligned<float>(args.bias) &&
                       rows_aligned<Out, kFinishWidth>(args.addend.data, args.addend.row_stride) &&
                       rows_aligned<T, kFinishWidth>(args.x.data, args.x.row_stride) &&
                       rows_aligned<Out, kFinishWidth>(args.out);
  const auto kernel = aligned ? finish_rows<T, Out, true> : finish_rows<T, Out, false>;
  return launch(kernel, grid, dim3(kElementThreads), 0, stream, args, vectors_per_row);
}

}  // namespace

AdapterTiles adapter_tiles(const AdapterShape& shape, bool hold, int64_t multiprocessors,
                           int64_t shared_limit) {
  // Distribute rows evenly, in whole fragments; a block has at least the 32 rows of one warp.
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
  return rows_aligned<__half>(rows.data, rows.row_stride);
}

int adapter_forward(DType dtype, const AdapterForward& args, const AdapterTiles& tiles, CudaStream stream) {
  if (!adapter_fuses(dtype, args.shape) || !adapter_rows_fuse(args.x) || !adapter_rows_fuse(args.residual) ||
      (tiles.held && !args.add_input)) {
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
    const bool aligned = rows_aligned<T>(args.hidden, count) && rows_aligned<T>(args.activated);
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
