// The launchers of cif with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/cif.h"

namespace {

// sizes: dtype, batch, frames, width, tokens, batch_stride, frame_stride
mmk::CifParams make_params(const int64_t* sizes, double beta, const void* x, const float* alpha,
                           const int64_t* lengths) {
  return {static_cast<mmk::DType>(sizes[0]),
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          beta,
          x,
          sizes[5],
          sizes[6],
          alpha,
          lengths};
}

}  // namespace

extern "C" int cif_forward(const int64_t* sizes, double beta, double tail_threshold, const void* x,
                           const float* alpha, const int64_t* lengths, const int64_t* target_lengths,
                           void* features, int64_t* counts, int64_t* ends, int32_t* token, float* weights,
                           double* facts, double* sums) {
  return mmk::cuda::cif_forward({make_params(sizes, beta, x, alpha, lengths),
                                 {counts, token, weights, facts},
                                 target_lengths,
                                 tail_threshold,
                                 features,
                                 ends,
                                 sums},
                                nullptr);
}

// strides: of grad, along batch and tokens; dx and d_alpha are null if not needed.
extern "C" int cif_backward(const int64_t* sizes, double beta, int64_t scaled, const void* grad,
                            const int64_t* strides, const void* x, const float* alpha, const int64_t* lengths,
                            int64_t* counts, int32_t* token, float* weights, double* facts, void* dx,
                            float* d_alpha, float* dots, double* sums) {
  return mmk::cuda::cif_backward({make_params(sizes, beta, x, alpha, lengths),
                                  {counts, token, weights, facts},
                                  scaled != 0,
                                  grad,
                                  strides[0],
                                  strides[1],
                                  dx,
                                  d_alpha,
                                  dots,
                                  sums},
                                 nullptr);
}
