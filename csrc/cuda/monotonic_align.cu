// One block for each utterance. A lane holds the scores of kStates neighbouring tokens in registers and takes
// the score before its first token from the previous lane. Scores come from the left only, so the first lane
// of a warp repeats the last tokens of the previous warp: from kStates exact scores it follows kStates frames
// without exchange. More tokens than a block holds are taken in panels, one after the other.
#include <algorithm>
#include <limits>

#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "mmkernels/monotonic_align.h"

namespace mmk::cuda {
namespace {

constexpr int kStates = 4;
constexpr int kWarpTokens = (kWarpSize - 1) * kStates;
constexpr int kMostWarps = 16;
constexpr int kPanelTokens = kMostWarps * kWarpTokens;
constexpr int kAhead = 8;  // frames whose log-probabilities are in flight
constexpr int kBits = 32;
constexpr int64_t kMostSize = int64_t{1} << 30;

struct Utterance {
  int frames;
  int tokens;
  uint32_t* words;
  int columns;
};

// The tokens of one lane: those from `column` on, which is negative before the first token.
template <class T, bool kAligned>
struct Lane {
  const T* log_probs;
  int64_t frame_stride;
  int tokens;
  int column;

  MMK_DEVICE Vec<T, kStates> load(int frame) const {
    if (column < 0) {
      Vec<T, kStates> impossible;
#pragma unroll
      for (int i = 0; i < kStates; ++i) impossible[i] = from_accumulator<T>(-INFINITY);
      return impossible;
    }
    return load_columns<kAligned, kStates>(log_probs + frame * frame_stride, column, tokens);
  }
};

struct States {
  float score[kStates];
  uint32_t starts[kStates];  // back-pointers of the current row of words
  bool not_a_number;
};

// Advances by one frame. `bit` is the frame's bit in a word.
template <class T>
MMK_DEVICE void advance(States& states, const Vec<T, kStates>& log_probs, uint32_t bit, int valid) {
  const float before = __shfl_up_sync(kFullMask, states.score[kStates - 1], 1);
#pragma unroll
  for (int i = kStates - 1; i >= 0; --i) {
    const float value = to_accumulator(log_probs[i]);
    const float come = i > 0 ? states.score[i - 1] : before;
    const bool comes = come >= states.score[i];
    states.score[i] = value + (comes ? come : states.score[i]);
    states.starts[i] |= comes ? bit : 0u;
    states.not_a_number |= value != value && i < valid;
  }
}

// Frames [first, first + kAhead) of the utterance; loads those of the next kAhead.
template <bool kWhole, class T, bool kAligned, class Exchange>
MMK_DEVICE void advance_frames(States& states, Vec<T, kStates> (&ahead)[kAhead],
                               const Lane<T, kAligned>& lane, int first, int frames, Exchange&& exchange) {
#pragma unroll
  for (int f = 0; f < kAhead; ++f) {
    const int frame = first + f;
    if (!kWhole && frame >= frames) return;
    if (f % kStates == 0) exchange(states, frame / kStates);
    advance(states, ahead[f], 1u << (frame % kBits), lane.tokens - lane.column);
    if (frame + kAhead < frames) ahead[f] = lane.load(frame + kAhead);
  }
}

// The tokens from `panel_first` on, as many as the block holds. Returns whether a log-probability is NaN.
// kPanels: there are other panels; `edges_in` and `edges_out` are the last scores of the previous panel and
// of this one, at every kStates-th frame.
template <class T, bool kAligned, bool kPanels>
MMK_DEVICE bool search(const T* log_probs, int64_t frame_stride, const Utterance& utterance, int panel_first,
                       const float* edges_in, float* edges_out) {
  MMK_SHARED(float, edges, 2, kMostWarps, kStates);
  const int warp = warp_index(), lane = lane_index(), warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int column = panel_first + warp * kWarpTokens + (lane - 1) * kStates;
  const Lane<T, kAligned> own = {log_probs, frame_stride, utterance.tokens, column};
  States states = {};
#pragma unroll
  for (int i = 0; i < kStates; ++i) states.score[i] = -INFINITY;
  if (column == -kStates) states.score[kStates - 1] = 0.0f;  // the start, before the first token

  const auto exchange = [&](States& current, int turn) {
    if (kPanels && warp == warps - 1 && lane == kWarpSize - 1) {
      store(edges_out + int64_t{turn} * kStates, *reinterpret_cast<Vec<float, kStates>*>(current.score));
    }
    if (warps > 1) {
      if (lane == kWarpSize - 1) {
#pragma unroll
        for (int i = 0; i < kStates; ++i) edges[turn % 2][warp][i] = current.score[i];
      }
      __syncthreads();
    }
    if (lane > 0 || column < 0) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const bool within = !kPanels || warp > 0;
      current.score[i] = within ? edges[turn % 2][warp - 1][i] : edges_in[int64_t{turn} * kStates + i];
    }
  };

  Vec<T, kStates> ahead[kAhead] = {};
#pragma unroll
  for (int f = 0; f < kAhead; ++f) {
    if (f < utterance.frames) ahead[f] = own.load(f);
  }
  for (int first = 0; first < utterance.frames; first += kAhead) {
    if (first + kAhead <= utterance.frames) {
      advance_frames<true>(states, ahead, own, first, utterance.frames, exchange);
    } else {
      advance_frames<false>(states, ahead, own, first, utterance.frames, exchange);
    }
    const int next = first + kAhead;
    if (next % kBits != 0 && next < utterance.frames) continue;
    if (lane > 0 && column < utterance.columns) {
      Vec<uint32_t, kStates> words;
#pragma unroll
      for (int i = 0; i < kStates; ++i) words[i] = states.starts[i];
      store(utterance.words + int64_t{first / kBits} * utterance.columns + column, words);
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) states.starts[i] = 0;
  }
  __syncthreads();
  return states.not_a_number;
}

// The words of a row around the token where the path enters it: lane l has those of the tokens `top - l` and
// `top - kWarpSize - l`.
struct Window {
  int top;
  uint32_t near;
  uint32_t far;

