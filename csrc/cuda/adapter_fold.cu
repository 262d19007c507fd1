#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/adapter.h"

namespace mmk::cuda {
namespace {

// Small blocks leave registers for a block of the next kernel, which can then start early.
inline constexpr int kFoldThreads = 128;
inline constexpr int kFoldWidth = 4;

// T is the type of x, P that of the parameters.

// Folds one row of V: writes its row of Vc, its b' and its folded_sum.
template <class T, class P, bool kAligned>
MMK_DEVICE void fold_row(const AdapterFold& args, int64_t index) {
  constexpr int kStep = kFoldThreads * kFoldWidth;
  const int64_t width = args.shape.width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kFoldWidth;
  const P* weight = static_cast<const P*>(args.parameters.down_weight) + index * width;
  const P* gain = static_cast<const P*>(args.parameters.norm_weight);
  const P* shift = static_cast<const P*>(args.parameters.norm_bias);
  const auto columns = [&](const P* row, int64_t column) {
    return to_accumulator(load_columns<kAligned, kFoldWidth>(row, column, width));
  };
  float sums[2] = {};  // over the row, of V gamma and V beta
  for (int64_t column = first; gain != nullptr && column < width; column += kStep) {
    const auto v = columns(weight, column);
    const auto factor = columns(gain, column);
    Vec<float, kFoldWidth> added = {};
    if (shift != nullptr) added = columns(shift, column);
#pragma unroll
    for (int i = 0; i < kFoldWidth; ++i) {
      sums[0] += v[i] * factor[i];
      sums[1] += v[i] * added[i];
    }
  }
  block_sums<kFoldThreads>(sums);
  if (threadIdx.x == 0) {
    const P* bias = static_cast<const P*>(args.parameters.down_bias);
    static_cast<float*>(args.folded_bias)[index] =
        (bias == nullptr ? 0.0f : to_accumulator(bias[index])) + sums[1];
  }
  // Nothing left to write; with width 0 folded_weight is null, and folded_sum still has to be written.
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

// Blocks that convert `count` elements, one piece each; none where there is no target.
MMK_HOST_DEVICE int64_t pieces(const void* target, int64_t count) {
  return target == nullptr ? 0 : ceil_div<int64_t>(count, kFoldThreads * kFoldWidth);
}

template <bool kAligned, class Out, class P>
MMK_DEVICE void convert_piece(Out* target, const P* source, int64_t piece, int64_t count) {
  const int64_t first = (piece * kFoldThreads + threadIdx.x) * kFoldWidth;
  const auto value = to_accumulator(load_columns<kAligned, kFoldWidth>(source, first, count));
  store_columns<kAligned>(target, first, count, from_accumulator<Out>(value));
}

// One block per row of V; the blocks after them convert one piece of U each, and the last ones of c.
template <class T, class P, bool kAligned>
__global__ void __launch_bounds__(kFoldThreads) fold_weights(const __grid_constant__ AdapterFold args) {
  grid_dependency_launch();
  const auto [rows, width, bottleneck] = args.shape;
  if (blockIdx.x < bottleneck) {
    fold_row<T, P, kAligned>(args, blockIdx.x);
    return;
  }
  const int64_t piece = blockIdx.x - bottleneck;
  const int64_t of_weight = pieces(args.up_weight, width * bottleneck);
  if (piece < of_weight) {
    convert_piece<kAligned>(static_cast<T*>(args.up_weight), static_cast<const P*>(args.parameters.up_weight),
                            piece, width * bottleneck);
  } else {
    // c is short, and the caller's tensor may start anywhere.
    convert_piece<false>(static_cast<float*>(args.up_bias), static_cast<const P*>(args.parameters.up_bias),
                         piece - of_weight, width);
  }
}

template <class P>
bool aligned(const void* data, int64_t stride) {
  return is_vector_aligned(static_cast<const P*>(data), stride, kFoldWidth);
}

}  // namespace

int adapter_fold(DType dtype, const AdapterFold& args, CudaStream stream) {
  const auto [rows, width, bottleneck] = args.shape;
  const int64_t blocks =
      bottleneck + pieces(args.up_weight, width * bottleneck) + pieces(args.up_bias, width);
  if (blocks == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(blocks, &grid)) return cudaErrorInvalidConfiguration;
  const AdapterParameters& parameters = args.parameters;
  return dispatch(dtype, parameters.type, [&](auto element, auto parameter) {
    using T = decltype(element);
    using P = decltype(parameter);
    const bool all = aligned<P>(parameters.down_weight, width) && aligned<P>(parameters.norm_weight, 0) &&
                     aligned<P>(parameters.norm_bias, 0) && aligned<T>(args.folded_weight, 0) &&
                     (args.up_weight == nullptr || (aligned<P>(parameters.up_weight, width * bottleneck) &&
                                                    aligned<T>(args.up_weight, 0)));
    const auto kernel = all ? fold_weights<T, P, true> : fold_weights<T, P, false>;
    return launch(kernel, grid, dim3(kFoldThreads), 0, stream, args);
  });
}

}  // namespace mmk::cuda
