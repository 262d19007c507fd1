// ldmatrix and mma.sync as warp collectives; lane layouts from the PTX ISA, "Warp-level matrix instructions".
#include "simt/tensor_core.h"

#include <bit>
#include <cstring>

#include "simt/internal.h"
#include "simt/races.h"
#include "simt/traffic.h"

namespace mmk::simt {
namespace {

struct LoadFrame {
  uint32_t* fragment;
  int tiles;
  bool transposed;
  const void* row;
};

void complete_ldmatrix(void* const (&frames)[kWarpSize], unsigned) {
  const auto& first = *static_cast<const LoadFrame*>(frames[0]);
  for (int tile = 0; tile < first.tiles; ++tile) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto& frame = *static_cast<const LoadFrame*>(frames[8 * tile + row]);
      if (reinterpret_cast<uintptr_t>(frame.row) % 16 != 0)
        fail("ldmatrix: row %p is not 16-byte aligned", frame.row);
      require_shared(frame.row, 16, "ldmatrix");
      std::memcpy(matrix[row], frame.row, 16);
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const unsigned row = lane / 4;
      const unsigned column = lane % 4 * 2;
      const uint32_t low = first.transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = first.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<const LoadFrame*>(frames[lane])->fragment[tile] = low | high << 16;
    }
  }
}

float to_float(__half, uint16_t bits) {
  return __half2float(std::bit_cast<__half>(bits));
}
float to_float(__nv_bfloat16, uint16_t bits) {
  return __bfloat162float(std::bit_cast<__nv_bfloat16>(bits));
}

struct MultiplyFrame {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Register r of the A fragment holds rows g + 8 * (r % 2) and columns 2t + 8 * (r / 2); of B, rows 2t + 8 *
// r, column g.
template <class T>
void complete_mma(void* const (&frames)[kWarpSize], unsigned) {
  float a[16][16];
  float b[16][8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& frame = *static_cast<const MultiplyFrame*>(frames[lane]);
    const unsigned group = lane / 4;
    const unsigned pair = lane % 4 * 2;
    for (unsigned half = 0; half < 2; ++half) {
      const auto element = [half](uint32_t word) {
        return to_float(T(), static_cast<uint16_t>(half == 0 ? word : word >> 16));
      };
      for (unsigned r = 0; r < 4; ++r)
        a[group + 8 * (r % 2)][pair + 8 * (r / 2) + half] = element(frame.a[r]);
      for (unsigned r = 0; r < 2; ++r) b[pair + 8 * r + half][group] = element(frame.b[r]);
    }
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& frame = *static_cast<const MultiplyFrame*>(frames[lane]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + 8 * (i / 2);
      const unsigned column = lane % 4 * 2 + i % 2;
      float sum = frame.d[i];
      for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      frame.d[i] = sum;
    }
  }
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const std::source_location& where) {
  MultiplyFrame frame{d, a, b};
  warp_collective({"mma.sync", complete_mma<T>, true}, 0xffffffffu, &frame, where);
}

}  // namespace

void ldmatrix(uint32_t* fragment, int tiles, bool transposed, const void* row,
              const std::source_location& where) {
  // A lane reads the row at its address; addresses of lanes past the last tile are ignored.
  if (lane_index() < 8u * static_cast<unsigned>(tiles)) {
    record_access(row, 16, AccessKind::kRead, __builtin_return_address(0));
    count_access(row, 16, Operation::kMatrixLoad, __builtin_return_address(0));
  }
  LoadFrame frame{fragment, tiles, transposed, row};
  warp_collective({"ldmatrix", complete_ldmatrix, true}, 0xffffffffu, &frame, where);
}

template <>
void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          const std::source_location& where) {
  multiply<__half>(d, a, b, where);
}

template <>
void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const std::source_location& where) {
  multiply<__nv_bfloat16>(d, a, b, where);
}

}  // namespace mmk::simt
