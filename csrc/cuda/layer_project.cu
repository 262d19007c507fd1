#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/moments.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/common/tile_product.cuh"
#include "cuda/layer_project.cuh"

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
__global__ void __launch_bounds__(kProjectThreads) fold(const __grid_constant__ LayerProjectFold args) {
  const int64_t inputs = args.shape.inputs;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kProjectWarps + warp_index();
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
    row_moments(const __grid_constant__ LayerProjectStats args) {
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
    row_moments_wide(const __grid_constant__ LayerProjectStats args) {
  const int64_t index = blockIdx.x;
  const T* row = input_row<T>(args.x, args.shape.taps, index);
  const float2 moments = wide_moments<T, kAligned>(row, args.shape.inputs, static_cast<float>(args.eps));
  if (threadIdx.x == 0) static_cast<float2*>(args.stats)[index] = moments;
}

// ---- from the product to the result

// Mean and 1 / standard deviation of row n * taps + tap; 0 and 1 without norm.
MMK_DEVICE float2 moments_of(const LayerProjectActivate& args, int64_t index) {
  return args.stats == nullptr ? float2{0.0f, 1.0f} : __ldg(static_cast<const float2*>(args.stats) + index);
}

// Writes z and y = act(z) for columns of row n * taps + tap, from the product x Vc^T.
template <class T, bool kAligned, int kWidth>
MMK_DEVICE void finish_columns(const LayerProjectActivate& args, int64_t index, int64_t tap, int64_t column,
                               Vec<float, kWidth> value) {
  const int64_t outputs = args.shape.outputs;
  const float* bias = static_cast<const float*>(args.folded_bias) + tap * outputs;
  const float2 moments = moments_of(args, index);
  const auto shift = load_columns<kAligned, kWidth>(bias, column, outputs);
  Vec<float, kWidth> sum = {};
  if (args.folded_sum != nullptr) {
    sum = load_columns<kAligned, kWidth>(static_cast<const float*>(args.folded_sum) + tap * outputs, column,
                                         outputs);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = moments.y * (value[i] - moments.x * sum[i]) + shift[i];
  if (args.preactivation != nullptr) {
    T* preactivation = static_cast<T*>(args.preactivation) + index * outputs;
    store_columns<kAligned>(preactivation, column, outputs, from_accumulator<T>(value));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) value[i] = activate(args.activation, value[i]);
  store_columns<kAligned>(static_cast<T*>(args.y) + index * outputs, column, outputs,
                          from_accumulator<T>(value));
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kProjectThreads)
    activate_rows(const __grid_constant__ LayerProjectActivate args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kProjectThreads + threadIdx.x;
  const int64_t index = vector / vectors_per_row;
  if (index >= args.shape.rows * args.shape.taps) return;
  const int64_t column = (vector - index * vectors_per_row) * kWidth;
  const T* product = static_cast<const T*>(args.y) + index * args.shape.outputs;
  const auto value = to_accumulator(load_columns<kAligned, kWidth>(product, column, args.shape.outputs));
  finish_columns<T, kAligned>(args, index, index % args.shape.taps, column, value);
}

// The product on the tensor cores, one tile of one tap per block. Statistics, bias and activation are applied
// while the tile is in shared memory.
template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(TileProduct<T, kRows, kColumns>::kThreads, 2)
    project(const __grid_constant__ LayerProjectProduct args,
            const __grid_constant__ LayerProjectTiles tiles) {
  using Tile = TileProduct<T, kRows, kColumns>;
  const LayerProjectShape& shape = args.rest.shape;
  // Neighbouring blocks read the same rows of x.
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) % tiles.output_tiles * kColumns;
  const int64_t rest = static_cast<int64_t>(blockIdx.x) / tiles.output_tiles;
  const int64_t first_row = rest % tiles.row_tiles * kRows;
  const int64_t tap = rest / tiles.row_tiles;
  const MatrixView<T> x = {static_cast<const T*>(args.x.data) + tap * args.x.tap_stride, args.x.row_stride,
                           shape.rows, shape.inputs};
  const MatrixView<T> weight = {
      static_cast<const T*>(args.folded_weight) + tap * shape.outputs * shape.inputs, shape.inputs,
      shape.outputs, shape.inputs};
  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  Tile::run(buffer, x, first_row, weight, first_column);

  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kVectors = kColumns / kWidth;  // of a row
  const float* result = reinterpret_cast<const float*>(buffer);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += Tile::kThreads) {
    const int row = i / kVectors;
    const int column = i % kVectors * kWidth;
    if (first_row + row >= shape.rows || first_column + column >= shape.outputs) continue;
    const auto value = load<kWidth>(result + row * Tile::kResultStride + column);
    finish_columns<T, true>(args.rest, (first_row + row) * shape.taps + tap, tap, first_column + column,
                            value);
  }
}

// ---- launchers

template <class T, int kColumns>
cudaError_t launch_project(const LayerProjectProduct& args, const LayerProjectTiles& tiles,
                           CudaStream stream) {
  using Tile = TileProduct<T, 128, kColumns>;
  dim3 grid;
  if (!make_grid(tiles.blocks(), &grid)) return cudaErrorInvalidConfiguration;
  return launch(project<T, 128, kColumns>, grid, dim3(Tile::kThreads), Tile::kBytes, stream, args, tiles);
}

template <class T>
cudaError_t launch_project(const LayerProjectProduct& args, CudaStream stream) {
  const LayerProjectTiles tiles = layer_project_tiles(args.rest.shape);
  return tiles.tile_outputs == 64 ? launch_project<T, 64>(args, tiles, stream)
                                  : launch_project<T, 128>(args, tiles, stream);
}

template <class T, bool kAligned>
cudaError_t launch_stats(const LayerProjectStats& args, CudaStream stream) {
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

int layer_project_fold(DType dtype, const LayerProjectFold& args, CudaStream stream) {
  const int64_t rows = args.shape.taps * args.shape.outputs;
  if (rows == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(rows, kProjectWarps), &grid)) return cudaErrorInvalidConfiguration;
  const int64_t inputs = args.shape.inputs;
  return dispatch(dtype, args.parameter_type, [&](auto element, auto parameter) {
    using T = decltype(element);
    using P = decltype(parameter);
    const auto aligned = [&](const auto* data) { return is_vector_aligned(data, inputs, kFoldWidth); };
    const bool all =
        aligned(static_cast<const P*>(args.weight)) && aligned(static_cast<const P*>(args.norm_weight)) &&
        aligned(static_cast<const P*>(args.norm_bias)) && aligned(static_cast<const T*>(args.folded_weight));
    const auto kernel = all ? fold<T, P, true> : fold<T, P, false>;
    return launch(kernel, grid, dim3(kProjectThreads), 0, stream, args);
  });
}

int layer_project_stats(DType dtype, const LayerProjectStats& args, CudaStream stream) {
  if (args.shape.rows * args.shape.taps == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    return rows_aligned<T>(args.x, args.shape.inputs) ? launch_stats<T, true>(args, stream)
                                                      : launch_stats<T, false>(args, stream);
  });
}

