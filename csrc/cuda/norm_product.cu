#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/moments.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/norm_product.cuh"

namespace mmk::cuda {
namespace {

// ---- folding the LayerNorm into the weight: one warp per row of the weight. P is the type of the parameters

constexpr int kFoldWidth = 4;

template <bool kAligned, class P>
MMK_DEVICE float dot_row(const P* a, const P* b, int64_t size) {
  float sum = 0.0f;
  for (int64_t column = lane_index() * kFoldWidth; column < size; column += kWarpSize * kFoldWidth) {
    const auto x = to_accumulator(load_columns<kAligned, kFoldWidth>(a, column, size));
    const auto y = to_accumulator(load_columns<kAligned, kFoldWidth>(b, column, size));
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) sum += x[i] * y[i];
  }
  return warp_sum(sum);
}

// folded = weight * gain - mean(weight * gain), or weight if gain is null. Returns the sum after rounding.
template <bool kAligned, class T, class P>
MMK_DEVICE float fold_row(T* folded, const P* weight, const P* gain, int64_t size) {
  const float mean =
      gain == nullptr ? 0.0f : dot_row<kAligned>(weight, gain, size) / static_cast<float>(size);
  float sum = 0.0f;
  for (int64_t column = lane_index() * kFoldWidth; column < size; column += kWarpSize * kFoldWidth) {
    auto value = to_accumulator(load_columns<kAligned, kFoldWidth>(weight, column, size));
    if (gain != nullptr) {
      const auto factor = to_accumulator(load_columns<kAligned, kFoldWidth>(gain, column, size));
#pragma unroll
      for (int i = 0; i < kFoldWidth; ++i) value[i] = value[i] * factor[i] - mean;
    }
    const Vec<T, kFoldWidth> rounded = from_accumulator<T>(value);
    store_columns<kAligned>(folded, column, size, rounded);
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) {
      if (column + i < size) sum += to_accumulator(rounded[i]);
    }
  }
  return warp_sum(sum);
}

template <class T, class P, bool kAligned>
__global__ void __launch_bounds__(kNormProductThreads) fold(const __grid_constant__ NormProductFold args) {
  const int64_t inputs = args.shape.inputs;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormProductWarps + warp_index();
  if (index >= args.shape.taps * args.shape.outputs) return;
  const int64_t tap = index / args.shape.outputs;
  const P* weight = static_cast<const P*>(args.weight) + index * inputs;
  float bias = args.bias == nullptr ? 0.0f : to_accumulator(static_cast<const P*>(args.bias)[index]);
  if (args.norm_bias != nullptr) {
    bias += dot_row<kAligned>(weight, static_cast<const P*>(args.norm_bias) + tap * inputs, inputs);
  }
  if (lane_index() == 0) static_cast<float*>(args.folded_bias)[index] = bias;
  if (args.folded_weight == nullptr) return;
  const P* gain =
      args.norm_weight == nullptr ? nullptr : static_cast<const P*>(args.norm_weight) + tap * inputs;
  const float sum =
      fold_row<kAligned>(static_cast<T*>(args.folded_weight) + index * inputs, weight, gain, inputs);
  if (args.folded_sum != nullptr && lane_index() == 0) static_cast<float*>(args.folded_sum)[index] = sum;
}

// ---- statistics of the rows of x

template <class Shape>
__global__ void __launch_bounds__(kRowBlockThreads)
    row_moments(const __grid_constant__ NormProductStats args) {
  using T = typename Shape::Element;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock + Shape::slot();
  if (index >= args.shape.rows * args.shape.taps) return;
  const int width = static_cast<int>(args.shape.inputs);
  const T* row = input_row<T>(args.x, args.shape.taps, index);
  typename Shape::Part x;
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
    x[v] = to_accumulator(load_columns<Shape::kIsAligned, Shape::kWidth>(row, Shape::column(v), width));
  }
  const float2 moments = centre<Shape>(x, width, static_cast<float>(args.eps));
  if (Shape::thread() == 0) static_cast<float2*>(args.stats)[index] = moments;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWideThreads)
    row_moments_wide(const __grid_constant__ NormProductStats args) {
  const int64_t index = blockIdx.x;
  const T* row = input_row<T>(args.x, args.shape.taps, index);
  const float2 moments = wide_moments<T, kAligned>(row, args.shape.inputs, static_cast<float>(args.eps));
  if (threadIdx.x == 0) static_cast<float2*>(args.stats)[index] = moments;
}

// ---- from the product to the result: one thread per vector

