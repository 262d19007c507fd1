// Shared by the kernels of ctc_align: an utterance, a step of its scores, and the backtrace.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vector.cuh"
#include "mmkernels/ctc_align.h"

namespace mmk::cuda {

// Frames that the backtrace takes at a time, one for each lane: the path passes no more pairs in them.
inline constexpr int kCtcFrames = static_cast<int>(kCtcRescale);
static_assert(kCtcFrames == kWarpSize);

// Scores of the blank and the token of a pair.
struct CtcPair {
  float even, odd;
};

template <class T>
struct CtcArguments {
  const T* log_probs;
  int64_t batch_stride, frame_stride;
  const int64_t* targets;
  const int64_t* input_lengths;
  const int64_t* target_lengths;
  int64_t* paths;
  int64_t* ends;
  float* totals;
  CtcPair* checkpoints;  // [batch][checkpoints][tokens + 1]
  // For align_wide.
  CtcPair* rows;  // [batch][2][tokens + 1]
  float* shifts;  // [batch][ceil(frames / kCtcFrames)]: subtracted by each rescaling
  int frames, tokens, classes, blank;
};

MMK_DEVICE float ctc_never() {
  return -__int_as_float(0x7f800000);
}

// NaN and +inf, which are not log-probabilities, count as -inf.
MMK_DEVICE float ctc_usable(float value) {
  return value < -ctc_never() ? value : ctc_never();
}

MMK_DEVICE int clamped_length(const int64_t* lengths, int64_t b, int most) {
  if (lengths == nullptr) return most;
  return static_cast<int>(min(max(lengths[b], int64_t{0}), static_cast<int64_t>(most)));
}

// The utterance of a block, with a checkpoint every kCheckpoint frames. Its lengths and tokens may have any
// values.
template <class T, int kCheckpoint = kCtcFrames>
struct CtcUtterance {
  const T* log_probs;
  int64_t frame_stride;
  const int64_t* targets;
  int64_t* path;
  int64_t* ends;
  float* total;
  CtcPair* checkpoints;
  int frames, tokens, classes, blank;
  int most_frames, most_tokens;  // of the batch

  MMK_DEVICE explicit CtcUtterance(const CtcArguments<T>& args) {
    const int64_t b = blockIdx.x;
    log_probs = args.log_probs + b * args.batch_stride;
    frame_stride = args.frame_stride;
    targets = args.targets + b * args.tokens;
    path = args.paths + b * args.frames;
    ends = args.ends + b * args.tokens;
    total = args.totals + b;
    frames = clamped_length(args.input_lengths, b, args.frames);
    tokens = clamped_length(args.target_lengths, b, args.tokens);
    classes = args.classes;
    blank = args.blank;
    most_frames = args.frames;
    most_tokens = args.tokens;
    checkpoints = args.checkpoints + b * ceil_div(most_frames, kCheckpoint) * (int64_t{1} + most_tokens);
  }

  MMK_DEVICE const T* frame(int t) const { return log_probs + t * frame_stride; }
  MMK_DEVICE CtcPair* checkpoint(int index) const { return checkpoints + index * (int64_t{1} + most_tokens); }

  // The class of token i, -1 where there is none: then the state is impossible.
  MMK_DEVICE int label(int i) const {
    if (i < 0 || i >= tokens) return -1;
    const int64_t value = targets[i];
    return value >= 0 && value < classes && value != blank ? static_cast<int>(value) : -1;
  }

  // Whether token i may follow token i - 1 without a blank.
  MMK_DEVICE bool skips(int i) const { return i > 0 && i < tokens && targets[i] != targets[i - 1]; }

  // Whether a path from the start to the end can be in pair i after frame t.
  MMK_DEVICE bool passed(int i, int t) const { return i <= t && i >= tokens - frames + t; }
};

// The scores of a pair after a frame; `left` is the score of the previous token.
MMK_DEVICE CtcPair ctc_step(CtcPair pair, float left, bool skips, float blank, float token) {
  const float best = fmaxf(fmaxf(pair.odd, pair.even), skips ? left : ctc_never());
  return {fmaxf(pair.even, left) + blank, best + token};
}

// Log-probabilities of the next Ahead frames, for the blank and Pairs tokens, in flight.
template <class U, class T, int Pairs, int Ahead>
struct CtcEmissions {
  T blank[Ahead];
  T token[Ahead][Pairs];

  // `slot` is constant after unrolling. Frames past the last are read as the last.
  MMK_DEVICE void load(const U& u, const int (&label)[Pairs], int slot, int t) {
    const T* frame = u.frame(min(t, u.frames - 1));
    blank[slot] = frame[u.blank];
#pragma unroll
    for (int r = 0; r < Pairs; ++r) token[slot][r] = frame[max(label[r], 0)];
  }

