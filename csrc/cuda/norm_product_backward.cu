#include "cuda/common/activation.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/common/partials.cuh"
#include "cuda/norm_product.cuh"

namespace mmk::cuda {
namespace {

// ---- gradient at z, scaled for the products, and its sums over rows (for the bias) and outputs (for x)

// Five blocks leave registers for four rows of a warp in flight: 80 KB on a multiprocessor.
inline constexpr int kGradientThreads = 128;
inline constexpr int kGradientWarps = kGradientThreads / kWarpSize;
inline constexpr int kGradientBlocks = 5;

// A block's rows: one chunk of one tap.
struct ChunkRows {
  int64_t first;  // row * taps + tap of the first one
  int64_t taps;
  int count;

  MMK_DEVICE int64_t index(int row) const { return first + row * taps; }
};

// Takes columns [column, column + kWidth) of all rows of the block: writes g, returns the sums of dz, and
// adds to each row's pull. folded_bias: that of the tap.
template <class T, bool kAligned, Activation kActivation>
MMK_DEVICE Vec<float, kVectorWidth<T>> gradient_columns(const NormProductGradient& args,
                                                        const ChunkRows& rows, const float* folded_bias,
                                                        int64_t column, const float* rstds, float* pulls) {
  constexpr int kWidth = kVectorWidth<T>;
  // Rows of a warp whose loads are in flight together. Elements loaded one by one take a register each.
  constexpr int kAhead = kAligned ? 4 : 1;
  const int64_t outputs = args.shape.outputs;
  const int left = static_cast<int>(max(min(outputs - column, int64_t{kWidth}), int64_t{0}));
  // A lane past the end reads the first vector instead: selecting zeros would unpack the elements early, into
  // a register each.
  const auto columns = [&](const auto* data) {
    if constexpr (kAligned) {
      return load<kWidth>(data);
    } else {
      return load_columns<false, kWidth>(data, 0, left);
    }
  };
  if (left == 0) column = 0;
  const int64_t first_element = rows.first * outputs + column;
  const int64_t row_step = rows.taps * outputs;
  const auto element = [&](int row) { return first_element + row * row_step; };
  Vec<float, kWidth> bias = {};
  if (args.pull != nullptr) bias = columns(folded_bias + column);
  const float scale = static_cast<float>(args.scale);
  Vec<float, kWidth> sums = {};
#pragma unroll 1
  for (int first = warp_index(); first < rows.count; first += kAhead * kGradientWarps) {
    Vec<T, kWidth> grads[kAhead], values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      // Past the end the warp rereads the last row: a branch would wait for each load.
      const int64_t place = element(min(first + k * kGradientWarps, rows.count - 1));
      grads[k] = columns(static_cast<const T*>(args.grad) + place);
      values[k] = columns(static_cast<const T*>(args.value) + place);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int row = first + k * kGradientWarps;
      if (row >= rows.count) break;
      const auto grad = to_accumulator(grads[k]);
      const auto value = to_accumulator(values[k]);
      const float rstd = rstds[row];
      Vec<float, kWidth> scaled;
      float pull = 0.0f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float dz = scale * grad[i] * activation_slope<kActivation>(value[i]);
        sums[i] += dz;
        scaled[i] = dz * rstd;
        // For relu, value is the output: it equals z except where dz is 0.
        pull += scaled[i] * (value[i] - bias[i]);
      }
      if (args.scaled_grad != nullptr) {
        store_columns<kAligned>(static_cast<T*>(args.scaled_grad) + element(row), 0, left,
                                from_accumulator<T>(scaled));
      }
      if (args.pull != nullptr) {
        pull = warp_sum(left > 0 ? pull : 0.0f);
        if (lane_index() == 0) pulls[row] += pull;
      }
    }
  }
  return sums;
}

template <class T, bool kAligned, Activation kActivation>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks)
    gradient(const __grid_constant__ NormProductGradient args) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kColumns = kWarpSize * kWidth;
  const NormProductShape& shape = args.shape;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) / shape.taps * kNormProductChunk;
  const int64_t tap = static_cast<int64_t>(blockIdx.x) % shape.taps;
  const ChunkRows rows = {begin * shape.taps + tap, shape.taps,
                          static_cast<int>(min(kNormProductChunk, shape.rows - begin))};
  MMK_SHARED(float, rstds, kNormProductChunk);
  MMK_SHARED(float, pulls, kNormProductChunk);
  MMK_SHARED(float, columns, kGradientWarps, kColumns);
  static_assert(kNormProductChunk <= kGradientThreads, "a thread for each row");
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < rows.count) {
    const auto* stats = static_cast<const float2*>(args.stats);
    rstds[thread] = stats == nullptr ? 1.0f : stats[rows.index(thread)].y;
    pulls[thread] = 0.0f;
  }
  __syncthreads();

  const float* bias = static_cast<const float*>(args.folded_bias);
  if (bias != nullptr) bias += tap * shape.outputs;
  for (int64_t first = 0; first < shape.outputs; first += kColumns) {
    const auto sums = gradient_columns<T, kAligned, kActivation>(args, rows, bias,
                                                                 first + lane_index() * kWidth, rstds, pulls);
    store(&columns[warp_index()][lane_index() * kWidth], sums);
    __syncthreads();
    // Block b is tap b % taps of chunk b / taps, so the rows of partial sums are in the order of blocks.
    float* partial = static_cast<float*>(args.partial_bias) + blockIdx.x * shape.outputs + first;
    for (int i = thread; i < kColumns && first + i < shape.outputs; i += kGradientThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kGradientWarps; ++warp) sum += columns[warp][i];
      partial[i] = sum;
    }
    __syncthreads();
  }
  if (args.pull == nullptr || thread >= rows.count) return;
  static_cast<float*>(args.pull)[rows.index(thread)] =
      rstds[thread] / static_cast<float>(shape.inputs) * pulls[thread];
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

