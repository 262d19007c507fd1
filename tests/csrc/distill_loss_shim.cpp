// The launchers of distill_loss with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/distill_loss.h"

namespace {

// sizes: dtype, dtype of the table, batch, tokens, width, vocabulary, batch_stride, token_stride, row_stride
mmk::DistillLossParams make_params(const int64_t* sizes, double cosine_weight, const void* pred,
                                   const void* table, const int64_t* ids, const int64_t* counts) {
  return {static_cast<mmk::DType>(sizes[0]),
          static_cast<mmk::DType>(sizes[1]),
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          cosine_weight,
          pred,
          sizes[6],
          sizes[7],
          table,
          sizes[8],
          ids,
          counts};
}

}  // namespace

extern "C" int distill_loss_forward(const int64_t* sizes, double cosine_weight, const void* pred,
                                    const void* table, const int64_t* ids, const int64_t* counts, float* dots,
                                    float* terms, float* loss, int64_t* count) {
  return mmk::cuda::distill_loss_forward(
      {make_params(sizes, cosine_weight, pred, table, ids, counts), dots, terms, loss, count}, nullptr);
}

extern "C" int distill_loss_backward(const int64_t* sizes, double cosine_weight, const void* pred,
                                     const void* table, const int64_t* ids, const int64_t* counts,
                                     const float* dots, const int64_t* count, const float* grad,
                                     void* d_pred) {
  return mmk::cuda::distill_loss_backward(
      {make_params(sizes, cosine_weight, pred, table, ids, counts), dots, count, grad, d_pred}, nullptr);
}
