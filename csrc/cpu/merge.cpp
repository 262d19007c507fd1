#include "mmkernels/merge.h"

#include <algorithm>
#include <utility>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

// Part of a tensor: `size` elements from `first` on.
struct Range {
  int64_t first;
  int64_t size;
};

struct Input {
  DType type;
  const void* data;
};

struct Output {
  DType type;
  void* data;
  bool stream;  // stores bypass the caches
};

// Calls body(k, chunk) for every chunk of pair k that begins in [begin, end) of the elements of all pairs.
template <class Body>
MMK_INLINE void for_each_chunk(const MergePair* pairs, int64_t count, int64_t begin, int64_t end,
                               Body&& body) {
  const MergePair* after = std::upper_bound(
      pairs, pairs + count, begin, [](int64_t at, const MergePair& pair) { return at < pair.begin; });
  for (int64_t k = after == pairs ? 0 : after - pairs - 1; k < count && pairs[k].begin < end; ++k) {
    const MergePair& pair = pairs[k];
    int64_t first = merge_chunks(std::max<int64_t>(begin - pair.begin, 0)) * kMergeChunk;
    for (; first < pair.size && pair.begin + first < end; first += kMergeChunk) {
      body(k, Range{first, std::min(kMergeChunk, pair.size - first)});
    }
  }
}

// Calls body(A{}, B{}, C{}) with the element types, which merge_supports allows.
template <class Body>
MMK_INLINE void dispatch(MergeTypes types, Body&& body) {
  cpu::dispatch(types.target, [&](auto a) MMK_LAMBDA {
    cpu::dispatch(types.source, [&](auto b) MMK_LAMBDA {
      cpu::dispatch(types.result, [&](auto c) MMK_LAMBDA {
        constexpr MergeTypes kTypes = {type_of<decltype(a)>, type_of<decltype(b)>, type_of<decltype(c)>};
        if constexpr (merge_supports(kTypes)) body(a, b, c);
      });
    });
  });
}

// The same with two types.
template <class Body>
MMK_INLINE void dispatch(DType from, DType to, Body&& body) {
  cpu::dispatch(from, [&](auto a) MMK_LAMBDA {
    cpu::dispatch(to, [&](auto b) MMK_LAMBDA {
      constexpr MergeTypes kTypes = {type_of<decltype(a)>, type_of<decltype(b)>, type_of<decltype(b)>};
      if constexpr (merge_supports(kTypes)) body(a, b);
    });
  });
}

// Writes each(j), a vector of elements, or one(j), a single one, to all places of `out`.
template <class T, class Each, class One>
MMK_INLINE void write(T* out, bool stream, int64_t size, Each&& each, One&& one) {
  const auto rest = [&](int64_t j) MMK_LAMBDA { out[j] = round_to<T>(one(j)); };
  if (stream) {
    sweep<acc_t<T>>(size, [&](int64_t j) MMK_LAMBDA { store_streaming(out + j, each(j)); }, rest);
  } else {
    sweep<acc_t<T>>(size, [&](int64_t j) MMK_LAMBDA { store(out + j, each(j)); }, rest);
  }
}

// out = factor * from. With factor 1 an exact copy.
MMK_INLINE void scale(Input from, double factor, Output out, Range range) {
  dispatch(from.type, out.type, [&](auto from_element, auto out_element) MMK_LAMBDA {
    using T = decltype(out_element);
    const auto* x = at<decltype(from_element)>(from.data, range.first);
    const auto weight = static_cast<acc_t<T>>(factor);
    write(
        at<T>(out.data, range.first), out.stream, range.size,
        [&](int64_t j) MMK_LAMBDA { return weight * load(x + j); },
        [&](int64_t j) MMK_LAMBDA { return weight * convert(x[j]); });
  });
}

// out = near + weight * (far - near)
MMK_INLINE void blend(Input near, Input far, double weight_of_far, Output out, Range range) {
  const MergeTypes types = {near.type, far.type, out.type};
  dispatch(types, [&](auto near_element, auto far_element, auto out_element) MMK_LAMBDA {
    using T = decltype(out_element);
    using A = acc_t<T>;
    const auto* a = at<decltype(near_element)>(near.data, range.first);
    const auto* b = at<decltype(far_element)>(far.data, range.first);
    const A weight = static_cast<A>(weight_of_far);
    write(
        at<T>(out.data, range.first), out.stream, range.size,
        [&](int64_t j) MMK_LAMBDA {
          const vec_t<A> start = load(a + j);
          return start + weight * (load(b + j) - start);
        },
        [&](int64_t j) MMK_LAMBDA {
          const A start = convert(a[j]);
          return start + weight * (convert(b[j]) - start);
        });
  });
}

