#include "cuda/common/partials.cuh"
#include "cuda/layer_mix.cuh"

namespace mmk::cuda {
namespace {

template <class T>
MMK_DEVICE const T* grad_row(const LayerMixBackward& args, int64_t batch, int64_t frame) {
  return static_cast<const T*>(args.grad) + batch * args.grad_batch_stride + frame * args.grad_frame_stride;
}

// ---- sums over rows, for d_weights, d_norm_weight and d_norm_bias

constexpr int kSumThreads = 128;
constexpr int kSumWarps = kSumThreads / kWarpSize;

// The rows of a warp: every kSumWarps-th one of its chunk. A run: those of one utterance, without padding.
class RowRuns {
 public:
  MMK_DEVICE RowRuns(const LayerMixParams& p, int64_t begin, int64_t end)
      : row_(begin), end_(end), batch_(begin / p.frames) {}

  // Calls enter(row, batch, frame) with the first row of the next run, if there is one.
  template <class Enter>
  MMK_DEVICE void next_run(const LayerMixParams& p, Enter&& enter) {
    while (row_ < end_) {
      const int64_t frame = row_ - batch_ * p.frames;
      if (frame < p.frames) {
        const int64_t rows = min(valid_frames(p, batch_) - frame, end_ - row_);
        if (rows > 0) {
          left_ = static_cast<int>((rows + kSumWarps - 1) / kSumWarps);
          enter(row_, batch_, frame);
          row_ += int64_t{left_} * kSumWarps;
          return;
        }
        row_ += (p.frames - frame + kSumWarps - 1) / kSumWarps * kSumWarps;
      }
      ++batch_;
    }
  }

  MMK_DEVICE bool done() const { return left_ == 0; }
  // Moves to the next row of the run; false at its end.
  MMK_DEVICE bool advance() { return --left_ > 0; }

 private:
  int64_t row_;  // past the run
  int64_t end_;
  int64_t batch_;
  int left_ = 0;  // rows of the run; a chunk has fewer than 2^31 rows
};

// Addresses of a warp's rows: of the layers of a group and of grad, padded to pairs.
constexpr int kSumRows = (kLayerMixGroup + 2) / 2 * 2;

// Shared memory of sum_rows: two stages, each with a vector per thread of every layer of a group and of grad,
// and with the group's moments and the addresses of the next rows per warp.
constexpr int kSumBytes = 2 * ((kLayerMixGroup + 1) * kSumThreads * 16 +
                               kSumWarps * (kLayerMixGroup * static_cast<int>(sizeof(float2)) +
                                            kSumRows * static_cast<int>(sizeof(void*))));

// A thread's sums over rows, for its columns: of grad * normalised layer (grad * layer without norm), and of
// grad.
template <int kWidth>
struct ColumnSums {
  Vec<float, kWidth> scale[kLayerMixGroup];
  Vec<float, kWidth> shift;
};

// The layers and columns of a block, and the shared memory that prefetches its rows: a warp adds one row
// while the next is in flight. A thread reads its own copies, and moments that its warp copied.
//
// Each lane follows the rows of one tensor: the first lanes those of the layers, the next those of grad, and
// later ones the moments. It publishes the address of a row one row ahead, through shared memory, where the
// barrier before the next fetch makes it visible to the warp.
template <class T, bool kAligned, bool kNorm>
struct RowTiles {
  static constexpr int kWidth = kVectorWidth<T>;
  static constexpr int kStageVectors = (kLayerMixGroup + 1) * kSumThreads;  // the last ones hold grad
  static constexpr int kMomentLane = 2 * kLayerMixGroup;                    // that of the first layer
  using Address = uint64_t;

  const LayerMixBackward& args;
  int first;
  int count;
  int columns;  // of the row from the thread's first one on; 0 or less past its end
  int64_t slice_begin;
  Vec<T, kWidth>* vectors;
  RowRuns runs;
  Address next = 0;  // the lane's tensor, at the row to be fetched and at the slice
  int64_t step = 0;  // from a row to the next

