#include "mmkernels/adapter.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/activation.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace mmk::cpu {
namespace {

template <class A>
MMK_INLINE const A* row_of(const AdapterRows& rows, int64_t index) {
  return at<A>(rows.data, index * rows.row_stride);
}

// Scratch of one thread for a block of rows: hidden values, statistics of each row, and a tile of rows of the
// second product. The output is written in whole rows: the prefetcher cannot follow parts of many rows.
template <class A>
struct Block {
  int64_t stride, wide_stride;
  std::vector<A> hidden, wide;
  A mean[kAdapterBlock], rstd[kAdapterBlock], pull[kAdapterBlock];

  // Rows are padded to whole panels and whole strips.
  explicit Block(const AdapterShape& shape)
      : stride((panels<A>(shape.bottleneck) + 1) * kPanel<A>),
        wide_stride(panels<A>(shape.width) * kPanel<A>),
        hidden(kAdapterBlock * stride),
        wide(kTileRows * wide_stride) {}

  MMK_INLINE A* row(int64_t r) { return hidden.data() + r * stride; }

  // hidden = rows times a packed weight.
  MMK_INLINE void narrow_product(const A* of_rows, int64_t row_stride, int64_t rows,
                                 const Packed<A>& weight) {
    product<A>(of_rows, row_stride, rows, weight, hidden.data(), stride);
  }

  // hidden times a packed weight; calls finish(r, row r of the product).
  template <class Finish>
  MMK_INLINE void wide_product(int64_t rows, const Packed<A>& weight, Finish&& finish) {
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - first);
      product<A>(row(first), stride, count, weight, wide.data(), wide_stride);
      for (int64_t i = 0; i < count; ++i) finish(first + i, wide.data() + i * wide_stride);
    }
  }
};

// ---- forward

template <class A, Activation kActivation>
MMK_INLINE void activate_block(const AdapterForward& args, Block<A>& block, int64_t first, int64_t rows) {
  const int64_t bottleneck = args.shape.bottleneck;
  const A* bias = at<A>(args.hidden_bias, 0);
  for (int64_t r = 0; r < rows; ++r) {
    A* hidden = block.row(r);
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
  block.narrow_product(x, args.x.row_stride, rows, {at<A>(args.down, 0), shape.width, shape.bottleneck});
  dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
    activate_block<A, activation.value>(args, block, first, rows);
  });
}

// Bias and residual, added to the second product. Zeros replace absent ones: the inner loop has no branch.
template <class A>
struct Addends {
  std::vector<A> bias, zeros;
  AdapterRows residual;

  explicit Addends(const AdapterForward& args) : bias(args.shape.width), residual(args.residual) {
    const A* up_bias = at<A>(args.up_bias, 0);
    for (int64_t j = 0; up_bias != nullptr && j < args.shape.width; ++j) {
      bias[j] = static_cast<A>(args.scale) * up_bias[j];
    }
    if (residual.data != nullptr) return;
    zeros.resize(args.shape.width);
    residual = {zeros.data(), 0};
  }
};

template <class A>
MMK_INLINE void output_block(const AdapterForward& args, const Addends<A>& addends, Block<A>& block,
                             int64_t first, int64_t rows) {
  const int64_t width = args.shape.width;
  const A* bias = addends.bias.data();
  const A* residual_rows = row_of<A>(addends.residual, first);
  const int64_t residual_stride = addends.residual.row_stride;
  A* out_rows = at<A>(args.out, first * width);
  block.wide_product(
      rows, {at<A>(args.up, 0), args.shape.bottleneck, width}, [&](int64_t r, const A* y) MMK_LAMBDA {
        const A* residual = residual_rows + r * residual_stride;
        A* out = out_rows + r * width;
        sweep<A>(
            width,
            [&](int64_t j)
                MMK_LAMBDA { store(out + j, (load(y + j) + load(bias + j)) + load(residual + j)); },
            [&](int64_t j) MMK_LAMBDA { out[j] = (y[j] + bias[j]) + residual[j]; });
      });
}

