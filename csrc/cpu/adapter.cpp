#include "mmkernels/adapter.h"

#include <algorithm>
#include <vector>

#include "cpu/activation.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

template <class A>
MMK_INLINE const A* row_of(const AdapterRows& rows, int64_t index) {
  return static_cast<const A*>(rows.data) + index * rows.row_stride;
}

// Columns of a panel that exist.
template <class A>
MMK_INLINE int64_t panel_columns(int64_t panel, int64_t columns) {
  return std::min(kPanel<A>, columns - panel * kPanel<A>);
}

// One row of a panel in memory, for the last one, whose columns do not all exist.
template <class A>
struct Cells {
  A values[kPanel<A>];

  MMK_INLINE explicit Cells(const vec_t<A> (&sums)[2]) {
    store(values, sums[0]);
    store(values + kLanes<A>, sums[1]);
  }
};

// Scratch of one thread, for a block of rows.
template <class A>
struct Block {
  std::vector<A> hidden, scaled, panel;
  A mean[kAdapterBlock], rstd[kAdapterBlock], pull[kAdapterBlock];
  int64_t hidden_stride;

  // With room for the tiles that reach beyond the last column.
  explicit Block(int64_t bottleneck) : hidden_stride(panels<A>(bottleneck) * kPanel<A> + kTileRows) {
    hidden.resize(kAdapterBlock * hidden_stride + kTileRows);
    scaled.resize(kAdapterBlock * hidden_stride + kTileRows);
    panel.resize(kAdapterBlock * kPanel<A>);
  }
};

// ---- forward

// Leaves a product with one of the packed weights in a block's scratch, as it is.
template <class A>
MMK_INLINE void product_into(A* target, int64_t stride, const A* rows_of, int64_t row_stride, int64_t rows,
                             const Packed<A>& weight) {
  product<A>(rows_of, row_stride, rows, weight,
             [&](int64_t r, int64_t panel, const vec_t<A>(&sums)[2]) MMK_LAMBDA {
               A* cells = target + r * stride + panel * kPanel<A>;
               store(cells, sums[0]);
               store(cells + kLanes<A>, sums[1]);
             });
}

template <class A, Activation kActivation>
MMK_INLINE void activate_block(const AdapterForward& args, Block<A>& block, int64_t first, int64_t rows) {
  const int64_t bottleneck = args.shape.bottleneck;
  const A* bias = at<A>(args.hidden_bias, 0);
  for (int64_t r = 0; r < rows; ++r) {
    A* hidden = block.hidden.data() + r * block.hidden_stride;
    A* saved = at<A>(args.hidden, (first + r) * bottleneck);
    for (int64_t n = 0; n < bottleneck; ++n) hidden[n] = block.rstd[r] * hidden[n] + bias[n];
    if (saved != nullptr) std::copy(hidden, hidden + bottleneck, saved);
    for (int64_t n = 0; n < bottleneck; ++n) hidden[n] = activate(kActivation, hidden[n]);
  }
}

template <class A>
MMK_INLINE void hidden_block(const AdapterForward& args, Block<A>& block, int64_t first, int64_t rows) {
  const AdapterShape& shape = args.shape;
  const A* x = row_of<A>(args.x, first);
  for (int64_t r = 0; r < rows; ++r) {
    block.rstd[r] = A(1);
    if (!args.norm) continue;
    const A* row = x + r * args.x.row_stride;
    const Moments<A> m = moments(row, r + 1 < rows ? row + args.x.row_stride : row, shape.width, args.eps);
    block.rstd[r] = m.rstd;
    if (args.stats == nullptr) continue;
    A* stats = at<A>(args.stats, 2 * (first + r));
    stats[0] = m.mean;
    stats[1] = m.rstd;
  }
  product_into<A>(block.hidden.data(), block.hidden_stride, x, args.x.row_stride, rows,
                  {at<A>(args.down, 0), shape.width, shape.bottleneck});
  dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
    activate_block<A, activation.value>(args, block, first, rows);
  });
}