  MMK_DEVICE RowTiles(const LayerMixBackward& backward, int first_layer, int layers, int64_t first_column,
                      void* buffer, int64_t begin, int64_t end)
      : args(backward),
        first(first_layer),
        count(layers),
        columns(static_cast<int>(min(backward.mix.width - first_column, int64_t{kWarpSize} * kWidth)) -
                lane_index() * kWidth),
        slice_begin(first_column),
        vectors(static_cast<Vec<T, kWidth>*>(buffer)),
        runs(backward.mix, begin, end) {
    const int lane = lane_index();
    int64_t elements = 0;
    if (lane < count) elements = args.mix.frame_stride[first + lane];
    if (lane == kLayerMixGroup) elements = args.grad_frame_stride;
    step = kSumWarps * elements * static_cast<int64_t>(sizeof(T));
    if (follows_moments()) step = kSumWarps * args.mix.layers * static_cast<int64_t>(sizeof(float2));
    enter_run();
    publish(0);
  }

  MMK_DEVICE Vec<T, kWidth>* vector(int stage, int i) const {
    return vectors + stage * kStageVectors + i * kSumThreads + threadIdx.x;
  }
  MMK_DEVICE float2* moments(int stage) const {
    return reinterpret_cast<float2*>(vectors + 2 * kStageVectors) +
           (stage * kSumWarps + warp_index()) * kLayerMixGroup;
  }
  MMK_DEVICE Address* addresses(int stage) const {
    return reinterpret_cast<Address*>(reinterpret_cast<float2*>(vectors + 2 * kStageVectors) +
                                      2 * kSumWarps * kLayerMixGroup) +
           (stage * kSumWarps + warp_index()) * kSumRows;
  }

  // Past the end of the row a thread copies columns that it does not use.
  MMK_DEVICE void copy(Vec<T, kWidth>* target, Address row) const {
    const T* slice = reinterpret_cast<const T*>(row);
    if constexpr (kAligned) {
      cp_async<16>(target, slice + (columns > 0 ? lane_index() * kWidth : 0));
    } else {
      store(target->data, load_columns<false, kWidth>(slice + lane_index() * kWidth, 0, columns));
    }
  }

  // Starts the copies of the next row; false if there is none. A barrier of the warp is needed between two
  // calls, which take the stages in turn.
  MMK_DEVICE bool fetch(int stage) {
    if (runs.done()) return false;
    const Address* rows = addresses(stage);
#pragma unroll
    for (int i = 0; i < kSumRows; i += 2) {
      const Vec<Address, 2> pair = load<2>(rows + i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i + j > kLayerMixGroup) continue;
        if (i + j < count || i + j == kLayerMixGroup) copy(vector(stage, i + j), pair[j]);
      }
    }
    if (follows_moments()) {
      cp_async<8>(moments(stage) + lane_index() - kMomentLane, reinterpret_cast<const float2*>(next));
    }
    if (runs.advance()) {
      next += step;
    } else {
      enter_run();
    }
    publish(stage ^ 1);
    return true;
  }

  MMK_DEVICE void add(int stage, ColumnSums<kWidth>& sums) const {
    const Vec<float, kWidth> grad = unpack(load<kWidth>(vector(stage, kLayerMixGroup)->data));
#pragma unroll
    for (int i = 0; i < kLayerMixGroup; ++i) {
      if (i < count) {
        const Vec<float, kWidth> x = unpack(load<kWidth>(vector(stage, i)->data));
        float2 m = {0.0f, 1.0f};
        if constexpr (kNorm) m = moments(stage)[i];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sums.scale[i][j] += kNorm ? grad[j] * m.y * (x[j] - m.x) : grad[j] * x[j];
        }
      }
    }
    if constexpr (kNorm) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums.shift[j] += grad[j];
    }
  }

 private:
  MMK_DEVICE bool follows_moments() const {
    return kNorm && lane_index() >= kMomentLane && lane_index() < kMomentLane + count;
  }

  MMK_DEVICE void enter_run() {
    runs.next_run(args.mix, [&](int64_t row, int64_t batch, int64_t frame) {
      const int lane = lane_index();
      const void* start = nullptr;
      if (lane < count) start = layer_row<T>(args.mix, first + lane, {batch, frame, true}) + slice_begin;
      if (lane == kLayerMixGroup) start = grad_row<T>(args, batch, frame) + slice_begin;
      if (follows_moments()) {
        start = static_cast<const float2*>(args.stats) + row * args.mix.layers + first + lane - kMomentLane;
      }
      next = reinterpret_cast<Address>(start);
    });
  }

  MMK_DEVICE void publish(int stage) const {
    if (lane_index() < kSumRows) addresses(stage)[lane_index()] = next;
  }
};

