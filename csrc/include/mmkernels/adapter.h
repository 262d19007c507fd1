// adapter: out = residual + scale * (act(LN(x) V^T + b) U^T + c), x (rows, width), V (bottleneck, width),
// U (width, bottleneck).
//
// The LayerNorm is folded into V as in norm_product.h. With W = V * gamma, Vc = W - mean(W) of each row,
//   z = LN(x) V^T + b = rstd * (x Vc^T) + b',   b' = b + V beta.
// Backwards, with g = dL/dout and a = act(z),
//   dz = (scale g U) * act'(z),  dU = scale g^T a,  dc = scale sum_r g,  db = db' = sum_r dz,
//   s = dz * rstd,  dVc = s^T x,  dW = dVc - mean(dVc),  dV = dW * gamma + db' beta^T,
//   dgamma = sum_o dW * V,  dbeta = V^T db',
//   dx = s Vc - pull * (x - mean) [+ g where x is the residual],  pull = rstd^2 / width * sum_o dz (z - b').
// Without norm_weight, Vc is V, rstd is 1, and the terms with mean and pull vanish.
//
// The forward pass saves x, z (rounded to the type of x) and, with LayerNorm, mean and rstd of each row.
//
// Short names of the algebra:
//   Vc     down-projection with the LayerNorm gain folded in and every row centred ("folded_weight")
//   b'     its bias with the LayerNorm bias folded in ("hidden_bias" or "folded_bias")
//   z, a   hidden values before and after the activation
//   s      gradient at z times rstd, the left factor of dVc and dx ("scaled", "scaled_grad")
//   pull   factor of x - mean in dx: a row's gradient through the variance
// of the CPU kernels:
//   run    kAdapterRun consecutive rows, whose bias gradients one thread sums in order
//   panel  kPanel columns of a packed right factor, dense by rows (cpu/product.h)
//   strip  kTileRows columns of a transposed left factor, dense by rows (cpu/product.h)
// of the CUDA kernels:
//   tile   rows that a block takes through both products at a time
//   chunk  columns of a tile that one step reads; it lies in a slot of the ring in shared memory
//   held   the ring keeps the whole tile, so that the second product can add it without reading it again
#pragma once

#include <cstdint>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

struct AdapterShape {
  int64_t rows;
  int64_t width;
  int64_t bottleneck;
};

// A matrix (rows, width) with a dense last dimension.
struct AdapterRows {
  const void* data;
  int64_t row_stride;
};

