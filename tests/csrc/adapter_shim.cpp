// The launchers of adapter with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/adapter.h"
#include "mmkernels/norm_product.h"

namespace {

// sizes: dtype, rows, width, bottleneck, activation, and for functions with parameters their dtype
mmk::DType dtype_of(const int64_t* sizes) {
  return static_cast<mmk::DType>(sizes[0]);
}
mmk::AdapterShape shape_of(const int64_t* sizes) {
  return {sizes[1], sizes[2], sizes[3]};
}
mmk::Activation activation_of(const int64_t* sizes) {
  return static_cast<mmk::Activation>(sizes[4]);
}
mmk::DType parameter_type_of(const int64_t* sizes) {
  return static_cast<mmk::DType>(sizes[5]);
}

}  // namespace

extern "C" {

// plan: tile_rows, rows_per_block, tiles_per_block, blocks, chunk_columns, held, shared_bytes, tiles,
// column_sums
int adapter_plan(const int64_t* sizes, int64_t hold, int64_t* plan) {
  mmk::cuda::AdapterTiles tiles = {};
  if (const int error = mmk::cuda::adapter_tiles(shape_of(sizes), hold != 0, &tiles)) return error;
  const int64_t values[] = {tiles.tile_rows,    tiles.rows_per_block, tiles.tiles_per_block,
                            tiles.blocks,       tiles.chunk_columns,  tiles.held ? 1 : 0,
                            tiles.shared_bytes, tiles.tiles(),        tiles.column_sums()};
  for (int i = 0; i < 9; ++i) plan[i] = values[i];
  return 0;
}

int adapter_fuses(const int64_t* sizes, const void* x, int64_t x_stride, int64_t* result) {
  *result = mmk::cuda::adapter_fuses(dtype_of(sizes), shape_of(sizes)) &&
            mmk::cuda::adapter_rows_fuse({x, x_stride});
  return 0;
}

int adapter_fold(const int64_t* sizes, const void* down_weight, const void* down_bias, const void* up_weight,
                 const void* up_bias, const void* norm_weight, const void* norm_bias, void* folded_weight,
                 void* folded_bias, void* folded_sum, void* folded_up, void* folded_up_bias) {
  const auto [rows, width, bottleneck] = shape_of(sizes);
  const mmk::NormProductFold args = {{rows, 1, width, bottleneck},
                                     down_weight,
                                     down_bias,
                                     norm_weight,
                                     norm_bias,
                                     folded_weight,
                                     folded_bias,
                                     folded_sum,
                                     parameter_type_of(sizes),
                                     {up_weight, folded_up, width * bottleneck},
                                     {up_bias, folded_up_bias, width}};
  return mmk::cuda::norm_product_fold(dtype_of(sizes), args, nullptr);
}

int adapter_forward(const int64_t* sizes, double scale, double eps, const void* x, int64_t x_stride,
                    const void* residual, int64_t residual_stride, int64_t add_input, int64_t out_type,
                    const void* down, const void* bias, const void* sum, const void* up, const void* up_bias,
                    void* out, void* hidden, void* stats) {
  const mmk::cuda::AdapterForward args = {shape_of(sizes),
                                          activation_of(sizes),
                                          scale,
                                          eps,
                                          {x, x_stride},
                                          {residual, residual_stride},
                                          add_input != 0,
                                          static_cast<mmk::DType>(out_type),
                                          down,
                                          bias,
                                          sum,
                                          up,
                                          up_bias,
                                          out,
                                          hidden,
                                          stats};
  mmk::cuda::AdapterTiles tiles = {};
  if (const int error = mmk::cuda::adapter_tiles(shape_of(sizes), add_input != 0, &tiles)) return error;
  return mmk::cuda::adapter_forward(dtype_of(sizes), args, tiles, nullptr);
}

int adapter_backward(const int64_t* sizes, double scale, const void* grad, int64_t grad_stride, const void* x,
                     int64_t x_stride, int64_t add_input, const void* down, const void* bias, const void* up,
                     const void* hidden, const void* stats, void* dx, void* activated, void* scaled_grad,
                     void* partial_bias, void* partial_up_bias) {
  const mmk::cuda::AdapterBackward args = {shape_of(sizes),
                                           activation_of(sizes),
                                           scale,
                                           {grad, grad_stride},
                                           {x, x_stride},
                                           add_input != 0,
                                           down,
                                           bias,
                                           up,
                                           hidden,
                                           stats,
                                           dx,
                                           activated,
                                           scaled_grad,
                                           partial_bias,
                                           partial_up_bias};
  const bool hold = dx != nullptr && add_input != 0;
  mmk::cuda::AdapterTiles tiles = {};
  if (const int error = mmk::cuda::adapter_tiles(shape_of(sizes), hold, &tiles)) return error;
  return mmk::cuda::adapter_backward(dtype_of(sizes), args, tiles, nullptr);
}

// norm_product's step between library products, with the scale of adapter.
int adapter_gradient(const int64_t* sizes, double scale, const void* grad, const void* hidden,
                     const void* stats, const void* folded_bias, void* scaled_grad, void* pull,
                     void* partial_bias) {
  const mmk::AdapterShape shape = shape_of(sizes);
  const mmk::NormProductGradient args = {{shape.rows, 1, shape.width, shape.bottleneck},
                                         activation_of(sizes),
                                         grad,
                                         hidden,
                                         stats,
                                         folded_bias,
                                         scaled_grad,
                                         pull,
                                         partial_bias,
                                         scale};
  return mmk::cuda::norm_product_gradient(dtype_of(sizes), args, nullptr);
}

// chunks: rows of partial_bias
int adapter_unfold(const int64_t* sizes, int64_t chunks, const void* partial_bias, const void* weight,
                   const void* norm_weight, const void* norm_bias, const void* product, void* d_weight,
                   void* d_bias, void* d_norm_weight, void* d_norm_bias, void* row_sums) {
  const mmk::AdapterShape shape = shape_of(sizes);
  const mmk::NormProductUnfold args = {{shape.rows, 1, shape.width, shape.bottleneck},
                                       chunks,
                                       partial_bias,
                                       weight,
                                       norm_weight,
                                       norm_bias,
                                       d_weight,
                                       d_bias,
                                       d_norm_weight,
                                       d_norm_bias,
                                       product,
                                       row_sums,
                                       parameter_type_of(sizes)};
  return mmk::cuda::norm_product_unfold(args, nullptr);
}

int adapter_activate(const int64_t* sizes, double scale, const void* hidden, void* activated) {
  const mmk::cuda::AdapterActivate args = {shape_of(sizes), activation_of(sizes), scale, hidden, activated};
  return mmk::cuda::adapter_activate(dtype_of(sizes), args, nullptr);
}

int adapter_finish(const int64_t* sizes, double scale, const void* product, const void* bias,
                   const void* addend, int64_t addend_stride, const void* x, int64_t x_stride,
                   const void* stats, const void* pull, int64_t out_type, void* out) {
  const mmk::cuda::AdapterFinish args = {shape_of(sizes),
                                         scale,
                                         product,
                                         bias,
                                         {addend, addend_stride},
                                         {x, x_stride},
                                         stats,
                                         pull,
                                         static_cast<mmk::DType>(out_type),
                                         out};
  return mmk::cuda::adapter_finish(dtype_of(sizes), args, nullptr);
}

int adapter_column_sums(const int64_t* sizes, const void* grad, int64_t grad_stride, void* partial) {
  const mmk::cuda::AdapterColumnSums args = {shape_of(sizes), {grad, grad_stride}, partial};
  return mmk::cuda::adapter_column_sums(dtype_of(sizes), args, nullptr);
}

int adapter_up_bias(const int64_t* sizes, int64_t chunks, double scale, const void* partial,
                    void* d_up_bias) {
  const mmk::cuda::AdapterUpBias args = {shape_of(sizes).width,   chunks, scale, partial, d_up_bias,
                                         parameter_type_of(sizes)};
  return mmk::cuda::adapter_up_bias(args, nullptr);
}

}  // extern "C"
