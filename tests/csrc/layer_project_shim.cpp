// The launchers of layer_project with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/layer_project.h"

namespace {

// sizes: dtype, rows, taps, inputs, outputs, activation
mmk::DType dtype_of(const int64_t* sizes) {
  return static_cast<mmk::DType>(sizes[0]);
}
mmk::NormProductShape shape_of(const int64_t* sizes) {
  return {sizes[1], sizes[2], sizes[3], sizes[4]};
}
mmk::Activation activation_of(const int64_t* sizes) {
  return static_cast<mmk::Activation>(sizes[5]);
}
mmk::NormProductInput input_of(const void* x, const int64_t* strides) {
  return {x, strides[0], strides[1]};
}

}  // namespace

extern "C" {

int project_fuses(const int64_t* sizes, const void* x, const int64_t* strides, int64_t* result) {
  *result = mmk::cuda::layer_project_fuses(dtype_of(sizes), shape_of(sizes), input_of(x, strides));
  return 0;
}

int project_product(const int64_t* sizes, const void* x, const int64_t* strides, const void* folded_weight,
                    const float* stats, const float* folded_bias, const float* folded_sum, void* y,
                    void* preactivation) {
  const mmk::NormProductActivate rest = {
      shape_of(sizes), activation_of(sizes), stats, folded_bias, y, preactivation, folded_sum};
  return mmk::cuda::layer_project_product(dtype_of(sizes), {input_of(x, strides), folded_weight, rest},
                                          nullptr);
}

}  // extern "C"
