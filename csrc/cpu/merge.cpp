#include "mmkernels/merge.h"

#include <algorithm>
#include <type_traits>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

// Calls body(pair, first, size) for every chunk that begins in [begin, end) of the elements of all pairs.
template <class Body>
MMK_INLINE void for_each_chunk(const MergePair* pairs, int64_t count, int64_t begin, int64_t end,
                               Body&& body) {
  const MergePair* after = std::upper_bound(
      pairs, pairs + count, begin, [](int64_t at, const MergePair& pair) { return at < pair.begin; });
  for (int64_t k = after == pairs ? 0 : after - pairs - 1; k < count && pairs[k].begin < end; ++k) {
    const MergePair& pair = pairs[k];
    int64_t first = merge_chunks(std::max<int64_t>(begin - pair.begin, 0)) * kMergeChunk;
    for (; first < pair.size && pair.begin + first < end; first += kMergeChunk) {
      body(k, first, std::min(kMergeChunk, pair.size - first));
    }
  }
}

// Calls body(Target{}, Source{}, Result{}) with the element types.
template <class Body>
MMK_INLINE void dispatch(MergeTypes types, Body&& body) {
  cpu::dispatch(types.target, [&](auto target) MMK_LAMBDA {
    cpu::dispatch(types.source, [&](auto source) MMK_LAMBDA {
      cpu::dispatch(types.result, [&](auto result) MMK_LAMBDA {
        constexpr MergeTypes kTypes = {type_of<decltype(target)>, type_of<decltype(source)>,
                                       type_of<decltype(result)>};
        if constexpr (merge_supports(kTypes)) body(target, source, result);
      });
    });
  });
}

MMK_INLINE double lam_of(MergeTypes types, const void* lam, int64_t group) {
  return types.result == DType::kFloat64 ? static_cast<const double*>(lam)[group]
                                         : static_cast<const float*>(lam)[group];
}

// As sweep, for the elements of `out`: each(j) gives a vector of them and one(j) a single one.
template <bool kStream, class Out, class Each, class One>
MMK_INLINE void write(Out* out, int64_t size, Each&& each, One&& one) {
  sweep<acc_t<Out>>(
      size,
      [&](int64_t j) MMK_LAMBDA {
        if constexpr (kStream) {
          store_streaming(out + j, each(j));
        } else {
          store(out + j, each(j));
        }
      },
      [&](int64_t j) MMK_LAMBDA { out[j] = round_to<Out>(one(j)); });
}

// out = near + weight * (far - near). With weight 0 a copy, also where `far` is not finite.
template <bool kStream, class Near, class Far, class Out>
MMK_INLINE void blend(const Near* near, const Far* far, acc_t<Out> weight, Out* out, int64_t size) {
  if (weight == 0) {
    write<kStream>(
        out, size, [&](int64_t j) MMK_LAMBDA { return load(near + j); },
        [&](int64_t j) MMK_LAMBDA { return convert(near[j]); });
    return;
  }
  write<kStream>(
      out, size,
      [&](int64_t j) MMK_LAMBDA {
        const vec_t<acc_t<Out>> start = load(near + j);
        return start + weight * (load(far + j) - start);
      },
      [&](int64_t j) MMK_LAMBDA {
        const acc_t<Out> start = convert(near[j]);
        return start + weight * (convert(far[j]) - start);
      });
}

// out = factor * grad
template <bool kStream, class Grad, class Out>
MMK_INLINE void scale(const Grad* grad, acc_t<Out> factor, Out* out, int64_t size) {
  write<kStream>(
      out, size, [&](int64_t j) MMK_LAMBDA { return factor * load(grad + j); },
      [&](int64_t j) MMK_LAMBDA { return factor * convert(grad[j]); });
}

// sum of grad * (source - target)
template <class Target, class Source, class Grad>
MMK_INLINE acc_t<Grad> dot_difference(const Grad* grad, const Target* target, const Source* source,
                                      int64_t size) {
  using A = acc_t<Grad>;
  return sum_over<A>(
      size, [&](int64_t j) MMK_LAMBDA { return load(grad + j) * (load(source + j) - load(target + j)); },
      [&](int64_t j) MMK_LAMBDA { return convert(grad[j]) * (convert(source[j]) - convert(target[j])); });
}

// Elements of grad that stay in the L1 cache while the gradients are computed one after the other. With few
// of them, reads and writes of memory overlap.
constexpr int64_t kTile = 256;

