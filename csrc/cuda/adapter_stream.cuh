// The tiles of adapter's fused kernels, and the stream of chunks and weights through shared memory that feeds
// them (docs/design/adapter-cuda.md).
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"
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
  using HiddenFragments = uint32_t[kBottleneck / 16][2][4];  // hidden values of all columns
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

// The steps of a block: for each tile the chunks of the first product, then those of the second, if `second`.
// Half of the warps copy weights, kStages - 1 steps ahead, and half copy rows, as soon as a slot is free.
// Copies of a thread complete in order: a thread that copied both would wait for rows with each weight.
template <class Tile, bool kBackward>
class AdapterStream {
 public:
  using T = typename Tile::T;

  // added: rows that the second product adds and that are not held; null for none.
  MMK_DEVICE AdapterStream(T* stages, const AdapterTiles& tiles, const AdapterShape& shape,
                           const AdapterRows& rows, const AdapterRows& added, const void* down,
                           const void* up, bool second)
      : shape_(shape),
        rows_(rows),
        added_(added),
        down_(static_cast<const T*>(down)),
        up_(static_cast<const T*>(up)),
        stages_(stages),
        slots_(stages + Tile::kStages * Tile::kStageElements),
        begin_(static_cast<int64_t>(blockIdx.x) * tiles.rows_per_block),
        end_(min(begin_ + tiles.rows_per_block, shape.rows)),
        chunks_(static_cast<int>(tiles.chunks)),
        steps_(second ? 2 * chunks_ : chunks_),
        slot_count_(static_cast<int>(tiles.slots)),
        held_(tiles.held && second),
        streamed_(!held_ && second && added.data != nullptr),
        row_steps_(streamed_ ? steps_ : chunks_),
        fetch_row_(begin_),
        free_slots_(slot_count_),
        chunks_left_(static_cast<int>(tiles.tiles_per_block) * row_steps_),
        weights_left_(static_cast<int>(tiles.tiles_per_block) * steps_) {
    // The previous kernel writes the folded weights; rows need not wait for it.
#pragma unroll 1
    for (int i = 0; i < kBurst; ++i) fetch_rows();
    grid_dependency_wait();
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) fetch_weights(i, i);
  }

  // The first row of a tile and its number of rows, 0 for a tile past the end.
  MMK_DEVICE int64_t first_row(int tile) const { return begin_ + static_cast<int64_t>(tile) * Tile::kRows; }
  MMK_DEVICE int rows(int tile) const {
    const int64_t left = end_ - first_row(tile);
    return static_cast<int>(max(int64_t{0}, min(left, int64_t{Tile::kRows})));
  }

  // Moves all warps to the next step: waits for its data, frees the slot of the step before, starts copies
  // for later steps. It contains a barrier.
  MMK_DEVICE void next() {
    step_ = wrapped(step_ + 1, steps_);
    const int freed_stage = stage_;
    stage_ = wrapped(stage_ + 1, Tile::kStages);
    const bool first = step_ < chunks_;
    if (first || adds()) slot_ = wrapped(slot_ + 1, slot_count_);
    if (first || streamed_) --chunks_ahead_;
    if (copies_weights()) {
      cp_async_wait_group<Tile::kStages - 2>();
    } else if (first || streamed_) {
      wait_for_chunk();
    }
    __syncthreads();
    free_slots_ += freed_;
    freed_ = first ? !held_ : adds();
    const int later = step_ + Tile::kStages - 1;
    fetch_weights(later < steps_ ? later : later - steps_, freed_stage);
    fetch_rows();
  }

  // Whether the current step of the second product finds rows to add in place().
  MMK_DEVICE bool adds() const { return held_ || streamed_; }
  // The chunk [kRows][kChunk] of the current step of the first product.
  MMK_DEVICE const T* chunk() const { return slots_ + slot_ * Tile::kSlotElements; }
  // Where the current step of the second product leaves its result.
  MMK_DEVICE T* place() const { return slots_ + (adds() ? slot_ : slot_count_) * Tile::kSlotElements; }
  MMK_DEVICE const T* weights() const { return stages_ + stage_ * Tile::kStageElements; }

 private:
  static constexpr int kCopyThreads = kAdapterThreads / 2;
  // Chunks in flight before the first step; later steps fetch one each. 64 KB keep the memory busy.
  static constexpr int kBurst = 32 * 1024 / Tile::kSlotElements;

  MMK_DEVICE static int wrapped(int value, int count) { return value == count ? 0 : value; }
  MMK_DEVICE static bool copies_weights() { return threadIdx.x < kCopyThreads; }

  // Each chunk is a group of copies: all but the latest chunks_ahead_ must have arrived.
  MMK_DEVICE void wait_for_chunk() const {
    if (chunks_ahead_ >= 8) {
      cp_async_wait_group<8>();
    } else if (chunks_ahead_ >= 4) {
      cp_async_wait_group<4>();
    } else if (chunks_ahead_ >= 2) {
      cp_async_wait_group<2>();
    } else {
      cp_async_wait_group<0>();
    }
  }

  MMK_DEVICE void fetch_weights(int step, int stage) {
    if (!copies_weights()) return;
    if (weights_left_-- > 0) {
      T* target = stages_ + stage * Tile::kStageElements;
      const bool first = step < chunks_;
      const int column = (first ? step : step - chunks_) * Tile::kChunk;
      const int columns = static_cast<int>(shape_.width) - column;
      const int thread = static_cast<int>(threadIdx.x);
      const int bottleneck = static_cast<int>(shape_.bottleneck);
      if (first != kBackward) {
        copy_tile<Tile::kBottleneck, Tile::kChunk / 8, kCopyThreads>(target, down_ + column, shape_.width,
                                                                     bottleneck, columns, thread);
      } else {
        copy_tile<Tile::kChunk, Tile::kBottleneck / 8, kCopyThreads>(target, up_ + column * shape_.bottleneck,
                                                                     bottleneck, columns, bottleneck, thread);
      }
    }
    cp_async_commit_group();
  }

  MMK_DEVICE void fetch_rows() {
    if (free_slots_ == 0 || chunks_left_ == 0) return;
    if (!copies_weights()) {
      const bool first = fetch_chunk_ < chunks_;
      const auto* data = static_cast<const T*>(first ? rows_.data : added_.data);
      const int64_t stride = first ? rows_.row_stride : added_.row_stride;
      const int column = (first ? fetch_chunk_ : fetch_chunk_ - chunks_) * Tile::kChunk;
      copy_tile<Tile::kRows, Tile::kChunk / 8, kCopyThreads>(
          slots_ + fetch_slot_ * Tile::kSlotElements, data + fetch_row_ * stride + column, stride,
          end_ - fetch_row_, static_cast<int>(shape_.width) - column,
          static_cast<int>(threadIdx.x) - kCopyThreads);
      cp_async_commit_group();
    }
    fetch_slot_ = wrapped(fetch_slot_ + 1, slot_count_);
    fetch_chunk_ = wrapped(fetch_chunk_ + 1, row_steps_);
    if (fetch_chunk_ == 0) fetch_row_ += Tile::kRows;
    --free_slots_;
    --chunks_left_;
    ++chunks_ahead_;
  }

  const AdapterShape& shape_;
  const AdapterRows& rows_;
  const AdapterRows added_;
  const T *down_, *up_;
  T *stages_, *slots_;
  int64_t begin_, end_;
  int chunks_, steps_, slot_count_;
  bool held_, streamed_;
  int row_steps_;  // of a tile: steps that take a chunk of rows from the stream
  int step_ = -1, stage_ = Tile::kStages - 1, slot_ = -1;
  int64_t fetch_row_;
  int fetch_slot_ = 0, fetch_chunk_ = 0;
  int free_slots_, freed_ = 0, chunks_left_, weights_left_;
  int chunks_ahead_ = 0;  // fetched for steps after the current one
};

// The shared memory before the slots.
template <class Tile>
struct AdapterShared {
  float2* rows;                // [kRows] two numbers per row: (mean, rstd) or (mean, pull)
  typename Tile::T* exchange;  // [kRows][kAdapterExchange]
  typename Tile::T* stages;    // kStages of weights
  MMK_DEVICE explicit AdapterShared(unsigned char* buffer)
      : rows(reinterpret_cast<float2*>(buffer)),
        exchange(reinterpret_cast<typename Tile::T*>(rows + Tile::kRows)),
        stages(exchange + Tile::kExchangeElements) {}
};

}  // namespace mmk::cuda