// The contribution of a thread's columns to d_weights[layer].
template <bool kAligned, int kWidth>
MMK_DEVICE float dot_columns(const LayerMixParams& p, int layer, const Vec<float, kWidth>& scale,
                             const Vec<float, kWidth>& shift, int64_t column) {
  Vec<float, kWidth> gain, bias;
  if (p.norm_weight != nullptr) {
    gain = load_columns<kAligned, kWidth>(parameter_row(p.norm_weight, layer, p.width), column, p.width);
  }
  if (p.norm_bias != nullptr) {
    bias = load_columns<kAligned, kWidth>(parameter_row(p.norm_bias, layer, p.width), column, p.width);
  }
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    dot += p.norm_weight == nullptr ? scale[j] : gain[j] * scale[j];
    if (p.norm_bias != nullptr) dot += bias[j] * shift[j];
  }
  return dot;
}

// Adds the sums of the block's warps in order and writes the total. All threads must call it.
template <int kWidth>
MMK_DEVICE void store_column_sums(float* partial, const Vec<float, kWidth>& value, int64_t first_column,
                                  int64_t width) {
  constexpr int kColumns = kWarpSize * kWidth;
  MMK_SHARED(float, columns, kSumWarps, kColumns);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) columns[warp_index()][lane_index() * kWidth + j] = value[j];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns && first_column + i < width; i += kSumThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kSumWarps; ++warp) sum += columns[warp][i];
    partial[first_column + i] = sum;
  }
  __syncthreads();
}

// Unaligned rows are copied element by element, which takes registers.
template <class T, bool kAligned, bool kNorm>
__global__ void __launch_bounds__(kSumThreads, kAligned ? 4 : 3)
    sum_rows(const __grid_constant__ LayerMixBackward args, const __grid_constant__ LayerMixSums plan) {
  constexpr int kWidth = kVectorWidth<T>;
  const LayerMixParams& p = args.mix;
  // Neighbouring blocks read the same rows of grad.
  const int group = static_cast<int>(blockIdx.x) % plan.groups;
  const int64_t slice = static_cast<int64_t>(blockIdx.x) / plan.groups % plan.slices;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / plan.groups / plan.slices;
  const int first = group * p.layers / plan.groups;
  const int count = (group + 1) * p.layers / plan.groups - first;
  const int64_t slice_begin = slice * plan.slice_columns;
  const int64_t column = slice_begin + lane_index() * kWidth;
  const int64_t begin = chunk * plan.rows_per_chunk;
  const int64_t end = min(begin + plan.rows_per_chunk, p.batch * p.frames);

  MMK_DYNAMIC_SMEM(unsigned char, buffer);
  using Tiles = RowTiles<T, kAligned, kNorm>;
  Tiles tiles(args, first, count, slice_begin, buffer, begin + warp_index(), end);
  ColumnSums<kWidth> sums = {};
  __syncwarp();
  bool more = tiles.fetch(0);
  for (int stage = 0; more; stage ^= 1) {
    cp_async_wait_all();
    __syncwarp();  // for moments and addresses, and so that no lane still reads the other stage
    more = tiles.fetch(stage ^ 1);
    tiles.add(stage, sums);
  }
  if (column >= p.width) sums = {};
  if (args.need_weights) {
    float dots[kLayerMixGroup];
#pragma unroll
    for (int i = 0; i < kLayerMixGroup; ++i) {
      dots[i] = 0.0f;
      if (i < count) dots[i] = dot_columns<kAligned>(p, first + i, sums.scale[i], sums.shift, column);
    }
    block_sums<kSumThreads>(dots);
    float* partial = static_cast<float*>(args.partial_dot) + (chunk * plan.slices + slice) * p.layers + first;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kLayerMixGroup; ++i) {
        if (i < count) partial[i] = dots[i];
      }
    }
  }
  if (!args.need_affine) return;
  float* scale = static_cast<float*>(args.partial_scale) + (chunk * p.layers + first) * p.width;
