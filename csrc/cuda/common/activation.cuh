// Activations and their derivatives in float; the formulas are those of cpu/activation.h.
#pragma once

#include "cuda/common/platform.cuh"
#include "mmkernels/activation.h"

namespace mmk {

inline constexpr float kSqrtHalf = 0.70710678118654752440f;
inline constexpr float kInverseSqrtTwoPi = 0.39894228040143267794f;
inline constexpr float kSqrtTwoOverPi = 0.79788456080286535588f;
inline constexpr float kGeluCubic = 0.044715f;

MMK_DEVICE float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kNone:
      break;
    // A comparison, not fmaxf, which would drop a NaN.
    case Activation::kRelu:
      return z < 0.0f ? 0.0f : z;
    case Activation::kGelu:
      return 0.5f * z * (1.0f + erff(z * kSqrtHalf));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.0f + tanhf(kSqrtTwoOverPi * (z + kGeluCubic * z * z * z)));
    case Activation::kSilu:
      return z / (1.0f + expf(-z));
  }
  return z;
}

// Derivative at z. For relu, z may also be the output.
MMK_DEVICE float activation_slope(Activation activation, float z) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : 1.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(z * kSqrtHalf)) + z * kInverseSqrtTwoPi * expf(-0.5f * z * z);
    case Activation::kGeluTanh: {
      const float cubic = kGeluCubic * z * z;
      const float t = tanhf(kSqrtTwoOverPi * z * (1.0f + cubic));
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * kSqrtTwoOverPi * (1.0f + 3.0f * cubic);
    }
    case Activation::kSilu: {
      const float s = 1.0f / (1.0f + expf(-z));
      return s * (1.0f + z * (1.0f - s));
    }
  }
  return 1.0f;
}

}  // namespace mmk
