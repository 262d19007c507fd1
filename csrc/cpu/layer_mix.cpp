#include "mmkernels/layer_mix.h"

#include <algorithm>
#include <type_traits>
#include <utility>
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

// sum_l weights[l] * norm_bias[l], the same for every row.
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

// The most layers read in parallel, each a stream that the hardware prefetcher follows. With more, rows whose
// width is a multiple of the page size would map to the same sets of the L1 cache and evict each other.
constexpr int kSideBySide = 16;
// Vectors of each layer's row that one step takes.
constexpr int kStep = 4;
// Prefetch distance in bytes.
constexpr int64_t kAhead = 1536;

// Adds a few layers to the sum of one row: acc[j] = start[j] + sum_l scale_l * gain_l[j] * (x_l[j] - mean_l).
template <class T>
struct Summed {
  acc_t<T>* acc;
  const acc_t<T>* start;  // null for zeros
  const T* x[kSideBySide];
  acc_t<T> mean[kSideBySide];
  acc_t<T> scale[kSideBySide];
  const acc_t<T>* gain[kSideBySide];
};

// Sums of x - shift and of its square over one row of a few layers. With a shift near the mean, one pass
// gives mean and variance.
template <class T>
struct Measured {
  const T* x[kSideBySide];
  acc_t<T> shift[kSideBySide];
  vec_t<acc_t<T>> sum[kSideBySide];
  vec_t<acc_t<T>> square[kSideBySide];
};

// Takes N vectors from column j on. With norm it sums one row and measures the next in the same loop, so that
// the arithmetic of one hides behind the loads of the other.
template <class T, int N, bool kNorm, bool kGain>
MMK_INLINE void step_side_by_side(const Summed<T>& row, Measured<T>& next, int layers, int64_t j) {
  using A = acc_t<T>;
  constexpr int64_t kWide = kLanes<A>;
  vec_t<A> acc[N] = {};
  if (row.start != nullptr) {
    for (int v = 0; v < N; ++v) acc[v] = load(row.start + j + v * kWide);
  }
  for (int l = 0; l < layers; ++l) {
    for (int v = 0; v < N; ++v) {
      vec_t<A> x = load(row.x[l] + j + v * kWide);
      if constexpr (kNorm) x -= row.mean[l];
      if constexpr (kGain) x *= load(row.gain[l] + j + v * kWide);
      acc[v] += row.scale[l] * x;
    }
    if constexpr (kNorm) {
      const T* x = next.x[l] + j;
      constexpr int64_t kBytes = N * kWide * static_cast<int64_t>(sizeof(T));
      for (int64_t line = 0; line < kBytes; line += 64) {
        prefetch(reinterpret_cast<const char*>(x) + kAhead + line);
      }
      vec_t<A> sum = {}, square = {};
      for (int v = 0; v < N; ++v) {
        const vec_t<A> d = load(x + v * kWide) - next.shift[l];
        sum += d;
        square += d * d;
      }
      next.sum[l] += sum;
      next.square[l] += square;
    }
  }
  for (int v = 0; v < N; ++v) store(row.acc + j + v * kWide, acc[v]);
}

template <class T, bool kNorm, bool kGain>
MMK_INLINE void pass_side_by_side(const Summed<T>& row, Measured<T>& next, int layers, int64_t width) {
  using A = acc_t<T>;
  int64_t j = 0;
  for (; j + kStep * kLanes<A> <= width; j += kStep * kLanes<A>) {
    step_side_by_side<T, kStep, kNorm, kGain>(row, next, layers, j);
  }
  for (; j < width; ++j) {
    A acc = row.start == nullptr ? A(0) : row.start[j];
    for (int l = 0; l < layers; ++l) {
      A x = convert(row.x[l][j]);
      if constexpr (kNorm) {
        x -= row.mean[l];
        const A d = convert(next.x[l][j]) - next.shift[l];
        next.sum[l][0] += d;
        next.square[l][0] += d * d;
      }
      if constexpr (kGain) x *= row.gain[l][j];
      acc += row.scale[l] * x;
    }
    row.acc[j] = acc;
  }
}