#pragma unroll
  for (int i = 0; i < kLayerMixGroup; ++i) {
    if (i < count) store_column_sums(scale + i * p.width, sums.scale[i], slice_begin, p.width);
  }
  float* shift = static_cast<float*>(args.partial_shift) + chunk * p.width;
  if (group == 0) store_column_sums(shift, sums.shift, slice_begin, p.width);
}

// ---- from partial sums to gradients

MMK_HOST_DEVICE int64_t gain_blocks(const LayerMixParams& p) {
  return ceil_div<int64_t>(p.layers * p.width, kWarpSize);
}

// The first blocks take 32 gains each; the others 32 columns of the bias, whose sums all layers share.
__global__ void __launch_bounds__(kPartialThreads)
    reduce_affine(const __grid_constant__ LayerMixBackward args, int64_t partials) {
  const LayerMixParams& p = args.mix;
  const float* weights = static_cast<const float*>(p.weights);
  const bool of_gain = blockIdx.x < gain_blocks(p);
  const int64_t columns = of_gain ? p.layers * p.width : p.width;
  const int64_t index = (blockIdx.x - (of_gain ? 0 : gain_blocks(p))) * kWarpSize + lane_index();
  const bool inside = index < columns;
  const float* partial = static_cast<const float*>(of_gain ? args.partial_scale : args.partial_shift);
  const double total = sum_partials<kWarpSize>(partial + index, partials, columns, inside);
  if (!inside) return;
  if (of_gain) {
    if (warp_index() != 0) return;
    static_cast<float*>(args.d_norm_weight)[index] = static_cast<float>(weights[index / p.width] * total);
    return;
  }
  for (int l = warp_index(); l < p.layers; l += kPartialThreads / kWarpSize) {
    static_cast<float*>(args.d_norm_bias)[l * p.width + index] = static_cast<float>(weights[l] * total);
  }
}

// ---- gradients of the layers without norm: weights[l] * grad, one thread per vector; no layer is read

template <class T, bool kAligned>
__global__ void __launch_bounds__(kPlainThreads)
    gradients_plain(const __grid_constant__ LayerMixBackward args, int64_t vectors_per_row) {
  constexpr int kWidth = kVectorWidth<T>;
  const LayerMixParams& p = args.mix;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  const int64_t row_index = index / vectors_per_row;
  if (row_index >= p.batch * p.frames) return;
  const int64_t column = (index - row_index * vectors_per_row) * kWidth;
  const MixRow row = locate(p, row_index);
  Vec<float, kWidth> grad = {};
  if (row.valid) {
    const T* start = grad_row<T>(args, row.batch, row.frame);
    grad = unpack(load_columns<kAligned, kWidth>(start, column, p.width));
  }
  for (int l = 0; l < p.layers; ++l) {
    T* d_layer = static_cast<T*>(args.d_layer[l]);
    if (d_layer == nullptr) continue;
    const float weight = row.valid ? __ldg(static_cast<const float*>(p.weights) + l) : 0.0f;
    Vec<float, kWidth> value;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] = weight * grad[j];
    store_columns<kAligned>(d_layer + row_index * p.width, column, p.width, from_accumulator<T>(value));
  }
}

// ---- gradients of the layers with norm: one warp or block per row, whose grad stays in registers

