// Shared by the forward and the backward kernel of adapter: two products around an activation,
//   forward   out = residual + scale * (act(x Vc^T ...) U^T + c)
//   backward  dx  = (g U * act' ...) Vc - pull * (x - mean) + g
//
// One block per multiprocessor takes a contiguous range of rows tile by tile. A ring in shared memory streams
// chunks of the tile, three stages hold the weights, and hidden values stay in registers between the
// products. Where shared memory holds the whole tile, the second product adds it without reading it again.
// docs/design/adapter-cuda.md has the argument: bytes moved, tile sizes, estimated times.
#pragma once

#include <type_traits>

#include "cuda/common/activation.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/vector.cuh"
#include "mmkernels/adapter.h"

namespace mmk::cuda {

inline constexpr int kAdapterThreads = 256;
inline constexpr int64_t kAdapterTallBottleneck =
    128;                                     // tiles of 128 rows with more do not fit the registers
inline constexpr int kAdapterExchange = 32;  // hidden columns that warps exchange at a time

// Columns of a chunk. Wide bottlenecks get narrow chunks, which keeps the work between two barriers similar.
constexpr int adapter_chunk_columns(int64_t tile_rows, int64_t bottleneck) {
  return tile_rows * bottleneck <= 128 * 64 ? 64 : 32;
}

template <class Element, int kTileRows, int kPaddedBottleneck>
struct AdapterTile {
  using T = Element;
  static constexpr int kRows = kTileRows;
  static constexpr int kBottleneck = kPaddedBottleneck;
  static constexpr int kChunk = adapter_chunk_columns(kRows, kBottleneck);
  static constexpr int kStages = 3;  // of weights
  static constexpr int kRowWarps = kRows / 32;
  static constexpr int kColumnWarps = kAdapterThreads / kWarpSize / kRowWarps;
  // Blocks of 8 columns per warp, of the hidden values and of a chunk.
  static constexpr int kHiddenBlocks = kBottleneck / 8 / kColumnWarps;
  static constexpr int kChunkBlocks = kChunk / 8 / kColumnWarps;
  static constexpr int kSlotElements = kRows * kChunk;
  static constexpr int kStageElements = kBottleneck * kChunk;
  static constexpr int kExchangeElements = kRows * kAdapterExchange;
  // Shared memory without the slots.
  static constexpr int kFixedBytes =
      kRows * static_cast<int>(sizeof(float2)) + 2 * (kStages * kStageElements + kExchangeElements);
  static_assert(kBottleneck % 64 == 0 && kChunkBlocks >= 1, "whole blocks for every warp");

  using HiddenSums = float[2][kHiddenBlocks][4];
  using HiddenWords = uint32_t[2][kHiddenBlocks][2];         // HiddenSums rounded to T, two per word
  using HiddenFragments = uint32_t[2][kBottleneck / 16][4];  // hidden values of all columns
  using ChunkSums = float[2][kChunkBlocks][4];

