#include "cuda/common/dispatch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/ctc_align.cuh"
#include "mmkernels/ctc_align.h"

namespace mmk::cuda {
namespace {

// A block aligns an utterance, with the scores of kPairs pairs in the registers of each thread. A pair needs
// its left neighbour only, by a shuffle. Each warp also computes a halo, the last kHalo pairs of the warp to
// its left: one more of them becomes invalid in each frame, and exchange() refreshes them every kHalo frames.
template <int kPairs, int kWarps>
struct Layout {
  // Pairs of the halo, frames between two barriers, and frames whose emissions are in flight.
  static constexpr int kHalo = kPairs == 2 ? 16 : kWarps < 16 ? 8 : 4;
  static constexpr int kWarpPairs = kPairs * kWarpSize;
  static constexpr int kMostPairs = kWarpPairs + (kWarps - 1) * (kWarpPairs - kHalo);
  static constexpr int kThreads = kWarps * kWarpSize;
  static_assert(kCtcFrames % kHalo == 0 && kHalo % kPairs == 0 && kWarpPairs >= 2 * kHalo);
};

template <class T, int kPairs, int kWarps>
struct Scores {
  using Sizes = Layout<kPairs, kWarps>;
  const CtcUtterance<T>& u;
  int first;   // pair of this thread
  bool owned;  // its pairs are not in the halo
  CtcPair pair[kPairs];
  int label[kPairs];
  bool skips[kPairs];
  CtcEmissions<CtcUtterance<T>, T, kPairs, Sizes::kHalo> emissions;

  MMK_DEVICE explicit Scores(const CtcUtterance<T>& utterance) : u(utterance) {
    first = warp_index() * (Sizes::kWarpPairs - Sizes::kHalo) + lane_index() * kPairs;
    owned = warp_index() == 0 || lane_index() * kPairs >= Sizes::kHalo;
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      pair[r] = {first + r == 0 ? 0.0f : ctc_never(), ctc_never()};
      label[r] = u.label(first + r);
      skips[r] = u.skips(first + r);
    }
#pragma unroll
    for (int slot = 0; slot < Sizes::kHalo; ++slot) emissions.load(u, label, slot, slot);
  }

  MMK_DEVICE void save(CtcPair* checkpoint) const {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      if (owned && first + r <= u.tokens) checkpoint[first + r] = pair[r];
    }
  }

  // Advances by kHalo frames from t on if kFull, else by the remaining ones.
  template <bool kFull>
  MMK_DEVICE void advance(int t) {
#pragma unroll
    for (int slot = 0; slot < Sizes::kHalo; ++slot) {
      if (!kFull && t + slot >= u.frames) break;
      float left = __shfl_up_sync(kFullMask, pair[kPairs - 1].odd, 1);
      if (lane_index() == 0) left = ctc_never();
      const float blank = emissions.blank_score(slot);
#pragma unroll
      for (int r = kPairs - 1; r >= 0; --r) {
        const float token = emissions.token_score(slot, r, label[r]);
        pair[r] = ctc_step(pair[r], r > 0 ? pair[r > 0 ? r - 1 : 0].odd : left, skips[r], blank, token);
      }
      if (kFull) emissions.load(u, label, slot, t + slot + Sizes::kHalo);
    }
  }

  // Refreshes the halo from the warp to the left. Two buffers, so that one barrier is enough.
  MMK_DEVICE void exchange(int buffer) {
    if constexpr (kWarps > 1) {
      MMK_SHARED(CtcPair, edge, 2, kWarps, Sizes::kHalo);
      const int begin = lane_index() * kPairs, end = begin - (Sizes::kWarpPairs - Sizes::kHalo);
#pragma unroll
      for (int r = 0; r < kPairs; ++r) {
        if (end >= 0) edge[buffer][warp_index()][end + r] = pair[r];
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kPairs; ++r) {
        if (!owned) pair[r] = edge[buffer][warp_index() - 1][begin + r];
      }
    }
  }

