// distill_loss: the distance of predicted vectors from rows of an embedding table, and the cosine of their
// angle. With z a prediction and h the row that its id names,
// loss = mean over valid tokens of |z - h|^2 + cosine_weight * (1 - cos(z, h)). The rows are read in place.
#pragma once

#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

// Shared by the forward and the backward pass. Sums are float, or double where `dtype` is kFloat64.
struct DistillLossParams {
  DType dtype;        // of the predictions
  DType table_dtype;  // on the CPU any, on CUDA any but kFloat64
  int64_t batch;
  int64_t tokens;
  int64_t width;
  int64_t vocabulary;  // rows of the table
  double cosine_weight;
  const void* pred;  // [batch, tokens, width], unit stride along width
  int64_t batch_stride;
  int64_t token_stride;
  const void* table;  // [vocabulary, width], unit stride along width
  int64_t row_stride;
  const int64_t* ids;     // [batch, tokens]; one outside the table makes loss and gradient of its token NaN
  const int64_t* counts;  // [batch] valid tokens, or null; clamped to [0, tokens]
};

// A token's scalar products, in this order, in `dots`.
enum DistillLossDot { kPredPred, kPredRow, kRowRow, kDistillLossDots };

struct DistillLossForward {
  DistillLossParams params;
  void* dots;      // [batch, tokens, kDistillLossDots]; zero past the counts
  void* terms;     // [batch, tokens], the term of each token in the mean; zero past the counts
  void* loss;      // one number
  int64_t* count;  // one number, the valid tokens
};

struct DistillLossBackward {
  DistillLossParams params;
  const void* dots;
  const int64_t* count;
  const void* grad;  // one number, of the type of sums
  void* d_pred;      // [batch, tokens, width]; zero past the counts
};

namespace cpu {

// Dots and terms of tokens [begin, end) of all rows, one after the other.
void distill_loss_tokens(const DistillLossForward& args, int64_t begin, int64_t end);
// Loss and count, after all tokens.
void distill_loss_mean(const DistillLossForward& args);
// The gradient of tokens [begin, end).
void distill_loss_backward(const DistillLossBackward& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

// Launchers run on the current device and return a cudaError_t.
int distill_loss_forward(const DistillLossForward& args, CudaStream stream);
int distill_loss_backward(const DistillLossBackward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
