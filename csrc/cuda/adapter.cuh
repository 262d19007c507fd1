// What the forward and the backward kernel of adapter share. Both are two products around an activation,
//   forward   out = residual + scale * (act(x Vc^T ...) U^T + c)
//   backward  dx  = (g U * act' ...) Vc - pull * (x - mean) + g
// and differ in what is streamed (x, or g), in which weight comes first, and in what is done in between.
//
// The plan, by bytes. At rows R, width D and bottleneck d = 64, x and out are 2 R D elements of device
// memory, and the weights, 2 D d for each tile of rows, come from L2: with 128 rows to a tile as many as x
// alone, with 64 twice that, which L2 cannot deliver in the time that the memory needs. So a tile has 128
// rows wherever it can be held in shared memory (227 KB on sm_90: up to D = 768), else 64 rows (up to
// D = 1,280 for d = 128; 163 KB on sm_80: D = 1,024), and where that does not fit either, 128 rows that are
// not held: the second product's addend is then read again. With one block of 8 warps to a multiprocessor,
// memory is kept busy by the ring: while the second product gives up the columns of a tile one chunk after
// another, the same columns of the next tile are on their way into them. A block has one run of rows, so
// that all blocks end together.
//
//   shared memory, D = 768, d = 64:  12 slots of 128 x 64 of x   196,608 bytes
//                                    3 stages of 64 x 64 weights  24,576
//                                    128 x 32 hidden values        8,192
//                                    mean and 1 / deviation        1,024
//
// What that costs at R = 38,848, D = 768, d = 64 on an H200 (132 multiprocessors, 4.8 TB/s), worked out and
// not measured. There are 128 blocks of 304 rows, in tiles of 128, 128 and 48 rows; in the last one half of
// the warps have none, and idle.
//
//   device memory  2 R D elements = 119 MB, 64 FLOP to a byte         28 us at 90 % of peak
//   L2             these and 75 MB of weights                         5.2 TB/s, if done in 37 us
//   tensor cores   4 R D d = 7.6 GFLOP                                13 us at what mma.sync reaches
//   shared memory  2.2 MB for a tile of 128 rows: copies in, both     24 us at 128 bytes a clock
//                  factors of each product, the result in and out
//
// So 75 % of a copy's bandwidth, 37 us, leaves 9 us for what does not overlap: the first product of a tile,
// during which no slot becomes free, the first tile's way in, and the last one's way out. Occupancy is one
// block, 8 of 64 warps. Folding the weights is one launch in front, which overlaps the first loads from sm_90
// on. The backward kernel moves 3 R D elements (g, x, dx; with no LayerNorm not x), 45 us, and the two
// library products behind it 2 R D, 28 us; half of the bandwidth, counted on 5 R D elements, is 139 us.
//
// Where shared memory is short the ring shrinks, down to three slots: any plan fits 99 KB, that of sm_86.
//
// Warps are 4 x 2 over a tile of 128 rows, 2 x 4 over one of 64: each has 32 rows. The hidden values cross
// between the warps of the same rows through shared memory, 32 columns at a time, and stay in registers as
// the factor of the second product. All tiles in shared memory are swizzled rather than padded.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/vector.cuh"
#include "mmkernels/adapter.h"

namespace mmk::cuda {

inline constexpr int kAdapterThreads = 256;
inline constexpr int64_t kAdapterTallBottleneck = 128;  // with more, 128 rows do not fit the registers
inline constexpr int kAdapterExchange = 32;             // hidden columns that cross between warps at a time

// Columns of a chunk: about as many multiplications between two barriers for every bottleneck.
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
  // Of one warp: blocks of 8 columns of the hidden values, and of a chunk.
  static constexpr int kHiddenBlocks = kBottleneck / 8 / kColumnWarps;
  static constexpr int kChunkBlocks = kChunk / 8 / kColumnWarps;
  static constexpr int kSlotElements = kRows * kChunk;
  static constexpr int kStageElements = kBottleneck * kChunk;
  static constexpr int kExchangeElements = kRows * kAdapterExchange;
  // All but the slots.
  static constexpr int kFixedBytes =
      kRows * static_cast<int>(sizeof(float2)) + 2 * (kStages * kStageElements + kExchangeElements);
  static_assert(kBottleneck % 64 == 0 && kChunkBlocks >= 1, "whole blocks for every warp");

  using HiddenSums = float[2][kHiddenBlocks][4];
  using HiddenWords = uint32_t[2][kHiddenBlocks][2];         // the same in T, two to a word
  using HiddenFragments = uint32_t[2][kBottleneck / 16][4];  // of all columns
  using ChunkSums = float[2][kChunkBlocks][4];

  MMK_DEVICE static int row_warp() { return warp_index() / kColumnWarps; }
  MMK_DEVICE static int column_warp() { return warp_index() % kColumnWarps; }
  // Place in the tile of this lane's element of fragment i, half h.
  MMK_DEVICE static int row(int i, int h) { return row_warp() * 32 + i * 16 + h * 8 + lane_index() / 4; }
  // Whether this warp has any of a tile's first `rows` rows: in the last tile of a block half of them may
  // not.
  MMK_DEVICE static bool live(int rows) { return row_warp() * 32 < rows; }
  MMK_DEVICE static int hidden_column(int block) {
    return (column_warp() * kHiddenBlocks + block) * 8 + lane_index() % 4 * 2;
  }
  MMK_DEVICE static int chunk_block(int j) { return column_warp() * kChunkBlocks + j; }
};

// Index of 8 elements in a tile of kVectors times 8 columns. Eight rows at one column lie in different banks.
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