template <class A>
MMK_INLINE void forward_rows(const AdapterForward& args, int64_t begin, int64_t end) {
  const Addends<A> addends(args);
  Block<A> block(args.shape);
  for (int64_t first = begin; first < end; first += kAdapterBlock) {
    const int64_t rows = std::min(kAdapterBlock, end - first);
    hidden_block<A>(args, block, first, rows);
    output_block<A>(args, addends, block, first, rows);
  }
}

// ---- backward: gradients of rows

// Writes s to block.hidden, sums dz over the rows of each run, and stores a and s in strips for the gradients
// of the weights.
template <class A, Activation kActivation>
MMK_INLINE void slope_block(const AdapterBackward& args, Block<A>& block, int64_t first, int64_t rows,
                            A* activated) {
  const auto [all_rows, width, bottleneck] = args.shape;
  for (int64_t r = 0; r < rows; ++r) {
    const A* saved = at<A>(args.hidden, (first + r) * bottleneck);
    A* scaled = block.row(r);
    for (int64_t n = 0; n < bottleneck; ++n) activated[n] = activate(kActivation, saved[n]);
    for (int64_t n = 0; n < bottleneck; ++n) scaled[n] *= activation_slope(kActivation, saved[n]);
    A* bias_sum = at<A>(args.partial_hidden_bias, (first + r) / kAdapterRun * bottleneck);
    if ((first + r) % kAdapterRun == 0) std::fill(bias_sum, bias_sum + bottleneck, A(0));
    for (int64_t n = 0; n < bottleneck; ++n) bias_sum[n] += scaled[n];
    for (int64_t n = 0; n < bottleneck; ++n) scaled[n] *= block.rstd[r];
    for (int64_t strip = 0; strip < strips(bottleneck); ++strip) {
      const int64_t cell = (strip * all_rows + first + r) * kTileRows;
      std::memcpy(at<A>(args.activated, cell), activated + strip * kTileRows, kTileRows * sizeof(A));
      std::memcpy(at<A>(args.scaled, cell), scaled + strip * kTileRows, kTileRows * sizeof(A));
    }
  }
}

template <class A>
MMK_INLINE void hidden_gradient_block(const AdapterBackward& args, Block<A>& block, std::vector<A>& activated,
                                      int64_t first, int64_t rows) {
  const AdapterShape& shape = args.shape;
  for (int64_t r = 0; r < rows; ++r) {
    const A* stats = at<A>(args.stats, 2 * (first + r));
    block.mean[r] = stats == nullptr ? A(0) : stats[0];
    block.rstd[r] = stats == nullptr ? A(1) : stats[1];
  }
  block.narrow_product(row_of<A>(args.grad, first), args.grad.row_stride, rows,
                       {at<A>(args.up, 0), shape.width, shape.bottleneck});
  dispatch_activation(args.activation, [&](auto activation) MMK_LAMBDA {
    slope_block<A, activation.value>(args, block, first, rows, activated.data());
  });
  if (args.stats == nullptr || args.dx == nullptr) return;
  const A* bias = at<A>(args.hidden_bias, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const A* saved = at<A>(args.hidden, (first + r) * shape.bottleneck);
    const A* scaled = block.row(r);
    const A sum = sum_over<A>(
        shape.bottleneck,
        [&](int64_t j) MMK_LAMBDA { return load(scaled + j) * (load(saved + j) - load(bias + j)); },
        [&](int64_t j) MMK_LAMBDA { return scaled[j] * (saved[j] - bias[j]); });
    block.pull[r] = block.rstd[r] / static_cast<A>(shape.width) * sum;
  }
}

template <class A>
MMK_INLINE void input_gradient_block(const AdapterBackward& args, Block<A>& block, int64_t first,
                                     int64_t rows) {
  const int64_t width = args.shape.width;
  const bool norm = args.stats != nullptr;
  const A* x_rows = row_of<A>(args.x, first);
  const A* grad_rows = row_of<A>(args.grad, first);
  const int64_t x_stride = args.x.row_stride, grad_stride = args.grad.row_stride;
  A* dx_rows = at<A>(args.dx, first * width);
  block.wide_product(rows, {at<A>(args.down, 0), args.shape.bottleneck, width},
                     [&](int64_t r, const A* y) MMK_LAMBDA {
                       const A* x = x_rows + r * x_stride;
                       const A* grad = grad_rows + r * grad_stride;
                       A* dx = dx_rows + r * width;
                       const A mean = block.mean[r], pull = block.pull[r];
                       sweep<A>(
                           width,
                           [&](int64_t j) MMK_LAMBDA {
                             vec_t<A> value = load(y + j);
                             if (norm) value -= pull * (load(x + j) - mean);
                             if (args.add_input) value += load(grad + j);
                             store(dx + j, value);
                           },
                           [&](int64_t j) MMK_LAMBDA {
                             A value = y[j];
                             if (norm) value -= pull * (x[j] - mean);
                             dx[j] = args.add_input ? value + grad[j] : value;
                           });
                     });
}