  // Subtracts the largest score after frame t.
  MMK_DEVICE void rescale(int t) {
    float largest = ctc_never();
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      if (u.passed(first + r, t)) largest = fmaxf(largest, fmaxf(pair[r].even, pair[r].odd));
    }
    largest = block_max<Sizes::kThreads>(largest);
    const float shift = largest > ctc_never() ? largest : 0.0f;
#pragma unroll
    for (int r = 0; r < kPairs; ++r) pair[r] = {pair[r].even - shift, pair[r].odd - shift};
  }
};

template <class T, int kPairs, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize) align(const __grid_constant__ CtcArguments<T> args) {
  using Sizes = Layout<kPairs, kWarps>;
  const CtcUtterance<T> u(args);
  MMK_SHARED(float, last, 2);
  if (threadIdx.x == 0) last[0] = last[1] = ctc_never();
  __syncthreads();
  if (u.tokens <= u.frames) {
    if (u.frames == 0) {
      if (threadIdx.x == 0) last[0] = 0.0f;
    } else {
      Scores<T, kPairs, kWarps> scores(u);
#pragma unroll 1
      for (int t = 0; t < u.frames; t += Sizes::kHalo) {
        if (t % kCtcFrames == 0) scores.save(u.checkpoint(t / kCtcFrames));
        if (t + Sizes::kHalo > u.frames) {
          scores.template advance<false>(t);
          break;
        }
        scores.template advance<true>(t);
        scores.exchange(t / Sizes::kHalo % 2);
        if ((t + Sizes::kHalo) % kCtcFrames == 0) scores.rescale(t + Sizes::kHalo - 1);
      }
#pragma unroll
      for (int r = 0; r < kPairs; ++r) {
        if (scores.owned && scores.first + r == u.tokens) last[0] = scores.pair[r].even;
        if (scores.owned && scores.first + r == u.tokens - 1) last[1] = scores.pair[r].odd;
      }
    }
  }
  __syncthreads();
  if (!ctc_fill<Sizes::kThreads>(u, last[0], last[1]) || warp_index() > 0) return;
  CtcPath path = ctc_end_of_path(u, last[0], last[1]);
  // Frames in flight. With eight, four warps of half precision put values on the stack of sm_90.
  constexpr int kAhead = sizeof(T) == 2 && kWarps == 4 ? 4 : 8;
#pragma unroll 1
  for (int block = ceil_div(u.frames, kCtcFrames) - 1; block >= 0; --block) {
    ctc_trace<kAhead>(u, u.checkpoint(block), 0, block, path);
  }
  ctc_write_total(u, path);
}

constexpr int kWideThreads = 1024;
// Every fourth block of kCtcFrames frames has a checkpoint: hours of audio would need gigabytes for all. The
// backtrace recomputes the scores between for the pairs that the path can pass.
constexpr int kWideBlocks = 4, kWideFrames = kWideBlocks * kCtcFrames, kWidePairs = kWideFrames + 1;

// Recomputes the scores before each block of a group but the first, for kWidePairs pairs from `first` on. All
// threads must call it. After each frame one more pair at the left is invalid. The path stays right of these:
// it ends in the last pair and moves by at most one pair a frame.
template <class U>
MMK_DEVICE void between_checkpoints(const U& u, int group, int first, const float* shifts,
                                    CtcPair (*scores)[kWidePairs]) {
  MMK_SHARED(float, tokens, 2, kWidePairs);
  const int thread = static_cast<int>(threadIdx.x), i = first + thread, begin = group * kWideFrames;
  const bool used = thread < kWidePairs;
  const int blocks = ceil_div(min(kWideFrames, u.frames - begin), kCtcFrames);
  CtcPair pair = {ctc_never(), ctc_never()};
  if (used && i >= 0) pair = u.checkpoint(group)[i];
  const int label = used ? u.label(i) : -1;
  const bool skips = used && u.skips(i);
#pragma unroll 1
  for (int f = 0; f < (blocks - 1) * kCtcFrames; ++f) {
    if (used) tokens[f % 2][thread] = pair.odd;
    __syncthreads();
    if (!used) continue;
    const auto* frame = u.frame(begin + f);
    const float left = thread > 0 ? tokens[f % 2][thread - 1] : ctc_never();
    const float token = label < 0 ? ctc_never() : ctc_usable(to_accumulator(frame[label]));
    pair = ctc_step(pair, left, skips, ctc_usable(to_accumulator(frame[u.blank])), token);
    if ((f + 1) % kCtcFrames == 0) {
      const float shift = shifts[(begin + f) / kCtcFrames];
      pair = {pair.even - shift, pair.odd - shift};
      scores[f / kCtcFrames][thread] = pair;
    }
  }
  __syncthreads();
}