// Calls body(first, count) for a few layers at a time.
template <class Body>
MMK_INLINE void for_layers(int layers, Body&& body) {
  const int passes = (layers + kSideBySide - 1) / kSideBySide;
  const int per_pass = (layers + passes - 1) / passes;
  for (int first = 0; first < layers; first += per_pass) body(first, std::min(per_pass, layers - first));
}

template <class T>
MMK_INLINE void forward_plain_row(const LayerMixParams& p, Row row, acc_t<T>* acc) {
  const acc_t<T>* weights = static_cast<const acc_t<T>*>(p.weights);
  for_layers(p.layers, [&](int first, int count) MMK_LAMBDA {
    Summed<T> sum;
    sum.acc = acc;
    sum.start = first == 0 ? nullptr : acc;
    for (int i = 0; i < count; ++i) {
      sum.x[i] = layer_row<T>(p, first + i, row);
      sum.scale[i] = weights[first + i];
    }
    Measured<T> none;
    pass_side_by_side<T, false, false>(sum, none, count, p.width);
  });
}

template <class T>
MMK_INLINE void sum_normalised(Summed<T>& sum, const LayerMixParams& p, Row row, int first, int count,
                               const Moments<acc_t<T>>* moments) {
  using A = acc_t<T>;
  for (int i = 0; i < count; ++i) {
    const int l = first + i;
    sum.x[i] = layer_row<T>(p, l, row);
    sum.mean[i] = moments[l].mean;
    sum.scale[i] = static_cast<const A*>(p.weights)[l] * moments[l].rstd;
    sum.gain[i] = parameter_row<A>(p.norm_weight, l, p.width);
  }
}

template <class T>
MMK_INLINE void measure(Measured<T>& measured, const LayerMixParams& p, Row row, int first, int count) {
  using A = acc_t<T>;
  for (int i = 0; i < count; ++i) {
    const T* x = layer_row<T>(p, first + i, row);
    measured.x[i] = x;
    // Of a constant row this is exactly its value, so that its variance is exactly 0.
    measured.shift[i] =
        p.width < kLanes<A> ? convert(x[0]) : sum_lanes<A>(load(x)) / static_cast<A>(kLanes<A>);
    measured.sum[i] = measured.square[i] = vec_t<A>{};
  }
}

template <class T>
MMK_INLINE void finish_moments(const Measured<T>& measured, int64_t width, double eps, int count,
                               Moments<acc_t<T>>* moments) {
  using A = acc_t<T>;
  const A inverse = A(1) / static_cast<A>(width);
  for (int i = 0; i < count; ++i) {
    const A offset = inverse * sum_lanes<A>(measured.sum[i]);
    const A variance = inverse * sum_lanes<A>(measured.square[i]) - offset * offset;
    moments[i] = {measured.shift[i] + offset, A(1) / std::sqrt(variance + static_cast<A>(eps))};
    // With a shift far from the mean, the difference lost digits: take two passes.
    if (offset * offset > 8 * variance) moments[i] = cpu::moments(measured.x[i], measured.x[i], width, eps);
  }
}

// Sums `row`, whose statistics are known, and computes those of `next`.
template <class T, bool kGain>
MMK_INLINE void forward_norm_row(const LayerMixParams& p, Row row, Row next, const acc_t<T>* bias,
                                 acc_t<T>* acc, const Moments<acc_t<T>>* of_row, Moments<acc_t<T>>* of_next) {
  for_layers(p.layers, [&](int first, int count) MMK_LAMBDA {
    Summed<T> sum;
    Measured<T> measured;
    sum.acc = acc;
    sum.start = first == 0 ? bias : acc;
    sum_normalised(sum, p, row, first, count, of_row);
    measure(measured, p, next, first, count);
    pass_side_by_side<T, true, kGain>(sum, measured, count, p.width);
    finish_moments(measured, p.width, p.eps, count, of_next + first);
  });
}

template <class T>
MMK_INLINE void write_stats(const LayerMixForward& args, int64_t r, const Moments<acc_t<T>>* moments) {
  using A = acc_t<T>;
  if (args.stats == nullptr) return;
  A* stats = static_cast<A*>(args.stats) + r * 2 * args.mix.layers;
  for (int l = 0; l < args.mix.layers; ++l) {
    stats[2 * l] = moments == nullptr ? A(0) : moments[l].mean;
    stats[2 * l + 1] = moments == nullptr ? A(0) : moments[l].rstd;
  }
}

