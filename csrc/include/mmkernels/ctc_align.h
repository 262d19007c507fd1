// ctc_align: the best CTC path of each utterance through its target (Viterbi), and where tokens end.
//
// A target of U tokens has U + 1 pairs of states: pair i is the blank before token i and token i itself; the
// last pair is a blank alone. With even[i] and odd[i] the best scores that end in the two states of pair i,
//
//   even[i] = max(even[i], odd[i - 1]) + log_probs[t, blank]
//   odd[i]  = max(odd[i], even[i], odd[i - 1] if token i differs from token i - 1) + log_probs[t, token i]
//
// from even[0] = 0 before the first frame, all others -inf. Of equal predecessors the one of the smallest
// advance is taken, and a path ends in the last token rather than in the blank behind it. After each
// kCtcRescale frames the largest score of the pairs tokens - frames + t to t is subtracted: a path from the
// start to the end is in no other. All backends do these operations in this order, in float (double for
// double), so that they give the same path.
//
// A log-probability that is NaN or +inf counts as -inf, and so does a token that is the blank or no class.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

constexpr int64_t kCtcRescale = 32;  // frames

struct CtcAlign {
  DType dtype;
  int64_t batch, frames, classes, tokens;
  int64_t blank;  // in [0, classes)
  const void* log_probs;
  int64_t batch_stride, frame_stride;  // elements; classes are neighbours
  const int64_t* targets;              // [batch, tokens]
  const int64_t* input_lengths;        // [batch] or null: clamped to [0, frames]
  const int64_t* target_lengths;       // [batch] or null: clamped to [0, tokens]
  int64_t* paths;                      // [batch, frames]; -1 in padding and where there is no path
  int64_t* ends;                       // [batch, tokens]
  void* totals;                        // [batch], float (double for kFloat64); -inf where there is no path
};

// Scores are saved every `block` frames; the backtrace recomputes the others, for the pairs that it can pass.
struct CtcCheckpoints {
  int64_t block;  // frames, a multiple of kCtcRescale
  int64_t count;
};

// Blocks grow with the utterance: its checkpoints then hold at most about kMostScores scores.
constexpr CtcCheckpoints ctc_checkpoints(int64_t frames, int64_t tokens) {
  constexpr int64_t kMostScores = int64_t{1} << 24;
  const int64_t scores = 2 * (tokens + 1) * frames;
  const int64_t block =
      kCtcRescale * std::max<int64_t>(1, (scores / kMostScores + kCtcRescale) / kCtcRescale);
  return {block, (frames + block - 1) / block};
}

namespace cpu {

// Bytes that ctc_align needs for utterances of these sizes.
size_t ctc_align_scratch(DType dtype, int64_t frames, int64_t tokens, int64_t classes);
// Aligns the utterances [begin, end), one after the other, in `scratch`, which is 64-byte aligned.
void ctc_align(const CtcAlign& args, int64_t begin, int64_t end, void* scratch);

}  // namespace cpu

namespace cuda {

// Bytes of device memory for a call.
size_t ctc_align_workspace(int64_t batch, int64_t frames, int64_t tokens);
// Runs on the current device and returns a cudaError_t. Types are float, half and bfloat16. `workspace` is
// 16-byte aligned.
int ctc_align(const CtcAlign& args, void* workspace, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
