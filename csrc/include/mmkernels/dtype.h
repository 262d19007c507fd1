// Element types of the kernels, shared by the CPU and the CUDA side.
#pragma once

#include <cstdint>

namespace mmk {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace mmk