// The steps of a block: for each tile the chunks of the first product, then, where there is one, those of the
// second. Weights arrive kStages - 1 steps ahead, chunks of rows as early as there are free slots.
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
    // The weights are what the kernel before this one folds; rows need not wait for it.
    fetch_rows();
    grid_dependency_wait();
    fetch_weights();
    cp_async_commit_group();
#pragma unroll 1
    for (int i = 1; i < Tile::kStages - 1; ++i) fetch();
  }

  // Rows of a tile: the first one, and how many there are (none in a tile behind the end).
  MMK_DEVICE int64_t first_row(int tile) const { return begin_ + static_cast<int64_t>(tile) * Tile::kRows; }
  MMK_DEVICE int rows(int tile) const {
    const int64_t left = end_ - first_row(tile);
    return static_cast<int>(max(int64_t{0}, min(left, int64_t{Tile::kRows})));
  }
  MMK_DEVICE bool held() const { return held_; }

  // Waits for what the next step needs, ends the last one for all warps, and starts copies for later ones.
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

  // [kRows][kChunk] of the current step of the first product.
  MMK_DEVICE const T* chunk() const { return slots_ + read_slot_ * Tile::kSlotElements; }
  // Where the current step of the second product finds its chunk, if held, and leaves its result.
  MMK_DEVICE T* place() const {
    return slots_ + (held_ ? step_ - chunks_ : slot_count_) * Tile::kSlotElements;
  }
  MMK_DEVICE const T* weights() const { return stage(stage_); }

 private:
  static constexpr int kBurst = 3;  // chunks started in a step

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

  // kTileRows x kColumns from (row, column) on; zero from end_row and end_column on.
  template <int kTileRows, int kColumns>
  MMK_DEVICE static void copy(T* tile, const T* data, int64_t stride, int64_t row, int64_t end_row,
                              int64_t column, int64_t end_column) {
    constexpr int kVectors = kColumns / 8;
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kAdapterThreads % kVectors == 0) {
      // The rows of a thread are swizzled alike, so that places and sources are constant steps apart.
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
      static_assert(kCount % kAdapterThreads == 0, "as many vectors for every thread");
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

// The parts of shared memory in front of the stream's.
template <class Tile>
struct AdapterShared {
  float2* rows;                // [kRows] what an epilogue needs of each row
  typename Tile::T* exchange;  // [kRows][kAdapterExchange]
  MMK_DEVICE explicit AdapterShared(unsigned char* buffer)
      : rows(reinterpret_cast<float2*>(buffer)),
        exchange(reinterpret_cast<typename Tile::T*>(buffer + Tile::kRows * sizeof(float2))) {}
};

// ---- products

// The place `vector` times 8 columns to the right of one whose own vector is 0 or 1: swizzling is an
// exclusive or, so that a lane's place in a tile is worked out once, and the way from there is a constant.
template <int kVectors, class T>
MMK_DEVICE const T* moved(const T* place, int vector) {
  constexpr int kLine = kVectors < 8 ? kVectors : 8;
  const uintptr_t address = reinterpret_cast<uintptr_t>(place) ^ static_cast<uintptr_t>(vector % kLine * 16);
  return reinterpret_cast<const T*>(address) + vector / kLine * kLine * 8;
}

// This lane's place for fragments of 16 rows and 16 columns of a tile of kVectors times 8 columns.
template <int kVectors, class T>
MMK_DEVICE const T* rows_place(const T* tile, int row) {
  return tile + swizzled<kVectors>(row + lane_index() % 16, lane_index() / 16);
}

// The second factor's fragments of 16 inner times 8 columns, kCount at a time, from block `column` of 8
// columns on. The tile is [columns][inner], or where kTransposed [inner][columns], of kVectors times 8 to a
// row.
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

// Adds the product of a chunk of rows with a stage of weights; body(i, inner, a) sees the fragments of rows.
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

// Turns sums into words, body(block, rows 0 to 15, rows 16 to 31, words) for each block of 8 columns; it
// finds in words what was there before. The loop is not unrolled, so that the activations' code exists once:
// the arrays move past index 0 instead.
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

// Gives every warp the hidden values of its rows in all columns. Ends with a barrier; before it, no thread
// may still use the exchange.
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

// ---- the result of a step of the second product

// body(i, j, h, row of the tile, column of the matrix) for each pair of elements of this lane that exists.
template <class Tile, class Body>
MMK_DEVICE void for_each_pair(int rows, int64_t column, int64_t width, Body&& body) {
#pragma unroll
  for (int j = 0; j < Tile::kChunkBlocks; ++j) {
    const int64_t c = column + Tile::chunk_block(j) * 8 + lane_index() % 4 * 2;
    if (c >= width) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (Tile::row(i, h) < rows) body(i, j, h, Tile::row(i, h), c);
      }
    }
  }
}

// The pair of this lane in a chunk in shared memory.
template <class Tile>
MMK_DEVICE uint32_t& chunk_pair(typename Tile::T* chunk, int i, int j, int h) {
  auto* vector = chunk + swizzled<Tile::kChunk / 8>(Tile::row(i, h), Tile::chunk_block(j));
  return reinterpret_cast<uint32_t*>(vector)[lane_index() % 4];
}

// Writes this warp's part of a chunk, whole vectors, from shared to device memory.
template <class Tile>
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
    if (row >= rows || c >= width) continue;
    const auto value = load<8>(chunk + swizzled<Tile::kChunk / 8>(row, block));
    store_columns<true>(out + (first_row + row) * width, c, width, value);
  }
}

// ---- launching

// Calls body(AdapterTile) with the tile of a plan.
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
