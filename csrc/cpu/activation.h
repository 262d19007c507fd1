// Activations and their derivatives, for float and double. Those for float have no branches, so that the
// compiler vectorises loops over them; those for double call the standard library.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/simd.h"
#include "mmkernels/activation.h"

namespace mmk::cpu {

MMK_INLINE double exponential(double x) {
  return std::exp(x);
}

// e^x to 2 units in the last place: 2^n e^r with |r| <= log(2) / 2, and e^r as 1 + r + r^2 times a polynomial
// fitted to that interval.
MMK_INLINE float exponential(float x) {
  // Adding kRounder rounds to the nearest integer and leaves it in the lowest bits.
  constexpr float kRounder = 0x1.8p23f;
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const float tail =
      0.5f + r * (0.166665181517601f +
                  r * (0.04166620597243309f + r * (0.008368884213268757f + r * 0.0013950478751212358f)));
  const float mantissa = 1.0f + (r + r * r * tail);
  const float power = to_float((to_bits(shifted) + 127u) << 23);
  const float value = mantissa * power;
  const float from_above = x < -87.33f ? 0.0f : value;
  return x > 88.37f ? to_float(0x7f800000u) : from_above;
}

// sigmoid(x) and sigmoid(-x); 1 - sigmoid(x) would lose digits where sigmoid(-x) is small.
template <class A>
struct Sigmoid {
  A value, complement;
};

template <class A>
MMK_INLINE Sigmoid<A> sigmoid(A x) {
  // Clamp x: exp(-x) would overflow to infinity, and infinity times the value 0 is NaN.
  constexpr A kLeast = sizeof(A) == 4 ? A(-87) : A(-700);
  const A e = exponential(x < kLeast ? -kLeast : -x);
  const A value = A(1) / (A(1) + e);
  return {x < kLeast ? A(0) : value, e * value};
}

// Distribution and density of the standard normal.
template <class A>
struct Normal {
  A distribution, density;
};

MMK_INLINE Normal<double> normal(double z) {
  return {0.5 * (1.0 + std::erf(z * 0.70710678118654752440)),
          0.39894228040143267794 * std::exp(-0.5 * z * z)};
}

// For z <= 0 the distribution is exp(-z^2 / 2) / 2 * t p(t), with t = 1 / (1 + 0.35 |z| / sqrt(2)) and p a
// polynomial fitted to a relative error of 7e-9. Unlike 1 + erf it loses no digits in the tail.
MMK_INLINE Normal<float> normal(float z) {
  const float magnitude = z < 0.0f ? -z : z;
  const float t = 1.0f / (1.0f + 0.35f * 0.707106781f * magnitude);
  float p = 0.03840135410428047f;
  p = p * t - 0.15892991423606873f;
  p = p * t + 0.1814650446176529f;
  p = p * t - 0.02771073766052723f;
  p = p * t + 0.08702298253774643f;
  p = p * t + 0.1460399180650711f;
  p = p * t + 0.1511869728565216f;
  p = p * t + 0.18790224194526672f;
  p = p * t + 0.19713836908340454f;
  p = p * t + 0.19748377799987793f;
  const float bell = exponential(-0.5f * z * z);
  const float below = 0.5f * bell * t * p;
  return {z < 0.0f ? below : 1.0f - below, 0.39894228f * bell};
}

// The argument of gelu_tanh's sigmoid, (1 + tanh(y)) / 2 = sigmoid(2 y), and its derivative.
template <class A>
struct TanhArgument {
  A value, slope;
};

template <class A>
MMK_INLINE TanhArgument<A> tanh_argument(A z) {
  const A twice = A(1.59576912160573071176);  // 2 sqrt(2 / pi)
  const A cubic = A(0.044715) * z * z;
  return {twice * z * (A(1) + cubic), twice * (A(1) + A(3) * cubic)};
}

template <class A>
MMK_INLINE A activate(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    // A comparison, not a maximum, which would drop a NaN.
    case Activation::kRelu:
      return z < A(0) ? A(0) : z;
    case Activation::kGelu:
      return z * normal(z).distribution;
    case Activation::kGeluTanh:
      return z * sigmoid(tanh_argument(z).value).value;
    case Activation::kSilu:
      return z * sigmoid(z).value;
  }
  return z;
}

// Derivative at z. For relu, z may also be the output.
template <class A>
MMK_INLINE A activation_slope(Activation activation, A z) {
  switch (activation) {
    case Activation::kNone:
      return A(1);
    case Activation::kRelu:
      return z <= A(0) ? A(0) : A(1);
    case Activation::kGelu: {
      const Normal<A> at_z = normal(z);
      return at_z.distribution + z * at_z.density;
    }
    case Activation::kGeluTanh: {
      const TanhArgument<A> argument = tanh_argument(z);
      const Sigmoid<A> s = sigmoid(argument.value);
      return s.value + z * s.value * s.complement * argument.slope;
    }
    case Activation::kSilu: {
      const Sigmoid<A> s = sigmoid(z);
      return s.value * (A(1) + z * s.complement);
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