  MMK_DEVICE static int row_warp() { return warp_index() / kColumnWarps; }
  MMK_DEVICE static int column_warp() { return warp_index() % kColumnWarps; }
  // Row of the tile that this lane holds in half h of fragment i.
  MMK_DEVICE static int row(int i, int h) { return row_warp() * 32 + i * 16 + h * 8 + lane_index() / 4; }
  // Whether this warp has any of the tile's first `rows` rows: a block's last tile may leave warps idle.
  MMK_DEVICE static bool live(int rows) { return row_warp() * 32 < rows; }
  MMK_DEVICE static int hidden_column(int block) {
    return (column_warp() * kHiddenBlocks + block) * 8 + lane_index() % 4 * 2;
  }
  MMK_DEVICE static int chunk_block(int j) { return column_warp() * kChunkBlocks + j; }
};

// Index of a vector of 8 elements in a tile of 8 * kVectors columns. The swizzle puts the same vector of
// eight neighbouring rows into different banks.
template <int kVectors>
MMK_DEVICE int swizzled(int row, int vector) {
  constexpr int kMask = (kVectors < 8 ? kVectors : 8) - 1;
  constexpr int kRowsPerLine = kVectors < 8 ? 8 / kVectors : 1;
  return (row * kVectors + (vector ^ (row / kRowsPerLine & kMask))) * 8;
}

template <class T>
MMK_DEVICE uint32_t pack(float low, float high) {
  const Vec<T, 2> pair = from_accumulator<T>(Vec<float, 2>{{low, high}});
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
MMK_DEVICE float2 unpack(uint32_t word) {
  const auto pair = to_accumulator(reinterpret_cast<const Vec<T, 2>&>(word));
  return {pair[0], pair[1]};
}

// ---- the stream of chunks and weights through shared memory

// The steps of a block: for each tile the chunks of the first product, then those of the second, if `second`.
// Weights are fetched kStages - 1 steps ahead, chunks of rows as soon as a slot is free.
template <class Tile, bool kBackward>
class AdapterStream {
 public:
  using T = typename Tile::T;

  MMK_DEVICE AdapterStream(unsigned char* buffer, const AdapterTiles& tiles, const AdapterShape& shape,
                           const AdapterRows& rows, const void* down, const void* up, bool second)
      : shape_(shape),
        rows_(rows),
        down_(static_cast<const T*>(down)),
        up_(static_cast<const T*>(up)),
        slots_(reinterpret_cast<T*>(buffer + Tile::kRows * sizeof(float2)) + Tile::kExchangeElements +
               Tile::kStages * Tile::kStageElements),
        begin_(static_cast<int64_t>(blockIdx.x) * tiles.rows_per_block),
        end_(min(begin_ + tiles.rows_per_block, shape.rows)),
        fetch_row_(begin_),
        chunks_(static_cast<int>(tiles.chunks)),
        steps_(second ? 2 * chunks_ : chunks_),
        slot_count_(static_cast<int>(tiles.slots)),
        held_(tiles.held && second),
        free_slots_(slot_count_),
        chunks_left_(static_cast<int>(tiles.tiles_per_block) * chunks_),
        weights_left_(static_cast<int>(tiles.tiles_per_block) * steps_) {
    // The previous kernel writes the folded weights; rows need not wait for it.
    fetch_rows();
    grid_dependency_wait();
    fetch_weights();
    cp_async_commit_group();
#pragma unroll 1
    for (int i = 1; i < Tile::kStages - 1; ++i) fetch();
  }

  // The first row of a tile and its number of rows, 0 for a tile past the end.
  MMK_DEVICE int64_t first_row(int tile) const { return begin_ + static_cast<int64_t>(tile) * Tile::kRows; }
  MMK_DEVICE int rows(int tile) const {
    const int64_t left = end_ - first_row(tile);
    return static_cast<int>(max(int64_t{0}, min(left, int64_t{Tile::kRows})));
  }
  MMK_DEVICE bool held() const { return held_; }

  // Moves all warps to the next step: waits for its data, frees the slot of the step before, starts copies
  // for later steps. It contains a barrier.
  MMK_DEVICE void next() {
    cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();
    if (started_) {
      const bool first = step_ < chunks_;
      if (first != held_) ++free_slots_;
      if (first) read_slot_ = wrapped(read_slot_ + 1, slot_count_);
      step_ = wrapped(step_ + 1, steps_);
      stage_ = wrapped(stage_ + 1, Tile::kStages);
    }
    started_ = true;
    fetch();
  }

  // The chunk [kRows][kChunk] of the current step of the first product.
  MMK_DEVICE const T* chunk() const { return slots_ + read_slot_ * Tile::kSlotElements; }
  // The slot where the current step of the second product leaves its result. If held, it has the chunk of the
  // input in the same columns.
  MMK_DEVICE T* place() const {
    return slots_ + (held_ ? step_ - chunks_ : slot_count_) * Tile::kSlotElements;
  }
  MMK_DEVICE const T* weights() const { return stage(stage_); }

 private:
  static constexpr int kBurst = 3;  // the most chunks fetched in one step

  MMK_DEVICE static int wrapped(int value, int count) { return value == count ? 0 : value; }

  MMK_DEVICE T* stage(int index) const { return slots_ - (Tile::kStages - index) * Tile::kStageElements; }

  MMK_DEVICE void fetch() {
    fetch_weights();
    fetch_rows();
    cp_async_commit_group();
  }

  MMK_DEVICE void fetch_weights() {
    if (weights_left_ > 0) {
      T* target = stage(fetch_stage_);
      const bool first = fetch_step_ < chunks_;
      const int column = (first ? fetch_step_ : fetch_step_ - chunks_) * Tile::kChunk;
      if (first != kBackward) {
        copy<Tile::kBottleneck, Tile::kChunk>(target, down_, shape_.width, 0, shape_.bottleneck, column,
                                              shape_.width);
      } else {
        copy<Tile::kChunk, Tile::kBottleneck>(target, up_, shape_.bottleneck, column, shape_.width, 0,
                                              shape_.bottleneck);
      }
      fetch_step_ = wrapped(fetch_step_ + 1, steps_);
      fetch_stage_ = wrapped(fetch_stage_ + 1, Tile::kStages);
      --weights_left_;
    }
  }

  MMK_DEVICE void fetch_rows() {
#pragma unroll 1
    for (int i = 0; i < kBurst && free_slots_ > 0 && chunks_left_ > 0; ++i) {
      copy<Tile::kRows, Tile::kChunk>(slots_ + fetch_slot_ * Tile::kSlotElements,
                                      static_cast<const T*>(rows_.data), rows_.row_stride, fetch_row_, end_,
                                      fetch_chunk_ * Tile::kChunk, shape_.width);
      fetch_slot_ = wrapped(fetch_slot_ + 1, slot_count_);
      fetch_chunk_ = wrapped(fetch_chunk_ + 1, chunks_);
      if (fetch_chunk_ == 0) fetch_row_ += Tile::kRows;
      --free_slots_;
      --chunks_left_;
    }
  }

  // Copies kTileRows x kColumns from (row, column) on; zero from end_row and end_column on.
  template <int kTileRows, int kColumns>
  MMK_DEVICE static void copy(T* tile, const T* data, int64_t stride, int64_t row, int64_t end_row,
                              int64_t column, int64_t end_column) {
    constexpr int kVectors = kColumns / 8;
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kAdapterThreads % kVectors == 0) {
      // All rows of a thread have the same swizzle, so that targets and sources have constant strides.
      constexpr int kStep = kAdapterThreads / kVectors;
      static_assert(kStep % 8 == 0 && kTileRows % kStep == 0, "whole periods of the swizzle");
      row += thread / kVectors;
      column += thread % kVectors * 8;
      T* target = tile + swizzled<kVectors>(thread / kVectors, thread % kVectors);
      const T* source = data + row * stride + column;
      const int64_t left = column < end_column ? end_row - row : 0;
#pragma unroll
      for (int r = 0; r < kTileRows; r += kStep) {
        const bool inside = r < left;
        cp_async_zfill<16>(target + r * kColumns, inside ? source + r * stride : data, inside);
      }
    } else {
      constexpr int kCount = kTileRows * kVectors;
      static_assert(kCount % kAdapterThreads == 0, "the same number of vectors for every thread");
#pragma unroll
      for (int index = thread; index < kCount; index += kAdapterThreads) {
        const int r = index / kVectors;
        const int v = index % kVectors;
        const bool inside = row + r < end_row && column + v * 8 < end_column;
        const T* source = inside ? data + (row + r) * stride + column + v * 8 : data;
        cp_async_zfill<16>(tile + swizzled<kVectors>(r, v), source, inside);
      }
    }
  }

  const AdapterShape& shape_;
  const AdapterRows& rows_;
  const T* down_;
  const T* up_;
  T* slots_;
  int64_t begin_, end_;
  int64_t fetch_row_;
  int chunks_, steps_, slot_count_;
  bool held_;
  bool started_ = false;
  int step_ = 0, stage_ = 0, read_slot_ = 0;
  int fetch_step_ = 0, fetch_stage_ = 0, fetch_slot_ = 0, fetch_chunk_ = 0;
  int free_slots_, chunks_left_, weights_left_;
};

// The shared memory before that of the stream.
template <class Tile>
struct AdapterShared {
  float2* rows;                // [kRows] two numbers per row: (mean, rstd) or (mean, pull)
  typename Tile::T* exchange;  // [kRows][kAdapterExchange]
  MMK_DEVICE explicit AdapterShared(unsigned char* buffer)
      : rows(reinterpret_cast<float2*>(buffer)),
        exchange(reinterpret_cast<typename Tile::T*>(buffer + Tile::kRows * sizeof(float2))) {}
};

// ---- products

// The address `vector` vectors to the right of `place`, whose vector is 0 or 1. The swizzle is an exclusive
// or, so a lane computes its place once and reaches the others by constants.
template <int kVectors, class T>
MMK_DEVICE const T* moved(const T* place, int vector) {
  constexpr int kLine = kVectors < 8 ? kVectors : 8;
  const uintptr_t address = reinterpret_cast<uintptr_t>(place) ^ static_cast<uintptr_t>(vector % kLine * 16);
  return reinterpret_cast<const T*>(address) + vector / kLine * kLine * 8;
}

// This lane's address for ldmatrix of 16 x 16 fragments from `row` on, in a tile of 8 * kVectors columns.
template <int kVectors, class T>
MMK_DEVICE const T* rows_place(const T* tile, int row) {
  return tile + swizzled<kVectors>(row + lane_index() % 16, lane_index() / 16);
}

// Loads kCount fragments (16 inner x 8 columns) of the right factor, from block `column` of 8 columns on. The
// tile is [columns][inner], or [inner][columns] if kTransposed; its rows have 8 * kVectors elements.
template <bool kTransposed, int kVectors, int kCount, class T>
class ColumnFragments {
 public:
  MMK_DEVICE ColumnFragments(const T* tile, int column) {
    const int lane = lane_index();
    if constexpr (kTransposed) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        places_[j] = tile + swizzled<kVectors>(lane % 16, column + 2 * j + (kCount > 1 ? lane / 16 : 0));
      }
    } else {
      places_[0] =
          tile + swizzled<kVectors>(column * 8 + lane % 8 + (kCount > 1 ? lane / 16 * 8 : 0), lane / 8 % 2);
    }
  }

  MMK_DEVICE void load(uint32_t (&b)[kCount][2], int inner) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const T* place = kTransposed ? places_[j] + inner * kVectors * 8
                                   : moved<kVectors>(places_[0], inner / 8) + j * 16 * kVectors * 8;
      if constexpr (kCount == 1) {
        ldmatrix<2, kTransposed>(b[0], place);
      } else {
        uint32_t pair[4];
        ldmatrix<4, kTransposed>(pair, place);
        b[2 * j][0] = pair[0], b[2 * j][1] = pair[1];
        b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
      }
    }
  }

 private:
  static_assert(kCount == 1 || kCount % 2 == 0, "one fragment or pairs");
  static constexpr int kPairs = (kCount + 1) / 2;
  const T* places_[kTransposed ? kPairs : 1];
};

