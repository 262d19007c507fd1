#include "cuda/merge.cuh"

namespace mmk::cuda {
namespace {

struct BackwardPair {
  const void* grad;
  const void* target;
  const void* source;
  void* d_target;
  void* d_source;
  int64_t size;
  int64_t first_partial;
  int32_t group;
  bool aligned;
};
using BackwardTable = MergeTable<BackwardPair>;

template <int kWidth>
MMK_DEVICE Vec<float, kWidth> scaled(Vec<float, kWidth> values, float factor) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) values[j] *= factor;
  return values;
}

// Writes the gradients of a chunk that are not null. Returns the thread's part of the sum of grad * (source -
// target), the only use of target and source.
template <bool kFull, bool kNeedLam, class Target, class Source, class Grad>
MMK_DEVICE float chunk_gradients(const Grad* grad, const Target* target, const Source* source,
                                 Target* d_target, Source* d_source, int size, const float* lam) {
  constexpr int kWidth = kMergeWidth<Target, Source, Grad>;
  using Lanes = MergeLanes<kFull, kWidth>;
  constexpr int kCount = Lanes::kCount;
  float sum = 0.0f;
  Lanes::for_each(size, [&](int first) {
    Vec<Grad, kWidth> g[kCount];
    Vec<Target, kWidth> t[kCount];
    Vec<Source, kWidth> s[kCount];
    Lanes::load(g, grad, first, size);
    if constexpr (kNeedLam) {
      Lanes::load(t, target, first, size);
      Lanes::load(s, source, first, size);
    }
    // Load lam after the vectors, so that it does not delay them.
    const float weight = __ldg(lam);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Vec<float, kWidth> value = to_accumulator(g[i]);
      if (d_target != nullptr) Lanes::store(scaled(value, 1.0f - weight), d_target, first, i, size);
      if (d_source != nullptr) Lanes::store(scaled(value, weight), d_source, first, i, size);
      if constexpr (kNeedLam) {
        const Vec<float, kWidth> a = to_accumulator(t[i]), b = to_accumulator(s[i]);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += value[j] * (b[j] - a[j]);
      }
    }
  });
  return sum;
}

// With three blocks per multiprocessor 12 vectors of a thread fit its registers.
template <bool kNeedLam, class Target, class Source, class Grad>
__global__ void __launch_bounds__(kMergeThreads, 3)
    interpolate_gradients(const __grid_constant__ BackwardTable table, const float* lam, float* partial) {
  if constexpr (kNeedLam) grid_dependency_launch();
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int index = table.find(block);
  const BackwardPair& pair = table.pair[index];
  const int64_t chunk = block - table.first_block[index];
  const int64_t first = chunk * kMergeChunk;
  const Grad* grad = static_cast<const Grad*>(pair.grad) + first;
  const Target* target = at(static_cast<const Target*>(pair.target), first);
  const Source* source = at(static_cast<const Source*>(pair.source), first);
  Target* d_target = at(static_cast<Target*>(pair.d_target), first);
  Source* d_source = at(static_cast<Source*>(pair.d_source), first);
  float sum;
  if (is_full(pair, first)) {
    sum = chunk_gradients<true, kNeedLam>(grad, target, source, d_target, d_source,
                                          static_cast<int>(kMergeChunk), lam + pair.group);
  } else {
    const int size = static_cast<int>(min(pair.size - first, kMergeChunk));
    sum = chunk_gradients<false, kNeedLam>(grad, target, source, d_target, d_source, size, lam + pair.group);
  }
  if constexpr (kNeedLam) {
    sum = block_sum<kMergeThreads>(sum);
    if (threadIdx.x == 0) partial[pair.first_partial + chunk] = sum;
  }
}

// ---- second stage: a block adds the partial sums of a group in order

constexpr int kGroupTable = 256;  // groups of one launch

struct GroupTable {
  int64_t begin[kGroupTable + 1];
};

__global__ void __launch_bounds__(kMergeThreads)
    reduce_lam(const __grid_constant__ GroupTable table, const float* partial, float* d_lam) {
  grid_dependency_wait();
  const int64_t end = table.begin[blockIdx.x + 1];
  double sum = 0.0;
  for (int64_t i = table.begin[blockIdx.x] + threadIdx.x; i < end; i += kMergeThreads) sum += partial[i];
  sum = block_sum<kMergeThreads>(sum);
  if (threadIdx.x == 0) d_lam[blockIdx.x] = static_cast<float>(sum);
}

// `overlapping` if a kernel of this call was launched before.
cudaError_t reduce(const MergeBackward& args, bool overlapping, CudaStream stream) {
  const float* partial = static_cast<const float*>(args.partial);
  for (int64_t first = 0; first < args.groups; first += kGroupTable) {
    const int64_t groups = std::min<int64_t>(args.groups - first, kGroupTable);
    GroupTable table = {};
    std::copy_n(args.group_begin + first, groups + 1, table.begin);
    const dim3 grid(static_cast<unsigned>(groups)), block(kMergeThreads);
    float* d_lam = static_cast<float*>(args.d_lam) + first;
    // Only the first launch overlaps: this kernel does not call grid_dependency_launch().
    const cudaError_t error =
        overlapping && first == 0
            ? launch_overlapping(reduce_lam, grid, block, 0, stream, table, partial, d_lam)
            : launch(reduce_lam, grid, block, 0, stream, table, partial, d_lam);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <bool kNeedLam, class Target, class Source, class Grad>
cudaError_t gradients(const MergeBackward& args, bool* launched, CudaStream stream) {
  constexpr int kWidth = kMergeWidth<Target, Source, Grad>;
  const auto make = [&](int64_t k, BackwardPair* pair) {
    const MergePair& given = args.pairs[k];
    const MergeGradient& of = args.gradients[k];
    *pair = {of.grad,     given.target, given.source,     of.d_target,
             of.d_source, given.size,   of.first_partial, static_cast<int32_t>(given.group),
             false};
    pair->aligned = rows_aligned<Grad, kWidth>(of.grad) && rows_aligned<Target, kWidth>(given.target) &&
                    rows_aligned<Source, kWidth>(given.source) && rows_aligned<Target, kWidth>(of.d_target) &&
                    rows_aligned<Source, kWidth>(of.d_source);
    return kNeedLam || of.d_target != nullptr || of.d_source != nullptr;
  };
  return launch_tables<BackwardPair>(
      args.pairs, args.count, make, [&](const BackwardTable& table, dim3 blocks) {
        *launched = true;
        return launch(interpolate_gradients<kNeedLam, Target, Source, Grad>, blocks, dim3(kMergeThreads), 0,
                      stream, table, static_cast<const float*>(args.lam), static_cast<float*>(args.partial));
      });
}

}  // namespace

int merge_backward(const MergeBackward& args, CudaStream stream) {
  const bool need_lam = args.d_lam != nullptr;
  bool launched = false;
  const cudaError_t error = dispatch(args.types, [&](auto target, auto source, auto grad) {
    using Target = decltype(target);
    using Source = decltype(source);
    using Grad = decltype(grad);
    return need_lam ? gradients<true, Target, Source, Grad>(args, &launched, stream)
                    : gradients<false, Target, Source, Grad>(args, &launched, stream);
  });
  return error != cudaSuccess || !need_lam ? error : reduce(args, launched, stream);
}

}  // namespace mmk::cuda