template <class A>
MMK_INLINE void backward_runs(const AdapterBackward& args, int64_t begin, int64_t end) {
  Block<A> block(args.shape);
  std::vector<A> activated(strips(args.shape.bottleneck) * kTileRows);
  const int64_t end_row = std::min(end * kAdapterRun, args.shape.rows);
  for (int64_t first = begin * kAdapterRun; first < end_row; first += kAdapterBlock) {
    const int64_t rows = std::min(kAdapterBlock, end_row - first);
    hidden_gradient_block<A>(args, block, activated, first, rows);
    if (args.dx != nullptr) input_gradient_block<A>(args, block, first, rows);
  }
}

// ---- backward: gradients of weights

// Rows of a panel and of a strip that fit the L1 cache together.
constexpr int64_t kSpan = 256;

// sum_r hidden[r]^T rows[r] for a range of panels of columns, as [panel][padded bottleneck][kPanel].
template <class A>
struct OuterProduct {
  const A* hidden;  // in strips
  AdapterRows rows;
  int64_t all_rows, bottleneck, width, begin;
  std::vector<A> totals, panel;
  std::vector<double> column_sums;

  OuterProduct(const void* hidden_strips, const AdapterRows& of_rows, const AdapterShape& shape,
               int64_t first_panel, int64_t end_panel)
      : hidden(static_cast<const A*>(hidden_strips)),
        rows(of_rows),
        all_rows(shape.rows),
        bottleneck(shape.bottleneck),
        width(shape.width),
        begin(first_panel),
        totals((end_panel - first_panel) * panel_size()),
        panel(kSpan * kPanel<A>),
        column_sums((end_panel - first_panel) * kPanel<A>) {}

  MMK_INLINE int64_t panel_size() const { return strips(bottleneck) * kTileRows * kPanel<A>; }
  MMK_INLINE A* total(int64_t index, int64_t n) {
    return totals.data() + (index - begin) * panel_size() + n * kPanel<A>;
  }
  MMK_INLINE int64_t columns(int64_t index) const { return std::min(kPanel<A>, width - index * kPanel<A>); }

  // Copies one panel of the rows, which lie row_stride apart, to dense memory, and sums its columns.
  MMK_INLINE void gather(int64_t index, int64_t first, int64_t count) {
    const A* source = row_of<A>(rows, first) + index * kPanel<A>;
    double* sums = column_sums.data() + (index - begin) * kPanel<A>;
    if (columns(index) == kPanel<A>) [[likely]] {
      vec_t<A> sum0 = {}, sum1 = {};
      for (int64_t r = 0; r < count; ++r, source += rows.row_stride) {
        const vec_t<A> value0 = load(source), value1 = load(source + kLanes<A>);
        sum0 += value0;
        sum1 += value1;
        store(panel.data() + r * kPanel<A>, value0);
        store(panel.data() + r * kPanel<A> + kLanes<A>, value1);
      }
      for (int64_t n = 0; n < kLanes<A>; ++n) sums[n] += static_cast<double>(sum0[n]);
      for (int64_t n = 0; n < kLanes<A>; ++n) sums[kLanes<A> + n] += static_cast<double>(sum1[n]);
      return;
    }
    pack<A>(source, rows.row_stride, 1, A(1), {nullptr, count, columns(index)}, panel.data(), 0, 1);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t n = 0; n < columns(index); ++n)
        sums[n] += static_cast<double>(source[r * rows.row_stride + n]);
    }
  }

  // Adds the product of rows [first, first + count), at most kSpan, to one panel.
  MMK_INLINE void add(int64_t index, int64_t first, int64_t count) {
    gather(index, first, count);
    const int64_t ahead = count / std::max<int64_t>(strips(bottleneck), 1) + 1;
    const A* next = row_of<A>(rows, first) + (index + 1) * kPanel<A>;
    for (int64_t strip = 0; strip < strips(bottleneck); ++strip) {
      // Prefetch part of the next panel, one line per row: no hardware prefetcher follows this pattern.
      if ((index + 1) * kPanel<A> < width) {
        for (int64_t r = strip * ahead; r < std::min(count, (strip + 1) * ahead); ++r) {
          prefetch(next + r * rows.row_stride);
        }
      }
      Tile<A> tile;
      multiply_strip(tile, hidden + (strip * all_rows + first) * kTileRows, panel.data(), count);
      for (int i = 0; i < kTileRows; ++i) {
        A* cells = total(index, strip * kTileRows + i);
        store(cells, load(cells) + tile.sums[i][0]);
        store(cells + kLanes<A>, load(cells + kLanes<A>) + tile.sums[i][1]);
      }
    }
  }
};

