#include <cmath>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/distill_loss.h"

namespace mmk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanThreads = 256;
// Up to this width a warp takes a token, else a block.
constexpr int64_t kWidestOfWarp = 1024;

template <class T, class U>
constexpr int kPairWidth = kVectorWidth<T> < kVectorWidth<U> ? kVectorWidth<T> : kVectorWidth<U>;

// kTokenThreads threads share a token. Each loads kSteps vectors of kWidth elements of both rows before it
// uses the first: a block has 4,096 elements of each row in flight, and a multiprocessor four blocks, that is
// 64 KB of half precision.
template <class T, class U, int kTokenThreads, bool kAligned>
struct Shape {
  using Pred = T;
  using Row = U;
  static constexpr int kThreadsOfToken = kTokenThreads;
  static constexpr bool kIsAligned = kAligned;
  static constexpr int kWidth = kPairWidth<T, U>;
  static constexpr int kSteps = kAligned ? 4096 / (kThreads * kWidth) : 1;
  static constexpr int64_t kColumns = int64_t{kTokenThreads} * kWidth * kSteps;
  static constexpr int kTokens = kThreads / kTokenThreads;  // of a block

  MMK_DEVICE static int64_t index() {
    return static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kTokenThreads;
  }
  MMK_DEVICE static int thread() { return static_cast<int>(threadIdx.x) % kTokenThreads; }
  MMK_DEVICE static int64_t column(int64_t start, int step) {
    return start + (step * kTokenThreads + thread()) * kWidth;
  }
};

MMK_DEVICE int64_t count_of(const DistillLossParams& p, int64_t row) {
  return p.counts == nullptr ? p.tokens : min(max(p.counts[row], int64_t{0}), p.tokens);
}

template <class T, class U>
struct Token {
  bool valid;   // before the count
  bool inside;  // the table; null pointers if not
  const T* pred;
  const U* row;
};

template <class Shape>
MMK_DEVICE auto token_at(const DistillLossParams& p, int64_t index) {
  using T = typename Shape::Pred;
  using U = typename Shape::Row;
  const int64_t batch = index / p.tokens, j = index - batch * p.tokens;
  const int64_t id = p.ids[index];  // before the count is used, to overlap both loads
  const bool valid = j < count_of(p, batch);
  if (!(valid & (id >= 0) & (id < p.vocabulary))) return Token<T, U>{valid, false, nullptr, nullptr};
  return Token<T, U>{true, true, static_cast<const T*>(p.pred) + batch * p.batch_stride + j * p.token_stride,
                     static_cast<const U*>(p.table) + id * p.row_stride};
}

// A thread's part of both rows from column `start` on; zero past their ends.
template <class Shape>
struct Parts {
  Vec<typename Shape::Pred, Shape::kWidth> pred[Shape::kSteps];
  Vec<typename Shape::Row, Shape::kWidth> row[Shape::kSteps];

  MMK_DEVICE Parts(const typename Shape::Pred* z, const typename Shape::Row* h, int64_t start,
                   int64_t width) {
#pragma unroll
    for (int s = 0; s < Shape::kSteps; ++s) {
      const int64_t column = Shape::column(start, s);
      pred[s] = load_columns<Shape::kIsAligned, Shape::kWidth>(z, column, width);
      row[s] = load_columns<Shape::kIsAligned, Shape::kWidth>(h, column, width);
    }
  }
};

// The cosine, and the inverse norms; zeros where a vector has no direction.
struct Angle {
  float cosine, inverse_pred, inverse_row;
};

MMK_DEVICE Angle angle_of(const float* dots) {
  constexpr float kLeast = 1.17549435e-38f;  // the smallest normal number
  // NaN fails both comparisons, and so reaches the result.
  if (dots[kPredPred] < kLeast || dots[kRowRow] < kLeast) return {0.0f, 0.0f, 0.0f};
  const float pred = sqrtf(dots[kPredPred]), row = sqrtf(dots[kRowRow]);
  return {dots[kPredRow] / pred / row, 1.0f / pred, 1.0f / row};
}

template <class Shape>
__global__ void __launch_bounds__(kThreads, 4) measure_tokens(DistillLossForward args) {
  grid_dependency_launch();
  const DistillLossParams& p = args.params;
  const int64_t index = Shape::index();
  if (index >= p.batch * p.tokens) return;
  const auto token = token_at<Shape>(p, index);
  // Three dots, and the squares of the differences.
  float sums[kDistillLossDots + 1] = {};
  if (token.inside) {
    for (int64_t start = 0; start < p.width; start += Shape::kColumns) {
      const Parts<Shape> parts(token.pred, token.row, start, p.width);
#pragma unroll
      for (int s = 0; s < Shape::kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < Shape::kWidth; ++i) {
          const float z = to_accumulator(parts.pred[s][i]), h = to_accumulator(parts.row[s][i]);
          sums[kPredPred] += z * z;
          sums[kPredRow] += z * h;
          sums[kRowRow] += h * h;
          sums[kDistillLossDots] += (z - h) * (z - h);
        }
      }
    }
    row_sums<Shape::kThreadsOfToken>(sums);
  }
  if (Shape::thread() != 0) return;
  float term = 0.0f;
  if (token.valid) {
    if (!token.inside) sums[0] = sums[1] = sums[2] = sums[3] = NAN;
    term = sums[kDistillLossDots] + static_cast<float>(p.cosine_weight) * (1.0f - angle_of(sums).cosine);
  }
  float* dots = static_cast<float*>(args.dots) + index * kDistillLossDots;