  MMK_DEVICE float blank_score(int slot) const { return ctc_usable(to_accumulator(blank[slot])); }
  MMK_DEVICE float token_score(int slot, int r, int label) const {
    return label < 0 ? ctc_never() : ctc_usable(to_accumulator(token[slot][r]));
  }
};

// The predecessors of the states of 32 pairs: a lane holds a frame, a bit a pair.
struct CtcMoves {
  unsigned even_one = 0, odd_one = 0, odd_two = 0;
};

// Recomputes a block of frames for the 32 pairs up to `last`, and returns the moves. `kept` holds the scores
// before the block, from pair `first_kept` on.
template <int kAhead, class T, int kCheckpoint>
MMK_DEVICE CtcMoves ctc_recompute(const CtcUtterance<T, kCheckpoint>& u, const CtcPair* kept, int first_kept,
                                  int block, int frames, int last) {
  const int lane = lane_index(), first_frame = block * kCtcFrames;
  const int i = last - (kWarpSize - 1) + lane;
  const int label[1] = {u.label(i)};
  const bool skips = u.skips(i);
  CtcPair pair = {ctc_never(), ctc_never()};
  if (i >= 0) pair = kept[i - first_kept];
  // The left neighbour of lane 0 matters in the first frame only: the path is right of it afterwards.
  float before = i > 0 ? kept[i - 1 - first_kept].odd : ctc_never();
  CtcEmissions<CtcUtterance<T, kCheckpoint>, T, 1, kAhead> emissions;
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) emissions.load(u, label, slot, first_frame + slot);
  CtcMoves moves;
#pragma unroll 1
  for (int start = 0; start < frames; start += kAhead) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int f = start + slot;
      float left = __shfl_up_sync(kFullMask, pair.odd, 1);
      if (lane == 0) left = before;
      before = ctc_never();
      const float two = skips ? left : ctc_never();
      const bool by_two = two > pair.even && two > pair.odd;
      const unsigned even_one = __ballot_sync(kFullMask, left > pair.even);
      const unsigned odd_two = __ballot_sync(kFullMask, by_two);
      const unsigned odd_one = __ballot_sync(kFullMask, !by_two && pair.even > pair.odd);
      if (lane == f) moves = {even_one, odd_one, odd_two};
      pair =
          ctc_step(pair, left, skips, emissions.blank_score(slot), emissions.token_score(slot, 0, label[0]));
      emissions.load(u, label, slot, first_frame + f + kAhead);
    }
  }
  return moves;
}

// The state of the backtrace, and the sum of the path's scores in this lane's frames.
struct CtcPath {
  int pair;
  bool odd;
  double total;
};

// One warp writes path and ends of a block of frames, and moves `path` from its end to its start.
template <int kAhead, class T, int kCheckpoint>
MMK_DEVICE void ctc_trace(const CtcUtterance<T, kCheckpoint>& u, const CtcPair* kept, int first_kept,
                          int block, CtcPath& path) {
  const int lane = lane_index(), frames = min(kCtcFrames, u.frames - block * kCtcFrames), last = path.pair;
  const CtcMoves moves = ctc_recompute<kAhead>(u, kept, first_kept, block, frames, last);
  int own_pair = 0;
  bool own_odd = false, entered = false;
#pragma unroll 4
  for (int f = frames - 1; f >= 0; --f) {
    const int bit = path.pair - last + kWarpSize - 1;
    const bool even_one = (__shfl_sync(kFullMask, moves.even_one, f) >> bit) & 1u;
    const bool odd_one = (__shfl_sync(kFullMask, moves.odd_one, f) >> bit) & 1u;
    const bool odd_two = (__shfl_sync(kFullMask, moves.odd_two, f) >> bit) & 1u;
    if (lane == f) {
      own_pair = path.pair;
      own_odd = path.odd;
      entered = odd_one || odd_two;
    }
    const bool to_left = path.odd ? odd_two : even_one;
    path.odd = path.odd ? !odd_one : even_one;
    path.pair -= to_left ? 1 : 0;
  }
  if (lane < frames) {
    const int t = block * kCtcFrames + lane;
    const int64_t token = own_odd ? u.targets[own_pair] : u.blank;
    u.path[t] = token;
    path.total += static_cast<double>(ctc_usable(to_accumulator(u.frame(t)[token])));
    if (own_odd && entered && own_pair > 0) u.ends[own_pair - 1] = t;
  }
}

// The whole warp adds up its lanes' scores.
template <class U>
MMK_DEVICE void ctc_write_total(const U& u, const CtcPath& path) {
  const double total = warp_sum(path.total);
  if (lane_index() == 0) *u.total = static_cast<float>(total);
}

// Writes the outputs that no path writes; all Threads threads must call it. `blank` and `token` are the
// scores of the two states in which a path may end. Returns whether there is a path.
template <int Threads, class U>
MMK_DEVICE bool ctc_fill(const U& u, float blank, float token) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool feasible = fmaxf(blank, token) > ctc_never();
  for (int64_t i = thread; i < u.most_tokens; i += Threads) u.ends[i] = feasible ? u.frames : 0;
  for (int64_t t = (feasible ? u.frames : 0) + thread; t < u.most_frames; t += Threads) u.path[t] = -1;
  if (!feasible && thread == 0) *u.total = ctc_never();
  __syncthreads();
  return feasible;
}

// A path ends in the last token if that is at least as likely as the blank behind it.
template <class U>
MMK_DEVICE CtcPath ctc_end_of_path(const U& u, float blank, float token) {
  const bool odd = u.tokens > 0 && !(blank > token);
  return {odd ? u.tokens - 1 : u.tokens, odd, 0.0};
}

}  // namespace mmk::cuda