// sums += chunk of rows times stage of weights; calls body(i, inner, a) for each fragment a of the rows.
template <class Tile, bool kTransposed, class Body>
MMK_DEVICE void first_product(typename Tile::HiddenSums& sums, const typename Tile::T* chunk,
                              const typename Tile::T* weights, Body&& body) {
  using T = typename Tile::T;
  constexpr int kVectors = Tile::kChunk / 8;
  const ColumnFragments<kTransposed, kTransposed ? Tile::kBottleneck / 8 : kVectors, Tile::kHiddenBlocks, T>
      columns(weights, Tile::column_warp() * Tile::kHiddenBlocks);
  const T* rows = rows_place<kVectors>(chunk, Tile::row_warp() * 32);
#pragma unroll
  for (int inner = 0; inner < Tile::kChunk; inner += 16) {
    uint32_t b[Tile::kHiddenBlocks][2];
    columns.load(b, inner);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4];
      ldmatrix<4, false>(a, moved<kVectors>(rows, inner / 8) + i * 16 * Tile::kChunk);
      body(i, inner, a);
#pragma unroll
      for (int j = 0; j < Tile::kHiddenBlocks; ++j) mma_m16n8k16<T>(sums[i][j], a, b[j]);
    }
  }
}

template <class Tile, bool kTransposed>
MMK_DEVICE void second_product(typename Tile::ChunkSums& sums, const typename Tile::HiddenFragments& hidden,
                               const typename Tile::T* weights) {
  using T = typename Tile::T;
  const ColumnFragments<kTransposed, (kTransposed ? Tile::kChunk : Tile::kBottleneck) / 8, Tile::kChunkBlocks,
                        T>
      columns(weights, Tile::chunk_block(0));
#pragma unroll
  for (int inner = 0; inner < Tile::kBottleneck; inner += 16) {
    uint32_t b[Tile::kChunkBlocks][2];
    columns.load(b, inner);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kChunkBlocks; ++j) {
        mma_m16n8k16<T>(sums[i][j], hidden[i][inner / 16], b[j]);
      }
    }
  }
}