// For any number of tokens: the scores before and after a frame are in device memory.
template <class T>
__global__ void __launch_bounds__(kWideThreads, 1) align_wide(const __grid_constant__ CtcArguments<T> args) {
  const CtcUtterance<T, kWideFrames> u(args);
  const int64_t pairs = int64_t{1} + u.most_tokens;
  CtcPair* rows = args.rows + static_cast<int64_t>(blockIdx.x) * 2 * pairs;
  float* shifts = args.shifts + static_cast<int64_t>(blockIdx.x) * ceil_div(u.most_frames, kCtcFrames);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i <= u.tokens; i += kWideThreads) {
    rows[i] = {i == 0 ? 0.0f : ctc_never(), ctc_never()};
    rows[pairs + i] = {ctc_never(), ctc_never()};
  }
  __syncthreads();
  const int frames = u.tokens <= u.frames ? u.frames : 0;
  for (int t = 0; t < frames; ++t) {
    const CtcPair* from = rows + t % 2 * pairs;
    CtcPair* to = rows + (1 - t % 2) * pairs;
    if (t % kWideFrames == 0) {
      CtcPair* kept = u.checkpoint(t / kWideFrames);
      for (int i = thread; i <= u.tokens; i += kWideThreads) kept[i] = from[i];
    }
    const T* frame = u.frame(t);
    const float blank = ctc_usable(to_accumulator(frame[u.blank]));
    const int first = max(0, u.tokens - u.frames + t) + thread, last = min(u.tokens, t);
    float largest = ctc_never();
    for (int i = first; i <= last; i += kWideThreads) {
      const int label = u.label(i);
      const float token = label < 0 ? ctc_never() : ctc_usable(to_accumulator(frame[label]));
      const CtcPair pair = ctc_step(from[i], i > 0 ? from[i - 1].odd : ctc_never(), u.skips(i), blank, token);
      largest = fmaxf(largest, fmaxf(pair.even, pair.odd));
      to[i] = pair;
    }
    if ((t + 1) % kCtcFrames == 0) {
      largest = block_max<kWideThreads>(largest);
      const float shift = largest > ctc_never() ? largest : 0.0f;
      if (thread == 0) shifts[t / kCtcFrames] = shift;
      for (int i = first; i <= last; i += kWideThreads) to[i] = {to[i].even - shift, to[i].odd - shift};
    }
    __syncthreads();
  }
  const CtcPair* scores = rows + u.frames % 2 * pairs;
  const bool possible = u.tokens <= u.frames;
  const float blank = possible ? scores[u.tokens].even : ctc_never();
  const float token = possible && u.tokens > 0 ? scores[u.tokens - 1].odd : ctc_never();
  if (!ctc_fill<kWideThreads>(u, blank, token)) return;
  MMK_SHARED(CtcPair, between, kWideBlocks - 1, kWidePairs);
  MMK_SHARED(int, reached, 1);
  CtcPath path = ctc_end_of_path(u, blank, token);
