#include "cuda/common/moments.cuh"
#include "cuda/layer_mix.cuh"

namespace mmk::cuda {
namespace {

// ---- forward without norm: one thread per vector of the output

// Adds kCount layers from `first` on; all loads are issued before the first is used, to hide their latency.
template <class T, bool kAligned, int kCount>
MMK_DEVICE void add_layers(Vec<float, kVectorWidth<T>>& sum, const LayerMixParams& p, int first,
                           const MixRow& row, int64_t column) {
  constexpr int kWidth = kVectorWidth<T>;
  const float* weights = static_cast<const float*>(p.weights) + first;
  Vec<T, kWidth> x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T* layer = layer_row<T>(p, first + i, row);
    if constexpr (kAligned) {
      x[i] = load_streaming<kWidth>(layer + column);
    } else {
      x[i] = load_columns<false, kWidth>(layer, column, p.width);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Vec<float, kWidth> value = unpack(x[i]);
    const float weight = __ldg(weights + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += weight * value[j];
  }
}

// With three blocks per multiprocessor the compiler keeps the eight loads together; with more it does not.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kPlainThreads, 3)
    mix_plain(const __grid_constant__ LayerMixForward args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const LayerMixParams& p = args.mix;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  const int64_t row_index = index / vectors_per_row;
  if (row_index >= p.batch * p.frames) return;
  const int64_t column = (index - row_index * vectors_per_row) * kWidth;
  const MixRow row = locate(p, row_index);
  T* out = static_cast<T*>(args.out) + row_index * p.width;
  if (!row.valid) {
    store_columns<kAligned>(out, column, p.width, Vec<T, kWidth>{});
    return;
  }
  Vec<float, kWidth> sum = {};
  if constexpr (kAligned) {
    int l = 0;
    for (; l + 8 <= p.layers; l += 8) add_layers<T, true, 8>(sum, p, l, row, column);
    if (p.layers & 4) add_layers<T, true, 4>(sum, p, l, row, column);
    if (p.layers & 2) add_layers<T, true, 2>(sum, p, l + (p.layers & 4), row, column);
    if (p.layers & 1) add_layers<T, true, 1>(sum, p, p.layers - 1, row, column);
  } else {
    for (int l = 0; l < p.layers; ++l) add_layers<T, false, 1>(sum, p, l, row, column);
  }
  store_columns<kAligned>(out, column, p.width, from_accumulator<T>(sum));
}

// ---- forward with norm: one warp or block per row, which stays in registers

// sum_l weights[l] * norm_bias[l], the same for every row: the initial value of the weighted sum.
__global__ void __launch_bounds__(kPlainThreads) mix_bias(const __grid_constant__ LayerMixForward args) {
  const LayerMixParams& p = args.mix;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (column >= p.width) return;
  const float* weights = static_cast<const float*>(p.weights);
  const float* bias = static_cast<const float*>(p.norm_bias);
  float sum = 0.0f;
  for (int l = 0; l < p.layers; ++l) sum += weights[l] * bias[l * p.width + column];
  static_cast<float*>(args.mixed_bias)[column] = sum;
}

// sum += scale * gain * x; without kGain the gain is 1. Only full shapes are compiled without it.
template <class Shape, bool kGain>
MMK_DEVICE void add_scaled(typename Shape::Part& sum, const typename Shape::Part& x, float scale,
                           const float* gain, int width) {
  if (!kGain || (!Shape::kIsFull && gain == nullptr)) {
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) sum[v][i] += scale * x[v][i];
    }
  } else {
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
      const auto factor = load_columns<Shape::kIsAligned, Shape::kWidth>(gain, Shape::column(v), width);
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) sum[v][i] += scale * factor[i] * x[v][i];
    }
  }
}

// Blocks of mix_norm per multiprocessor: as many as leave registers for the sum, one row, and its gain.
template <class Shape, bool kGain>
constexpr int mix_blocks() {
  constexpr bool kWide = Shape::kElements > 32;
  int blocks = Shape::kIsAligned && !(kWide && kGain) && !kFewerBlocks ? 4 : 3;
  if (Shape::kIsFull && !kWide && !kGain) ++blocks;
  if (kFewerBlocks && kWide && kGain) --blocks;
  return blocks * kRowBlockThreads / Shape::kBlockThreads;
}

template <class Shape, bool kGain>
__global__ void __launch_bounds__(Shape::kBlockThreads, mix_blocks<Shape, kGain>())
    mix_norm(const __grid_constant__ LayerMixForward args) {
  using T = typename Shape::Element;
  const LayerMixParams& p = args.mix;
  const int width = Shape::width(p.width);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * Shape::kRowsPerBlock + Shape::slot();
  if (index >= p.batch * p.frames) return;
  const MixRow row = locate(p, index);
  const int layers = row.valid ? p.layers : 0;
  const float* weights = static_cast<const float*>(p.weights);
  float2* stats = args.stats == nullptr ? nullptr : static_cast<float2*>(args.stats) + index * p.layers;

  typename Shape::Part sum = {};
  if (row.valid && args.mixed_bias != nullptr) {
    const float* bias = static_cast<const float*>(args.mixed_bias);
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
      sum[v] = load_columns<Shape::kIsAligned, Shape::kWidth>(bias, Shape::column(v), width);
    }
  }
  MMK_DYNAMIC_SMEM(T, buffer);
  RowRing<Shape> ring(buffer);
  const auto push = [&](int l) { ring.push(l < layers ? layer_row<T>(p, l, row) : nullptr, width); };
  for (int l = 0; l < ring.kInFlight; ++l) push(l);
  for (int l = 0; l < layers; ++l) {
    typename Shape::Part x;
    ring.peek(x);
    ring.pop();
    push(l + ring.kInFlight);
    const float2 moments = centre<Shape>(x, width, static_cast<float>(p.eps));
    if (stats != nullptr && Shape::thread() == 0) stats[l] = moments;
    add_scaled<Shape, kGain>(sum, x, __ldg(weights + l) * moments.y, parameter_row(p.norm_weight, l, width),
                             width);
  }
  if (!row.valid && stats != nullptr) {
    for (int l = Shape::thread(); l < p.layers; l += Shape::kThreads) stats[l] = {0.0f, 0.0f};
  }
  T* out = static_cast<T*>(args.out) + index * width;
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
    store_columns<Shape::kIsAligned>(out, Shape::column(v), width, from_accumulator<T>(sum[v]));
  }
}