// sum of grad * (source - target)
MMK_INLINE double dot_difference(Input grad, Input target, Input source, Range range) {
  double sum = 0.0;
  const MergeTypes types = {target.type, source.type, grad.type};
  dispatch(types, [&](auto target_element, auto source_element, auto grad_element) MMK_LAMBDA {
    const auto* a = at<decltype(target_element)>(target.data, range.first);
    const auto* b = at<decltype(source_element)>(source.data, range.first);
    const auto* g = at<decltype(grad_element)>(grad.data, range.first);
    sum = sum_over<acc_t<decltype(grad_element)>>(
        range.size, [&](int64_t j) MMK_LAMBDA { return load(g + j) * (load(b + j) - load(a + j)); },
        [&](int64_t j) MMK_LAMBDA { return convert(g[j]) * (convert(b[j]) - convert(a[j])); });
  });
  return sum;
}

MMK_INLINE double lam_of(MergeTypes types, const void* lam, int64_t group) {
  if (types.result == DType::kFloat64) return static_cast<const double*>(lam)[group];
  return static_cast<const float*>(lam)[group];
}

// Results of calls with at least this many elements exceed the caches: stores bypass them.
constexpr int64_t kLeastStreamed = int64_t{1} << 20;

Output output(DType type, void* data, const MergePair* pairs, int64_t count) {
  const bool large = pairs[count - 1].begin + pairs[count - 1].size >= kLeastStreamed;
  return {type, data, large && reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

// Elements of grad that stay in the L1 cache while the gradients are computed one after the other. With few
// of them, reads and writes of memory overlap.
constexpr int64_t kTile = 256;

// Writes the gradients of one chunk and returns its part of d_lam.
MMK_INLINE double chunk_gradients(const MergeBackward& args, int64_t k, Range chunk) {
  const MergePair& pair = args.pairs[k];
  const MergeGradient& gradient = args.gradients[k];
  const MergeTypes& types = args.types;
  const double lam = lam_of(types, args.lam, pair.group);
  const Input grad = {types.result, gradient.grad};
  const Output d_target = output(types.target, gradient.d_target, args.pairs, args.count);
  const Output d_source = output(types.source, gradient.d_source, args.pairs, args.count);
  double sum = 0.0;
  for (int64_t done = 0; done < chunk.size; done += kTile) {
    const Range tile = {chunk.first + done, std::min(kTile, chunk.size - done)};
    if (args.d_lam != nullptr) {
      sum += dot_difference(grad, {types.target, pair.target}, {types.source, pair.source}, tile);
    }
    if (d_target.data != nullptr) scale(grad, 1 - lam, d_target, tile);
    if (d_source.data != nullptr) scale(grad, lam, d_source, tile);
  }
  return sum;
}

}  // namespace

MMK_MULTIARCH void merge_forward(const MergeForward& args, int64_t begin, int64_t end) {
  for_each_chunk(args.pairs, args.count, begin, end, [&](int64_t k, Range chunk) MMK_LAMBDA {
    const MergePair& pair = args.pairs[k];
    Input near = {args.types.target, pair.target}, far = {args.types.source, pair.source};
    Output out = output(args.types.result, args.out[k], args.pairs, args.count);
    if (out.data == near.data || out.data == far.data) out.stream = false;  // in place: it is cached
    double weight = lam_of(args.types, args.lam, pair.group);
    // Start from the nearer end, so that both ends are exact.
    if (!(weight < 0.5)) {
      std::swap(near, far);
      weight = 1 - weight;
    }
    // At an end the other tensor may hold NaN or infinity.
    if (weight == 0) {
      scale(near, 1.0, out, chunk);
    } else {
      blend(near, far, weight, out, chunk);
    }
  });
  finish_streaming();
}

MMK_MULTIARCH void merge_backward(const MergeBackward& args, int64_t begin, int64_t end) {
  for_each_chunk(args.pairs, args.count, begin, end, [&](int64_t k, Range chunk) MMK_LAMBDA {
    const double sum = chunk_gradients(args, k, chunk);
    if (args.d_lam == nullptr) return;
    const int64_t place = args.gradients[k].first_partial + chunk.first / kMergeChunk;
    if (args.types.result == DType::kFloat64) {
      static_cast<double*>(args.partial)[place] = sum;
    } else {
      static_cast<float*>(args.partial)[place] = static_cast<float>(sum);
    }
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
