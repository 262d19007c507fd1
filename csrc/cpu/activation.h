// Activations and their derivatives, of float or double.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "mmkernels/activation.h"

namespace mmk::cpu {

template <class A>
MMK_INLINE A activate(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    // Written so that NaN passes through.
    case Activation::kRelu:
      return z < A(0) ? A(0) : z;
    case Activation::kGelu:
      return A(0.5) * z * (A(1) + std::erf(z * A(0.70710678118654752440)));
    case Activation::kGeluTanh:
      return A(0.5) * z * (A(1) + std::tanh(A(0.79788456080286535588) * (z + A(0.044715) * z * z * z)));
    case Activation::kSilu:
      return z / (A(1) + std::exp(-z));
  }
  return z;
}

// Derivative at z; for relu the output serves as well as z.
template <class A>
MMK_INLINE A activation_slope(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return A(1);
    case Activation::kRelu:
      return z <= A(0) ? A(0) : A(1);
    case Activation::kGelu:
      return A(0.5) * (A(1) + std::erf(z * A(0.70710678118654752440))) +
             z * A(0.39894228040143267794) * std::exp(A(-0.5) * z * z);
    case Activation::kGeluTanh: {
      const A cubic = A(0.044715) * z * z;
      const A t = std::tanh(A(0.79788456080286535588) * z * (A(1) + cubic));
      return A(0.5) * (A(1) + t) +
             A(0.5) * z * (A(1) - t * t) * A(0.79788456080286535588) * (A(1) + A(3) * cubic);
    }
    case Activation::kSilu: {
      const A s = A(1) / (A(1) + std::exp(-z));
      return s * (A(1) + z * (A(1) - s));
    }
  }
  return A(1);
}

// Calls body(std::integral_constant) so that the activation is a constant inside the loops.
template <class Body>
MMK_INLINE void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kNone:
      return body(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace mmk::cpu