template <class A>
MMK_INLINE void output_block(const AdapterForward& args, const Block<A>& block, int64_t first, int64_t rows) {
  const int64_t width = args.shape.width;
  const A scale = static_cast<A>(args.scale);
  const A* bias = at<A>(args.up_bias, 0);
  const Packed<A> up = {at<A>(args.up, 0), args.shape.bottleneck, width};
  product<A>(block.hidden.data(), block.hidden_stride, rows, up,
             [&](int64_t r, int64_t panel, const vec_t<A>(&sums)[2]) MMK_LAMBDA {
               const int64_t column = panel * kPanel<A>;
               const A* residual = at<A>(args.residual.data, (first + r) * args.residual.row_stride + column);
               A* out = at<A>(args.out, (first + r) * width + column);
               if (column + kPanel<A> <= width) {
                 for (int v = 0; v < 2; ++v) {
                   const int64_t j = v * kLanes<A>;
                   vec_t<A> y = sums[v];
                   if (bias != nullptr) y += load(bias + column + j);
                   y *= scale;
                   if (residual != nullptr) y += load(residual + j);
                   store(out + j, y);
                 }
                 return;
               }
               const Cells<A> cells(sums);
               for (int64_t n = 0; column + n < width; ++n) {
                 A y = cells.values[n];
                 if (bias != nullptr) y += bias[column + n];
                 out[n] = scale * y + (residual == nullptr ? A(0) : residual[n]);
               }
             });
}

template <class A>
MMK_INLINE void forward_rows(const AdapterForward& args, int64_t begin, int64_t end) {
  Block<A> block(args.shape.bottleneck);
  for (int64_t first = begin; first < end; first += kAdapterBlock) {
    const int64_t rows = std::min(kAdapterBlock, end - first);
    hidden_block<A>(args, block, first, rows);
    output_block<A>(args, block, first, rows);
  }
}

// ---- backward

template <class A, Activation kActivation>
MMK_INLINE void slope_block(const AdapterBackward& args, Block<A>& block, int64_t first, int64_t rows,
                            double* bias_sum) {
  const int64_t bottleneck = args.shape.bottleneck;
  const A scale = static_cast<A>(args.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const A* saved = at<A>(args.hidden, (first + r) * bottleneck);
    A* hidden = block.hidden.data() + r * block.hidden_stride;
    A* scaled = block.scaled.data() + r * block.hidden_stride;
    for (int64_t n = 0; n < bottleneck; ++n) hidden[n] = activate(kActivation, saved[n]);
    for (int64_t n = 0; n < bottleneck; ++n) scaled[n] *= scale * activation_slope(kActivation, saved[n]);
    for (int64_t n = 0; n < bottleneck; ++n) bias_sum[n] += static_cast<double>(scaled[n]);
    for (int64_t n = 0; n < bottleneck; ++n) scaled[n] *= block.rstd[r];
  }
}

// Leaves a = act(z) in block.hidden and s = dz * rstd in block.scaled, and adds dz to bias_sum.
template <class A>
MMK_INLINE void hidden_gradient_block(const AdapterBackward& args, Block<A>& block, int64_t first,
                                      int64_t rows, double* bias_sum) {
  const AdapterShape& shape = args.shape;
  for (int64_t r = 0; r < rows; ++r) {
    const A* stats = at<A>(args.stats, 2 * (first + r));
    block.mean[r] = stats == nullptr ? A(0) : stats[0];
    block.rstd[r] = stats == nullptr ? A(1) : stats[1];
  }
  product_into<A>(block.scaled.data(), block.hidden_stride, row_of<A>(args.grad, first), args.grad.row_stride,
                  rows, {at<A>(args.up, 0), shape.width, shape.bottleneck});
  dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
    slope_block<A, activation.value>(args, block, first, rows, bias_sum);
  });
  if (args.stats == nullptr || args.dx == nullptr) return;
  const A* bias = at<A>(args.hidden_bias, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const A* saved = at<A>(args.hidden, (first + r) * shape.bottleneck);
    const A* scaled = block.scaled.data() + r * block.hidden_stride;
    const A sum = sum_over<A>(
        shape.bottleneck,
        [&](int64_t j) MMK_LAMBDA { return load(scaled + j) * (load(saved + j) - load(bias + j)); },
        [&](int64_t j) MMK_LAMBDA { return scaled[j] * (saved[j] - bias[j]); });
    block.pull[r] = block.rstd[r] / static_cast<A>(shape.width) * sum;
  }
}

