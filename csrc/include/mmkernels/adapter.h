// adapter: out = residual + scale * (act(LN(x) V^T + b) U^T + c), x (rows, width), V (bottleneck, width),
// U (width, bottleneck).
//
// The LayerNorm is folded into V as in layer_project.h. With W = V * gamma, Vc = W - mean(W) of each row,
//   z = LN(x) V^T + b = rstd * (x Vc^T) + b',   b' = b + V beta.
// Backwards, with g = dL/dout and a = act(z),
//   dz = (scale g U) * act'(z),  dU = scale g^T a,  dc = scale sum_r g,  db = db' = sum_r dz,
//   s = dz * rstd,  dVc = s^T x,  dW = dVc - mean(dVc),  dV = dW * gamma + db' beta^T,
//   dgamma = sum_o dW * V,  dbeta = V^T db',
//   dx = s Vc - pull * (x - mean) [+ g where x is the residual],  pull = rstd^2 / width * sum_o dz (z - b').
// Without norm_weight, Vc is V, rstd is 1, and mean and pull drop out.
//
// Saved for the backward pass: x, z (rounded to the type of x) and, with LayerNorm, mean and rstd of each
// row.
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct AdapterShape {
  int64_t rows;
  int64_t width;
  int64_t bottleneck;
};

// (rows, width) by the stride of its rows; the last one is 1.
struct AdapterRows {
  const void* data;
  int64_t row_stride;
};

// Of the accumulation type of x, contiguous; null where absent. The LayerNorm is there iff norm_weight is.
struct AdapterParameters {
  const void* down_weight;  // [bottleneck, width]
  const void* down_bias;    // [bottleneck]
  const void* up_weight;    // [width, bottleneck]
  const void* up_bias;      // [width]
  const void* norm_weight;  // [width]
  const void* norm_bias;    // [width]
};

}  // namespace mmk
