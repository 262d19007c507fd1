#include "mmkernels/layer_mix.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

struct Row {
  int64_t batch;
  int64_t frame;
  bool valid;
};

MMK_INLINE Row locate(const LayerMixParams& p, int64_t row) {
  const int64_t batch = row / p.frames;
  const int64_t frame = row - batch * p.frames;
  return {batch, frame, p.lengths == nullptr || frame < p.lengths[batch]};
}

template <class T>
MMK_INLINE const T* layer_row(const LayerMixParams& p, int layer, Row row) {
  return static_cast<const T*>(p.layer[layer]) + row.batch * p.batch_stride[layer] +
         row.frame * p.frame_stride[layer];
}

// Rows of a few layers that are worked on together, so that what they share is loaded and stored once.
constexpr int kGroup = 4;

template <class T>
struct Group {
  const T* x[kGroup];
  acc_t<T> mean[kGroup];
  acc_t<T> scale[kGroup];  // what x - mean is multiplied by
  const acc_t<T>* gain[kGroup];
  const T* next[kGroup];  // the layer's row that will be read after x
};

// acc[j] += sum_i scale_i * gain_i[j] * (x_i[j] - mean_i)
template <class T, int N, bool kGain>
MMK_INLINE void add_group(acc_t<T>* acc, const Group<T>& group, int64_t width) {
  using A = acc_t<T>;
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        vec_t<A> sum = load(acc + j);
        for (int i = 0; i < N; ++i) {
          // The moments have asked for it already; asking again, where little else is going on, measures
          // faster.
          prefetch(group.next[i] + j);
          vec_t<A> x = load(group.x[i] + j) - group.mean[i];
          if constexpr (kGain) x *= load(group.gain[i] + j);
          sum += group.scale[i] * x;
        }
        store(acc + j, sum);
      },
      [&](int64_t j) MMK_LAMBDA {
        A sum = acc[j];
        for (int i = 0; i < N; ++i) {
          A x = convert(group.x[i][j]) - group.mean[i];
          if constexpr (kGain) x *= group.gain[i][j];
          sum += group.scale[i] * x;
        }
        acc[j] = sum;
      });
}

// dots[i] = sum_j g[j] * gain_i[j] * (x_i[j] - mean_i)
template <class T, int N, bool kNorm, bool kGain>
MMK_INLINE void dot_group(acc_t<T>* dots, const acc_t<T>* g, const Group<T>& group, int64_t width) {
  using A = acc_t<T>;
  vec_t<A> sums[N] = {};
  A rests[N] = {};
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        const vec_t<A> gradient = load(g + j);
        for (int i = 0; i < N; ++i) {
          prefetch(group.next[i] + j);
          vec_t<A> x = load(group.x[i] + j);
          if constexpr (kNorm) x -= group.mean[i];
          if constexpr (kGain) x *= load(group.gain[i] + j);
          sums[i] += gradient * x;
        }
      },
      [&](int64_t j) MMK_LAMBDA {
        for (int i = 0; i < N; ++i) {
          A x = convert(group.x[i][j]);
          if constexpr (kNorm) x -= group.mean[i];
          if constexpr (kGain) x *= group.gain[i][j];
          rests[i] += g[j] * x;
        }
      });
  for (int i = 0; i < N; ++i) dots[i] = sum_lanes<A>(sums[i]) + rests[i];
}

// Layers from `first` on that are worked on together: a whole group, or one.
MMK_INLINE int group_size(int layers, int first) {
  return layers - first >= kGroup ? kGroup : 1;
}

// Calls body(count, norm, gain) with integral constants, for the size of a group and the form of the op.
template <class Body>
MMK_INLINE void dispatch_group(int count, bool norm, bool gain, Body&& body) {
  const auto with_count = [&](auto size) MMK_LAMBDA {
    if (gain) return body(size, std::true_type{}, std::true_type{});
    if (norm) return body(size, std::true_type{}, std::false_type{});
    return body(size, std::false_type{}, std::false_type{});
  };
  if (count == kGroup) return with_count(std::integral_constant<int, kGroup>{});
  return with_count(std::integral_constant<int, 1>{});
}

