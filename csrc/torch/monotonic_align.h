// Checks and outputs that the CPU and the CUDA glue of monotonic_align share. The schema is in
// mmkernels/ops/monotonic_align/schema.py.
#pragma once

#include "mmkernels/monotonic_align.h"
#include "torch/glue.h"

namespace mmk::glue {

// One call; keeps its tensors alive.
struct MonotonicAlignCall {
  Tensor log_probs, durations, words, states;
  OptionalTensor frame_lengths, token_lengths;
  MonotonicAlign args;

  // states_of(frames, tokens): scores of the workspace for each utterance.
  template <class States>
  MonotonicAlignCall(const Tensor& given, const OptionalTensor& given_frames,
                     const OptionalTensor& given_tokens, States&& states_of) {
    STD_TORCH_CHECK(given.dim() == 3, "log_probs: expected shape (batch, frames, tokens), got ", given.dim(),
                    " dimensions");
    args = {};
    args.dtype = dtype_of(given, "log_probs");
    args.batch = given.size(0);
    args.frames = given.size(1);
    args.tokens = given.size(2);
    const bool unit_stride = given.stride(2) == 1 || args.tokens <= 1;
    log_probs = unit_stride ? given : torch::stable::contiguous(given);
    frame_lengths = checked(given_frames, {args.batch}, ScalarType::Long, given, "frame_lengths");
    token_lengths = checked(given_tokens, {args.batch}, ScalarType::Long, given, "token_lengths");
    const MonotonicWords size = monotonic_words(args.dtype, args.frames, args.tokens);
    const ScalarType accumulate = accumulate_type(args.dtype);
    durations = new_empty(given, {args.batch, args.tokens}, ScalarType::Long);
    // Words are as wide as scores.
    words = new_empty(given, {args.batch, size.rows, size.columns}, accumulate);
    states = new_empty(given, {args.batch, states_of(args.frames, args.tokens)}, accumulate);
    args.log_probs = log_probs.const_data_ptr();
    args.batch_stride = stride_of(log_probs, 0);
    args.frame_stride = stride_of(log_probs, 1);
    args.frame_lengths = static_cast<const int64_t*>(data_or_null(frame_lengths));
    args.token_lengths = static_cast<const int64_t*>(data_or_null(token_lengths));
    args.durations = static_cast<int64_t*>(durations.mutable_data_ptr());
    args.words = mutable_or_null(words);
    args.states = mutable_or_null(states);
  }
};

}  // namespace mmk::glue
