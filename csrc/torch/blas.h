// Products from torch's own BLAS, written where the caller wants them: strided views cost no copies.
#pragma once

#include <array>

#include "torch/glue.h"

namespace mmk::glue {

// out = a b
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

// Rows [start, start + rows) of one tap of a (N, L, width) tensor, as a matrix.
inline Tensor tap_rows(Tensor tensor, int64_t tap, int64_t start, int64_t rows) {
  return torch::stable::select(torch::stable::narrow(tensor, 0, start, rows), 1, tap);
}

}  // namespace mmk::glue
