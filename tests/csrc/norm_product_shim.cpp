// The launchers of norm_product with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/norm_product.h"

namespace {

// sizes: dtype, rows, taps, inputs, outputs, activation, and for functions with parameters their dtype
mmk::DType dtype_of(const int64_t* sizes) {
  return static_cast<mmk::DType>(sizes[0]);
}
mmk::NormProductShape shape_of(const int64_t* sizes) {
  return {sizes[1], sizes[2], sizes[3], sizes[4]};
}
mmk::Activation activation_of(const int64_t* sizes) {
  return static_cast<mmk::Activation>(sizes[5]);
}
mmk::DType parameter_type_of(const int64_t* sizes) {
  return static_cast<mmk::DType>(sizes[6]);
}
mmk::NormProductInput input_of(const void* x, const int64_t* strides) {
  return {x, strides[0], strides[1]};
}

}  // namespace

extern "C" {

int norm_product_fold(const int64_t* sizes, const void* weight, const void* bias, const void* norm_weight,
                      const void* norm_bias, void* folded_weight, float* folded_bias, float* folded_sum) {
  const mmk::NormProductFold args = {shape_of(sizes), weight,     bias,
                                     norm_weight,     norm_bias,  folded_weight,
                                     folded_bias,     folded_sum, parameter_type_of(sizes)};
  return mmk::cuda::norm_product_fold(dtype_of(sizes), args, nullptr);
}

int norm_product_stats(const int64_t* sizes, const void* x, const int64_t* strides, double eps,
                       float* stats) {
  const mmk::NormProductStats args = {shape_of(sizes), input_of(x, strides), eps, stats};
  return mmk::cuda::norm_product_stats(dtype_of(sizes), args, nullptr);
}

int norm_product_activate(const int64_t* sizes, const float* stats, const float* folded_bias,
                          const float* folded_sum, void* y, void* preactivation) {
  const mmk::NormProductActivate args = {
      shape_of(sizes), activation_of(sizes), stats, folded_bias, y, preactivation, folded_sum};
  return mmk::cuda::norm_product_activate(dtype_of(sizes), args, nullptr);
}

int norm_product_gradient(const int64_t* sizes, const void* grad, const void* value, const float* stats,
                          const float* folded_bias, void* scaled_grad, float* pull, float* partial_bias) {
  const mmk::NormProductGradient args = {shape_of(sizes), activation_of(sizes), grad, value,       stats,
                                         folded_bias,     scaled_grad,          pull, partial_bias};
  return mmk::cuda::norm_product_gradient(dtype_of(sizes), args, nullptr);
}

int norm_product_input_gradient(const int64_t* sizes, const void* x, const int64_t* strides,
                                const float* stats, const float* pull, void* dx) {
  const mmk::NormProductInputGradient args = {shape_of(sizes), input_of(x, strides), stats, pull, dx};
  return mmk::cuda::norm_product_input_gradient(dtype_of(sizes), args, nullptr);
}

int norm_product_unfold(const int64_t* sizes, const float* partial_bias, const void* weight,
                        const void* norm_weight, const void* norm_bias, const float* product, void* d_weight,
                        void* d_bias, void* d_norm_weight, void* d_norm_bias, float* row_sums) {
  const mmk::NormProductShape shape = shape_of(sizes);
  const mmk::NormProductUnfold args = {shape,
                                       mmk::cuda::norm_product_chunks(shape.rows),
                                       partial_bias,
                                       weight,
                                       norm_weight,
                                       norm_bias,
                                       d_weight,
                                       d_bias,
                                       d_norm_weight,
                                       d_norm_bias,
                                       product,
                                       row_sums,
                                       parameter_type_of(sizes)};
  return mmk::cuda::norm_product_unfold(args, nullptr);
}

}  // extern "C"
