// merge: out_k = target_k + lam[group_k] * (source_k - target_k) for many pairs of tensors at once.
//
// Tensors are contiguous and cut into chunks of kMergeChunk elements. d_lam[g] is the sum of grad * (source -
// target) over the pairs of group g: one partial sum for each chunk, added in the order of pairs and chunks.
// It does not depend on the number of threads or multiprocessors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

constexpr int64_t kMergeChunk = 16384;  // elements

constexpr int64_t merge_chunks(int64_t size) {
  return (size + kMergeChunk - 1) / kMergeChunk;
}

// One type of each for all pairs of a call. `result` is that of the results and of their gradients.
struct MergeTypes {
  DType target;
  DType source;
  DType result;
};

// float64 stands alone (and on the CPU only); float32 goes with one of the half types.
constexpr bool merge_supports(MergeTypes types) {
  int of[4] = {};
  for (const DType type : {types.target, types.source, types.result}) ++of[static_cast<int>(type)];
  const int doubles = of[static_cast<int>(DType::kFloat64)];
  const bool mixed_halves =
      of[static_cast<int>(DType::kFloat16)] > 0 && of[static_cast<int>(DType::kBFloat16)] > 0;
  return (doubles == 0 || doubles == 3) && !mixed_halves;
}

struct MergePair {
  const void* target;
  const void* source;
  int64_t size;
  int64_t group;
  int64_t begin;  // elements of all pairs before this one
};

struct MergeForward {
  MergeTypes types;
  const void* lam;  // [groups], float (double for kFloat64), like all sums below
  const MergePair* pairs;
  void* const* out;  // [count] results; one may be the target or the source of its pair
  int64_t count;
};

struct MergeGradient {
  const void* grad;
  void* d_target;         // null if not needed
  void* d_source;         // null if not needed
  int64_t first_partial;  // the place of its first chunk in `partial`
};

struct MergeBackward {
  MergeTypes types;
  const void* lam;
  const MergePair* pairs;  // without d_lam, target and source are not read
  const MergeGradient* gradients;
  int64_t count;
  const int64_t* group_begin;  // [groups + 1] places in `partial`, by merge_partials
  int64_t groups;
  void* partial;  // [group_begin[groups]]
  void* d_lam;    // [groups] or null if not needed
};

// Gives the chunks of a group neighbouring places in `partial`, in the order of its pairs. Sets first_partial
// of `gradients` and returns group_begin. Groups are in [0, groups).
inline std::vector<int64_t> merge_partials(const MergePair* pairs, int64_t count, int64_t groups,
                                           MergeGradient* gradients) {
  std::vector<int64_t> begin(static_cast<size_t>(groups) + 1, 0);
  for (int64_t k = 0; k < count; ++k) begin[pairs[k].group + 1] += merge_chunks(pairs[k].size);
  for (int64_t g = 0; g < groups; ++g) begin[g + 1] += begin[g];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t k = 0; k < count; ++k) {
    gradients[k].first_partial = next[pairs[k].group];
    next[pairs[k].group] += merge_chunks(pairs[k].size);
  }
  return begin;
}

namespace cpu {

// The chunks that begin in [begin, end) of the elements of all pairs, one after the other.
void merge_forward(const MergeForward& args, int64_t begin, int64_t end);
void merge_backward(const MergeBackward& args, int64_t begin, int64_t end);
// Adds the partial sums in order; call once, after all chunks.
void merge_reduce(const MergeBackward& args);

}  // namespace cpu

namespace cuda {

// Launchers run on the current device and return a cudaError_t. Types are float, half and bfloat16.
int merge_forward(const MergeForward& args, CudaStream stream);
int merge_backward(const MergeBackward& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
