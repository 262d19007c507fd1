#include "cuda/cif.cuh"

namespace mmk::cuda {
namespace {

constexpr double kMostTokens = 2e9;  // token numbers are int32
// Frames that a warp loads before it uses the first: 128 bytes a lane, or 16 elements of unaligned rows.
template <bool kAligned, class T>
constexpr int kUnroll = kAligned ? 16 / static_cast<int>(sizeof(T)) : 2;

// The end of a row's line (mmkernels/cif.h), and the scale of the weights on it.
struct Line {
  double scale;  // of alpha
  int64_t last;  // token in which the last frame ends
  int64_t most;  // the last token in which any other frame may end
  int64_t tail;  // token whose weights are scaled, or -1
  double tail_factor;
};

template <bool kScaled>
MMK_DEVICE Line line_of(const CifForward& args, int64_t row, double total) {
  const double beta = args.params.beta;
  double* facts = args.plan.facts + row * 2;
  int64_t* count = args.plan.counts + row;
  const bool writes = threadIdx.x == 0;
  if constexpr (kScaled) {
    const int64_t target = min(max(args.target_lengths[row], int64_t{0}), static_cast<int64_t>(kMostTokens));
    const double inverse = total > 0 ? 1 / total : 0.0;
    const double scale = beta * static_cast<double>(target) * inverse;
    if (writes) {
      facts[0] = scale;
      facts[1] = inverse;
      *count = min(target, args.params.tokens);
    }
    return {scale, total > 0 ? target : 0, max(target - 1, int64_t{0}), -1, 1.0};
  } else {
    const double whole = fmin(floor(total / beta), kMostTokens);
    const double rest = total - whole * beta;
    const bool fires = rest >= args.tail_threshold * beta && rest > 0;
    const int64_t last = static_cast<int64_t>(whole);
    const double factor = fires ? beta / rest : 1.0;
    if (writes) {
      facts[0] = factor;
      facts[1] = fires ? 1.0 : 0.0;
      *count = min(last + fires, args.params.tokens);
    }
    return {1.0, last, last, fires ? last : int64_t{-1}, factor};
  }
}

// The token in which frame t ends, by the cumulative sums of its row.
MMK_DEVICE int64_t token_at(const CifForward& args, const Line& line, const double* sums, int64_t frames,
                            int64_t t) {
  if (t < 0) return 0;
  if (t + 1 == frames) return line.last;
  const double token = fmin(floor(sums[t] * line.scale / args.params.beta), kMostTokens);
  return min(static_cast<int64_t>(token), line.most);
}

// A block takes a row: cumulative sums, then each frame's tokens and weights, and the ends of tokens.
template <bool kScaled>
__global__ void __launch_bounds__(kCifThreads) plan(CifForward args) {
  const CifParams& p = args.params;
  const int64_t row = blockIdx.x, length = cif_length(p, row);
  const int64_t thread = threadIdx.x;
  const float* alpha = static_cast<const float*>(p.alpha) + row * p.frames;
  double* sums = args.sums + row * p.frames;
  // Sums in another order may differ in the last bit: a running maximum keeps them ascending.
  double total = 0, highest = 0;
  for (int64_t first = 0; first < length; first += kCifThreads) {
    const int64_t t = first + thread;
    double of_block = 0, most = 0;
    const double weight = t < length ? cif_weight(alpha[t]) : 0.0;
    const double sum = total + block_scan<kCifThreads>(weight, Sum(), &of_block);
    const double ascending = block_scan<kCifThreads>(fmax(sum, highest), Max(), &most);
    if (t < length) sums[t] = ascending;
    total += of_block;
    highest = most;
  }
  __syncthreads();
  const Line line = line_of<kScaled>(args, row, length > 0 ? sums[length - 1] : 0.0);
  int32_t* token = args.plan.token + row * (p.frames + 1);
  float* weights = static_cast<float*>(args.plan.weights) + row * p.frames * 2;
  int64_t* ends = args.ends + row * p.tokens;
  for (int64_t t = thread; t < p.frames; t += kCifThreads) {
    if (t >= length) {
      weights[2 * t] = weights[2 * t + 1] = 0.0f;
      token[t + 1] = static_cast<int32_t>(length > 0 ? line.last : 0);
      continue;
    }
    const double start = t > 0 ? sums[t - 1] * line.scale : 0.0, end = sums[t] * line.scale;
    const int64_t first = token_at(args, line, sums, length, t - 1);
    const int64_t last = token_at(args, line, sums, length, t);
    const double into_first = last == first ? end - start : static_cast<double>(first + 1) * p.beta - start;
    const double into_last = last == first ? end - start : end - static_cast<double>(last) * p.beta;
    const double of_first = first == line.tail ? line.tail_factor : 1.0;
    const double of_last = last == line.tail ? line.tail_factor : 1.0;
    weights[2 * t] = static_cast<float>(of_first * fmax(into_first, 0.0));
    weights[2 * t + 1] = static_cast<float>(of_last * fmax(into_last, 0.0));
    token[t + 1] = static_cast<int32_t>(last);
    for (int64_t j = first; j < min(last, p.tokens); ++j) ends[j] = t + 1;
  }
  if (thread == 0) token[0] = 0;
  for (int64_t j = (length > 0 ? line.last : 0) + thread; j < p.tokens; j += kCifThreads) ends[j] = length;
}

// As load_part, but lanes past the end of the row load its last elements: a branch, with the conversion after
// it, would wait for each load before the next is issued.
template <bool kAligned, class T>
MMK_DEVICE void load_part_clamped(CifPart<T>& part, const T* row, int64_t column, int64_t width) {
#pragma unroll
  for (int v = 0; v < kCifVectors<T>; ++v) {
    const int64_t first = column + v * kWarpSize * kVectorWidth<T>;
    if constexpr (kAligned) {
      part[v] = load<kVectorWidth<T>>(row + min(first, width - kVectorWidth<T>));
    } else {
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) part[v][i] = row[min(first + i, width - 1)];
    }
  }
}

// As add_part, but with weight 0 it drops the part, which may hold NaN or infinity.
template <class T>
MMK_DEVICE void add_weighted_part(float (&sum)[kCifColumns], float weight, const CifPart<T>& part) {
  float with[kCifColumns];
#pragma unroll
  for (int i = 0; i < kCifColumns; ++i) with[i] = sum[i];
  add_part<T>(with, weight, part);
#pragma unroll
  for (int i = 0; i < kCifColumns; ++i) sum[i] = weight != 0.0f ? with[i] : sum[i];
}

// A warp takes kCifWarpColumns columns of a token: the weighted sum of its frames.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kCifThreads, 3) sum_tokens(CifForward args, int64_t slabs) {
  const CifParams& p = args.params;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCifWarps + warp_index();
  if (index >= p.batch * p.tokens * slabs) return;
  const int64_t place = index / slabs, row = place / p.tokens, j = place - row * p.tokens;
  const int lane = lane_index();
  const int64_t column = (index - place * slabs) * kCifWarpColumns + lane * kVectorWidth<T>;
  float sum[kCifColumns] = {};
  if (j < args.plan.counts[row]) {
    const T* x = static_cast<const T*>(p.x) + row * p.batch_stride;
    const int32_t* token = args.plan.token + row * (p.frames + 1);
    const float* weights = static_cast<const float*>(args.plan.weights) + row * p.frames * 2;
    const int64_t* ends = args.ends + row * p.tokens;
    // The frame in which the previous token fires is also the first of this one.
    const int64_t begin = j == 0 ? 0 : max(ends[j - 1] - 1, int64_t{0}), end = ends[j];
    for (int64_t first = begin; first < end; first += kWarpSize) {
      const int64_t own = first + lane;
      float weight = 0.0f;
      if (own < end) {
        const int32_t before = token[own], after = token[own + 1];
        if (j == after) {
          weight = weights[2 * own + 1];
        } else if (j == before) {
          weight = weights[2 * own];
        } else if (j > before && j < after) {
          weight = static_cast<float>(p.beta);
        }
      }
      const int frames = static_cast<int>(min(end - first, int64_t{kWarpSize}));
      for (int f = 0; f < frames; f += kUnroll<kAligned, T>) {
        CifPart<T> part[kUnroll<kAligned, T>];
#pragma unroll
        for (int u = 0; u < kUnroll<kAligned, T>; ++u) {
          const int64_t frame = first + min(f + u, frames - 1);
          load_part_clamped<kAligned>(part[u], x + frame * p.frame_stride, column, p.width);
        }
#pragma unroll
        for (int u = 0; u < kUnroll<kAligned, T>; ++u) {
          add_weighted_part<T>(sum, __shfl_sync(kFullMask, weight, f + u), part[u]);
        }
      }
    }
  }
  store_part<kAligned>(static_cast<T*>(args.features) + place * p.width, column, p.width, sum);
}

}  // namespace

int cif_forward(const CifForward& args, CudaStream stream) {
  const CifParams& p = args.params;
  dim3 grid;
  if (p.batch == 0) return cudaSuccess;
  if (!make_grid(p.batch, &grid)) return cudaErrorInvalidValue;
  const auto kernel = args.target_lengths != nullptr ? plan<true> : plan<false>;
  if (const cudaError_t error = launch(kernel, grid, dim3(kCifThreads), 0, stream, args);
      error != cudaSuccess) {
    return error;
  }
  if (p.tokens == 0 || p.width == 0) return cudaSuccess;
  const int64_t slabs = ceil_div<int64_t>(p.width, kCifWarpColumns);
  if (!make_grid(ceil_div<int64_t>(p.batch * p.tokens * slabs, kCifWarps), &grid))
    return cudaErrorInvalidValue;
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned =
        rows_aligned<T>(p.x, p.batch_stride, p.frame_stride, p.width) && rows_aligned<T>(args.features);
    const auto sum = aligned ? sum_tokens<T, true> : sum_tokens<T, false>;
    return launch(sum, grid, dim3(kCifThreads), 0, stream, args, slabs);
  });
}

}  // namespace mmk::cuda
