#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/moments.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/norm_product.cuh"

namespace mmk::cuda {
namespace {

// ---- folding the LayerNorm into the weight. T is the type of x, P that of the parameters

// Small blocks leave registers for a block of the next kernel, which can then start early.
inline constexpr int kFoldThreads = 128;
inline constexpr int kFoldWidth = 4;

// Folds one row of the weight: writes its row of Vc, its b' and its folded_sum.
template <class T, class P, bool kAligned>
MMK_DEVICE void fold_row(const NormProductFold& args, int64_t index) {
  constexpr int kStep = kFoldThreads * kFoldWidth;
  const int64_t width = args.shape.inputs;
  const int64_t of_tap = index / args.shape.outputs * width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kFoldWidth;
  const P* weight = static_cast<const P*>(args.weight) + index * width;
  const P* gain = static_cast<const P*>(args.norm_weight);
  const P* shift = static_cast<const P*>(args.norm_bias);
  if (gain != nullptr) gain += of_tap;
  if (shift != nullptr) shift += of_tap;
  const auto columns = [&](const P* row, int64_t column) {
    return to_accumulator(load_columns<kAligned, kFoldWidth>(row, column, width));
  };
  float sums[2] = {};  // over the row, of W gamma and W beta
  for (int64_t column = first; gain != nullptr && column < width; column += kStep) {
    const auto w = columns(weight, column);
    const auto factor = columns(gain, column);
    Vec<float, kFoldWidth> added = {};
    if (shift != nullptr) added = columns(shift, column);
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) {
      sums[0] += w[i] * factor[i];
      sums[1] += w[i] * added[i];
    }
  }
  block_sums<kFoldThreads>(sums);
  if (threadIdx.x == 0) {
    const P* bias = static_cast<const P*>(args.bias);
    static_cast<float*>(args.folded_bias)[index] =
        (bias == nullptr ? 0.0f : to_accumulator(bias[index])) + sums[1];
  }
  // Stop if nothing is left to write. With width 0 folded_weight is null, but folded_sum must be written.
  if (args.folded_weight == nullptr && args.folded_sum == nullptr) return;
  const float mean = gain == nullptr ? 0.0f : sums[0] / static_cast<float>(width);
  float total = 0.0f;
  for (int64_t column = first; column < width; column += kStep) {
    auto value = columns(weight, column);
    if (gain != nullptr) {
      const auto factor = columns(gain, column);
#pragma unroll
      for (int i = 0; i < kFoldWidth; ++i) value[i] = value[i] * factor[i] - mean;
    }
    const Vec<T, kFoldWidth> rounded = from_accumulator<T>(value);
    store_columns<kAligned>(static_cast<T*>(args.folded_weight) + index * width, column, width, rounded);
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) {
      if (column + i < width) total += to_accumulator(rounded[i]);
    }
  }
  if (args.folded_sum == nullptr) return;
  total = block_sum<kFoldThreads>(total);
  if (threadIdx.x == 0) static_cast<float*>(args.folded_sum)[index] = total;
}

// Blocks of a conversion, one for each piece.
MMK_HOST_DEVICE int64_t pieces(const NormProductConversion& conversion) {
  return conversion.target == nullptr ? 0 : ceil_div<int64_t>(conversion.count, kFoldThreads * kFoldWidth);
}

template <class Out, class P, bool kAligned>
MMK_DEVICE void convert_piece(const NormProductConversion& conversion, int64_t piece) {
  const int64_t first = (piece * kFoldThreads + threadIdx.x) * kFoldWidth;
  const auto value = to_accumulator(
      load_columns<kAligned, kFoldWidth>(static_cast<const P*>(conversion.source), first, conversion.count));
  store_columns<kAligned>(static_cast<Out*>(conversion.target), first, conversion.count,
                          from_accumulator<Out>(value));
}

// One block per row of the weight; the blocks after them convert one piece each.
template <class T, class P, bool kAligned>
__global__ void __launch_bounds__(kFoldThreads) fold(const __grid_constant__ NormProductFold args) {
  grid_dependency_launch();
  const int64_t rows = args.shape.taps * args.shape.outputs;
  if (blockIdx.x < rows) {
    fold_row<T, P, kAligned>(args, blockIdx.x);
    return;
  }
  const int64_t piece = blockIdx.x - rows;
  const int64_t of_weight = pieces(args.next_weight);
  if (piece < of_weight) {
    convert_piece<T, P, kAligned>(args.next_weight, piece);
  } else {
    // A bias is short, and the caller's tensor may start anywhere.
    convert_piece<float, P, false>(args.next_bias, piece - of_weight);
  }
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
  const int64_t blocks =
      args.shape.taps * args.shape.outputs + pieces(args.next_weight) + pieces(args.next_bias);
  if (blocks == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(blocks, &grid)) return cudaErrorInvalidConfiguration;
  return dispatch(dtype, args.parameter_type, [&](auto element, auto parameter) {
    using T = decltype(element);
    using P = decltype(parameter);
    const auto source_aligned = [](const void* data, int64_t size) {
      return rows_aligned<P, kFoldWidth>(data, size);
    };
    const auto target_aligned = [](const void* data) { return rows_aligned<T, kFoldWidth>(data); };
    const NormProductConversion& next = args.next_weight;
    const bool all =
        source_aligned(args.weight, args.shape.inputs) && source_aligned(args.norm_weight, 0) &&
        source_aligned(args.norm_bias, 0) && target_aligned(args.folded_weight) &&
        (next.target == nullptr || (source_aligned(next.source, next.count) && target_aligned(next.target)));
    const auto kernel = all ? fold<T, P, true> : fold<T, P, false>;
    return launch(kernel, grid, dim3(kFoldThreads), 0, stream, args);
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