template <class A>
MMK_INLINE void input_gradient_block(const AdapterBackward& args, const Block<A>& block, int64_t first,
                                     int64_t rows) {
  const int64_t width = args.shape.width;
  const bool norm = args.stats != nullptr;
  const Packed<A> down = {at<A>(args.down, 0), args.shape.bottleneck, width};
  product<A>(block.scaled.data(), block.hidden_stride, rows, down,
             [&](int64_t r, int64_t panel, const vec_t<A>(&sums)[2]) MMK_LAMBDA {
               const int64_t column = panel * kPanel<A>;
               const A* x = row_of<A>(args.x, first + r) + column;
               const A* grad = row_of<A>(args.grad, first + r) + column;
               A* dx = at<A>(args.dx, (first + r) * width + column);
               if (column + kPanel<A> <= width) {
                 for (int v = 0; v < 2; ++v) {
                   const int64_t j = v * kLanes<A>;
                   vec_t<A> y = sums[v];
                   if (norm) y -= block.pull[r] * (load(x + j) - block.mean[r]);
                   if (args.add_input) y += load(grad + j);
                   store(dx + j, y);
                 }
                 return;
               }
               const Cells<A> cells(sums);
               for (int64_t n = 0; column + n < width; ++n) {
                 A y = cells.values[n];
                 if (norm) y -= block.pull[r] * (x[n] - block.mean[r]);
                 dx[n] = args.add_input ? y + grad[n] : y;
               }
             });
}

// total (bottleneck, width) += a^T b, of a block of rows.
template <class A>
MMK_INLINE void add_outer_products(A* total, const AdapterShape& shape, const A* a, int64_t a_stride,
                                   const A* b, int64_t b_stride, int64_t rows, A* panel) {
  const Packed<A> layout = {panel, rows, shape.width};
  for (int64_t index = 0; index < panels<A>(shape.width); ++index) {
    const int64_t column = index * kPanel<A>;
    const int64_t count = panel_columns<A>(index, shape.width);
    pack<A>(b + column, b_stride, 1, {panel, rows, count}, panel, 0, 1);
    for (int64_t first = 0; first < shape.bottleneck; first += kTileRows) {
      Tile<A> tile;
      multiply_transposed(tile, a + first, a_stride, layout.data, rows);
      for (int64_t i = 0; i < std::min<int64_t>(kTileRows, shape.bottleneck - first); ++i) {
        A* target = total + (first + i) * shape.width + column;
        if (count == kPanel<A>) {
          store(target, load(target) + tile.sums[i][0]);
          store(target + kLanes<A>, load(target + kLanes<A>) + tile.sums[i][1]);
          continue;
        }
        const Cells<A> cells(tile.sums[i]);
        for (int64_t n = 0; n < count; ++n) target[n] += cells.values[n];
      }
    }
  }
}

