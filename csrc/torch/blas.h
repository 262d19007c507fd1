// Products from torch's BLAS. Factors may be strided views; they are not copied.
#pragma once

#include <array>

#include "torch/glue.h"

namespace mmk::glue {

// out = a b, of batches of matrices
inline void bmm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The same with `out` in the type of the factors, or in float32, which keeps sums of half-precision factors
// unrounded. torch supports that on CUDA only.
inline void bmm_out_as(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  if (a.scalar_type() == out.scalar_type()) return bmm_out(out, a, b);
#ifdef MMK_SIMT
  bmm_out(out, torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float));
#else
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
#endif
}

}  // namespace mmk::glue
