#include "cuda/merge.cuh"

namespace mmk::cuda {
namespace {

struct ForwardPair {
  const void* target;
  const void* source;
  void* out;
  int64_t size;
  int32_t group;
  bool aligned;
};
using ForwardTable = MergeTable<ForwardPair>;

// target + lam (source - target), computed from the nearer end, so that both ends are exact.
struct Blend {
  bool from_target;
  bool copies;  // at an end, where the other tensor may hold NaN or infinity
  float weight;

  MMK_DEVICE explicit Blend(float lam)
      : from_target(lam < 0.5f), copies(lam == 0.0f || lam == 1.0f), weight(from_target ? lam : lam - 1.0f) {}

  MMK_DEVICE float operator()(float target, float source) const {
    const float nearer = from_target ? target : source;
    return copies ? nearer : nearer + weight * (source - target);
  }
};

template <bool kFull, class Target, class Source, class Result>
MMK_DEVICE void interpolate_chunk(const Target* target, const Source* source, Result* out, int size,
                                  const float* lam) {
  constexpr int kWidth = kMergeWidth<Target, Source, Result>;
  using Lanes = MergeLanes<kFull, kWidth>;
  Lanes::for_each(size, [&](int first) {
    Vec<Target, kWidth> t[Lanes::kCount];
    Vec<Source, kWidth> s[Lanes::kCount];
    Lanes::load(t, target, first, size);
    Lanes::load(s, source, first, size);
    // Load lam after the vectors, so that it does not delay them.
    const Blend blend(__ldg(lam));
#pragma unroll
    for (int i = 0; i < Lanes::kCount; ++i) {
      const Vec<float, kWidth> a = to_accumulator(t[i]), b = to_accumulator(s[i]);
      Vec<float, kWidth> value;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) value[j] = blend(a[j], b[j]);
      Lanes::store(value, out, first, i, size);
    }
  });
}

template <class Target, class Source, class Result>
__global__ void __launch_bounds__(kMergeThreads, 4)
    interpolate(const __grid_constant__ ForwardTable table, const float* lam) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int index = table.find(block);
  const ForwardPair& pair = table.pair[index];
  const int64_t first = (block - table.first_block[index]) * kMergeChunk;
  const Target* target = static_cast<const Target*>(pair.target) + first;
  const Source* source = static_cast<const Source*>(pair.source) + first;
  Result* out = static_cast<Result*>(pair.out) + first;
  if (is_full(pair, first)) {
    interpolate_chunk<true>(target, source, out, static_cast<int>(kMergeChunk), lam + pair.group);
  } else {
    const int size = static_cast<int>(min(pair.size - first, kMergeChunk));
    interpolate_chunk<false>(target, source, out, size, lam + pair.group);
  }
}

}  // namespace

int merge_forward(const MergeForward& args, CudaStream stream) {
  return dispatch(args.types, [&](auto target_type, auto source_type, auto result_type) {
    using Target = decltype(target_type);
    using Source = decltype(source_type);
    using Result = decltype(result_type);
    constexpr int kWidth = kMergeWidth<Target, Source, Result>;
    const auto make = [&](int64_t k, ForwardPair* pair) {
      const MergePair& given = args.pairs[k];
      *pair = {given.target, given.source, args.out[k], given.size, static_cast<int32_t>(given.group), false};
      pair->aligned = rows_aligned<Target, kWidth>(pair->target) &&
                      rows_aligned<Source, kWidth>(pair->source) && rows_aligned<Result, kWidth>(pair->out);
      return true;
    };
    return launch_tables<ForwardPair>(
        args.pairs, args.count, make, [&](const ForwardTable& table, dim3 blocks) {
          return launch(interpolate<Target, Source, Result>, blocks, dim3(kMergeThreads), 0, stream, table,
                        static_cast<const float*>(args.lam));
        });
  });
}

}  // namespace mmk::cuda
