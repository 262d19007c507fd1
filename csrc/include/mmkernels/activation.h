// Activations that the fused products offer; the order is that of mmkernels/ops/_common.py.
#pragma once

#include <cstdint>

namespace mmk {

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// The derivatives of relu and none follow from the output; the others need the value before the activation.
constexpr bool needs_preactivation(Activation activation) {
  return activation != Activation::kNone && activation != Activation::kRelu;
}

}  // namespace mmk
