// Shared by the forward and the backward kernel of adapter: two products around an activation,
//   forward   out = residual + scale * (act(x Vc^T ...) U^T + c)
//   backward  dx  = (g U * act' ...) Vc - pull * (x - mean) + g
//
// One block per multiprocessor takes a contiguous range of rows tile by tile. A ring in shared memory streams
// chunks of the tile, three stages hold the weights, and hidden values stay in registers between the
// products. The second product adds rows where they lie in the ring: those of the tile, if shared memory
// holds all of it, or else rows that are streamed once more.
// docs/design/adapter-cuda.md has the argument: bytes moved, tile sizes, estimated times.
#pragma once

#include "cuda/adapter_stream.cuh"
#include "cuda/common/activation.cuh"
#include "cuda/common/rows.cuh"

namespace mmk::cuda {

// ---- products

// sums += chunk of rows times stage of weights; calls body(inner, a) with the fragments a of the rows for
// each 32 columns: a[k][i] are columns inner + 16 k and rows 16 i.
template <class Tile, bool kTransposed, class Body>
MMK_DEVICE void first_product(typename Tile::HiddenSums& sums, const typename Tile::T* chunk,
                              const typename Tile::T* weights, Body&& body) {
  using T = typename Tile::T;
  constexpr int kVectors = Tile::kChunk / 8;
  constexpr int kBlocks = Tile::kHiddenBlocks;
  const ColumnFragments<kTransposed, kTransposed ? Tile::kBottleneck / 8 : kVectors, kBlocks, T> columns(
      weights, Tile::column_warp() * kBlocks);
  const RowFragments<kVectors, 2, T> rows(chunk, Tile::row_warp() * 32);
#pragma unroll
  for (int inner = 0; inner < Tile::kChunk; inner += 32) {
    uint32_t a[2][2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t b[kBlocks][2];
      columns.load(b, inner + 16 * k);
      rows.load(a[k], inner + 16 * k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) mma_m16n8k16<T>(sums[i][j], a[k][i], b[j]);
      }
    }
    body(inner, a);
  }
}

template <class Tile, bool kTransposed>
MMK_DEVICE void second_product(typename Tile::ChunkSums& sums, const typename Tile::HiddenFragments& hidden,
                               const typename Tile::T* weights) {
  using T = typename Tile::T;
  constexpr int kVectors = (kTransposed ? Tile::kChunk : Tile::kBottleneck) / 8;
  const ColumnFragments<kTransposed, kVectors, Tile::kChunkBlocks, T> columns(weights, Tile::chunk_block(0));
#pragma unroll
  for (int inner = 0; inner < Tile::kBottleneck; inner += 16) {
    uint32_t b[Tile::kChunkBlocks][2];
    columns.load(b, inner);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kChunkBlocks; ++j) mma_m16n8k16<T>(sums[i][j], hidden[inner / 16][i], b[j]);
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
  const RowFragments<kVectors, 2, typename Tile::T> rows(exchange, Tile::row_warp() * 32);
  // Blocks of a warp start at an even one, so that the place of block j differs by an exclusive or with j.
  static_assert(Tile::kHiddenBlocks % 2 == 0, "pairs of blocks");
  const int place = swizzled<kVectors>(Tile::row(0, 0), Tile::hidden_column(0) / 8 % kVectors);
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
          auto* target =
              exchange + moved<kVectors>(place, j % kVectors) + (i * 16 + h * 8) * kAdapterExchange;
          reinterpret_cast<uint32_t*>(target)[lane_index() % 4] = words[i][j][h];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kAdapterExchange / 16; ++k) {
      rows.load(fragments[round * (kAdapterExchange / 16) + k], k * 16);
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

template <class Tile>
MMK_DEVICE uint32_t& chunk_pair(typename Tile::T* chunk, int i, int j, int h) {
  return block_pair<Tile::kChunk / 8, Tile::kChunkBlocks>(chunk, Tile::row_warp() * 32, Tile::chunk_block(0),
                                                          i * 16 + h * 8, j);
}

template <class Tile>
MMK_DEVICE void load_words(ChunkWords<Tile>& words, typename Tile::T* chunk) {
#pragma unroll
  for (int n = 0; n < 4 * Tile::kChunkBlocks; ++n) {
    words[n / 2 % 2][n / 4][n % 2] = chunk_pair<Tile>(chunk, n / 2 % 2, n / 4, n % 2);
  }
}

// Writes this warp's part of a chunk from shared to device memory.
template <class Tile, bool kFull>
MMK_DEVICE void write_chunk(void* out, const typename Tile::T* chunk, int64_t first_row, int rows,
                            int64_t column, int64_t width) {
  __syncwarp();
  store_blocks<Tile::kChunk / 8, Tile::kChunkBlocks, kFull>(
      static_cast<typename Tile::T*>(out) + first_row * width + column, width, rows,
      static_cast<int>(width - column), chunk, Tile::row_warp() * 32, Tile::chunk_block(0));
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
