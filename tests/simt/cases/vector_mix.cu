// out = sum of weights[l] * layers[l], layers read in place with 16-byte loads, four of them in flight.
#include "cuda/common/launch.cuh"
#include "cuda/common/vector.cuh"

namespace {

constexpr int kMaxLayers = 8;
constexpr int kInFlight = 4;

struct Layers {
  const void* pointer[kMaxLayers];
};

template <class T>
__global__ void __launch_bounds__(128)
    vector_mix(const __grid_constant__ Layers layers, const float* __restrict__ weights, T* __restrict__ out,
               int count, int64_t size) {
  constexpr int kWidth = mmk::kVectorWidth<T>;
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  if (offset >= size) return;
  mmk::Vec<float, kWidth> sum = {};
  for (int first = 0; first < count; first += kInFlight) {
    mmk::Vec<T, kWidth> values[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) {
        values[i] = mmk::load_streaming<kWidth>(static_cast<const T*>(layers.pointer[first + i]) + offset);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) {
        const auto wide = mmk::to_accumulator(values[i]);
        const float weight = __ldg(weights + first + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] = fmaf(weight, wide[j], sum[j]);
      }
    }
  }
  mmk::store_streaming(out + offset, mmk::from_accumulator<T>(sum));
}

}  // namespace

// `layers` is [count, size], size a multiple of 8.
extern "C" int vector_mix_bfloat16(const __nv_bfloat16* layers, const float* weights, __nv_bfloat16* out,
                                   int64_t count, int64_t size) {
  Layers pointers = {};
  for (int64_t i = 0; i < count; ++i) pointers.pointer[i] = layers + i * size;
  const int64_t blocks = mmk::ceil_div<int64_t>(size, 128 * mmk::kVectorWidth<__nv_bfloat16>);
  return mmk::launch(vector_mix<__nv_bfloat16>, dim3(blocks), dim3(128), 0, nullptr, pointers, weights, out,
                     static_cast<int>(count), size);
}
