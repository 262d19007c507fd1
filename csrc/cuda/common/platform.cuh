// The CUDA headers for nvcc, or their emulation for g++ with MMK_SIMT (tests/simt/README.md).
#pragma once

#ifdef MMK_SIMT
#include "simt/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

#define MMK_DEVICE __device__ __forceinline__
#define MMK_HOST_DEVICE __host__ __device__ __forceinline__

namespace mmk {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

namespace detail {
template <class T, size_t... Extents>
struct Array;
template <class T>
struct Array<T> {
  using Type = T;
};
template <class T, size_t Extent, size_t... Inner>
struct Array<T, Extent, Inner...> {
  using Type = typename Array<T, Inner...>::Type[Extent];
};
}  // namespace detail

// array_t<float, 32, 33> is float[32][33].
template <class T, size_t... Extents>
using array_t = typename detail::Array<T, Extents...>::Type;

}  // namespace mmk

// Shared memory of a block. MMK_SHARED(float, tile, 32, 33) declares `float tile[32][33]`;
// MMK_DYNAMIC_SMEM(float, buffer) declares `float* buffer`, the start of the dynamic shared memory.
// Both are 128-byte aligned. A type whose name holds a comma needs a `using` first.
#ifdef MMK_SIMT
#define MMK_SHARED(type, name, ...)                                                           \
  static const char name##_shared_site = 0;                                                   \
  ::mmk::array_t<type, __VA_ARGS__>& name = *static_cast<::mmk::array_t<type, __VA_ARGS__>*>( \
      ::mmk::simt::static_shared(&name##_shared_site, #name, sizeof(::mmk::array_t<type, __VA_ARGS__>)))
#define MMK_DYNAMIC_SMEM(type, name) type* const name = static_cast<type*>(::mmk::simt::dynamic_shared())
#else
#define MMK_SHARED(type, name, ...) __shared__ __align__(128)::mmk::array_t<type, __VA_ARGS__> name
#define MMK_DYNAMIC_SMEM(type, name)                                 \
  extern __shared__ __align__(128) unsigned char mmk_dynamic_smem[]; \
  type* const name = reinterpret_cast<type*>(mmk_dynamic_smem)
#endif