inline constexpr int kUnfoldWidth = 4;  // columns of a thread: 16 bytes of dVc

// One warp per row of the weight: its bias gradient, and the mean of its row of dVc.
template <class P, bool kAligned>
__global__ void __launch_bounds__(kPartialThreads, 6)
    unfold_rows(const __grid_constant__ NormProductUnfold args) {
  constexpr int kRows = kPartialThreads / kWarpSize;
  const int64_t rows = args.shape.taps * args.shape.outputs;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  // Eight rows are neighbours in a row of partial sums, 32 bytes.
  const int64_t row_of_thread = first + threadIdx.x % kRows;
  const double bias_of_thread = sum_partials<kRows>(
      static_cast<const float*>(args.partial_bias) + row_of_thread, args.chunks, rows, row_of_thread < rows);
  const double bias = __shfl_sync(kFullMask, bias_of_thread, warp_index());
  const int64_t index = first + warp_index();
  if (index >= rows) return;
  float2 sums = {static_cast<float>(bias), 0.0f};
  if (lane_index() == 0) static_cast<P*>(args.d_bias)[index] = from_accumulator<P>(sums.x);
  if (args.product != nullptr) {
    const int64_t inputs = args.shape.inputs;
    const float* product = static_cast<const float*>(args.product) + index * inputs;
    double total = 0.0;
#pragma unroll 4
    for (int64_t column = lane_index() * kUnfoldWidth; column < inputs; column += kWarpSize * kUnfoldWidth) {
      const auto values = load_columns<kAligned, kUnfoldWidth>(product, column, inputs);
#pragma unroll
      for (int i = 0; i < kUnfoldWidth; ++i) total += values[i];
    }
    total = warp_sum(total);
    sums.y = static_cast<float>(total / static_cast<double>(inputs));
  }
  if (args.row_sums != nullptr && lane_index() == 0) static_cast<float2*>(args.row_sums)[index] = sums;
}

inline constexpr int kUnfoldLanes = 8;  // of a row: 128 bytes of dVc
inline constexpr int kUnfoldColumns = kUnfoldLanes * kUnfoldWidth;

