#include "mmkernels/layer_mix.h"

#include <algorithm>
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

// The rows of other layers lie far apart, where the hardware prefetcher does not see them coming.
template <class T>
MMK_INLINE void prefetch_row(const T* p, int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// acc[j] += scale * gain[j] * (x[j] - mean), gain left out where null.
template <class T>
MMK_INLINE void add_scaled(acc_t<T>* acc, const T* x, acc_t<T> mean, acc_t<T> scale, const acc_t<T>* gain,
                           int64_t width) {
  using A = acc_t<T>;
  if (gain == nullptr) {
    sweep<A>(
        width, [&](int64_t j) MMK_LAMBDA { store(acc + j, load(acc + j) + scale * (load(x + j) - mean)); },
        [&](int64_t j) MMK_LAMBDA { acc[j] += scale * (convert(x[j]) - mean); });
  } else {
    sweep<A>(
        width,
        [&](int64_t j)
            MMK_LAMBDA { store(acc + j, load(acc + j) + scale * load(gain + j) * (load(x + j) - mean)); },
        [&](int64_t j) MMK_LAMBDA { acc[j] += scale * gain[j] * (convert(x[j]) - mean); });
  }
}

// Plain weighted sum of up to kGroup layers at once, so that the accumulator row is touched once per group.
constexpr int kGroup = 4;

template <class T, int N>
MMK_INLINE void add_group(acc_t<T>* acc, const T* const* x, const acc_t<T>* weight, int64_t width, bool first) {
  using A = acc_t<T>;
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        vec_t<A> sum = first ? vec_t<A>{} : load(acc + j);
        for (int i = 0; i < N; ++i) sum += weight[i] * load(x[i] + j);
        store(acc + j, sum);
      },
      [&](int64_t j) MMK_LAMBDA {
        A sum = first ? A(0) : acc[j];
        for (int i = 0; i < N; ++i) sum += weight[i] * convert(x[i][j]);
        acc[j] = sum;
      });
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

template <class T>
MMK_INLINE void forward_plain_row(const LayerMixParams& p, Row row, Row next, acc_t<T>* acc) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(p.weights);
  for (int first = 0; first < p.layers; first += kGroup) {
    const int count = std::min(kGroup, p.layers - first);
    const T* x[kGroup];
    for (int i = 0; i < count; ++i) {
      x[i] = layer_row<T>(p, first + i, row);
      if (next.valid) prefetch_row(layer_row<T>(p, first + i, next), p.width);
    }
    switch (count) {
      case 1: add_group<T, 1>(acc, x, weights + first, p.width, first == 0); break;
      case 2: add_group<T, 2>(acc, x, weights + first, p.width, first == 0); break;
      case 3: add_group<T, 3>(acc, x, weights + first, p.width, first == 0); break;
      default: add_group<T, 4>(acc, x, weights + first, p.width, first == 0); break;
    }
  }
}

template <class T>
MMK_INLINE void forward_norm_row(const LayerMixParams& p, Row row, Row next, const acc_t<T>* bias,
                                 acc_t<T>* acc, acc_t<T>* stats) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(p.weights);
  const A* gain = static_cast<const A*>(p.norm_weight);
  std::copy(bias, bias + p.width, acc);
  for (int l = 0; l < p.layers; ++l) {
    const T* x = layer_row<T>(p, l, row);
    if (next.valid) prefetch_row(layer_row<T>(p, l, next), p.width);
    const Moments<A> m = moments(x, p.width, p.eps);
    if (stats != nullptr) {
      stats[2 * l] = m.mean;
      stats[2 * l + 1] = m.rstd;
    }
    add_scaled(acc, x, m.mean, weights[l] * m.rstd, gain == nullptr ? nullptr : gain + l * p.width, p.width);
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
      forward_plain_row<T>(p, row, next, acc);
    }
    if constexpr (!std::is_same_v<T, A>) write_row(out, acc, p.width);
  }
}

template <class A>
struct Dots {
  A plain;       // sum of g * (x - mean)
  A with_gain;   // sum of g * gain
  A shift;       // sum of g * bias
};