template <class A>
MMK_INLINE const A* parameter_row(const void* parameter, int64_t layer, int64_t width) {
  return parameter == nullptr ? nullptr : static_cast<const A*>(parameter) + layer * width;
}

template <class T>
MMK_INLINE void write_row(T* out, const acc_t<T>* acc, int64_t width) {
  using A = acc_t<T>;
  sweep<A>(
      width, [&](int64_t j) MMK_LAMBDA { store(out + j, load(acc + j)); },
      [&](int64_t j) MMK_LAMBDA { out[j] = round_to<T>(acc[j]); });
}

// sum_l weights[l] * norm_bias[l]: the same for every row.
template <class A>
MMK_INLINE void mix_bias(const LayerMixParams& p, A* bias) {
  const A* weights = static_cast<const A*>(p.weights);
  const A* norm_bias = static_cast<const A*>(p.norm_bias);
  std::fill(bias, bias + p.width, A(0));
  if (norm_bias == nullptr) return;
  for (int l = 0; l < p.layers; ++l) {
    for (int64_t j = 0; j < p.width; ++j) bias[j] += weights[l] * norm_bias[l * p.width + j];
  }
}

// Layers whose rows are read side by side. Rows of more would fall into the same sets of the first-level
// cache, where the width is a multiple of the page size, and push each other out.
constexpr int kSideBySide = 16;

// Without norm: many layers of a few columns at once, with the sums in registers. Rows that follow each other
// in memory come in time without being asked for.
template <class T>
MMK_INLINE void add_side_by_side(acc_t<T>* acc, const T* const* x, const acc_t<T>* weights, int layers,
                                 int64_t width, bool first) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 4 * kLanes<A>;
  int64_t j = 0;
  for (; j + kStep <= width; j += kStep) {
    vec_t<A> sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    if (!first) {
      sum0 = load(acc + j);
      sum1 = load(acc + j + kLanes<A>);
      sum2 = load(acc + j + 2 * kLanes<A>);
      sum3 = load(acc + j + 3 * kLanes<A>);
    }
    for (int l = 0; l < layers; ++l) {
      sum0 += weights[l] * load(x[l] + j);
      sum1 += weights[l] * load(x[l] + j + kLanes<A>);
      sum2 += weights[l] * load(x[l] + j + 2 * kLanes<A>);
      sum3 += weights[l] * load(x[l] + j + 3 * kLanes<A>);
    }
    store(acc + j, sum0);
    store(acc + j + kLanes<A>, sum1);
    store(acc + j + 2 * kLanes<A>, sum2);
    store(acc + j + 3 * kLanes<A>, sum3);
  }
  for (; j < width; ++j) {
    A sum = first ? A(0) : acc[j];
    for (int l = 0; l < layers; ++l) sum += weights[l] * convert(x[l][j]);
    acc[j] = sum;
  }
}

template <class T>
MMK_INLINE void forward_plain_row(const LayerMixParams& p, Row row, acc_t<T>* acc) {
  const acc_t<T>* weights = static_cast<const acc_t<T>*>(p.weights);
  const int passes = (p.layers + kSideBySide - 1) / kSideBySide;
  const int layers_of_pass = (p.layers + passes - 1) / passes;
  for (int first = 0; first < p.layers; first += layers_of_pass) {
    const int count = std::min(layers_of_pass, p.layers - first);
    const T* x[kSideBySide];
    for (int i = 0; i < count; ++i) x[i] = layer_row<T>(p, first + i, row);
    add_side_by_side<T>(acc, x, weights + first, count, p.width, first == 0);
  }
}