template <class A>
MMK_INLINE void weight_panels(const AdapterWeightGradients& args, int64_t begin, int64_t end) {
  const auto [rows, width, bottleneck] = args.shape;
  const bool need_down = args.d_down != nullptr, need_up = args.d_up_bias != nullptr;
  OuterProduct<A> down(args.scaled, args.x, args.shape, begin, need_down ? end : begin);
  OuterProduct<A> up(args.activated, args.grad, args.shape, begin, need_up ? end : begin);
  for (int64_t first = 0; first < rows; first += kSpan) {
    const int64_t count = std::min(kSpan, rows - first);
    for (int64_t index = begin; need_down && index < end; ++index) down.add(index, first, count);
    for (int64_t index = begin; need_up && index < end; ++index) up.add(index, first, count);
  }
  const A scale = static_cast<A>(args.scale);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t column = index * kPanel<A>;
    const int64_t columns = down.columns(index);
    for (int64_t n = 0; need_down && n < bottleneck; ++n) {
      const A* total = down.total(index, n);
      std::copy(total, total + columns, at<A>(args.d_down, n * width + column));
    }
    for (int64_t i = 0; need_up && i < columns; ++i) {
      A* d_up = at<A>(args.d_up, (column + i) * bottleneck);
      for (int64_t n = 0; n < bottleneck; ++n) d_up[n] = scale * up.total(index, n)[i];
      *at<A>(args.d_up_bias, column + i) =
          static_cast<A>(args.scale * up.column_sums[(index - begin) * kPanel<A> + i]);
    }
  }
}

}  // namespace

int64_t adapter_panels(DType dtype, int64_t columns) {
  return dispatch_wide(dtype, [&](auto element) { return panels<decltype(element)>(columns); });
}

int64_t adapter_packed_size(DType dtype, int64_t depth, int64_t columns) {
  return dispatch_wide(dtype, [&](auto element) { return packed_size<decltype(element)>(depth, columns); });
}

int64_t adapter_strips_size(int64_t rows, int64_t columns) {
  return strips(columns) * kTileRows * rows;
}

MMK_MULTIARCH void adapter_pack(DType dtype, const AdapterPack& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA {
    using A = decltype(element);
    pack<A>(at<A>(args.source, 0), args.depth_stride, args.column_stride, static_cast<A>(args.factor),
            {nullptr, args.depth, args.columns}, at<A>(args.packed, 0), begin, end);
  });
}

MMK_MULTIARCH void adapter_forward(DType dtype, const AdapterForward& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { forward_rows<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void adapter_backward(DType dtype, const AdapterBackward& args, int64_t begin, int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { backward_runs<decltype(element)>(args, begin, end); });
}

MMK_MULTIARCH void adapter_weight_gradients(DType dtype, const AdapterWeightGradients& args, int64_t begin,
                                            int64_t end) {
  dispatch_wide(dtype, [&](auto element) MMK_LAMBDA { weight_panels<decltype(element)>(args, begin, end); });
}

}  // namespace mmk::cpu
