// ldmatrix and mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "simt/runtime.h"

namespace mmk::simt {

void ldmatrix(uint32_t* fragment, int tiles, bool transposed, const void* row,
              const std::source_location& where = std::source_location::current());

// Specialised for __half and __nv_bfloat16.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const std::source_location& where = std::source_location::current());

}  // namespace mmk::simt