// d_layer = weight * rstd * (g - mean(g) - xhat * mean(g xhat)), g = grad * gain, written as
// scale * (g - offset - slope * (x - mean)).
struct GradientForm {
  float scale;
  float offset;
  float slope;
};

MMK_DEVICE GradientForm gradient_form(float weight, float rstd, float dot, float sum, int64_t width) {
  const float inverse = 1.0f / static_cast<float>(width);
  return {weight * rstd, sum * inverse, dot * rstd * rstd * inverse};
}

// The turn of the next sum over a row (row_sums_in_turn).
struct Turn {
  int next = 0;

  template <class Shape, int kCount>
  MMK_DEVICE void sum(float (&values)[kCount]) {
    row_sums_in_turn<Shape::kThreads>(values, next);
    next ^= 1;
  }
};

template <class Shape>
MMK_DEVICE float dot_parameter(const typename Shape::Part& part, const float* parameter, int width,
                               Turn& turn) {
  float sum[1] = {0.0f};
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
    const auto value = load_columns<Shape::kIsAligned, Shape::kWidth>(parameter, Shape::column(v), width);
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) sum[0] += part[v][i] * value[i];
  }
  turn.sum<Shape>(sum);
  return sum[0];
}

// Writes the gradient of one row of a layer, unless d_layer is null, and overwrites x. Returns the row's
// contribution to d_weights, without that of the bias. Only full shapes are compiled without kGain.
template <class Shape, bool kGain>
MMK_DEVICE float layer_gradient(typename Shape::Element* d_layer, typename Shape::Part& x,
                                const typename Shape::Part& grad, float2 moments, float weight,
                                const float* gain, int width, Turn& turn) {
  typename Shape::Part scaled;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
    scaled[v] = grad[v];
    if (kGain && (Shape::kIsFull || gain != nullptr)) {
      const auto factor = load_columns<Shape::kIsAligned, Shape::kWidth>(gain, Shape::column(v), width);
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) scaled[v][i] *= factor[i];
    }
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) {
      x[v][i] -= moments.x;
      sums[0] += scaled[v][i] * x[v][i];
      sums[1] += scaled[v][i];
    }
  }
  turn.sum<Shape>(sums);
  if (d_layer != nullptr) {
    const GradientForm form = gradient_form(weight, moments.y, sums[0], sums[1], width);
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) {
        x[v][i] = form.scale * (scaled[v][i] - form.offset - form.slope * x[v][i]);
      }
      store_columns<Shape::kIsAligned>(d_layer, Shape::column(v), width,
                                       from_accumulator<typename Shape::Element>(x[v]));
    }
  }
  return sums[0] * moments.y;
}

template <class Shape>
MMK_DEVICE void zero_gradients(const LayerMixBackward& args, int64_t row) {
  using T = typename Shape::Element;
  const int width = Shape::width(args.mix.width);
  for (int l = 0; l < args.mix.layers; ++l) {
    if (args.d_layer[l] == nullptr) continue;
    T* d_layer = static_cast<T*>(args.d_layer[l]) + row * width;
#pragma unroll
    for (int v = 0; v < Shape::kCount; ++v) {
      store_columns<Shape::kIsAligned>(d_layer, Shape::column(v), width, Vec<T, Shape::kWidth>{});
    }
  }
}

