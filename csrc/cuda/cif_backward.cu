#include "cuda/cif.cuh"

namespace mmk::cuda {
namespace {

// A warp takes a frame: dx is the weighted sum of its tokens' gradients. d_alpha needs the dot products of
// the frame with the gradients of the tokens in which it begins and ends.
template <class T, bool kAligned, bool kNeedX, bool kNeedAlpha>
__global__ void __launch_bounds__(kCifThreads, 2) frame_gradients(CifBackward args) {
  const CifParams& p = args.params;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCifWarps + warp_index();
  if (index >= p.batch * p.frames) return;
  const int64_t row = index / p.frames, t = index - row * p.frames;
  const int32_t* token = args.plan.token + row * (p.frames + 1);
  const float* weights = static_cast<const float*>(args.plan.weights) + index * 2;
  const int64_t count = t < cif_length(p, row) ? args.plan.counts[row] : 0;
  const int64_t first = token[t], last = token[t + 1];
  const T* x = static_cast<const T*>(p.x) + row * p.batch_stride + t * p.frame_stride;
  const T* grad = static_cast<const T*>(args.grad) + row * args.grad_batch_stride;
  float dots[2] = {};
  for (int64_t start = 0; start < p.width; start += kCifWarpColumns) {
    const int64_t column = start + lane_index() * kVectorWidth<T>;
    CifPart<T> frame;
    if (kNeedAlpha && first < count) load_part<kAligned>(frame, x, column, p.width);
    float sum[kCifColumns] = {};
    const auto add = [&](int64_t j, float weight, int dot) {
      CifPart<T> part;
      load_part<kAligned>(part, grad + j * args.grad_token_stride, column, p.width);
      if constexpr (kNeedX) add_part<T>(sum, weight, part);
      if constexpr (kNeedAlpha) {
        if (dot < 0) return;
#pragma unroll
        for (int v = 0; v < kCifVectors<T>; ++v) {
#pragma unroll
          for (int i = 0; i < kVectorWidth<T>; ++i) {
            dots[dot] += to_accumulator(frame[v][i]) * to_accumulator(part[v][i]);
          }
        }
      }
    };
    if (last == first) {
      if (first < count) add(first, weights[1], 0);
    } else {
      if (first < count) add(first, weights[0], 0);
      if constexpr (kNeedX) {
        for (int64_t j = first + 1; j < min(last, count); ++j) add(j, static_cast<float>(p.beta), -1);
      }
      if (last < count) add(last, weights[1], 1);
    }
    if constexpr (kNeedX) {
      store_part<kAligned>(static_cast<T*>(args.dx) + index * p.width, column, p.width, sum);
    }
  }
  if constexpr (kNeedAlpha) {
    dots[0] = warp_sum(dots[0]);
    dots[1] = warp_sum(dots[1]);
    if (lane_index() == 0) {
      float* out = static_cast<float*>(args.dots) + index * 2;
      out[0] = dots[0];
      out[1] = last == first ? dots[0] : dots[1];
    }
  }
}

// The gradient at the last frame's weight: more of it moves the tail, a mean of frames, towards that frame.
MMK_DEVICE double tail_gradient(const float* weights, const float* dots, const int32_t* token, int64_t length,
                                double factor) {
  const double end = dots[2 * length - 1];
  double sums[2] = {};
  for (int64_t t = threadIdx.x; t < length; t += kCifThreads) {
    if (token[t + 1] != token[length]) continue;
    sums[0] += static_cast<double>(weights[2 * t + 1]) * (end - dots[2 * t + 1]);
    sums[1] += weights[2 * t + 1];
  }
  block_sums<kCifThreads>(sums);
  return factor * sums[0] / sums[1];
}

// A block takes a row. Moving the end of a frame shifts weight between it and the next one: sum these
// gradients from the last frame on, then apply the quotient rule of the scaling.
template <bool kScaled>
__global__ void __launch_bounds__(kCifThreads, 4) alpha_gradients(CifBackward args) {
  const CifParams& p = args.params;
  const int64_t row = blockIdx.x, length = cif_length(p, row), thread = threadIdx.x;
  const int32_t* token = args.plan.token + row * (p.frames + 1);
  const float* weights = static_cast<const float*>(args.plan.weights) + row * p.frames * 2;
  const float* dots = static_cast<const float*>(args.dots) + row * p.frames * 2;
  const float* alpha = static_cast<const float*>(p.alpha) + row * p.frames;
  float* d_alpha = static_cast<float*>(args.d_alpha) + row * p.frames;
  double* sums = args.sums + row * p.frames;
  const double scale = args.plan.facts[2 * row], fact = args.plan.facts[2 * row + 1];
  const bool has_tail = !kScaled && fact > 0 && length > 0;
  double after = has_tail ? tail_gradient(weights, dots, token, length, scale) : 0.0;
  double products[1] = {};
  for (int64_t done = 0; done < length; done += kCifThreads) {
    const int64_t t = length - 1 - done - thread;
    double moved = 0, of_block = 0;
    if (t >= 0 && t + 1 < length) {
      moved = static_cast<double>(dots[2 * t + 1]) - static_cast<double>(dots[2 * t + 2]);
      if (has_tail && token[t + 1] == token[length]) moved *= scale;
    }
    const double sum = after + block_scan<kCifThreads>(moved, Sum(), &of_block);
    after += of_block;
    if (t < 0) continue;
    if constexpr (kScaled) {
      sums[t] = sum;
      products[0] += cif_weight(alpha[t]) * sum;
    } else {
      d_alpha[t] = static_cast<float>(sum);
    }
  }
  if constexpr (kScaled) {
    block_sums<kCifThreads>(products);
    // No barrier: each thread reads the sums that it stored itself.
    for (int64_t done = 0; done < length; done += kCifThreads) {
      const int64_t t = length - 1 - done - thread;
      if (t >= 0) d_alpha[t] = static_cast<float>(scale * (sums[t] - fact * products[0]));
    }
  }
  for (int64_t t = length + thread; t < p.frames; t += kCifThreads) d_alpha[t] = 0.0f;
}

}  // namespace

int cif_backward(const CifBackward& args, CudaStream stream) {
  const CifParams& p = args.params;
  const bool need_x = args.dx != nullptr, need_alpha = args.d_alpha != nullptr;
  if (p.batch == 0 || p.frames == 0 || (!need_x && !need_alpha)) return cudaSuccess;
  dim3 frames, rows;
  if (!make_grid(ceil_div<int64_t>(p.batch * p.frames, kCifWarps), &frames) || !make_grid(p.batch, &rows)) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error = dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned<T>(p.x, p.batch_stride, p.frame_stride, p.width) &&
                         rows_aligned<T>(args.grad, args.grad_batch_stride, args.grad_token_stride) &&
                         rows_aligned<T>(args.dx);
    const auto start = [&](auto kernel) {
      return launch(kernel, frames, dim3(kCifThreads), 0, stream, args);
    };
    if (need_x && need_alpha) {
      return start(aligned ? frame_gradients<T, true, true, true> : frame_gradients<T, false, true, true>);
    }
    if (need_x)
      return start(aligned ? frame_gradients<T, true, true, false> : frame_gradients<T, false, true, false>);
    return start(aligned ? frame_gradients<T, true, false, true> : frame_gradients<T, false, false, true>);
  });
  if (error != cudaSuccess || !need_alpha) return error;
  const auto kernel = args.scaled ? alpha_gradients<true> : alpha_gradients<false>;
  return launch(kernel, rows, dim3(kCifThreads), 0, stream, args);
}

}  // namespace mmk::cuda