// Writes z and y = act(z), y over the product.
template <class T, bool kAligned, Activation kActivation>
__global__ void __launch_bounds__(kNormProductThreads)
    activate_rows(const __grid_constant__ NormProductActivate args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t outputs = args.shape.outputs;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kNormProductThreads + threadIdx.x;
  const int64_t index = vector / vectors_per_row;
  if (index >= args.shape.rows * args.shape.taps) return;
  const int64_t column = (vector - index * vectors_per_row) * kWidth;
  const int64_t tap = index % args.shape.taps;
  T* y = static_cast<T*>(args.y) + index * outputs;
  auto value = to_accumulator(load_columns<kAligned, kWidth>(y, column, outputs));
  float2 moments = {0.0f, 1.0f};
  if (args.stats != nullptr) moments = __ldg(static_cast<const float2*>(args.stats) + index);
  const float* bias = static_cast<const float*>(args.folded_bias) + tap * outputs;
  const auto shift = load_columns<kAligned, kWidth>(bias, column, outputs);
  Vec<float, kWidth> sum = {};
  if (args.folded_sum != nullptr) {
    const float* sums = static_cast<const float*>(args.folded_sum) + tap * outputs;
    sum = load_columns<kAligned, kWidth>(sums, column, outputs);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = moments.y * (value[i] - moments.x * sum[i]) + shift[i];
  if (args.preactivation != nullptr) {
    T* preactivation = static_cast<T*>(args.preactivation) + index * outputs;
    store_columns<kAligned>(preactivation, column, outputs, from_accumulator<T>(value));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = activate<kActivation>(value[i]);
  store_columns<kAligned>(y, column, outputs, from_accumulator<T>(value));
}

// ---- launchers

template <class T, bool kAligned>
cudaError_t launch_stats(const NormProductStats& args, CudaStream stream) {
  const int64_t rows = args.shape.rows * args.shape.taps;
  dim3 grid;
  const auto in_registers = [&](auto shape) {
    using Shape = decltype(shape);
    if (!make_grid(ceil_div<int64_t>(rows, Shape::kRowsPerBlock), &grid))
      return cudaErrorInvalidConfiguration;
    return launch(row_moments<Shape>, grid, dim3(kRowBlockThreads), 0, stream, args);
  };
  const auto wide = [&] {
    if (!make_grid(rows, &grid)) return cudaErrorInvalidConfiguration;
    return launch(row_moments_wide<T, kAligned>, grid, dim3(kWideThreads), 0, stream, args);
  };
  return dispatch_row_shape<T, kAligned>(args.shape.inputs, in_registers, wide);
}

}  // namespace

int norm_product_fold(DType dtype, const NormProductFold& args, CudaStream stream) {
  const int64_t rows = args.shape.taps * args.shape.outputs;
  if (rows == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(rows, kNormProductWarps), &grid)) return cudaErrorInvalidConfiguration;
  const int64_t inputs = args.shape.inputs;
  return dispatch(dtype, args.parameter_type, [&](auto element, auto parameter) {
    using T = decltype(element);
    using P = decltype(parameter);
    const auto aligned = [&](const auto* data) { return is_vector_aligned(data, inputs, kFoldWidth); };
    const bool all =
        aligned(static_cast<const P*>(args.weight)) && aligned(static_cast<const P*>(args.norm_weight)) &&
        aligned(static_cast<const P*>(args.norm_bias)) && aligned(static_cast<const T*>(args.folded_weight));
    const auto kernel = all ? fold<T, P, true> : fold<T, P, false>;
    return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args);
  });
}

int norm_product_stats(DType dtype, const NormProductStats& args, CudaStream stream) {
  if (args.shape.rows * args.shape.taps == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    return input_aligned<T>(args.x, args.shape.inputs) ? launch_stats<T, true>(args, stream)
                                                       : launch_stats<T, false>(args, stream);
  });
}

int norm_product_activate(DType dtype, const NormProductActivate& args, CudaStream stream) {
  const int64_t rows = args.shape.rows * args.shape.taps;
  if (rows * args.shape.outputs == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    int64_t vectors_per_row = 0;
    dim3 grid;
    if (!vector_grid<T>(rows, args.shape.outputs, &vectors_per_row, &grid))
      return cudaErrorInvalidConfiguration;
    const bool aligned = rows_aligned<T>(args.y, args.shape.outputs) && rows_aligned<T>(args.preactivation) &&
                         rows_aligned<float>(args.folded_bias) && rows_aligned<float>(args.folded_sum);
    return dispatch_activation(args.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      const auto kernel =
          aligned ? activate_rows<T, true, kActivation> : activate_rows<T, false, kActivation>;
      return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args, vectors_per_row);
    });
  });
}

}  // namespace mmk::cuda