// Computes the needed gradients of one row and, with need_dots, adds its contributions to d_weights to dots.
template <class Shape, bool kGain>
MMK_DEVICE void row_gradients(const LayerMixBackward& args, int64_t index, const MixRow& row, bool need_dots,
                              RowRing<Shape>& ring, Turn& turn, float* dots) {
  using T = typename Shape::Element;
  const LayerMixParams& p = args.mix;
  const int width = Shape::width(p.width);
  const T* grad_start = grad_row<T>(args, row.batch, row.frame);
  typename Shape::Part grad;
#pragma unroll
  for (int v = 0; v < Shape::kCount; ++v) {
    grad[v] = unpack(load_columns<Shape::kIsAligned, Shape::kWidth>(grad_start, Shape::column(v), width));
  }
  const float2* stats = static_cast<const float2*>(args.stats) + index * p.layers;
  const auto is_needed = [&](int l) { return l < p.layers && (need_dots || args.d_layer[l] != nullptr); };
  const auto push = [&](int l) { ring.push(is_needed(l) ? layer_row<T>(p, l, row) : nullptr, width); };
  for (int l = 0; l < ring.kInFlight; ++l) push(l);
  for (int l = 0; l < p.layers; ++l) {
    typename Shape::Part x;
    if (is_needed(l)) ring.peek(x);
    ring.pop();
    push(l + ring.kInFlight);
    if (!is_needed(l)) continue;
    T* d_layer = static_cast<T*>(args.d_layer[l]);
    if (d_layer != nullptr) d_layer += index * width;
    const float* gain = parameter_row(p.norm_weight, l, width);
    const float weight = __ldg(static_cast<const float*>(p.weights) + l);
    float dot = layer_gradient<Shape, kGain>(d_layer, x, grad, __ldg(stats + l), weight, gain, width, turn);
    if (!need_dots) continue;
    if (p.norm_bias != nullptr) {
      dot += dot_parameter<Shape>(grad, parameter_row(p.norm_bias, l, width), width, turn);
    }
    if (Shape::thread() == 0) dots[l] += dot;
  }
  ring.drain();
}

// Blocks of gradients_norm per multiprocessor: as many as leave registers for grad, one row, and its gain.
template <class Shape, bool kGain>
constexpr int gradient_blocks() {
  int blocks = Shape::kElements > 32 || (kGain && kFewerBlocks) ? 2 : 3;
  if (Shape::kIsFull && !kGain && !kFewerBlocks) ++blocks;
  return blocks * kRowBlockThreads / Shape::kBlockThreads;
}

template <class Shape, bool kGain>
__global__ void __launch_bounds__(Shape::kBlockThreads, gradient_blocks<Shape, kGain>())
    gradients_norm(const __grid_constant__ LayerMixBackward args, int64_t rows_per_block, bool need_dots) {
  const LayerMixParams& p = args.mix;
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = min(begin + rows_per_block, p.batch * p.frames);
  MMK_SHARED(float, dots, Shape::kRowsPerBlock, kLayerMixMaxLayers);
  for (int l = Shape::thread(); l < p.layers; l += Shape::kThreads) dots[Shape::slot()][l] = 0.0f;
  __syncthreads();

  MMK_DYNAMIC_SMEM(typename Shape::Element, buffer);
  RowRing<Shape> ring(buffer);
  Turn turn;
  for (int64_t index = begin + Shape::slot(); index < end; index += Shape::kRowsPerBlock) {
    const MixRow row = locate(p, index);
    if (row.valid) {
      row_gradients<Shape, kGain>(args, index, row, need_dots, ring, turn, dots[Shape::slot()]);
    } else {
      zero_gradients<Shape>(args, index);
    }
  }
  if (!need_dots) return;
  __syncthreads();
  float* partial = static_cast<float*>(args.partial_dot) + static_cast<int64_t>(blockIdx.x) * p.layers;
  for (int l = threadIdx.x; l < p.layers; l += Shape::kBlockThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int slot = 0; slot < Shape::kRowsPerBlock; ++slot) sum += dots[slot][l];
    partial[l] = sum;
  }
}

// ---- gradients with norm of rows too wide for the registers: read twice, the second time from the L2 cache

template <class T, bool kAligned>
struct WideGradient {
  using Columns = Vec<float, kVectorWidth<T>>;
  T* d_layer;  // or null
  const T* x;
  const T* grad;
  float2 moments;
  float weight;
  const float* gain;  // or null
  const float* bias;  // or null
  int64_t width;

  template <class E>
  MMK_DEVICE Columns columns(const E* row, int64_t column) const {
    return unpack(load_columns<kAligned, kVectorWidth<T>>(row, column, width));
  }

