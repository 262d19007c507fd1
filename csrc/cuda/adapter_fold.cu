#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/adapter.h"

namespace mmk::cuda {
namespace {

// Small blocks leave registers for a block of the next kernel, which can then start early.
inline constexpr int kFoldThreads = 128;
inline constexpr int kFoldWidth = 4;

// Folds one row of V: writes its row of Vc, its b' and its folded_sum.
template <class T, bool kAligned>
MMK_DEVICE void fold_row(const AdapterFold& args, int64_t index) {
  constexpr int kStep = kFoldThreads * kFoldWidth;
  const int64_t width = args.shape.width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kFoldWidth;
  const float* weight = static_cast<const float*>(args.parameters.down_weight) + index * width;
  const float* gain = static_cast<const float*>(args.parameters.norm_weight);
  const float* shift = static_cast<const float*>(args.parameters.norm_bias);
  float sums[2] = {};  // over the row, of V gamma and V beta
  for (int64_t column = first; gain != nullptr && column < width; column += kStep) {
    const auto v = load_columns<kAligned, kFoldWidth>(weight, column, width);
    const auto factor = load_columns<kAligned, kFoldWidth>(gain, column, width);
    Vec<float, kFoldWidth> added = {};
    if (shift != nullptr) added = load_columns<kAligned, kFoldWidth>(shift, column, width);
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) {
      sums[0] += v[i] * factor[i];
      sums[1] += v[i] * added[i];
    }
  }
  block_sums<kFoldThreads>(sums);
  if (threadIdx.x == 0) {
    const float* bias = static_cast<const float*>(args.parameters.down_bias);
    static_cast<float*>(args.folded_bias)[index] = (bias == nullptr ? 0.0f : bias[index]) + sums[1];
  }
  // Nothing left to write; with width 0 folded_weight is null, and folded_sum still has to be written.
  if (args.folded_weight == nullptr && args.folded_sum == nullptr) return;
  const float mean = gain == nullptr ? 0.0f : sums[0] / static_cast<float>(width);
  float total = 0.0f;
  for (int64_t column = first; column < width; column += kStep) {
    auto value = load_columns<kAligned, kFoldWidth>(weight, column, width);
    if (gain != nullptr) {
      const auto factor = load_columns<kAligned, kFoldWidth>(gain, column, width);
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

// One block per row of V; the blocks after them convert one piece of U each.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kFoldThreads) fold_weights(const __grid_constant__ AdapterFold args) {
  grid_dependency_launch();
  const int64_t block = blockIdx.x;
  if (block < args.shape.bottleneck) {
    fold_row<T, kAligned>(args, block);
    return;
  }
  const int64_t count = args.shape.width * args.shape.bottleneck;
  const int64_t thread = (block - args.shape.bottleneck) * kFoldThreads + threadIdx.x;
  const auto value = load_columns<kAligned, kFoldWidth>(static_cast<const float*>(args.parameters.up_weight),
                                                        thread * kFoldWidth, count);
  store_columns<kAligned>(static_cast<T*>(args.up_weight), thread * kFoldWidth, count,
                          from_accumulator<T>(value));
}

bool aligned(const void* data, int64_t stride) {
  return is_vector_aligned(static_cast<const float*>(data), stride, kFoldWidth);
}

}  // namespace

int adapter_fold(DType dtype, const AdapterFold& args, CudaStream stream) {
  const auto [rows, width, bottleneck] = args.shape;
  const int64_t pieces =
      args.up_weight == nullptr ? 0 : ceil_div<int64_t>(width * bottleneck, kFoldThreads * kFoldWidth);
  if (bottleneck == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(bottleneck + pieces, &grid)) return cudaErrorInvalidConfiguration;
  const AdapterParameters& parameters = args.parameters;
  const bool all = aligned(parameters.down_weight, width) && aligned(parameters.norm_weight, 0) &&
                   aligned(parameters.norm_bias, 0) && aligned(args.folded_weight, 0) &&
                   aligned(parameters.up_weight, width * bottleneck) && aligned(args.up_weight, 0);
  return dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = all ? fold_weights<T, true> : fold_weights<T, false>;
    return launch(kernel, grid, dim3(kFoldThreads), 0, stream, args);
  });
}

}  // namespace mmk::cuda
