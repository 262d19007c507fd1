// Checks and outputs that the CPU and the CUDA glue of ctc_align share. The schema is in
// mmkernels/ops/ctc_align/schema.py.
#pragma once

#include <limits>
#include <tuple>

#include "mmkernels/ctc_align.h"
#include "torch/glue.h"

namespace mmk::glue {

// The tensors of a call, kept alive for its duration, and the kernel parameters that point into them.
struct CtcAlignCall {
  Tensor log_probs, targets;
  OptionalTensor input_lengths, target_lengths;
  Tensor paths, ends, totals;
  CtcAlign args = {};

  CtcAlignCall(const Tensor& given, const Tensor& given_targets, const OptionalTensor& given_input_lengths,
               const OptionalTensor& given_target_lengths, int64_t blank)
      : log_probs(given) {
    STD_TORCH_CHECK(given.dim() == 3, "log_probs: expected (batch, frames, classes), got ", given.dim(),
                    " dimensions");
    STD_TORCH_CHECK(given_targets.dim() == 2, "targets: expected (batch, tokens), got ", given_targets.dim(),
                    " dimensions");
    args.dtype = dtype_of(given, "log_probs");
    args.batch = given.size(0);
    args.frames = given.size(1);
    args.classes = given.size(2);
    args.tokens = given_targets.size(1);
    args.blank = blank;
    STD_TORCH_CHECK(blank >= 0 && blank < args.classes, "blank: expected a class below ", args.classes,
                    ", got ", blank);
    STD_TORCH_CHECK(args.classes < std::numeric_limits<int32_t>::max(), "log_probs: too many classes");
    if (given.stride(2) != 1 && args.classes > 1) log_probs = torch::stable::contiguous(given);
    targets = checked(given_targets, {args.batch, args.tokens}, ScalarType::Long, given, "targets");
    input_lengths = checked(given_input_lengths, {args.batch}, ScalarType::Long, given, "input_lengths");
    target_lengths = checked(given_target_lengths, {args.batch}, ScalarType::Long, given, "target_lengths");
    const Place place(given);
    const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
      return new_empty(place, sizes.begin(), sizes.size(), type);
    };
    paths = make({args.batch, args.frames}, ScalarType::Long);
    ends = make({args.batch, args.tokens}, ScalarType::Long);
    totals = make({args.batch}, accumulate_type(args.dtype));
    args.log_probs = log_probs.numel() == 0 ? nullptr : log_probs.const_data_ptr();
    args.batch_stride = stride_of(log_probs, 0);
    args.frame_stride = stride_of(log_probs, 1);
    args.targets = targets.numel() == 0 ? nullptr : static_cast<const int64_t*>(targets.const_data_ptr());
    args.input_lengths = static_cast<const int64_t*>(data_or_null(input_lengths));
    args.target_lengths = static_cast<const int64_t*>(data_or_null(target_lengths));
    args.paths = static_cast<int64_t*>(mutable_or_null(paths));
    args.ends = static_cast<int64_t*>(mutable_or_null(ends));
    args.totals = mutable_or_null(totals);
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {paths, ends, totals}; }
};

}  // namespace mmk::glue