  MMK_DEVICE Columns scaled_grad(int64_t column) const {
    Columns value = columns(grad, column);
    if (gain == nullptr) return value;
    const Columns factor = columns(gain, column);
#pragma unroll
    for (int i = 0; i < kVectorWidth<T>; ++i) value[i] *= factor[i];
    return value;
  }

  // Sums g (x - mean), g, and grad * bias over the row.
  MMK_DEVICE void sum(float (&sums)[3]) const {
    for_each_vector<kWideThreads, kAligned>(x, width, [&](int64_t column, const Columns& value) {
      const Columns scaled = scaled_grad(column);
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) {
        sums[0] += scaled[i] * (value[i] - moments.x);
        sums[1] += scaled[i];
      }
      if (bias == nullptr) return;
      const Columns plain = columns(grad, column);
      const Columns shift = columns(bias, column);
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) sums[2] += plain[i] * shift[i];
    });
    block_sums<kWideThreads>(sums);
  }

  MMK_DEVICE void write(const GradientForm& form) const {
    for_each_vector<kWideThreads, kAligned>(x, width, [&](int64_t column, const Columns& value) {
      Columns result = scaled_grad(column);
#pragma unroll
      for (int i = 0; i < kVectorWidth<T>; ++i) {
        result[i] = form.scale * (result[i] - form.offset - form.slope * (value[i] - moments.x));
      }
      store_columns<kAligned>(d_layer, column, width, from_accumulator<T>(result));
    });
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWideThreads)
    gradients_norm_wide(const __grid_constant__ LayerMixBackward args, int64_t rows_per_block,
                        bool need_dots) {
  const LayerMixParams& p = args.mix;
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = min(begin + rows_per_block, p.batch * p.frames);
  for (int l = 0; l < p.layers; ++l) {
    T* d_layer = static_cast<T*>(args.d_layer[l]);
    if (d_layer == nullptr && !need_dots) continue;
    float dot = 0.0f;
    for (int64_t index = begin; index < end; ++index) {
      const MixRow row = locate(p, index);
      T* d_row = d_layer == nullptr ? nullptr : d_layer + index * p.width;
      if (!row.valid) {
        for (int64_t j = threadIdx.x; d_row != nullptr && j < p.width; j += kWideThreads) {
          d_row[j] = from_accumulator<T>(0.0f);
        }
        continue;
      }
      const WideGradient<T, kAligned> gradient = {
          d_row,
          layer_row<T>(p, l, row),
          grad_row<T>(args, row.batch, row.frame),
          static_cast<const float2*>(args.stats)[index * p.layers + l],
          static_cast<const float*>(p.weights)[l],
          parameter_row(p.norm_weight, l, p.width),
          need_dots ? parameter_row(p.norm_bias, l, p.width) : nullptr,
          p.width};
      float sums[3] = {0.0f, 0.0f, 0.0f};
      gradient.sum(sums);
      const float rstd = gradient.moments.y;
      if (d_row != nullptr) gradient.write(gradient_form(gradient.weight, rstd, sums[0], sums[1], p.width));
      dot += sums[0] * rstd + sums[2];
    }
    if (need_dots && threadIdx.x == 0) {
      static_cast<float*>(args.partial_dot)[static_cast<int64_t>(blockIdx.x) * p.layers + l] = dot;
    }
  }
}

// ---- launchers

template <class T, bool kAligned>
cudaError_t backward_sums(const LayerMixBackward& args, const LayerMixSums& plan, CudaStream stream) {
  if (plan.blocks() == 0) return cudaSuccess;
  dim3 grid;
  if (!make_grid(plan.blocks(), &grid)) return cudaErrorInvalidConfiguration;
  const auto kernel = args.mix.norm ? sum_rows<T, kAligned, true> : sum_rows<T, kAligned, false>;
  return launch(kernel, grid, dim3(kSumThreads), kSumBytes, stream, args, plan);
}

