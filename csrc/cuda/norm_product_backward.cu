#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/norm_product.cuh"

namespace mmk::cuda {
namespace {

// ---- gradient at z, scaled for the products, and its sums over rows (for the bias) and outputs (for x)

// A block's rows: one chunk of one tap.
struct ChunkRows {
  int64_t begin;
  int count;
  int64_t tap;
  int64_t taps;

  MMK_DEVICE int64_t index(int row) const { return (begin + row) * taps + tap; }
};

// Takes columns [column, column + kWidth) of all rows of the block: writes g, returns the sums of dz, and
// adds to each row's pull.
template <class T, bool kAligned>
MMK_DEVICE Vec<float, kVectorWidth<T>> gradient_columns(const NormProductGradient& args,
                                                        const ChunkRows& rows, int64_t column, float* pulls) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t outputs = args.shape.outputs;
  Vec<float, kWidth> bias = {};
  if (args.pull != nullptr) {
    const float* folded_bias = static_cast<const float*>(args.folded_bias) + rows.tap * outputs;
    bias = load_columns<kAligned, kWidth>(folded_bias, column, outputs);
  }
  const float scale = static_cast<float>(args.scale);
  Vec<float, kWidth> sums = {};
  for (int row = warp_index(); row < rows.count; row += kNormProductWarps) {
    const int64_t index = rows.index(row);
    const T* grad_row = static_cast<const T*>(args.grad) + index * outputs;
    const T* value_row = static_cast<const T*>(args.value) + index * outputs;
    const auto grad = to_accumulator(load_columns<kAligned, kWidth>(grad_row, column, outputs));
    const auto value = to_accumulator(load_columns<kAligned, kWidth>(value_row, column, outputs));
    const float rstd = args.stats == nullptr ? 1.0f : static_cast<const float2*>(args.stats)[index].y;
    Vec<float, kWidth> scaled;
    float pull = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float dz = scale * grad[i] * activation_slope(args.activation, value[i]);
      sums[i] += dz;
      scaled[i] = dz * rstd;
      // For relu, value is the output: it equals z except where dz is 0.
      pull += scaled[i] * (value[i] - bias[i]);
    }
    if (args.scaled_grad != nullptr) {
      T* target = static_cast<T*>(args.scaled_grad) + index * outputs;
      store_columns<kAligned>(target, column, outputs, from_accumulator<T>(scaled));
    }
    if (args.pull != nullptr) {
      pull = warp_sum(pull);
      if (lane_index() == 0) pulls[row] += pull;
    }
  }
  return sums;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormProductThreads)
    gradient(const __grid_constant__ NormProductGradient args) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kColumns = kWarpSize * kWidth;
  const NormProductShape& shape = args.shape;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / shape.taps;
  const int64_t begin = chunk * kNormProductChunk;
  const ChunkRows rows = {begin, static_cast<int>(min(kNormProductChunk, shape.rows - begin)),
                          static_cast<int64_t>(blockIdx.x) % shape.taps, shape.taps};
  MMK_SHARED(float, pulls, kNormProductChunk);
  MMK_SHARED(float, columns, kNormProductWarps, kColumns);
  // Lane 0 of a warp alone reads and writes the pulls of the warp's rows.
  for (int row = warp_index(); lane_index() == 0 && row < rows.count; row += kNormProductWarps)
    pulls[row] = 0.0f;

  float* partial = static_cast<float*>(args.partial_bias) + (chunk * shape.taps + rows.tap) * shape.outputs;
  for (int64_t first = 0; first < shape.outputs; first += kColumns) {
    const auto sums = gradient_columns<T, kAligned>(args, rows, first + lane_index() * kWidth, pulls);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) columns[warp_index()][lane_index() * kWidth + i] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns && first + i < shape.outputs; i += kNormProductThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kNormProductWarps; ++warp) sum += columns[warp][i];
      partial[first + i] = sum;
    }
    __syncthreads();
  }
  if (args.pull == nullptr || lane_index() != 0) return;
  for (int row = warp_index(); row < rows.count; row += kNormProductWarps) {
    const int64_t index = rows.index(row);
    const float rstd = static_cast<const float2*>(args.stats)[index].y;
    static_cast<float*>(args.pull)[index] = rstd / static_cast<float>(shape.inputs) * pulls[row];
  }
}