template <class T>
MMK_INLINE void forward_norm_row(const LayerMixParams& p, Row row, Row next, const acc_t<T>* bias,
                                 acc_t<T>* acc, acc_t<T>* stats) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(p.weights);
  std::copy(bias, bias + p.width, acc);
  for (int first = 0, count; first < p.layers; first += count) {
    count = group_size(p.layers, first);
    Group<T> group;
    for (int i = 0; i < count; ++i) {
      const int l = first + i;
      group.x[i] = layer_row<T>(p, l, row);
      group.next[i] = next.valid ? layer_row<T>(p, l, next) : group.x[i];
      const Moments<A> m = moments(group.x[i], group.next[i], p.width, p.eps);
      group.mean[i] = m.mean;
      group.scale[i] = weights[l] * m.rstd;
      group.gain[i] = parameter_row<A>(p.norm_weight, l, p.width);
      if (stats != nullptr) {
        stats[2 * l] = m.mean;
        stats[2 * l + 1] = m.rstd;
      }
    }
    dispatch_group(count, true, p.norm_weight != nullptr, [&](auto size, auto, auto gain) MMK_LAMBDA {
      add_group<T, size.value, gain.value>(acc, group, p.width);
    });
  }
}

template <class T>
MMK_INLINE void forward_rows(const LayerMixForward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  std::vector<A> scratch(2 * p.width);
  A* bias = scratch.data();
  A* row_sum = bias + p.width;
  if (p.norm) mix_bias(p, bias);
  for (int64_t r = begin; r < end; ++r) {
    const Row row = locate(p, r);
    T* out = static_cast<T*>(args.out) + r * p.width;
    A* stats = args.stats == nullptr ? nullptr : static_cast<A*>(args.stats) + r * 2 * p.layers;
    if (!row.valid) {
      std::fill(out, out + p.width, T{});
      if (stats != nullptr) std::fill(stats, stats + 2 * p.layers, A(0));
      continue;
    }
    const Row next = r + 1 < end ? locate(p, r + 1) : Row{0, 0, false};
    // Where element and accumulator are one type, the output row itself accumulates.
    A* acc = row_sum;
    if constexpr (std::is_same_v<T, A>) acc = out;
    if (p.norm) {
      forward_norm_row<T>(p, row, next, bias, acc, stats);
    } else {
      forward_plain_row<T>(p, row, acc);
    }
    if constexpr (!std::is_same_v<T, A>) write_row(out, acc, p.width);
  }
}

// scale_sum[j] += g[j] * (x[j] - mean) * rstd: the gradient of the LayerNorm gain, before the layer's weight.
template <class T>
MMK_INLINE void add_scale_gradient(acc_t<T>* scale_sum, const acc_t<T>* g, const T* x, Moments<acc_t<T>> m,
                                   int64_t width) {
  using A = acc_t<T>;
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        store(scale_sum + j, load(scale_sum + j) + load(g + j) * ((load(x + j) - m.mean) * m.rstd));
      },
      [&](int64_t j) MMK_LAMBDA { scale_sum[j] += g[j] * ((convert(x[j]) - m.mean) * m.rstd); });
}

// dx = weight * rstd * (g' - mean(g') - xhat * mean(g' xhat)), g' = g * gain; without norm dx = weight * g.
template <class T>
MMK_INLINE void write_layer_gradient(T* dx, const acc_t<T>* g, const T* x, bool norm, Moments<acc_t<T>> m,
                                     acc_t<T> weight, acc_t<T> plain_dot, const acc_t<T>* gain,
                                     int64_t width) {
  using A = acc_t<T>;
  if (!norm) {
    sweep<A>(
        width, [&](int64_t j) MMK_LAMBDA { store(dx + j, weight * load(g + j)); },
        [&](int64_t j) MMK_LAMBDA { dx[j] = round_to<T>(weight * g[j]); });
    return;
  }
  const A scale = weight * m.rstd;
  const A mean_gradient = (gain == nullptr ? sum(g, width) : dot(g, gain, width)) / static_cast<A>(width);
  const A slope = plain_dot * m.rstd * m.rstd / static_cast<A>(width);
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        vec_t<A> scaled = load(g + j);
        if (gain != nullptr) scaled *= load(gain + j);
        store(dx + j, scale * (scaled - mean_gradient - slope * (load(x + j) - m.mean)));
      },
      [&](int64_t j) MMK_LAMBDA {
        const A scaled = gain == nullptr ? g[j] : g[j] * gain[j];
        dx[j] = round_to<T>(scale * (scaled - mean_gradient - slope * (convert(x[j]) - m.mean)));
      });
}