// Sums each valid row while it measures the next. The first sum and the last statistics are dropped:
// computing them too gives the statistics of all rows the same order of additions.
template <class T, bool kGain>
MMK_INLINE void forward_norm_rows(const LayerMixForward& args, int64_t begin, int64_t end, acc_t<T>* bias,
                                  acc_t<T>* row_sum) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  mix_bias(p, bias);
  Moments<A> moments[2][kLayerMixMaxLayers] = {};
  Moments<A>*known = moments[0], *coming = moments[1];
  Row row = {0, 0, false};
  int64_t row_index = begin;
  for (int64_t r = begin; r <= end; ++r) {
    Row next = r < end ? locate(p, r) : row;
    if (!next.valid) {
      if (r == end) return;
      T* out = static_cast<T*>(args.out) + r * p.width;
      std::fill(out, out + p.width, T{});
      write_stats<T>(args, r, nullptr);
      continue;
    }
    // If the element is the accumulation type, accumulate in the output row itself.
    A* acc = row_sum;
    if constexpr (std::is_same_v<T, A>) {
      if (row.valid) acc = static_cast<A*>(args.out) + row_index * p.width;
    }
    forward_norm_row<T, kGain>(p, row.valid ? row : next, next, bias, acc, known, coming);
    if (row.valid) {
      if constexpr (!std::is_same_v<T, A>) {
        write_row(static_cast<T*>(args.out) + row_index * p.width, acc, p.width);
      }
      write_stats<T>(args, row_index, known);
    }
    row = next;
    row_index = r;
    std::swap(known, coming);
  }
}

template <class T>
MMK_INLINE void forward_plain_rows(const LayerMixForward& args, int64_t begin, int64_t end,
                                   acc_t<T>* row_sum) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  for (int64_t r = begin; r < end; ++r) {
    const Row row = locate(p, r);
    T* out = static_cast<T*>(args.out) + r * p.width;
    if (!row.valid) {
      std::fill(out, out + p.width, T{});
      continue;
    }
    A* acc = row_sum;
    if constexpr (std::is_same_v<T, A>) acc = out;
    forward_plain_row<T>(p, row, acc);
    if constexpr (!std::is_same_v<T, A>) write_row(out, acc, p.width);
  }
}

template <class T>
MMK_INLINE void forward_rows(const LayerMixForward& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t width = args.mix.width;
  std::vector<A> scratch(2 * width);
  A* bias = scratch.data();
  A* row_sum = bias + width;
  if (!args.mix.norm) return forward_plain_rows<T>(args, begin, end, row_sum);
  if (args.mix.norm_weight == nullptr) return forward_norm_rows<T, false>(args, begin, end, bias, row_sum);
  forward_norm_rows<T, true>(args, begin, end, bias, row_sum);
}

// scale_sum[j] += g[j] * (x[j] - mean) * rstd: the gradient of the LayerNorm gain without the layer's weight.
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

// Dot products of one row with a few layers: operands and sums.
template <class T>
struct Dotted {
  const T* x[kSideBySide];
  acc_t<T> mean[kSideBySide];
  const acc_t<T>* gain[kSideBySide];
  vec_t<acc_t<T>> sum[kSideBySide];
};

// dots[i] = sum_j g[j] * gain_i[j] * (x_i[j] - mean_i)
template <class T, bool kNorm, bool kGain>
MMK_INLINE void dot_side_by_side(Dotted<T>& row, const acc_t<T>* g, int layers, int64_t width,
                                 acc_t<T>* dots) {
  using A = acc_t<T>;
  constexpr int64_t kWide = kLanes<A>;
  for (int l = 0; l < layers; ++l) row.sum[l] = vec_t<A>{};
  int64_t j = 0;
  for (; j + kStep * kWide <= width; j += kStep * kWide) {
    vec_t<A> gradient[kStep];
    for (int v = 0; v < kStep; ++v) gradient[v] = load(g + j + v * kWide);
    for (int l = 0; l < layers; ++l) {
      vec_t<A> sum = {};
      for (int v = 0; v < kStep; ++v) {
        vec_t<A> x = load(row.x[l] + j + v * kWide);
        if constexpr (kNorm) x -= row.mean[l];
        if constexpr (kGain) x *= load(row.gain[l] + j + v * kWide);
        sum += gradient[v] * x;
      }
      row.sum[l] += sum;
    }
  }
  for (; j < width; ++j) {
    for (int l = 0; l < layers; ++l) {
      A x = convert(row.x[l][j]);
      if constexpr (kNorm) x -= row.mean[l];
      if constexpr (kGain) x *= row.gain[l][j];
      row.sum[l][0] += g[j] * x;
    }
  }
  for (int l = 0; l < layers; ++l) dots[l] = sum_lanes<A>(row.sum[l]);
}