// ---- gradient of x: dx -= pull * (x - mean), one thread per vector

template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormProductThreads)
    finish_input_gradient(const __grid_constant__ NormProductInputGradient args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t inputs = args.shape.inputs;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kNormProductThreads + threadIdx.x;
  const int64_t index = vector / vectors_per_row;
  if (index >= args.shape.rows * args.shape.taps) return;
  const int64_t column = (vector - index * vectors_per_row) * kWidth;
  const float mean = __ldg(static_cast<const float2*>(args.stats) + index).x;
  const float pull = __ldg(static_cast<const float*>(args.pull) + index);
  const T* row = input_row<T>(args.x, args.shape.taps, index);
  T* dx_row = static_cast<T*>(args.dx) + index * inputs;
  const auto x = to_accumulator(load_columns<kAligned, kWidth>(row, column, inputs));
  auto dx = to_accumulator(load_columns<kAligned, kWidth>(dx_row, column, inputs));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) dx[i] -= pull * (x[i] - mean);
  store_columns<kAligned>(dx_row, column, inputs, from_accumulator<T>(dx));
}

// ---- from the folded weight's gradient to those of the parameters

// P is the type of the parameters and of their gradients, which are rounded once.

// One warp per row of the weight: its bias gradient, and the mean of its row of dVc.
template <class P>
__global__ void __launch_bounds__(kNormProductThreads)
    unfold_rows(const __grid_constant__ NormProductUnfold args) {
  const int64_t rows = args.shape.taps * args.shape.outputs;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormProductWarps + warp_index();
  if (index >= rows) return;
  double bias = 0.0;
  for (int64_t chunk = lane_index(); chunk < args.chunks; chunk += kWarpSize) {
    bias += static_cast<const float*>(args.partial_bias)[chunk * rows + index];
  }
  bias = warp_sum(bias);
  float2 sums = {static_cast<float>(bias), 0.0f};
  if (lane_index() == 0) static_cast<P*>(args.d_bias)[index] = from_accumulator<P>(sums.x);
  if (args.product != nullptr) {
    const float* product = static_cast<const float*>(args.product) + index * args.shape.inputs;
    double total = 0.0;
    for (int64_t column = lane_index(); column < args.shape.inputs; column += kWarpSize)
      total += product[column];
    total = warp_sum(total);
    sums.y = static_cast<float>(total / static_cast<double>(args.shape.inputs));
  }
  if (args.row_sums != nullptr && lane_index() == 0) static_cast<float2*>(args.row_sums)[index] = sums;
}

