#include "mmkernels/merge.h"

#include <algorithm>
#include <cstring>
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

template <class From, class To>
MMK_INLINE void copy(const From* from, To* to, int64_t size) {
  using A = acc_t<To>;
  if constexpr (std::is_same_v<From, To>) {
    if (from != to) std::memcpy(to, from, static_cast<size_t>(size) * sizeof(To));
  } else {
    sweep<A>(
        size, [&](int64_t j) MMK_LAMBDA { store(to + j, load(from + j)); },
        [&](int64_t j) MMK_LAMBDA { to[j] = round_to<To>(convert(from[j])); });
  }
}

// out = near + weight * (far - near). With weight 0 a copy, whatever `far` holds.
template <class Near, class Far, class Result>
MMK_INLINE void blend(const Near* near, const Far* far, acc_t<Result> weight, Result* out, int64_t size) {
  using A = acc_t<Result>;
  if (weight == 0) return copy(near, out, size);
  sweep<A>(
      size,
      [&](int64_t j) MMK_LAMBDA {
        const vec_t<A> start = load(near + j);
        store(out + j, start + weight * (load(far + j) - start));
      },
      [&](int64_t j) MMK_LAMBDA {
        const A start = convert(near[j]);
        out[j] = round_to<Result>(start + weight * (convert(far[j]) - start));
      });
}

// to = factor * grad
template <class From, class To>
MMK_INLINE void scale(const From* grad, acc_t<To> factor, To* to, int64_t size) {
  using A = acc_t<To>;
  sweep<A>(
      size, [&](int64_t j) MMK_LAMBDA { store(to + j, factor * load(grad + j)); },
      [&](int64_t j) MMK_LAMBDA { to[j] = round_to<To>(factor * convert(grad[j])); });
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

// Elements of grad that stay in the L1 cache while the gradients are computed one after the other.
constexpr int64_t kTile = 1024;

// Writes the gradients of one chunk and returns its part of d_lam.
template <class Target, class Source, class Grad>
MMK_INLINE double chunk_gradients(const MergePair& pair, const MergeGradient& gradient, acc_t<Grad> lam,
                                  bool need_lam, int64_t first, int64_t size) {
  double sum = 0.0;
  for (int64_t end = first + size; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    const Grad* grad = at<Grad>(gradient.grad, first);
    if (need_lam) {
      sum += dot_difference(grad, at<Target>(pair.target, first), at<Source>(pair.source, first), count);
    }
    if (Target* d_target = at<Target>(gradient.d_target, first)) scale(grad, 1 - lam, d_target, count);
    if (Source* d_source = at<Source>(gradient.d_source, first)) scale(grad, lam, d_source, count);
  }
  return sum;
}

}  // namespace

MMK_MULTIARCH void merge_forward(const MergeForward& args, int64_t begin, int64_t end) {
  dispatch(args.types, [&](auto target_element, auto source_element, auto result_element) MMK_LAMBDA {
    using Target = decltype(target_element);
    using Source = decltype(source_element);
    using Result = decltype(result_element);
    using A = acc_t<Result>;
    for_each_chunk(args.pairs, args.count, begin, end,
                   [&](int64_t k, int64_t first, int64_t size) MMK_LAMBDA {
                     const MergePair& pair = args.pairs[k];
                     const Target* target = at<Target>(pair.target, first);
                     const Source* source = at<Source>(pair.source, first);
                     Result* out = at<Result>(args.out[k], first);
                     const A lam = static_cast<const A*>(args.lam)[pair.group];
                     // From the nearer end, so that both ends are exact.
                     if (lam < A(0.5)) {
                       blend(target, source, lam, out, size);
                     } else {
                       blend(source, target, 1 - lam, out, size);
                     }
                   });
  });
}

MMK_MULTIARCH void merge_backward(const MergeBackward& args, int64_t begin, int64_t end) {
  dispatch(args.types, [&](auto target_element, auto source_element, auto grad_element) MMK_LAMBDA {
    using Grad = decltype(grad_element);
    using A = acc_t<Grad>;
    for_each_chunk(
        args.pairs, args.count, begin, end, [&](int64_t k, int64_t first, int64_t size) MMK_LAMBDA {
          const A lam = static_cast<const A*>(args.lam)[args.pairs[k].group];
          const bool need_lam = args.d_lam != nullptr;
          const double sum = chunk_gradients<decltype(target_element), decltype(source_element), Grad>(
              args.pairs[k], args.gradients[k], lam, need_lam, first, size);
          if (need_lam) {
            static_cast<A*>(args.partial)[args.gradients[k].first_partial + first / kMergeChunk] =
                static_cast<A>(sum);
          }
        });
  });
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