template <class T, bool kAligned>
cudaError_t backward_gradients(const LayerMixBackward& args, const LayerMixBackwardPlan& plan,
                               CudaStream stream) {
  if (plan.gradient_blocks == 0) return cudaSuccess;
  dim3 grid;
  if (!args.mix.norm) {
    const int64_t vectors_per_row = ceil_div<int64_t>(args.mix.width, kVectorWidth<T>);
    const int64_t vectors = args.mix.batch * args.mix.frames * vectors_per_row;
    if (!make_grid(ceil_div<int64_t>(vectors, kPlainThreads), &grid)) return cudaErrorInvalidConfiguration;
    return launch(gradients_plain<T, kAligned>, grid, dim3(kPlainThreads), 0, stream, args, vectors_per_row);
  }
  if (!make_grid(plan.gradient_blocks, &grid)) return cudaErrorInvalidConfiguration;
  const auto in_registers = [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = Shape::kIsFull && args.mix.norm_weight == nullptr
                            ? gradients_norm<Shape, !Shape::kIsFull>
                            : gradients_norm<Shape, true>;
    return launch(kernel, grid, dim3(Shape::kBlockThreads), RowRing<Shape>::kBytes, stream, args,
                  plan.rows_per_block, plan.gradients_dot);
  };
  const auto wide = [&] {
    return launch(gradients_norm_wide<T, kAligned>, grid, dim3(kWideThreads), 0, stream, args,
                  plan.rows_per_block, plan.gradients_dot);
  };
  return dispatch_streamed_row_shape<T, kAligned>(args.mix.width, in_registers, wide);
}

template <class T, bool kAligned>
cudaError_t backward(const LayerMixBackward& args, const LayerMixBackwardPlan& plan, CudaStream stream) {
  if (plan.sums) {
    const cudaError_t error = backward_sums<T, kAligned>(args, plan.sum_plan, stream);
    if (error != cudaSuccess) return error;
  }
  return plan.gradients ? backward_gradients<T, kAligned>(args, plan, stream) : cudaSuccess;
}

template <class T>
bool gradients_aligned(const LayerMixBackward& args) {
  bool aligned =
      is_aligned<T>(args.mix) && rows_aligned<T>(args.grad, args.grad_batch_stride, args.grad_frame_stride);
  for (int l = 0; l < args.mix.layers; ++l) {
    aligned = aligned && rows_aligned<T>(args.d_layer[l]);
  }
  return aligned;
}

cudaError_t reduce(const LayerMixBackward& args, const LayerMixBackwardPlan& plan, CudaStream stream) {
  if (args.need_weights) {
    const cudaError_t error = reduce_partials<4>(args.partial_dot, plan.dot_partials, args.mix.layers, 1.0,
                                                 static_cast<float*>(args.d_weights), stream);
    if (error != cudaSuccess) return error;
  }
  if (!args.need_affine || args.mix.width == 0) return cudaSuccess;
  const int64_t blocks = gain_blocks(args.mix) + ceil_div<int64_t>(args.mix.width, kWarpSize);
  dim3 grid;
  if (!make_grid(blocks, &grid)) return cudaErrorInvalidConfiguration;
  return launch(reduce_affine, grid, dim3(kPartialThreads), 0, stream, args, plan.affine_partials);
}

}  // namespace

int layer_mix_backward(const LayerMixBackward& args, CudaStream stream) {
  const LayerMixParams& p = args.mix;
  bool need_layers = false;
  for (int l = 0; l < p.layers; ++l) need_layers = need_layers || args.d_layer[l] != nullptr;
  const LayerMixBackwardPlan plan =
      layer_mix_backward_plan(p.dtype, p.batch * p.frames, p.width, p.layers, p.norm, args.need_weights,
                              args.need_affine, need_layers);
  const cudaError_t error = dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    return gradients_aligned<T>(args) ? backward<T, true>(args, plan, stream)
                                      : backward<T, false>(args, plan, stream);
  });
  return error != cudaSuccess ? error : reduce(args, plan, stream);
}

}  // namespace mmk::cuda