namespace cpu {

// Rows processed together, so that they stay in cache; a multiple of the products' tile.
constexpr int64_t kAdapterBlock = 48;

// Rows with one partial sum of the bias gradient. One thread takes a whole run, so that the sums do not
// depend on the number of threads. A divisor of kAdapterBlock.
constexpr int64_t kAdapterRun = 12;

constexpr int64_t adapter_runs(int64_t rows) {
  return (rows + kAdapterRun - 1) / kAdapterRun;
}

// Packs factor times a matrix (depth, columns) into panels; see cpu/product.h.
struct AdapterPack {
  const void* source;  // element (k, n) is source[k * depth_stride + n * column_stride]
  int64_t depth_stride, column_stride;
  int64_t depth, columns;
  double factor;
  void* packed;
};

struct AdapterForward {
  AdapterShape shape;
  Activation activation;
  double scale, eps;
  bool norm;
  AdapterRows x;
  AdapterRows residual;     // null for none
  const void* down;         // Vc^T, packed
  const void* up;           // scale U^T, packed
  const void* hidden_bias;  // [bottleneck] b'
  const void* up_bias;      // [width] or null
  void* out;                // [rows, width]
  void* hidden;             // [rows, bottleneck] z, or null
  void* stats;              // [rows, 2] or null
};

struct AdapterBackward {
  AdapterShape shape;
  Activation activation;
  bool add_input;
  AdapterRows grad;
  AdapterRows x;
  const void* hidden;         // [rows, bottleneck]
  const void* stats;          // [rows, 2], null without norm
  const void* up;             // scale U, packed
  const void* down;           // Vc, packed; null where dx is
  const void* hidden_bias;    // [bottleneck]; read for dx with norm
  void* dx;                   // [rows, width] or null
  void* scaled;               // s in strips
  void* activated;            // a in strips
  void* partial_hidden_bias;  // [runs, bottleneck] sums of dz over the rows of a run
};

// One thread sums a column of x or g over all rows, in order, so that the sums do not depend on the number of
// threads.
struct AdapterWeightGradients {
  AdapterShape shape;
  double scale;
  AdapterRows grad;
  AdapterRows x;
  const void* scaled;
  const void* activated;
  void* d_down;     // [bottleneck, width] dVc, or null
  void* d_up;       // [width, bottleneck], or null
  void* d_up_bias;  // [width], null with d_up
};

// dtype is kFloat32 or kFloat64. [begin, end) counts panels in adapter_pack, rows in adapter_forward, runs in
// adapter_backward, and panels of x's columns in adapter_weight_gradients.
int64_t adapter_panels(DType dtype, int64_t columns);
int64_t adapter_packed_size(DType dtype, int64_t depth, int64_t columns);
int64_t adapter_strips_size(int64_t rows, int64_t columns);
void adapter_pack(DType dtype, const AdapterPack& args, int64_t begin, int64_t end);
void adapter_forward(DType dtype, const AdapterForward& args, int64_t begin, int64_t end);
void adapter_backward(DType dtype, const AdapterBackward& args, int64_t begin, int64_t end);
void adapter_weight_gradients(DType dtype, const AdapterWeightGradients& args, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

constexpr int64_t kAdapterMostBottleneck = 256;

// How the fused kernels split the rows. Each multiprocessor runs one block, which takes a contiguous range of
// rows tile by tile. A tile arrives in chunks of columns through a ring of slots in shared memory.
struct AdapterTiles {
  int64_t tile_rows;
  int64_t bottleneck;  // padded
  int64_t rows_per_block;
  int64_t tiles_per_block;
  int64_t blocks;
  int64_t chunk_columns;
  int64_t chunks;
  int64_t slots;
  bool held;
  int64_t shared_bytes;

  constexpr int64_t tiles() const { return blocks * tiles_per_block; }
  // Rows of partial_up_bias.
  constexpr int64_t column_sums() const { return tiles() * (64 / chunk_columns); }
};

// The plan for a device with this many multiprocessors and `shared_limit` bytes of shared memory per block.
// hold: the second product adds the rows that the first one reads.
AdapterTiles adapter_tiles(const AdapterShape& shape, bool hold, int64_t multiprocessors,
                           int64_t shared_limit);
// The plan for the current device; a cudaError_t.
int adapter_tiles(const AdapterShape& shape, bool hold, AdapterTiles* tiles);

// The whole forward pass in one kernel, with the parameters that norm_product_fold wrote.
struct AdapterForward {
  AdapterShape shape;
  Activation activation;
  double scale;
  double eps;
  AdapterRows x;
  AdapterRows residual;     // of out's type; null for none
  bool add_input;           // x is the residual, and `residual` is null
  DType out_type;           // that of x, or float
  const void* down_weight;  // [bottleneck, width]  Vc
  const void* folded_bias;  // [bottleneck]         b'
  const void* folded_sum;   // [bottleneck]         null without norm
  const void* up_weight;    // [width, bottleneck]
  const void* up_bias;      // [width], float; null for none
  void* out;                // [rows, width]
  void* hidden;             // [rows, bottleneck] z, or null
  void* stats;              // [rows, 2] or null
};

// The backward pass in one kernel, except for the products that sum over rows. Null outputs are not computed.
struct AdapterBackward {
  AdapterShape shape;
  Activation activation;
  double scale;
  AdapterRows grad;
  AdapterRows x;            // read for pull only
  bool add_input;           // adds g to dx
  const void* down_weight;  // [bottleneck, width]  Vc
  const void* folded_bias;  // [bottleneck]         b', for pull
  const void* up_weight;    // [width, bottleneck]
  const void* hidden;       // [rows, bottleneck]   z
  const void* stats;        // [rows, 2], null without norm
  void* dx;                 // [rows, width]
  void* activated;          // [rows, bottleneck]   scale * act(z)
  void* scaled_grad;        // [rows, bottleneck]   s
  void* partial_bias;       // [tiles, bottleneck]  sums of dz over the rows of a tile
  void* partial_up_bias;    // [column_sums, width] sums of g over the rows of a part of a tile
};

// Steps around library products, for problems that the fused kernels do not support.

// activated = scale * act(hidden)
struct AdapterActivate {
  AdapterShape shape;
  Activation activation;
  double scale;
  const void* hidden;
  void* activated;
};

// out = scale * (product + bias) + addend - pull * (x - mean)
struct AdapterFinish {
  AdapterShape shape;
  double scale;
  const void* product;  // [rows, width] float
  const void* bias;     // [width] float, or null
  AdapterRows addend;   // of out's type, or null
  AdapterRows x;
  const void* stats;  // [rows, 2], read with pull
  const void* pull;   // [rows] or null
  DType out_type;
  void* out;
};

// Sums of g over rows, in chunks of kAdapterSumRows.
constexpr int64_t kAdapterSumRows = 256;

struct AdapterColumnSums {
  AdapterShape shape;
  AdapterRows grad;
  void* partial;  // [ceil(rows / kAdapterSumRows), width]
};

// d_up_bias = scale * sum of the partial sums, in a fixed order
struct AdapterUpBias {
  int64_t width;
  int64_t chunks;
  double scale;
  const void* partial;  // [chunks, width]
  void* d_up_bias;      // [width]
  DType type;           // of d_up_bias
};

// Whether the fused kernels support a problem: half precision, dimensions of whole 16-byte vectors, and a
// bottleneck of at most kAdapterMostBottleneck. adapter_rows_fuse checks the alignment of rows.
bool adapter_fuses(DType dtype, const AdapterShape& shape);
bool adapter_rows_fuse(const AdapterRows& rows);

// Launchers run on the current device and return a cudaError_t. dtype is that of x: float, half or bfloat16.
int adapter_forward(DType dtype, const AdapterForward& args, const AdapterTiles& tiles, CudaStream stream);
int adapter_backward(DType dtype, const AdapterBackward& args, const AdapterTiles& tiles, CudaStream stream);
int adapter_activate(DType dtype, const AdapterActivate& args, CudaStream stream);
int adapter_finish(DType dtype, const AdapterFinish& args, CudaStream stream);
int adapter_column_sums(DType dtype, const AdapterColumnSums& args, CudaStream stream);
int adapter_up_bias(const AdapterUpBias& args, CudaStream stream);

}  // namespace cuda
}  // namespace mmk
