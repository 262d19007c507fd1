// Activations and their derivatives in float: the functions of cpu/activation.h, by CUDA's math library.
#pragma once

#include <type_traits>

#include "cuda/common/platform.cuh"
#include "mmkernels/activation.h"

namespace mmk {

inline constexpr float kSqrtHalf = 0.70710678118654752440f;
inline constexpr float kInverseSqrtTwoPi = 0.39894228040143267794f;
inline constexpr float kSqrtTwoOverPi = 0.79788456080286535588f;
inline constexpr float kGeluCubic = 0.044715f;

// Chosen at compile time: a switch in a loop costs a branch for each element.
template <Activation kActivation>
MMK_DEVICE float activate(float z) {
  if constexpr (kActivation == Activation::kRelu) {
    // A comparison, not fmaxf, which would drop a NaN.
    return z < 0.0f ? 0.0f : z;
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * z * (1.0f + erff(z * kSqrtHalf));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return 0.5f * z * (1.0f + tanhf(kSqrtTwoOverPi * (z + kGeluCubic * z * z * z)));
  } else if constexpr (kActivation == Activation::kSilu) {
    return z / (1.0f + expf(-z));
  } else {
    return z;
  }
}

// Derivative at z. For relu, z may also be the output.
template <Activation kActivation>
MMK_DEVICE float activation_slope(float z) {
  if constexpr (kActivation == Activation::kRelu) {
    return z <= 0.0f ? 0.0f : 1.0f;
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * (1.0f + erff(z * kSqrtHalf)) + z * kInverseSqrtTwoPi * expf(-0.5f * z * z);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float cubic = kGeluCubic * z * z;
    const float t = tanhf(kSqrtTwoOverPi * z * (1.0f + cubic));
    return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * kSqrtTwoOverPi * (1.0f + 3.0f * cubic);
  } else if constexpr (kActivation == Activation::kSilu) {
    const float s = 1.0f / (1.0f + expf(-z));
    return s * (1.0f + z * (1.0f - s));
  } else {
    return 1.0f;
  }
}

// Calls body(std::integral_constant<Activation, ...>), on the host to choose a kernel, or in a kernel around
// a loop.
#pragma nv_exec_check_disable
template <class Body>
MMK_HOST_DEVICE auto dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      return body(std::integral_constant<Activation, Activation::kNone>{});
  }
}

// The same with a switch for each element, for kernels that are bound by memory.
MMK_DEVICE float activate(Activation activation, float z) {
  return dispatch_activation(activation, [z](auto chosen) { return activate<decltype(chosen)::value>(z); });
}

}  // namespace mmk