// ---- between the products

// Calls body(block, sums of rows 0 to 15, sums of rows 16 to 31, words) for each block of 8 columns, to
// replace the old words by new ones. Not unrolled, so that the code of the activations exists once: the loop
// shifts the arrays by one block instead of indexing them, which keeps them in registers.
template <class Tile, class Body>
MMK_DEVICE void finish_hidden(typename Tile::HiddenSums& sums, typename Tile::HiddenWords& words,
                              Body&& body) {
  constexpr int kBlocks = Tile::kHiddenBlocks;
#pragma unroll 1
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t finished[2][2] = {{words[0][0][0], words[0][0][1]}, {words[1][0][0], words[1][0][1]}};
    body(block, sums[0][0], sums[1][0], finished);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j + 1 < kBlocks; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][j][k] = sums[i][j + 1][k];
#pragma unroll
        for (int h = 0; h < 2; ++h) words[i][j][h] = words[i][j + 1][h];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) words[i][kBlocks - 1][h] = finished[i][h];
    }
  }
}

// Gives every warp the hidden values of its rows in all columns. Needs a barrier after the last use of the
// exchange, and ends with one.
template <class Tile>
MMK_DEVICE void exchange_hidden(typename Tile::T* exchange, const typename Tile::HiddenWords& words,
                                typename Tile::HiddenFragments& fragments) {
  constexpr int kVectors = kAdapterExchange / 8;
  const auto* rows =
      rows_place<kVectors>(static_cast<const typename Tile::T*>(exchange), Tile::row_warp() * 32);
#pragma unroll
  for (int round = 0; round < Tile::kBottleneck / kAdapterExchange; ++round) {
#pragma unroll
    for (int j = 0; j < Tile::kHiddenBlocks; ++j) {
      const int block = Tile::column_warp() * Tile::kHiddenBlocks + j;
      if (block / kVectors != round) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          auto* target = exchange + swizzled<kVectors>(Tile::row(i, h), block % kVectors);
          reinterpret_cast<uint32_t*>(target)[lane_index() % 4] = words[i][j][h];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < kAdapterExchange / 16; ++k) {
        ldmatrix<4, false>(fragments[i][round * (kAdapterExchange / 16) + k],
                           moved<kVectors>(rows, 2 * k) + i * 16 * kAdapterExchange);
      }
    }
    __syncthreads();
  }
}

