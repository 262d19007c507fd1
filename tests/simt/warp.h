// Barriers, votes and shuffles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <source_location>
#include <type_traits>

#include "simt/runtime.h"

namespace mmk::simt {

struct ShuffleFrame {
  uint64_t value;  // in: own value; out: that of `source`
  int source;
};

// Replaces the value of each present lane by that of its source lane.
void complete_shuffle(void* const (&frames)[kWarpSize], unsigned present);

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, const std::source_location& where) {
  static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> ||
                    std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat162>,
                "the types that CUDA shuffles");
  ShuffleFrame frame{0, source};
  std::memcpy(&frame.value, &value, sizeof(T));
  warp_collective({name, complete_shuffle, false}, mask, &frame, where);
  std::memcpy(static_cast<void*>(&value), &frame.value, sizeof(T));
  return value;
}

struct ReduceFrame {
  int64_t value;
  int64_t (*combine)(int64_t, int64_t);
};
void complete_reduce(void* const (&frames)[kWarpSize], unsigned present);

template <class T>
T reduce(const char* name, unsigned mask, T value, int64_t (*combine)(int64_t, int64_t),
         const std::source_location& where) {
  ReduceFrame frame{static_cast<int64_t>(value), combine};
  warp_collective({name, complete_reduce, false}, mask, &frame, where);
  return static_cast<T>(frame.value);
}

struct MatchFrame {
  uint64_t value;
  unsigned lanes;
};
void complete_match(void* const (&frames)[kWarpSize], unsigned present);

// The present lanes whose predicate holds, and all present lanes, as masks.
struct Votes {
  unsigned set;
  unsigned present;
};
Votes vote(const char* name, unsigned mask, int predicate, const std::source_location& where);
void sync_warp(unsigned mask, const std::source_location& where);

}  // namespace mmk::simt

#define MMK_SIMT_HERE const std::source_location& where = std::source_location::current()

inline void __syncthreads(MMK_SIMT_HERE) {
  mmk::simt::block_barrier(0, where);
}
inline int __syncthreads_count(int predicate, MMK_SIMT_HERE) {
  return mmk::simt::block_barrier(predicate, where).count;
}
inline int __syncthreads_and(int predicate, MMK_SIMT_HERE) {
  const auto result = mmk::simt::block_barrier(predicate, where);
  return result.count == result.threads;
}
inline int __syncthreads_or(int predicate, MMK_SIMT_HERE) {
  return mmk::simt::block_barrier(predicate, where).count != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MMK_SIMT_HERE) {
  mmk::simt::sync_warp(mask, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MMK_SIMT_HERE) {
  return mmk::simt::vote("__ballot_sync", mask, predicate, where).set;
}
inline int __any_sync(unsigned mask, int predicate, MMK_SIMT_HERE) {
  return mmk::simt::vote("__any_sync", mask, predicate, where).set != 0;
}
inline int __all_sync(unsigned mask, int predicate, MMK_SIMT_HERE) {
  const auto votes = mmk::simt::vote("__all_sync", mask, predicate, where);
  return votes.set == votes.present;
}
inline unsigned __activemask() {
  return mmk::simt::live_lanes();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MMK_SIMT_HERE) {
  const int lane = static_cast<int>(mmk::simt::lane_index());
  return mmk::simt::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)),
                            where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MMK_SIMT_HERE) {
  const int lane = static_cast<int>(mmk::simt::lane_index());
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return mmk::simt::shuffle("__shfl_up_sync", mask, value, inside ? lane - static_cast<int>(delta) : lane,
                            where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MMK_SIMT_HERE) {
  const int lane = static_cast<int>(mmk::simt::lane_index());
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return mmk::simt::shuffle("__shfl_down_sync", mask, value, inside ? lane + static_cast<int>(delta) : lane,
                            where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MMK_SIMT_HERE) {
  const int lane = static_cast<int>(mmk::simt::lane_index());
  const int source = lane ^ lane_mask;
  const bool inside = source <= (lane | (width - 1));  // earlier groups may be read, later ones not
  return mmk::simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, MMK_SIMT_HERE) {
  return mmk::simt::reduce(
      "__reduce_add_sync", mask, value, [](int64_t a, int64_t b) { return a + b; }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, MMK_SIMT_HERE) {
  return mmk::simt::reduce(
      "__reduce_max_sync", mask, value, [](int64_t a, int64_t b) { return a > b ? a : b; }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, MMK_SIMT_HERE) {
  return mmk::simt::reduce(
      "__reduce_min_sync", mask, value, [](int64_t a, int64_t b) { return a < b ? a : b; }, where);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, MMK_SIMT_HERE) {
  static_assert(std::is_arithmetic_v<T>);
  mmk::simt::MatchFrame frame{0, 0};
  std::memcpy(&frame.value, &value, sizeof(T));
  mmk::simt::warp_collective({"__match_any_sync", mmk::simt::complete_match, false}, mask, &frame, where);
  return frame.lanes;
}

#undef MMK_SIMT_HERE
