// Checks and outputs that the CPU and the CUDA glue of cif share. The schema is in
// mmkernels/ops/cif/schema.py.
#pragma once

#include <cmath>
#include <tuple>

#include "mmkernels/cif.h"
#include "torch/glue.h"

namespace mmk::glue {

// x and alpha of a call, kept alive for its duration, and the parameters that point into them.
struct CifInputs {
  Tensor x, alpha;
  OptionalTensor lengths;
  CifParams params;

  CifInputs(const Tensor& given, const Tensor& given_alpha, const OptionalTensor& given_lengths, double beta,
            int64_t tokens) {
    STD_TORCH_CHECK(given.dim() == 3, "x: expected shape (batch, frames, width), got ", given.dim(),
                    " dimensions");
    STD_TORCH_CHECK(beta > 0 && std::isfinite(beta), "beta: expected a positive number, got ", beta);
    STD_TORCH_CHECK(tokens >= 0, "max_length: expected at least 0, got ", tokens);
    params = {};
    params.dtype = dtype_of(given, "x");
    params.batch = given.size(0);
    params.frames = given.size(1);
    params.width = given.size(2);
    params.tokens = tokens;
    params.beta = beta;
    const bool unit_stride = given.stride(2) == 1 || params.width <= 1;
    x = unit_stride ? given : torch::stable::contiguous(given);
    alpha =
        checked(given_alpha, {params.batch, params.frames}, accumulate_type(params.dtype), given, "alpha");
    lengths = checked(given_lengths, {params.batch}, ScalarType::Long, given, "lengths");
    params.x = x.const_data_ptr();
    params.batch_stride = stride_of(x, 0);
    params.frame_stride = stride_of(x, 1);
    params.alpha = alpha.const_data_ptr();
    params.lengths = static_cast<const int64_t*>(data_or_null(lengths));
  }
};

struct CifForwardCall {
  CifInputs inputs;
  OptionalTensor target_lengths;
  Tensor features, counts, ends, token, weights, facts, sums;
  CifForward args;

  // `sums` is for the CUDA kernels only.
  CifForwardCall(const Tensor& x, const Tensor& alpha, const OptionalTensor& lengths,
                 const OptionalTensor& given_targets, double beta, double tail_threshold, int64_t max_length,
                 bool need_sums)
      : inputs(x, alpha, lengths, beta, max_length) {
    const CifParams& p = inputs.params;
    target_lengths = checked(given_targets, {p.batch}, ScalarType::Long, x, "target_lengths");
    features = new_empty(x, {p.batch, p.tokens, p.width}, x.scalar_type());
    counts = new_empty(x, {p.batch}, ScalarType::Long);
    ends = new_empty(x, {p.batch, p.tokens}, ScalarType::Long);
    token = new_empty(x, {p.batch, p.frames + 1}, ScalarType::Int);
    weights = new_empty(x, {p.batch, p.frames, 2}, accumulate_type(p.dtype));
    facts = new_empty(x, {p.batch, 2}, ScalarType::Double);
    sums = new_empty(x, {need_sums ? p.batch : 0, p.frames}, ScalarType::Double);
    args = {
        p,
        {static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<int32_t*>(token.mutable_data_ptr()),
         weights.mutable_data_ptr(), static_cast<double*>(facts.mutable_data_ptr())},
        static_cast<const int64_t*>(data_or_null(target_lengths)),
        tail_threshold,
        features.mutable_data_ptr(),
        static_cast<int64_t*>(ends.mutable_data_ptr()),
        static_cast<double*>(mutable_or_null(sums))};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {features, counts, ends, token, weights, facts};
  }
};

struct CifBackwardCall {
  CifInputs inputs;
  Tensor grad, counts, token, weights, facts, dx, d_alpha, dots, sums;
  CifBackward args;

  CifBackwardCall(const Tensor& given_grad, const Tensor& x, const Tensor& alpha,
                  const OptionalTensor& lengths, const Tensor& given_counts, const Tensor& given_token,
                  const Tensor& given_weights, const Tensor& given_facts, double beta, bool scaled,
                  bool need_x, bool need_alpha, bool need_sums)
      : inputs(x, alpha, lengths, beta, given_grad.dim() == 3 ? given_grad.size(1) : 0) {
    const CifParams& p = inputs.params;
    const ScalarType accumulate = accumulate_type(p.dtype);
    check_shape(given_grad, {p.batch, p.tokens, p.width}, "grad");
    check_same_device(given_grad, x, "grad");
    STD_TORCH_CHECK(given_grad.scalar_type() == x.scalar_type(), "grad: expected the dtype of x");
    grad = given_grad.stride(2) == 1 || p.width <= 1 ? given_grad : torch::stable::contiguous(given_grad);
    counts = checked(given_counts, {p.batch}, ScalarType::Long, x, "counts");
    token = checked(given_token, {p.batch, p.frames + 1}, ScalarType::Int, x, "token");
    weights = checked(given_weights, {p.batch, p.frames, 2}, accumulate, x, "weights");
    facts = checked(given_facts, {p.batch, 2}, ScalarType::Double, x, "facts");
    dx = new_empty(x, {need_x ? p.batch : 0, p.frames, p.width}, x.scalar_type());
    d_alpha = new_empty(x, {need_alpha ? p.batch : 0, p.frames}, accumulate);
    dots = new_empty(x, {need_alpha ? p.batch : 0, p.frames, 2}, accumulate);
    sums = new_empty(x, {need_alpha && need_sums ? p.batch : 0, p.frames}, ScalarType::Double);
    // The kernels only read the plan.
    const auto read = [](const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); };
    args = {p,
            {static_cast<int64_t*>(read(counts)), static_cast<int32_t*>(read(token)), read(weights),
             static_cast<double*>(read(facts))},
            scaled,
            grad.const_data_ptr(),
            stride_of(grad, 0),
            stride_of(grad, 1),
            mutable_or_null(dx),
            mutable_or_null(d_alpha),
            mutable_or_null(dots),
            static_cast<double*>(mutable_or_null(sums))};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {dx, d_alpha}; }
};

}  // namespace mmk::glue