// ---- writing the result of a step of the second product

// Column of this lane's pairs in block j of a chunk that starts at `column`.
template <class Tile>
MMK_DEVICE int64_t pair_column(int64_t column, int j) {
  return column + Tile::chunk_block(j) * 8 + lane_index() % 4 * 2;
}

// Calls body(i, j, h, row of the tile, column of the matrix) for this lane's pairs inside the matrix; for all
// of them, without a test, if the chunk is full.
template <class Tile, bool kFull, class Body>
MMK_DEVICE void for_each_pair(int rows, int64_t column, int64_t width, Body&& body) {
#pragma unroll
  for (int j = 0; j < Tile::kChunkBlocks; ++j) {
    const int64_t c = pair_column<Tile>(column, j);
    if (!kFull && c >= width) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (kFull || Tile::row(i, h) < rows) body(i, j, h, Tile::row(i, h), c);
      }
    }
  }
}

// This lane's pairs of a chunk, two elements of T in each word.
template <class Tile>
using ChunkWords = uint32_t[2][Tile::kChunkBlocks][2];

// Loads the pairs of a matrix of T, all before the first is used.
template <class Tile, bool kFull>
MMK_DEVICE void load_pairs(ChunkWords<Tile>& words, const AdapterRows& from, int64_t first_row, int rows,
                           int64_t column, int64_t width) {
  const auto* data = static_cast<const typename Tile::T*>(from.data) + first_row * from.row_stride;
  for_each_pair<Tile, kFull>(rows, column, width, [&](int i, int j, int h, int row, int64_t c) {
    words[i][j][h] = __ldg(reinterpret_cast<const uint32_t*>(data + row * from.row_stride + c));
  });
}