bool layer_project_fuses(DType dtype, const LayerProjectShape& shape, const LayerProjectInput& x) {
  return (dtype == DType::kFloat16 || dtype == DType::kBFloat16) && shape.inputs > 0 &&
         shape.outputs % 8 == 0 && rows_aligned<__half>(x, shape.inputs);
}

int layer_project_product(DType dtype, const LayerProjectProduct& args, CudaStream stream) {
  const LayerProjectShape& shape = args.rest.shape;
  if (!layer_project_fuses(dtype, shape, args.x)) return cudaErrorInvalidValue;
  if (shape.rows * shape.taps * shape.outputs == 0) return cudaSuccess;
  return dtype == DType::kFloat16 ? launch_project<__half>(args, stream)
                                  : launch_project<__nv_bfloat16>(args, stream);
}

int layer_project_activate(DType dtype, const LayerProjectActivate& args, CudaStream stream) {
  const int64_t rows = args.shape.rows * args.shape.taps;
  if (rows * args.shape.outputs == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    int64_t vectors_per_row = 0;
    dim3 grid;
    if (!vector_grid<T>(rows, args.shape.outputs, &vectors_per_row, &grid))
      return cudaErrorInvalidConfiguration;
    const bool aligned = rows_aligned<T>(args.y, args.shape.outputs) &&
                         rows_aligned<T>(args.preactivation, 0) && rows_aligned<float>(args.folded_bias, 0) &&
                         rows_aligned<float>(args.folded_sum, 0);
    const auto kernel = aligned ? activate_rows<T, true> : activate_rows<T, false>;
    return launch(kernel, grid, dim3(kProjectThreads), 0, stream, args, vectors_per_row);
  });
}

}  // namespace mmk::cuda