// ---- forward with norm, rows too wide for the registers: three passes, the later ones hit the L2 cache

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWideThreads) mix_norm_wide(const __grid_constant__ LayerMixForward args) {
  constexpr int kWidth = kVectorWidth<T>;
  const LayerMixParams& p = args.mix;
  const int64_t index = blockIdx.x;
  const MixRow row = locate(p, index);
  float2* saved = args.stats == nullptr ? nullptr : static_cast<float2*>(args.stats) + index * p.layers;
  MMK_SHARED(float2, stats, kLayerMixMaxLayers);
  for (int l = 0; l < p.layers; ++l) {
    float2 moments = {0.0f, 0.0f};
    if (row.valid) {
      moments = wide_moments<T, kAligned>(layer_row<T>(p, l, row), p.width, static_cast<float>(p.eps));
    }
    if (threadIdx.x == 0) {
      stats[l] = moments;
      if (saved != nullptr) saved[l] = moments;
    }
  }
  __syncthreads();
  const float* weights = static_cast<const float*>(p.weights);
  T* out = static_cast<T*>(args.out) + index * p.width;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kWidth; column < p.width;
       column += kWideThreads * kWidth) {
    Vec<float, kWidth> sum = {};
    if (row.valid && args.mixed_bias != nullptr) {
      sum = load_columns<kAligned, kWidth>(static_cast<const float*>(args.mixed_bias), column, p.width);
    }
    for (int l = 0; row.valid && l < p.layers; ++l) {
      const auto x = unpack(load_columns<kAligned, kWidth>(layer_row<T>(p, l, row), column, p.width));
      const float scale = weights[l] * stats[l].y;
      const float* gain = parameter_row(p.norm_weight, l, p.width);
      Vec<float, kWidth> factor;
      if (gain != nullptr) factor = load_columns<kAligned, kWidth>(gain, column, p.width);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum[i] += (gain == nullptr ? scale : scale * factor[i]) * (x[i] - stats[l].x);
      }
    }
    store_columns<kAligned>(out, column, p.width, from_accumulator<T>(sum));
  }
}

// ---- launchers

template <class T, bool kAligned>
cudaError_t forward_plain(const LayerMixForward& args, CudaStream stream) {
  const int64_t vectors_per_row = ceil_div<int64_t>(args.mix.width, kVectorWidth<T>);
  const int64_t vectors = args.mix.batch * args.mix.frames * vectors_per_row;
  dim3 grid;
  if (!make_grid(ceil_div<int64_t>(vectors, kPlainThreads), &grid)) return cudaErrorInvalidConfiguration;
  return launch(mix_plain<T, kAligned>, grid, dim3(kPlainThreads), 0, stream, args, vectors_per_row);
}

template <class T, bool kAligned>
cudaError_t forward_norm(const LayerMixForward& args, CudaStream stream) {
  const int64_t rows = args.mix.batch * args.mix.frames;
  dim3 grid;
  if (args.mixed_bias != nullptr) {
    if (!make_grid(ceil_div<int64_t>(args.mix.width, kPlainThreads), &grid))
      return cudaErrorInvalidConfiguration;
    const cudaError_t error = launch(mix_bias, grid, dim3(kPlainThreads), 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  return dispatch_streamed_row_shape<T, kAligned>(
      args.mix.width,
      [&](auto shape) {
        using Shape = decltype(shape);
        if (!make_grid(ceil_div<int64_t>(rows, Shape::kRowsPerBlock), &grid))
          return cudaErrorInvalidConfiguration;
        const bool plain = Shape::kIsFull && args.mix.norm_weight == nullptr;
        const auto kernel = plain ? mix_norm<Shape, !Shape::kIsFull> : mix_norm<Shape, true>;
        return launch(kernel, grid, dim3(Shape::kBlockThreads), RowRing<Shape>::kBytes, stream, args);
      },
      [&] {
        if (!make_grid(rows, &grid)) return cudaErrorInvalidConfiguration;
        return launch(mix_norm_wide<T, kAligned>, grid, dim3(kWideThreads), 0, stream, args);
      });
}

template <class T, bool kAligned>
cudaError_t forward(const LayerMixForward& args, CudaStream stream) {
  return args.mix.norm ? forward_norm<T, kAligned>(args, stream) : forward_plain<T, kAligned>(args, stream);
}

}  // namespace

int layer_mix_forward(const LayerMixForward& args, CudaStream stream) {
  if (args.mix.batch * args.mix.frames * args.mix.width == 0) return cudaSuccess;
  return dispatch(args.mix.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = is_aligned<T>(args.mix) && rows_aligned<T>(args.out);
    return aligned ? forward<T, true>(args, stream) : forward<T, false>(args, stream);
  });
}

}  // namespace mmk::cuda