template <class A>
MMK_INLINE void backward_chunk(const AdapterBackward& args, int64_t chunk, Block<A>& block,
                               std::vector<double>& bias_sum) {
  const AdapterShape& shape = args.shape;
  const AdapterChunks chunks = adapter_chunks(shape);
  const int64_t size = shape.bottleneck * shape.width;
  A* down = at<A>(args.partial_down, chunk * size);
  A* up = at<A>(args.partial_up, chunk * size);
  A* up_bias = at<A>(args.partial_up_bias, chunk * shape.width);
  if (down != nullptr) std::fill(down, down + size, A(0));
  if (up != nullptr) std::fill(up, up + size, A(0));
  if (up_bias != nullptr) std::fill(up_bias, up_bias + shape.width, A(0));
  std::fill(bias_sum.begin(), bias_sum.end(), 0.0);
  const int64_t end = std::min(shape.rows, (chunk + 1) * chunks.rows_per_chunk);
  for (int64_t first = chunk * chunks.rows_per_chunk; first < end; first += kAdapterBlock) {
    const int64_t rows = std::min(kAdapterBlock, end - first);
    const A* grad = row_of<A>(args.grad, first);
    const A* x = row_of<A>(args.x, first);
    hidden_gradient_block<A>(args, block, first, rows, bias_sum.data());
    if (args.dx != nullptr) input_gradient_block<A>(args, block, first, rows);
    if (down != nullptr) {
      add_outer_products<A>(down, shape, block.scaled.data(), block.hidden_stride, x, args.x.row_stride, rows,
                            block.panel.data());
    }
    if (up != nullptr) {
      add_outer_products<A>(up, shape, block.hidden.data(), block.hidden_stride, grad, args.grad.row_stride,
                            rows, block.panel.data());
    }
    for (int64_t r = 0; up_bias != nullptr && r < rows; ++r) {
      for (int64_t j = 0; j < shape.width; ++j) up_bias[j] += grad[r * args.grad.row_stride + j];
    }
  }
  A* hidden_bias = at<A>(args.partial_hidden_bias, chunk * shape.bottleneck);
  for (int64_t n = 0; n < shape.bottleneck; ++n) hidden_bias[n] = static_cast<A>(bias_sum[n]);
}

template <class A>
MMK_INLINE void backward_chunks(const AdapterBackward& args, int64_t begin, int64_t end) {
  Block<A> block(args.shape.bottleneck);
  std::vector<double> bias_sum(args.shape.bottleneck);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    backward_chunk<A>(args, chunk, block, bias_sum);
  }
}

// Adds the chunks' sums for columns [begin, end) of x.
template <class A>
MMK_INLINE void reduce_columns(const AdapterReduce& args, int64_t begin, int64_t end) {
  const AdapterShape& shape = args.shape;
  const int64_t chunks = adapter_chunks(shape).chunks;
  const int64_t size = shape.bottleneck * shape.width;
  const auto total = [&](const void* partial, int64_t stride, int64_t offset) MMK_LAMBDA {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += static_cast<double>(*at<A>(partial, c * stride + offset));
    return sum;
  };
  for (int64_t n = 0; n < shape.bottleneck; ++n) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t offset = n * shape.width + j;
      if (args.d_down != nullptr)
        *at<A>(args.d_down, offset) = static_cast<A>(total(args.partial_down, size, offset));
      if (args.d_up != nullptr) {
        *at<A>(args.d_up, j * shape.bottleneck + n) =
            static_cast<A>(args.scale * total(args.partial_up, size, offset));
      }
    }
  }
  for (int64_t j = begin; args.d_up_bias != nullptr && j < end; ++j) {
    *at<A>(args.d_up_bias, j) = static_cast<A>(args.scale * total(args.partial_up_bias, shape.width, j));
  }
}

}  // namespace

int64_t adapter_panels(DType dtype, int64_t columns) {
  return dispatch_wide(dtype, [&](auto element) { return panels<decltype(element)>(columns); });
}

int64_t adapter_packed_size(DType dtype, int64_t depth, int64_t columns) {
  return dispatch_wide(dtype, [&](auto element) { return packed_size<decltype(element)>(depth, columns); });
}

MMK_MULTIARCH void adapter_pack(DType dtype, const AdapterPack& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    using A = decltype(element);
    pack<A>(at<A>(args.source, 0), args.depth_stride, args.column_stride, {nullptr, args.depth, args.columns},
            at<A>(args.packed, 0), begin, end);
  });
}

MMK_MULTIARCH void adapter_forward(DType dtype, const AdapterForward& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { forward_rows<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void adapter_backward(DType dtype, const AdapterBackward& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype,
                [&](auto element) MMK_LAMBDA { backward_chunks<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void adapter_reduce(DType dtype, const AdapterReduce& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { reduce_columns<decltype(element)>(args, begin, end); });
}

}  // namespace mmk::cpu
