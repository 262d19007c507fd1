// Checks and outputs that the CPU and the CUDA glue of distill_loss share. The schema is in
// mmkernels/ops/distill_loss/schema.py.
#pragma once

#include <cmath>
#include <tuple>

#include "mmkernels/distill_loss.h"
#include "torch/glue.h"

namespace mmk::glue {

// Tensors of a call, kept alive for its duration, and the parameters that point into them.
struct DistillLossInputs {
  Tensor pred, table, ids;
  OptionalTensor counts;
  DistillLossParams params;

  DistillLossInputs(const Tensor& given, const Tensor& given_table, const Tensor& given_ids,
                    const OptionalTensor& given_counts, double cosine_weight) {
    STD_TORCH_CHECK(given.dim() == 3, "pred: expected shape (batch, tokens, width), got ", given.dim(),
                    " dimensions");
    STD_TORCH_CHECK(given_table.dim() == 2 && given_table.size(1) == given.size(2),
                    "table: expected rows of the width of pred");
    check_same_device(given_table, given, "table");
    STD_TORCH_CHECK(std::isfinite(cosine_weight), "cosine_weight: expected a finite number");
    params = {};
    params.dtype = dtype_of(given, "pred");
    params.table_dtype = dtype_of(given_table, "table");
    params.batch = given.size(0);
    params.tokens = given.size(1);
    params.width = given.size(2);
    params.vocabulary = given_table.size(0);
    params.cosine_weight = cosine_weight;
    pred = dense_rows(given, 2);
    table = dense_rows(given_table, 1);
    ids = checked(given_ids, {params.batch, params.tokens}, ScalarType::Long, given, "ids");
    counts = checked(given_counts, {params.batch}, ScalarType::Long, given, "counts");
    params.pred = pred.const_data_ptr();
    params.batch_stride = stride_of(pred, 0);
    params.token_stride = stride_of(pred, 1);
    params.table = table.const_data_ptr();
    params.row_stride = stride_of(table, 0);
    params.ids = static_cast<const int64_t*>(ids.const_data_ptr());
    params.counts = static_cast<const int64_t*>(data_or_null(counts));
  }

 private:
  static Tensor dense_rows(const Tensor& tensor, int64_t last) {
    return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
  }
};

struct DistillLossForwardCall {
  DistillLossInputs inputs;
  Tensor loss, dots, count, terms;
  DistillLossForward args;

  DistillLossForwardCall(const Tensor& pred, const Tensor& table, const Tensor& ids,
                         const OptionalTensor& counts, double cosine_weight)
      : inputs(pred, table, ids, counts, cosine_weight) {
    const DistillLossParams& p = inputs.params;
    const ScalarType accumulate = accumulate_type(p.dtype);
    loss = new_empty(pred, {}, accumulate);
    dots = new_empty(pred, {p.batch, p.tokens, int64_t{kDistillLossDots}}, accumulate);
    count = new_empty(pred, {}, ScalarType::Long);
    terms = new_empty(pred, {p.batch, p.tokens}, accumulate);
    args = {p, dots.mutable_data_ptr(), terms.mutable_data_ptr(), loss.mutable_data_ptr(),
            static_cast<int64_t*>(count.mutable_data_ptr())};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {loss, dots, count}; }
};

struct DistillLossBackwardCall {
  DistillLossInputs inputs;
  Tensor grad, dots, count, d_pred;
  DistillLossBackward args;

  DistillLossBackwardCall(const Tensor& given_grad, const Tensor& pred, const Tensor& table,
                          const Tensor& ids, const OptionalTensor& counts, const Tensor& given_dots,
                          const Tensor& given_count, double cosine_weight)
      : inputs(pred, table, ids, counts, cosine_weight) {
    const DistillLossParams& p = inputs.params;
    const ScalarType accumulate = accumulate_type(p.dtype);
    grad = checked(given_grad, {}, accumulate, pred, "grad");
    dots = checked(given_dots, {p.batch, p.tokens, int64_t{kDistillLossDots}}, accumulate, pred, "dots");
    count = checked(given_count, {}, ScalarType::Long, pred, "count");
    d_pred = new_empty(pred, {p.batch, p.tokens, p.width}, pred.scalar_type());
    args = {p, dots.const_data_ptr(), static_cast<const int64_t*>(count.const_data_ptr()),
            grad.const_data_ptr(), d_pred.mutable_data_ptr()};
  }
};

}  // namespace mmk::glue