template <class T>
MMK_INLINE void dot_layers(const LayerMixParams& p, Row row, const acc_t<T>* g,
                           const Moments<acc_t<T>>* moments, acc_t<T>* dots) {
  using A = acc_t<T>;
  for_layers(p.layers, [&](int first, int count) MMK_LAMBDA {
    Dotted<T> dotted;
    for (int i = 0; i < count; ++i) {
      const int l = first + i;
      dotted.x[i] = layer_row<T>(p, l, row);
      dotted.mean[i] = moments[l].mean;
      dotted.gain[i] = parameter_row<A>(p.norm_weight, l, p.width);
    }
    if (p.norm_weight != nullptr) {
      dot_side_by_side<T, true, true>(dotted, g, count, p.width, dots + first);
    } else if (p.norm) {
      dot_side_by_side<T, true, false>(dotted, g, count, p.width, dots + first);
    } else {
      dot_side_by_side<T, false, false>(dotted, g, count, p.width, dots + first);
    }
  });
}

// Sums over the rows of one chunk.
template <class T>
struct ChunkSums {
  // [layers] grad . gain * normalised layer; in double, since a chunk may have thousands of rows
  double* dot;
  acc_t<T>* scale;     // [layers, width]  grad * normalised layer, or null
  acc_t<T>* gradient;  // [width]          grad, or null
};

template <class T>
MMK_INLINE void backward_row(const LayerMixBackward& args, int64_t r, Row row, const acc_t<T>* g,
                             bool any_gradient, const ChunkSums<T>& sums) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  const A* weights = static_cast<const A*>(p.weights);
  const A* stats = static_cast<const A*>(args.stats);
  Moments<A> moments[kLayerMixMaxLayers];
  A dots[kLayerMixMaxLayers] = {};
  for (int l = 0; l < p.layers; ++l) {
    moments[l] = {0, 1};
    if (p.norm) moments[l] = {stats[(r * p.layers + l) * 2], stats[(r * p.layers + l) * 2 + 1]};
  }
  // If the gain needs its sums, write_dots computes those for the weights from them at the end of the chunk.
  if ((args.need_weights && sums.scale == nullptr) || (p.norm && any_gradient)) {
    dot_layers<T>(p, row, g, moments, dots);
  }
  for (int l = 0; l < p.layers; ++l) {
    const T* x = layer_row<T>(p, l, row);
    sums.dot[l] += static_cast<double>(dots[l] * moments[l].rstd);
    if (sums.scale != nullptr) add_scale_gradient(sums.scale + l * p.width, g, x, moments[l], p.width);
    T* dx = static_cast<T*>(args.d_layer[l]);
    if (dx != nullptr) {
      write_layer_gradient(dx + r * p.width, g, x, p.norm, moments[l], weights[l], dots[l],
                           parameter_row<A>(p.norm_weight, l, p.width), p.width);
    }
  }
  if (sums.gradient != nullptr) {
    for (int64_t j = 0; j < p.width; ++j) sums.gradient[j] += g[j];
  }
}

// The chunk's part of d_weights, from the sums over rows or from the sums for gain and shift.
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
  bool any_gradient = false;
  for (int l = 0; l < p.layers; ++l) any_gradient |= args.d_layer[l] != nullptr;
  const int64_t begin = chunk * chunks.rows_per_chunk;
  const int64_t end = std::min(rows, begin + chunks.rows_per_chunk);
  for (int64_t r = begin; r < end; ++r) {
    const Row row = locate(p, r);
    if (!row.valid) {
      zero_padding_gradients<T>(args, r);
      continue;
    }
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
    backward_row<T>(args, r, row, g, any_gradient, sums);
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