  MMK_DEVICE Window(const Utterance& utterance, int row, int entered) : top(entered), near(0), far(0) {
    if (row < 0) return;
    const uint32_t* words = utterance.words + int64_t{row} * utterance.columns;
    const int token = top - lane_index();
    if (token >= 0) near = words[token];
    if (token >= kWarpSize) far = words[token - kWarpSize];
  }

  MMK_DEVICE uint32_t at(int token) const {
    const int distance = top - token;
    const uint32_t a = __shfl_sync(kFullMask, near, distance % kWarpSize);
    const uint32_t b = __shfl_sync(kFullMask, far, distance % kWarpSize);
    return distance < kWarpSize ? a : b;
  }
};

// Follows the back-pointers from the end, by one warp: a step for each token and each row of words.
// Prefetches the words of the next row; within a row the path moves by at most kBits tokens.
MMK_DEVICE void trace(const Utterance& utterance, int64_t* durations) {
  int token = utterance.tokens - 1, end = utterance.frames, frame = utterance.frames - 1;
  int row = frame / kBits;
  Window window(utterance, row, token);
  while (token > 0) {
    const Window next(utterance, row - 1, token);
    while (token > 0 && frame >= row * kBits) {
      uint32_t starts = window.at(token);
      // Token u starts in frame u at the earliest.
      if (token / kBits == row) starts |= 1u << (token % kBits);
      starts &= 0xffffffffu >> (kBits - 1 - frame % kBits);
      if (starts == 0) break;
      const int start = row * kBits + kBits - 1 - __clz(static_cast<int>(starts));
      if (lane_index() == 0) durations[token] = end - start;
      end = start;
      frame = start - 1;
      --token;
    }
    frame = min(frame, row * kBits - 1);
    --row;
    window = next;
  }
  if (lane_index() == 0) durations[0] = end;
}

MMK_DEVICE int length_of(const int64_t* lengths, int64_t row, int64_t most) {
  return static_cast<int>(lengths == nullptr ? most : min(max(lengths[row], int64_t{0}), most));
}

template <class T, bool kAligned, bool kPanels>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    align(MonotonicAlign args, MonotonicWords size, int64_t states) {
  const int64_t row = blockIdx.x;
  int64_t* durations = args.durations + row * args.tokens;
  const Utterance utterance = {
      length_of(args.frame_lengths, row, args.frames), length_of(args.token_lengths, row, args.tokens),
      static_cast<uint32_t*>(args.words) + row * size.rows * size.columns, static_cast<int>(size.columns)};
  const T* log_probs = static_cast<const T*>(args.log_probs) + row * args.batch_stride;
  bool has_path = utterance.tokens > 0 && utterance.frames >= utterance.tokens;
  if (has_path) {
    bool not_a_number = false;
    if constexpr (kPanels) {
      float* in = static_cast<float*>(args.states) + row * states;
      float* out = in + states / 2;
      for (int first = 0; first < utterance.tokens; first += kPanelTokens) {
        not_a_number |= search<T, kAligned, true>(log_probs, args.frame_stride, utterance, first, in, out);
        float* const other = in;
        in = out;
        out = other;
      }
    } else {
      not_a_number = search<T, kAligned, false>(log_probs, args.frame_stride, utterance, 0, nullptr, nullptr);
    }
    has_path = __syncthreads_or(not_a_number) == 0;
  }
  const int threads = static_cast<int>(blockDim.x);
  for (int64_t u = (has_path ? utterance.tokens : 0) + static_cast<int64_t>(threadIdx.x); u < args.tokens;
       u += threads) {
    durations[u] = 0;
  }
  if (has_path && warp_index() == 0) trace(utterance, durations);
}

}  // namespace

int64_t monotonic_align_states(int64_t frames, int64_t tokens) {
  return tokens > kPanelTokens ? 2 * kStates * ceil_div<int64_t>(frames, kStates) : 0;
}

int monotonic_align(const MonotonicAlign& args, CudaStream stream) {
  if (args.batch == 0 || args.tokens == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(args.batch, &grid) || std::max(args.frames, args.tokens) > kMostSize) {
    return cudaErrorInvalidValue;
  }
  const int64_t warps = std::min<int64_t>(kMostWarps, ceil_div<int64_t>(args.tokens, kWarpTokens));
  const int64_t states = monotonic_align_states(args.frames, args.tokens);
  return dispatch(args.dtype, [&](auto element) {
    using T = decltype(element);
    const T* log_probs = static_cast<const T*>(args.log_probs);
    const bool aligned =
        rows_aligned<T, kStates>(log_probs, args.tokens, args.batch_stride, args.frame_stride);
    const auto start = [&](auto kernel) {
      return launch(kernel, grid, dim3(static_cast<unsigned>(warps * kWarpSize)), 0, stream, args,
                    monotonic_words(args.dtype, args.frames, args.tokens), states);
    };
    if (states > 0) return aligned ? start(align<T, true, true>) : start(align<T, false, true>);
    return aligned ? start(align<T, true, false>) : start(align<T, false, false>);
  });
}

}  // namespace mmk::cuda