// This lane's pair of elements in a chunk in shared memory.
template <class Tile>
MMK_DEVICE uint32_t& chunk_pair(typename Tile::T* chunk, int i, int j, int h) {
  auto* vector = chunk + swizzled<Tile::kChunk / 8>(Tile::row(i, h), Tile::chunk_block(j));
  return reinterpret_cast<uint32_t*>(vector)[lane_index() % 4];
}

// Writes this warp's part of a chunk from shared to device memory, in coalesced 16-byte stores.
template <class Tile, bool kFull>
MMK_DEVICE void write_chunk(typename Tile::T* out, const typename Tile::T* chunk, int64_t first_row, int rows,
                            int64_t column, int64_t width) {
  constexpr int kBlocks = Tile::kChunkBlocks;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    const int index = k * kWarpSize + lane_index();
    const int row = Tile::row_warp() * 32 + index / kBlocks;
    const int block = Tile::chunk_block(index % kBlocks);
    const int64_t c = column + block * 8;
    if (!kFull && (row >= rows || c >= width)) continue;
    const auto value = load<8>(chunk + swizzled<Tile::kChunk / 8>(row, block));
    store_columns<true>(out + (first_row + row) * width, c, width, value);
  }
}

// Calls body(constant<bool>): whether the chunk is full. A second copy of the body serves the last ones.
template <class Tile, class Body>
MMK_DEVICE void dispatch_full(int rows, int64_t column, int64_t width, Body&& body) {
  if (rows == Tile::kRows && column + Tile::kChunk <= width) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// ---- launching

// Calls body(AdapterTile) with the tile type of a plan.
template <class T, class Body>
cudaError_t dispatch_adapter_tile(const AdapterTiles& tiles, Body&& body) {
  const bool tall = tiles.tile_rows == 128;
  switch (tiles.bottleneck) {
    case 64:
      return tall ? body(AdapterTile<T, 128, 64>{}) : body(AdapterTile<T, 64, 64>{});
    case 128:
      return tall ? body(AdapterTile<T, 128, 128>{}) : body(AdapterTile<T, 64, 128>{});
    case 192:
      return tall ? cudaErrorInvalidValue : body(AdapterTile<T, 64, 192>{});
    case 256:
      return tall ? cudaErrorInvalidValue : body(AdapterTile<T, 64, 256>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mmk::cuda