// One block per kUnfoldColumns columns of a tap: turns dVc into dW if there is a norm, and sums over outputs.
template <class P, bool kAligned, bool kNorm>
__global__ void __launch_bounds__(kNormProductThreads, 3)
    unfold_columns(const __grid_constant__ NormProductUnfold args, int64_t blocks_per_tap) {
  constexpr int kRows = kNormProductThreads / kUnfoldLanes;
  // Rows of a thread whose loads are in flight together.
  constexpr int kAhead = !kAligned ? 2 : sizeof(P) == 4 ? 3 : 4;
  using Columns = Vec<float, kUnfoldWidth>;
  const auto [batch, taps, inputs, outputs] = args.shape;
  const int64_t tap = static_cast<int64_t>(blockIdx.x) / blocks_per_tap;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) % blocks_per_tap * kUnfoldColumns;
  const int part = static_cast<int>(threadIdx.x) % kUnfoldLanes * kUnfoldWidth;
  const int group = static_cast<int>(threadIdx.x) / kUnfoldLanes;
  const int64_t column = first_column + part;
  const auto parameter = [&](const void* data) {
    if (data == nullptr) return Columns{};
    return to_accumulator(
        load_columns<kAligned, kUnfoldWidth>(static_cast<const P*>(data) + tap * inputs, column, inputs));
  };
  const Columns gain = parameter(args.norm_weight);
  const Columns shift = parameter(args.norm_bias);
  Columns d_gain = {}, d_shift = {};
  for (int64_t first = group; column < inputs && first < outputs; first += kAhead * kRows) {
    Vec<P, kUnfoldWidth> weights[kAhead];
    Columns products[kAhead];
    float2 row_sums[kAhead];
    const auto present = [&](int k) { return first + k * kRows < outputs; };
    // Past the end the thread rereads its first row: a branch would wait for each load.
    const auto row = [&](int k) { return tap * outputs + first + (present(k) ? k * kRows : 0); };
    const auto element = [&](int k) { return row(k) * inputs + column; };
    const int left = static_cast<int>(inputs - column < kUnfoldWidth ? inputs - column : kUnfoldWidth);
    const auto columns = [&](const auto* data) {
      return load_columns<kAligned, kUnfoldWidth>(data, 0, left);
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      weights[k] = columns(static_cast<const P*>(args.weight) + element(k));
      if constexpr (kNorm) products[k] = columns(static_cast<const float*>(args.product) + element(k));
      row_sums[k] = __ldg(static_cast<const float2*>(args.row_sums) + row(k));
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!present(k)) continue;
      const Columns weight = to_accumulator(weights[k]);
#pragma unroll
      for (int i = 0; i < kUnfoldWidth; ++i) d_shift[i] += row_sums[k].x * weight[i];
      if constexpr (kNorm) {
        Columns d_weight;
#pragma unroll
        for (int i = 0; i < kUnfoldWidth; ++i) {
          const float d_product = products[k][i] - row_sums[k].y;
          d_gain[i] += d_product * weight[i];
          d_weight[i] = d_product * gain[i] + row_sums[k].x * shift[i];
        }
        store_columns<kAligned>(static_cast<P*>(args.d_weight) + element(k), 0, left,
                                from_accumulator<P>(d_weight));
      }
    }
  }
  MMK_SHARED(float, sums, 2, kRows, kUnfoldColumns);  // of the gain and of the shift
  store(&sums[0][group][part], d_gain);
  store(&sums[1][group][part], d_shift);
  __syncthreads();
  const int which = static_cast<int>(threadIdx.x) / kUnfoldColumns;
  const int place = static_cast<int>(threadIdx.x) % kUnfoldColumns;
  void* result = which == 0 ? args.d_norm_weight : args.d_norm_bias;
  if (which > 1 || first_column + place >= inputs || result == nullptr) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows; ++i) total += sums[which][i][place];
  static_cast<P*>(result)[tap * inputs + first_column + place] = from_accumulator<P>(total);
}

template <class P, bool kAligned>
cudaError_t launch_unfold(const NormProductUnfold& args, CudaStream stream) {
  const NormProductShape& shape = args.shape;
  dim3 grid;
  if (shape.taps * shape.outputs > 0) {
    const int64_t blocks = ceil_div<int64_t>(shape.taps * shape.outputs, kPartialThreads / kWarpSize);
    if (!make_grid(blocks, &grid)) return cudaErrorInvalidConfiguration;
    const cudaError_t error = launch(unfold_rows<P, kAligned>, grid, dim3(kPartialThreads), 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  const bool wanted = args.product != nullptr || args.d_norm_weight != nullptr || args.d_norm_bias != nullptr;
  if (!wanted || shape.taps * shape.inputs == 0) return cudaSuccess;
  const int64_t blocks_per_tap = ceil_div<int64_t>(shape.inputs, kUnfoldColumns);
  if (!make_grid(blocks_per_tap * shape.taps, &grid)) return cudaErrorInvalidConfiguration;
  const auto kernel =
      args.product != nullptr ? unfold_columns<P, kAligned, true> : unfold_columns<P, kAligned, false>;
  return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args, blocks_per_tap);
}

}  // namespace

int norm_product_gradient(DType dtype, const NormProductGradient& args, CudaStream stream) {
  const NormProductShape& shape = args.shape;
  if (shape.rows * shape.taps == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(norm_product_chunks(shape.rows) * shape.taps, &grid)) return cudaErrorInvalidConfiguration;
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned<T>(args.grad, shape.outputs) && rows_aligned<T>(args.value) &&
                         rows_aligned<T>(args.scaled_grad) && rows_aligned<float>(args.folded_bias);
    return dispatch_activation(args.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      const auto kernel = aligned ? gradient<T, true, kActivation> : gradient<T, false, kActivation>;
      return launch(kernel, grid, dim3(kGradientThreads), 0, stream, args);
    });
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
    const bool aligned = input_aligned<T>(args.x, args.shape.inputs) && rows_aligned<T>(args.dx);
    const auto kernel = aligned ? finish_input_gradient<T, true> : finish_input_gradient<T, false>;
    return launch(kernel, grid, dim3(kNormProductThreads), 0, stream, args, vectors_per_row);
  });
}

int norm_product_unfold(const NormProductUnfold& args, CudaStream stream) {
  return dispatch(args.parameter_type, [&](auto parameter) {
    using P = decltype(parameter);
    const auto aligned = [](const void* data) { return rows_aligned<P, kUnfoldWidth>(data); };
    const bool all = aligned(args.weight) && aligned(args.norm_weight) && aligned(args.norm_bias) &&
                     aligned(args.d_weight) &&
                     rows_aligned<float, kUnfoldWidth>(args.product, args.shape.inputs);
    return all ? launch_unfold<P, true>(args, stream) : launch_unfold<P, false>(args, stream);
  });
}

}  // namespace mmk::cuda