#pragma unroll
  for (int i = 0; i < kDistillLossDots; ++i) dots[i] = sums[i];
  static_cast<float*>(args.terms)[index] = term;
}

// One block: the sum of the terms and the count, each in an order that depends on the sizes only.
__global__ void __launch_bounds__(kMeanThreads) mean_loss(DistillLossForward args) {
  const DistillLossParams& p = args.params;
  const int64_t thread = threadIdx.x, tokens = p.batch * p.tokens;
  double sums[2] = {};
  for (int64_t row = thread; row < p.batch; row += kMeanThreads) {
    sums[1] += static_cast<double>(count_of(p, row));
  }
  grid_dependency_wait();
  const float* terms = static_cast<const float*>(args.terms);
  for (int64_t i = thread; i < tokens; i += kMeanThreads) sums[0] += terms[i];
  block_sums<kMeanThreads>(sums);
  if (thread != 0) return;
  *args.count = static_cast<int64_t>(sums[1]);
  *static_cast<float*>(args.loss) = sums[1] > 0 ? static_cast<float>(sums[0] / sums[1]) : 0.0f;
}

// d = g / count * (2 (z - h) - cosine_weight * (h / (|z| |h|) - cos z / |z|^2))
template <class Shape>
__global__ void __launch_bounds__(kThreads, 4) token_gradients(DistillLossBackward args) {
  using T = typename Shape::Pred;
  const DistillLossParams& p = args.params;
  const int64_t index = Shape::index();
  if (index >= p.batch * p.tokens) return;
  const auto token = token_at<Shape>(p, index);
  T* out = static_cast<T*>(args.d_pred) + index * p.width;
  if (!token.inside) {
    Vec<float, Shape::kWidth> fill;
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) fill[i] = token.valid ? NAN : 0.0f;
    for (int64_t column = Shape::column(0, 0); column < p.width;
         column += Shape::kThreadsOfToken * Shape::kWidth) {
      store_columns<Shape::kIsAligned>(out, column, p.width, from_accumulator<T>(fill));
    }
    return;
  }
  const float scale = *static_cast<const float*>(args.grad) / static_cast<float>(*args.count);
  const Angle angle = angle_of(static_cast<const float*>(args.dots) + index * kDistillLossDots);
  // Multiply by one inverse norm at a time: the product of two may overflow.
  const float twice = 2.0f * scale;
  const float outer = scale * static_cast<float>(p.cosine_weight) * angle.inverse_pred;
  const float of_pred = angle.cosine * angle.inverse_pred, of_row = angle.inverse_row;
  for (int64_t start = 0; start < p.width; start += Shape::kColumns) {
    const Parts<Shape> parts(token.pred, token.row, start, p.width);
#pragma unroll
    for (int s = 0; s < Shape::kSteps; ++s) {
      Vec<float, Shape::kWidth> values;
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) {
        const float z = to_accumulator(parts.pred[s][i]), h = to_accumulator(parts.row[s][i]);
        values[i] = twice * (z - h) + outer * (of_pred * z - of_row * h);
      }
      store_columns<Shape::kIsAligned>(out, Shape::column(start, s), p.width, from_accumulator<T>(values));
    }
  }
}

// Calls body(Shape) with the types, and with as many threads for a token as its rows keep busy.
template <class Body>
cudaError_t dispatch_shape(const DistillLossParams& p, const void* out, Body&& body) {
  return dispatch(p.dtype, [&](auto pred) {
    return dispatch(p.table_dtype, [&](auto row) {
      using T = decltype(pred);
      using U = decltype(row);
      constexpr int kWidth = kPairWidth<T, U>;
      const bool aligned = rows_aligned<T, kWidth>(p.pred, p.width, p.batch_stride, p.token_stride) &&
                           rows_aligned<U, kWidth>(p.table, p.row_stride) && rows_aligned<T, kWidth>(out);
      if (!aligned) return body(Shape<T, U, kThreads, false>{});
      if (p.width <= kWidestOfWarp) return body(Shape<T, U, kWarpSize, true>{});
      return body(Shape<T, U, kThreads, true>{});
    });
  });
}

}  // namespace

int distill_loss_forward(const DistillLossForward& args, CudaStream stream) {
  const DistillLossParams& p = args.params;
  const int64_t tokens = p.batch * p.tokens;
  if (tokens == 0) return launch(mean_loss, dim3(1), dim3(kMeanThreads), 0, stream, args);
  const cudaError_t error = dispatch_shape(p, nullptr, [&](auto shape) {
    using Shape = decltype(shape);
    dim3 grid;
    if (!make_grid(ceil_div<int64_t>(tokens, Shape::kTokens), &grid)) return cudaErrorInvalidValue;
    return launch(measure_tokens<Shape>, grid, dim3(kThreads), 0, stream, args);
  });
  if (error != cudaSuccess) return error;
  return launch_overlapping(mean_loss, dim3(1), dim3(kMeanThreads), 0, stream, args);
}

int distill_loss_backward(const DistillLossBackward& args, CudaStream stream) {
  const DistillLossParams& p = args.params;
  const int64_t tokens = p.batch * p.tokens;
  if (tokens == 0 || p.width == 0) return cudaSuccess;
  return dispatch_shape(p, args.d_pred, [&](auto shape) {
    using Shape = decltype(shape);
    dim3 grid;
    if (!make_grid(ceil_div<int64_t>(tokens, Shape::kTokens), &grid)) return cudaErrorInvalidValue;
    return launch(token_gradients<Shape>, grid, dim3(kThreads), 0, stream, args);
  });
}

}  // namespace mmk::cuda
