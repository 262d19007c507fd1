// monotonic_align: the best path through log-probabilities of frames and tokens that stays on its token or
// advances to the next one with each frame. With Q the score of the best path to a place,
//
//   Q[t, u] = log_probs[t, u] + max(Q[t - 1, u], Q[t - 1, u - 1]),
//
// from (0, 0) to (frames - 1, tokens - 1); of equal predecessors the one that advances. The back-pointers are
// bits: bit t % B of words[t / B][u] says that the best path to (t, u) comes from u - 1, with B the bits of a
// word, an unsigned integer as wide as the scores.
#pragma once

#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

// Back-pointers of one utterance.
struct MonotonicWords {
  int64_t rows;
  int64_t columns;  // a multiple of 8, for whole vectors
};

constexpr MonotonicWords monotonic_words(DType dtype, int64_t frames, int64_t tokens) {
  const int64_t bits = dtype == DType::kFloat64 ? 64 : 32;
  return {(frames + bits - 1) / bits, (tokens + 7) / 8 * 8};
}

struct MonotonicAlign {
  DType dtype;
  const void* log_probs;  // [batch, frames, tokens], unit stride along tokens
  int64_t batch;
  int64_t frames;
  int64_t tokens;
  int64_t batch_stride;
  int64_t frame_stride;
  const int64_t* frame_lengths;  // [batch] or null; clamped to [0, frames]
  const int64_t* token_lengths;  // [batch] or null; clamped to [0, tokens]
  // [batch, tokens]. A row without a path (fewer frames than tokens, no tokens, or a NaN among its
  // log-probabilities) is zero.
  int64_t* durations;
  void* words;   // [batch, rows, columns] of monotonic_words, scratch
  void* states;  // [batch, states of one utterance] scores, scratch
};

namespace cpu {

// Scores that the CPU kernel keeps for each utterance.
constexpr int64_t monotonic_align_states(int64_t tokens) {
  return monotonic_words(DType::kFloat32, 0, tokens).columns;
}

// Utterances [begin, end).
void monotonic_align(const MonotonicAlign& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// Scores that the CUDA kernel keeps for each utterance: none unless it has more tokens than a block takes.
int64_t monotonic_align_states(int64_t frames, int64_t tokens);

// Runs on the current device and returns a cudaError_t. Types are float, half and bfloat16.
int monotonic_align(const MonotonicAlign& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