// One block per 32 columns of a tap: turns dVc into dW, and sums over outputs.
template <class P>
__global__ void __launch_bounds__(kNormProductThreads)
    unfold_columns(const __grid_constant__ NormProductUnfold args, int64_t blocks_per_tap) {
  const NormProductShape& shape = args.shape;
  const int64_t tap = static_cast<int64_t>(blockIdx.x) / blocks_per_tap;
  const int64_t column = static_cast<int64_t>(blockIdx.x) % blocks_per_tap * kWarpSize + lane_index();
  const bool inside = column < shape.inputs;
  const int64_t place = tap * shape.inputs + column;
  const bool normed = args.product != nullptr;
  const auto parameter = [&](const void* data) {
    return inside && data != nullptr ? to_accumulator(static_cast<const P*>(data)[place]) : 0.0f;
  };
  const float gain = normed ? parameter(args.norm_weight) : 0.0f;
  const float shift = parameter(args.norm_bias);
  float d_gain = 0.0f;
  float d_shift = 0.0f;
  for (int64_t output = warp_index(); inside && output < shape.outputs; output += kNormProductWarps) {
    const int64_t row = tap * shape.outputs + output;
    const int64_t element = row * shape.inputs + column;
    const float weight = to_accumulator(static_cast<const P*>(args.weight)[element]);
    const float2 row_sums = static_cast<const float2*>(args.row_sums)[row];
    d_shift += row_sums.x * weight;
    if (!normed) continue;
    const float d_product = static_cast<const float*>(args.product)[element] - row_sums.y;
    d_gain += d_product * weight;
    static_cast<P*>(args.d_weight)[element] = from_accumulator<P>(d_product * gain + row_sums.x * shift);
  }
  MMK_SHARED(float2, sums, kNormProductWarps, kWarpSize);
  sums[warp_index()][lane_index()] = {d_gain, d_shift};
  __syncthreads();
  if (warp_index() != 0 || !inside) return;
  float2 total = {0.0f, 0.0f};
#pragma unroll
  for (int warp = 0; warp < kNormProductWarps; ++warp) {
    total.x += sums[warp][lane_index()].x;
    total.y += sums[warp][lane_index()].y;
  }
  const auto store = [&](void* data, float value) {
    if (data != nullptr) static_cast<P*>(data)[place] = from_accumulator<P>(value);
  };
  store(args.d_norm_weight, total.x);
  store(args.d_norm_bias, total.y);
}

template <class P>
cudaError_t launch_unfold(const NormProductUnfold& args, CudaStream stream) {
  const NormProductShape& shape = args.shape;
  dim3 grid;
  if (shape.taps * shape.outputs > 0) {
    const int64_t blocks = ceil_div<int64_t>(shape.taps * shape.outputs, kNormProductWarps);
    if (!make_grid(blocks, &grid)) return cudaErrorInvalidConfiguration;
    const cudaError_t error = launch(unfold_rows<P>, grid, dim3(kNormProductThreads), 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  const bool wanted = args.product != nullptr || args.d_norm_weight != nullptr || args.d_norm_bias != nullptr;
  if (!wanted || shape.taps * shape.inputs == 0) return cudaSuccess;
  const int64_t blocks_per_tap = ceil_div<int64_t>(shape.inputs, kWarpSize);
  if (!make_grid(blocks_per_tap * shape.taps, &grid)) return cudaErrorInvalidConfiguration;
  return launch(unfold_columns<P>, grid, dim3(kNormProductThreads), 0, stream, args, blocks_per_tap);
}

}  // namespace

int norm_product_gradient(DType dtype, const NormProductGradient& args, CudaStream stream) {
  const NormProductShape& shape = args.shape;
  if (shape.rows * shape.taps == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(norm_product_chunks(shape.rows) * shape.taps, &grid)) return cudaErrorInvalidConfiguration;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned<T>(args.grad, shape.outputs) && rows_aligned<T>(args.value, 0) &&
                         rows_aligned<T>(args.scaled_grad, 0) && rows_aligned<float>(args.folded_bias, 0);
    const auto kernel = aligned ? gradient<T, true> : gradient<T, false>;
    return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args);
  });
}

int norm_product_input_gradient(DType dtype, const NormProductInputGradient& args, CudaStream stream) {
  const int64_t rows = args.shape.rows * args.shape.taps;
  if (rows * args.shape.inputs == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    int64_t vectors_per_row = 0;
    dim3 grid;
    if (!vector_grid<T>(rows, args.shape.inputs, &vectors_per_row, &grid))
      return cudaErrorInvalidConfiguration;
    const bool aligned = rows_aligned<T>(args.x, args.shape.inputs) && rows_aligned<T>(args.dx, 0);
    const auto kernel = aligned ? finish_input_gradient<T, true> : finish_input_gradient<T, false>;
    return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args, vectors_per_row);
  });
}

int norm_product_unfold(const NormProductUnfold& args, CudaStream stream) {
  return dispatch(args.parameter_type,
                  [&](auto parameter) { return launch_unfold<decltype(parameter)>(args, stream); });
}

}  // namespace mmk::cuda
