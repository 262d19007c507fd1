// cif: continuous integrate-and-fire, on a line of weight. With C the cumulative sum of alpha, frame t covers
// [C[t - 1], C[t]] and token j covers [j beta, (j + 1) beta]. Their overlap is the frame's weight in the
// token, and a token is the weighted sum of its frames.
//
// With target lengths, alpha is scaled so that its sum is beta times the target length, and the last token
// ends with the last frame. Without, the rest after the last whole token (the tail) becomes a token if it is
// at least tail_threshold * beta; its weights are scaled to the sum beta.
#pragma once

#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

// Shared by the forward and the backward pass. `alpha`, `weights` and `dots` are float (double for kFloat64).
struct CifParams {
  DType dtype;
  int64_t batch;
  int64_t frames;
  int64_t width;
  int64_t tokens;  // of the result; further ones are dropped
  double beta;
  const void* x;  // [batch, frames, width], unit stride along width
  int64_t batch_stride;
  int64_t frame_stride;
  const void* alpha;       // [batch, frames]; negative and non-finite ones count as zero
  const int64_t* lengths;  // [batch] or null; clamped to [0, frames]
};

// The plan: where each frame begins and ends.
struct CifPlan {
  int64_t* counts;  // [batch] tokens of each row, at most `tokens`
  int32_t* token;   // [batch, frames + 1]: the token in which frame t begins and frame t - 1 ends
  void* weights;    // [batch, frames, 2]: the frame's weights in the tokens in which it begins and ends
  // [batch, 2]: with target lengths, scale of alpha and 1 / its sum; else factor of the tail and 1, or 1, 0.
  double* facts;
};

struct CifForward {
  CifParams params;
  CifPlan plan;
  const int64_t* target_lengths;  // [batch] or null
  double tail_threshold;
  void* features;  // [batch, tokens, width]
  int64_t* ends;   // [batch, tokens]: the frame in which a token fires, + 1
  double* sums;    // [batch, frames] scratch, CUDA only
};

struct CifBackward {
  CifParams params;
  CifPlan plan;      // read only
  bool scaled;       // by target lengths
  const void* grad;  // [batch, tokens, width], unit stride along width
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  void* dx;       // [batch, frames, width] or null
  void* d_alpha;  // [batch, frames] or null
  void* dots;     // [batch, frames, 2]: x . grad of the tokens in which a frame begins and ends, for d_alpha
  double* sums;   // [batch, frames] scratch for d_alpha, CUDA only
};

namespace cpu {

// The plan and the ends of rows [begin, end).
void cif_plan(const CifForward& args, int64_t begin, int64_t end);
// Tokens [begin, end) of all rows, one after the other.
void cif_features(const CifForward& args, int64_t begin, int64_t end);
// dx and dots of frames [begin, end) of all rows.
void cif_frames(const CifBackward& args, int64_t begin, int64_t end);
// d_alpha of rows [begin, end), after all frames.
void cif_alpha(const CifBackward& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int cif_forward(const CifForward& args, CudaStream stream);
int cif_backward(const CifBackward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