#pragma unroll 1
  for (int group = ceil_div(u.frames, kWideFrames) - 1; group >= 0; --group) {
    const int first = path.pair - (kWidePairs - 1);
    between_checkpoints(u, group, first, shifts, between);
    if (warp_index() == 0) {
      const int blocks = ceil_div(min(kWideFrames, u.frames - group * kWideFrames), kCtcFrames);
#pragma unroll 1
      for (int block = blocks - 1; block >= 0; --block) {
        const CtcPair* kept = block > 0 ? between[block - 1] : u.checkpoint(group);
        // Prefetch one frame only: a thread has 64 registers.
        ctc_trace<1>(u, kept, block > 0 ? first : 0, group * kWideBlocks + block, path);
      }
      if (lane_index() == 0) reached[0] = path.pair;
    }
    __syncthreads();
    path.pair = reached[0];
  }
  if (warp_index() == 0) ctc_write_total(u, path);
}

template <int kPairs, int kWarps>
constexpr bool fits(int64_t pairs) {
  return pairs <= Layout<kPairs, kWarps>::kMostPairs;
}

constexpr bool is_wide(int64_t tokens) {
  return !fits<4, 16>(tokens + 1);
}

template <class T>
cudaError_t start(const CtcArguments<T>& args, dim3 grid, cudaStream_t stream) {
  const int64_t pairs = int64_t{1} + args.tokens;
  const auto with = [&](auto kernel, int threads) {
    return launch(kernel, grid, dim3(static_cast<unsigned>(threads)), 0, stream, args);
  };
  if (fits<2, 1>(pairs)) return with(align<T, 2, 1>, 1 * kWarpSize);
  if (fits<2, 4>(pairs)) return with(align<T, 2, 4>, 4 * kWarpSize);
  if (fits<4, 4>(pairs)) return with(align<T, 4, 4>, 4 * kWarpSize);
  if (fits<4, 8>(pairs)) return with(align<T, 4, 8>, 8 * kWarpSize);
  if (fits<4, 16>(pairs)) return with(align<T, 4, 16>, 16 * kWarpSize);
  return with(align_wide<T>, kWideThreads);
}

// The parts of the workspace, in pairs and floats.
struct CtcWorkspace {
  int64_t checkpoints, rows, shifts;

  CtcWorkspace(int64_t batch, int64_t frames, int64_t tokens) {
    const bool wide = is_wide(tokens);
    checkpoints = batch * ceil_div<int64_t>(frames, wide ? kWideFrames : kCtcFrames) * (tokens + 1);
    rows = wide ? batch * 2 * (tokens + 1) : 0;
    shifts = wide ? batch * ceil_div<int64_t>(frames, kCtcFrames) : 0;
  }
};

}  // namespace

size_t ctc_align_workspace(int64_t batch, int64_t frames, int64_t tokens) {
  const CtcWorkspace parts(batch, frames, tokens);
  return static_cast<size_t>(parts.checkpoints + parts.rows) * sizeof(CtcPair) +
         static_cast<size_t>(parts.shifts) * sizeof(float);
}

int ctc_align(const CtcAlign& args, void* workspace, CudaStream stream) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (args.batch == 0) return cudaSuccess;
  dim3 grid;
  if (args.frames >= kMost || args.tokens >= kMost || !make_grid(args.batch, &grid)) {
    return cudaErrorInvalidValue;
  }
  CtcPair* checkpoints = static_cast<CtcPair*>(workspace);
  const CtcWorkspace parts(args.batch, args.frames, args.tokens);
  CtcPair* rows = checkpoints + parts.checkpoints;
  float* shifts = reinterpret_cast<float*>(rows + parts.rows);
  return dispatch(args.dtype, [&](auto element) {
    using T = decltype(element);
    const CtcArguments<T> arguments = {static_cast<const T*>(args.log_probs),
                                       args.batch_stride,
                                       args.frame_stride,
                                       args.targets,
                                       args.input_lengths,
                                       args.target_lengths,
                                       args.paths,
                                       args.ends,
                                       static_cast<float*>(args.totals),
                                       checkpoints,
                                       rows,
                                       shifts,
                                       static_cast<int>(args.frames),
                                       static_cast<int>(args.tokens),
                                       static_cast<int>(args.classes),
                                       static_cast<int>(args.blank)};
    return start(arguments, grid, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mmk::cuda