template <class T>
MMK_INLINE void zero_padding_gradients(const LayerMixBackward& args, int64_t r) {
  const int64_t width = args.mix.width;
  for (int l = 0; l < args.mix.layers; ++l) {
    T* dx = static_cast<T*>(args.d_layer[l]);
    if (dx != nullptr) std::fill(dx + r * width, dx + (r + 1) * width, T{});
  }
}

// Sums over the rows of one chunk.
template <class T>
struct ChunkSums {
  double* dot;  // [layers]         grad . gain * normalised layer; in double, for a chunk may hold thousands
                // of rows
  acc_t<T>* scale;     // [layers, width]  grad * normalised layer, or null
  acc_t<T>* gradient;  // [width]          grad, or null
};

template <class T>
MMK_INLINE void backward_row(const LayerMixBackward& args, int64_t r, Row row, Row next, const acc_t<T>* g,
                             const ChunkSums<T>& sums) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  const A* weights = static_cast<const A*>(p.weights);
  const A* stats = static_cast<const A*>(args.stats);
  const bool reads_layers = args.need_weights || p.norm;
  for (int first = 0, count; first < p.layers; first += count) {
    count = group_size(p.layers, first);
    Group<T> group = {};
    Moments<A> m[kGroup];
    bool any_gradient = false;
    for (int i = 0; i < count; ++i) {
      const int l = first + i;
      m[i] = {0, 1};
      if (p.norm) m[i] = {stats[(r * p.layers + l) * 2], stats[(r * p.layers + l) * 2 + 1]};
      group.mean[i] = m[i].mean;
      group.gain[i] = parameter_row<A>(p.norm_weight, l, p.width);
      any_gradient |= args.d_layer[l] != nullptr;
      if (!reads_layers) continue;
      group.x[i] = layer_row<T>(p, l, row);
      group.next[i] = next.valid ? layer_row<T>(p, l, next) : group.x[i];
    }
    A dots[kGroup] = {};
    // With the sums for the gain at hand, those for the weights follow from them at the end of the chunk.
    if ((args.need_weights && sums.scale == nullptr) || (p.norm && any_gradient)) {
      dispatch_group(count, p.norm, p.norm_weight != nullptr,
                     [&](auto size, auto norm, auto gain) MMK_LAMBDA {
                       dot_group<T, size.value, norm.value, gain.value>(dots, g, group, p.width);
                     });
    }
    for (int i = 0; i < count; ++i) {
      const int l = first + i;
      sums.dot[l] += static_cast<double>(dots[i] * m[i].rstd);
      if (sums.scale != nullptr) add_scale_gradient(sums.scale + l * p.width, g, group.x[i], m[i], p.width);
      T* dx = static_cast<T*>(args.d_layer[l]);
      if (dx != nullptr) {
        write_layer_gradient(dx + r * p.width, g, group.x[i], p.norm, m[i], weights[l], dots[i],
                             group.gain[i], p.width);
      }
    }
  }
  if (sums.gradient != nullptr) {
    for (int64_t j = 0; j < p.width; ++j) sums.gradient[j] += g[j];
  }
}

// The chunk's part of d_weights: what the rows gave, or what the sums for gain and shift imply.
template <class T>
MMK_INLINE void write_dots(const LayerMixBackward& args, int64_t chunk, const ChunkSums<T>& sums) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  A* partial = static_cast<A*>(args.partial_dot) + chunk * p.layers;
  for (int l = 0; l < p.layers; ++l) {
    const A* gain = parameter_row<A>(p.norm_weight, l, p.width);
    const A* shift = parameter_row<A>(p.norm_bias, l, p.width);
    A total = static_cast<A>(sums.dot[l]);
    if (sums.scale != nullptr) {
      const A* scale = sums.scale + l * p.width;
      total = gain == nullptr ? sum(scale, p.width) : dot(scale, gain, p.width);
    }
    if (shift != nullptr) total += dot(sums.gradient, shift, p.width);
    partial[l] = total;
  }
}

