// Turns a run-time dtype into an element type.
#pragma once

#include "cuda/common/platform.cuh"
#include "mmkernels/dtype.h"

namespace mmk {

// Calls body(T{}) with the element type that dtype names.
template <class Body>
cudaError_t dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls body(T{}, P{}) with the types of activations and parameters; P is float or T.
template <class Body>
cudaError_t dispatch(DType dtype, DType parameter_type, Body&& body) {
  return dispatch(dtype, [&](auto element) {
    if (parameter_type == DType::kFloat32) return body(element, float{});
    return parameter_type == dtype ? body(element, element) : cudaErrorInvalidValue;
  });
}

}  // namespace mmk