// Writes the gradients of one chunk and returns its part of d_lam.
template <bool kStream, class Target, class Source, class Grad>
MMK_INLINE double chunk_gradients(const MergePair& pair, const MergeGradient& gradient, acc_t<Grad> lam,
                                  bool need_lam, int64_t first, int64_t size) {
  double sum = 0.0;
  for (const int64_t end = first + size; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    const Grad* grad = at<Grad>(gradient.grad, first);
    if (need_lam) {
      sum += dot_difference(grad, at<Target>(pair.target, first), at<Source>(pair.source, first), count);
    }
    if (Target* out = at<Target>(gradient.d_target, first)) scale<kStream>(grad, 1 - lam, out, count);
    if (Source* out = at<Source>(gradient.d_source, first)) scale<kStream>(grad, lam, out, count);
  }
  return sum;
}

// Results of calls of this many elements do not stay in the caches: they are written around them.
constexpr int64_t kLeastStreamed = int64_t{1} << 20;

bool is_large(const MergePair* pairs, int64_t count) {
  return count > 0 && pairs[count - 1].begin + pairs[count - 1].size >= kLeastStreamed;
}

bool can_stream(const void* out) {
  return reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

template <class Body>
MMK_INLINE void choose(bool condition, Body&& body) {
  if (condition) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

}  // namespace

MMK_MULTIARCH void merge_forward(const MergeForward& args, int64_t begin, int64_t end) {
  const bool large = is_large(args.pairs, args.count);
  for_each_chunk(args.pairs, args.count, begin, end, [&](int64_t k, int64_t first, int64_t size) MMK_LAMBDA {
    const MergePair& pair = args.pairs[k];
    const bool in_place = args.out[k] == pair.target || args.out[k] == pair.source;
    const bool stream = large && !in_place && can_stream(args.out[k]);
    // From the nearer end, so that both ends are exact.
    const double lam = lam_of(args.types, args.lam, pair.group);
    const bool near_target = lam < 0.5;
    const MergeTypes types =
        near_target ? args.types : MergeTypes{args.types.source, args.types.target, args.types.result};
    dispatch(types, [&](auto near, auto far, auto result) MMK_LAMBDA {
      using Result = decltype(result);
      using A = acc_t<Result>;
      const A weight = near_target ? static_cast<A>(lam) : 1 - static_cast<A>(lam);
      choose(stream, [&](auto streams) MMK_LAMBDA {
        blend<decltype(streams)::value>(at<decltype(near)>(near_target ? pair.target : pair.source, first),
                                        at<decltype(far)>(near_target ? pair.source : pair.target, first),
                                        weight, at<Result>(args.out[k], first), size);
      });
    });
  });
  finish_streaming();
}

MMK_MULTIARCH void merge_backward(const MergeBackward& args, int64_t begin, int64_t end) {
  const bool large = is_large(args.pairs, args.count);
  const bool need_lam = args.d_lam != nullptr;
  for_each_chunk(args.pairs, args.count, begin, end, [&](int64_t k, int64_t first, int64_t size) MMK_LAMBDA {
    const MergePair& pair = args.pairs[k];
    const MergeGradient& gradient = args.gradients[k];
    const bool stream = large && can_stream(gradient.d_target) && can_stream(gradient.d_source);
    dispatch(args.types, [&](auto target, auto source, auto grad) MMK_LAMBDA {
      using A = acc_t<decltype(grad)>;
      const A lam = static_cast<const A*>(args.lam)[pair.group];
      choose(stream, [&](auto streams) MMK_LAMBDA {
        const double sum =
            chunk_gradients<decltype(streams)::value, decltype(target), decltype(source), decltype(grad)>(
                pair, gradient, lam, need_lam, first, size);
        if (!need_lam) return;
        static_cast<A*>(args.partial)[gradient.first_partial + first / kMergeChunk] = static_cast<A>(sum);
      });
    });
  });
  finish_streaming();
}

void merge_reduce(const MergeBackward& args) {
  dispatch_wide(args.types.result, [&](auto element) {
    using A = decltype(element);
    for (int64_t g = 0; g < args.groups; ++g) {
      double sum = 0.0;
      for (int64_t i = args.group_begin[g]; i < args.group_begin[g + 1]; ++i) {
        sum += static_cast<const A*>(args.partial)[i];
      }
      static_cast<A*>(args.d_lam)[g] = static_cast<A>(sum);
    }
  });
}

}  // namespace mmk::cpu