template <class T>
MMK_INLINE void backward_chunk(const LayerMixBackward& args, int64_t chunk, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  const int64_t rows = p.batch * p.frames;
  const LayerMixChunks chunks = layer_mix_chunks(rows, args.need_affine);
  A* wide_gradient = scratch;
  double dot_sums[kLayerMixMaxLayers] = {};
  ChunkSums<T> sums = {dot_sums, nullptr, nullptr};
  if (p.norm_bias != nullptr && args.need_weights) sums.gradient = scratch + p.width;
  if (args.need_affine) {
    sums.scale = static_cast<A*>(args.partial_scale) + chunk * p.layers * p.width;
    sums.gradient = static_cast<A*>(args.partial_shift) + chunk * p.width;
    std::fill(sums.scale, sums.scale + p.layers * p.width, A(0));
  }
  if (sums.gradient != nullptr) std::fill(sums.gradient, sums.gradient + p.width, A(0));
  const int64_t begin = chunk * chunks.rows_per_chunk;
  const int64_t end = std::min(rows, begin + chunks.rows_per_chunk);
  for (int64_t r = begin; r < end; ++r) {
    const Row row = locate(p, r);
    if (!row.valid) {
      zero_padding_gradients<T>(args, r);
      continue;
    }
    const Row next = r + 1 < end ? locate(p, r + 1) : Row{0, 0, false};
    const T* grad = static_cast<const T*>(args.grad) + row.batch * args.grad_batch_stride +
                    row.frame * args.grad_frame_stride;
    const A* g;
    if constexpr (std::is_same_v<T, A>) {
      g = grad;
    } else {
      sweep<A>(
          p.width, [&](int64_t j) MMK_LAMBDA { store(wide_gradient + j, load(grad + j)); },
          [&](int64_t j) MMK_LAMBDA { wide_gradient[j] = convert(grad[j]); });
      g = wide_gradient;
    }
    backward_row<T>(args, r, row, next, g, sums);
  }
  if (args.need_weights) write_dots<T>(args, chunk, sums);
}

template <class A>
void reduce(const LayerMixBackward& args) {
  const LayerMixParams& p = args.mix;
  const int64_t chunks = layer_mix_chunks(p.batch * p.frames, args.need_affine).chunks;
  const A* weights = static_cast<const A*>(p.weights);
  if (args.need_weights) {
    for (int l = 0; l < p.layers; ++l) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += static_cast<const A*>(args.partial_dot)[c * p.layers + l];
      static_cast<A*>(args.d_weights)[l] = static_cast<A>(sum);
    }
  }
  if (!args.need_affine) return;
  std::vector<double> shift(p.width, 0.0);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t j = 0; j < p.width; ++j)
      shift[j] += static_cast<const A*>(args.partial_shift)[c * p.width + j];
  }
  for (int64_t i = 0; i < p.layers * p.width; ++i) {
    double scale = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      scale += static_cast<const A*>(args.partial_scale)[c * p.layers * p.width + i];
    }
    const A weight = weights[i / p.width];
    static_cast<A*>(args.d_norm_weight)[i] = static_cast<A>(weight * scale);
    static_cast<A*>(args.d_norm_bias)[i] = static_cast<A>(weight * shift[i % p.width]);
  }
}

}  // namespace

MMK_MULTIARCH void layer_mix_forward(const LayerMixForward& args, int64_t begin, int64_t end) {
  dispatch(args.mix.dtype,
           [&](auto element) MMK_LAMBDA { forward_rows<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void layer_mix_backward(const LayerMixBackward& args, int64_t begin, int64_t end) {
  dispatch(args.mix.dtype, [&](auto element) MMK_LAMBDA {
    using T = decltype(element);
    std::vector<acc_t<T>> scratch(2 * args.mix.width);
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<T>(args, chunk, scratch.data());
  });
}

void layer_mix_reduce(const LayerMixBackward& args) {
  if (args.mix.dtype == DType::kFloat64) {
    reduce<double>(args);
  } else {
    reduce<float>(args);
  }
}

}  // namespace mmk::cpu