// What one row and one layer give to the sums of the backward pass.
template <class T>
MMK_INLINE Dots<acc_t<T>> row_dots(const acc_t<T>* g, const T* x, acc_t<T> mean, const acc_t<T>* gain,
                                   const acc_t<T>* bias, int64_t width) {
  using A = acc_t<T>;
  vec_t<A> plain = {}, with_gain = {}, shift = {};
  Dots<A> rest = {};
  sweep<A>(
      width,
      [&](int64_t j) MMK_LAMBDA {
        vec_t<A> scaled = load(g + j);
        if (bias != nullptr) shift += scaled * load(bias + j);
        if (gain != nullptr) scaled *= load(gain + j);
        plain += scaled * (load(x + j) - mean);
        with_gain += scaled;
      },
      [&](int64_t j) MMK_LAMBDA {
        const A scaled = gain == nullptr ? g[j] : g[j] * gain[j];
        if (bias != nullptr) rest.shift += g[j] * bias[j];
        rest.plain += scaled * (convert(x[j]) - mean);
        rest.with_gain += scaled;
      });
  return {rest.plain + sum_lanes<A>(plain), rest.with_gain + sum_lanes<A>(with_gain),
          rest.shift + sum_lanes<A>(shift)};
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
                                     acc_t<T> weight, Dots<acc_t<T>> dots, const acc_t<T>* gain, int64_t width) {
  using A = acc_t<T>;
  if (!norm) {
    sweep<A>(
        width, [&](int64_t j) MMK_LAMBDA { store(dx + j, weight * load(g + j)); },
        [&](int64_t j) MMK_LAMBDA { dx[j] = round_to<T>(weight * g[j]); });
    return;
  }
  const A scale = weight * m.rstd;
  const A mean_gradient = dots.with_gain / static_cast<A>(width);
  const A slope = dots.plain * m.rstd * m.rstd / static_cast<A>(width);
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

// Sums of one chunk; dot is kept in double, since a chunk may hold thousands of rows.
template <class T>
struct ChunkSums {
  double* dot;
  acc_t<T>* scale;
  acc_t<T>* shift;
};

template <class T>
MMK_INLINE void backward_row(const LayerMixBackward& args, int64_t r, Row row, Row next, const acc_t<T>* g,
                             ChunkSums<T> sums) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  const A* weights = static_cast<const A*>(p.weights);
  const A* stats = static_cast<const A*>(args.stats);
  for (int l = 0; l < p.layers; ++l) {
    T* dx = static_cast<T*>(args.d_layer[l]);
    const bool reads_layer = args.need_weights || args.need_affine || p.norm;
    const T* x = reads_layer ? layer_row<T>(p, l, row) : nullptr;
    if (reads_layer && next.valid) prefetch_row(layer_row<T>(p, l, next), p.width);
    const A* gain = p.norm_weight == nullptr ? nullptr : static_cast<const A*>(p.norm_weight) + l * p.width;
    const A* bias = p.norm_bias == nullptr ? nullptr : static_cast<const A*>(p.norm_bias) + l * p.width;
    Moments<A> m = {0, 1};
    if (p.norm) m = {stats[(r * p.layers + l) * 2], stats[(r * p.layers + l) * 2 + 1]};
    Dots<A> dots = {};
    if (args.need_weights || (p.norm && dx != nullptr)) {
      dots = row_dots(g, x, m.mean, gain, args.need_weights ? bias : nullptr, p.width);
      sums.dot[l] += static_cast<double>(dots.plain * m.rstd) + static_cast<double>(dots.shift);
    }
    if (args.need_affine) add_scale_gradient(sums.scale + l * p.width, g, x, m, p.width);
    if (dx != nullptr) {
      write_layer_gradient(dx + r * p.width, g, x, p.norm, m, weights[l], dots, gain, p.width);
    }
  }
  if (args.need_affine) {
    for (int64_t j = 0; j < p.width; ++j) sums.shift[j] += g[j];
  }
}

template <class T>
MMK_INLINE void backward_chunk(const LayerMixBackward& args, int64_t chunk, acc_t<T>* wide_gradient) {
  using A = acc_t<T>;
  const LayerMixParams& p = args.mix;
  const int64_t rows = p.batch * p.frames;
  const LayerMixChunks chunks = layer_mix_chunks(rows, args.need_affine);
  double dot[kLayerMixMaxLayers] = {};
  ChunkSums<T> sums = {dot, nullptr, nullptr};
  if (args.need_affine) {
    sums.scale = static_cast<A*>(args.partial_scale) + chunk * p.layers * p.width;
    sums.shift = static_cast<A*>(args.partial_shift) + chunk * p.width;
    std::fill(sums.scale, sums.scale + p.layers * p.width, A(0));
    std::fill(sums.shift, sums.shift + p.width, A(0));
  }
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
  if (args.need_weights) {
    A* partial = static_cast<A*>(args.partial_dot) + chunk * p.layers;
    for (int l = 0; l < p.layers; ++l) partial[l] = static_cast<A>(dot[l]);
  }
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
    for (int64_t j = 0; j < p.width; ++j) shift[j] += static_cast<const A*>(args.partial_shift)[c * p.width + j];
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
    std::vector<acc_t<T>> wide_gradient(args.mix.width);
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<T>(args, chunk, wide_gradient.data());
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
