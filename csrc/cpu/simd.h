// 32-byte vectors through the compiler's vector extension, which splits wider ones badly where they are not
// native. Functions marked MMK_MULTIARCH are compiled once per instruction set (SSE2, AVX2 + FMA, AVX-512);
// the loader chooses one. Everything they call must be inlined into them.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "mmkernels/dtype.h"

#define MMK_INLINE inline __attribute__((always_inline))
#define MMK_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(MMKERNELS_NO_MULTIARCH)
#define MMK_MULTIARCH __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MMK_MULTIARCH
#endif

namespace mmk::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Accumulation type of an element type.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(32)));
};
template <class A>
using vec_t = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = 32 / static_cast<int64_t>(sizeof(A));

MMK_INLINE float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MMK_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

MMK_INLINE float convert(float value) {
  return value;
}
MMK_INLINE double convert(double value) {
  return value;
}
MMK_INLINE float convert(BFloat16 value) {
  return to_float(static_cast<uint32_t>(value.bits) << 16);
}
MMK_INLINE float convert(Half value) {
  // Shift exponent and mantissa up by 13 bits; a product corrects the bias, also of subnormal numbers.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const float scaled = to_float(magnitude << 13) * 0x1p112f;
  const uint32_t finite = to_bits(scaled);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return to_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <class T>
MMK_INLINE T round_to(acc_t<T> value);
template <>
MMK_INLINE float round_to<float>(float value) {
  return value;
}
template <>
MMK_INLINE double round_to<double>(double value) {
  return value;
}
template <>
MMK_INLINE BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest_even)};
}
template <>
MMK_INLINE Half round_to<Half>(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 makes the hardware round at the last half-precision bit.
  const uint32_t subnormal = to_bits(to_float(magnitude) + 0.5f) - to_bits(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
}

// kLanes consecutive elements, from any address.
template <class T>
MMK_INLINE vec_t<acc_t<T>> load(const T* p) {
  vec_t<acc_t<T>> v;
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    std::memcpy(&v, p, 32);
  } else {
    acc_t<T> wide[kLanes<acc_t<T>>];
    for (int64_t i = 0; i < kLanes<acc_t<T>>; ++i) wide[i] = convert(p[i]);
    std::memcpy(&v, wide, 32);
  }
  return v;
}

template <class T>
MMK_INLINE void store(T* p, vec_t<acc_t<T>> v) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    std::memcpy(p, &v, 32);
  } else {
    acc_t<T> wide[kLanes<acc_t<T>>];
    std::memcpy(wide, &v, 32);
    for (int64_t i = 0; i < kLanes<acc_t<T>>; ++i) p[i] = round_to<T>(wide[i]);
  }
}

template <class A>
MMK_INLINE A sum_lanes(vec_t<A> v) {
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// As store, bypassing the caches, to a 16-byte aligned address: lines that are not cached are then not read
// before they are written. Call finish_streaming after the last one.
template <class T>
MMK_INLINE void store_streaming(T* p, vec_t<acc_t<T>> v) {
#ifdef __SSE2__
  alignas(16) T rounded[kLanes<acc_t<T>>];
  store(rounded, v);
  constexpr int64_t kBytes = kLanes<acc_t<T>> * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < kBytes / 16; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, reinterpret_cast<const __m128i*>(rounded)[i]);
  }
#else
  store(p, v);
#endif
}

// As memcpy, bypassing the caches if `to` is 16-byte aligned.
MMK_INLINE void copy_streaming(void* to, const void* from, int64_t bytes) {
  int64_t done = 0;
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (; done + 16 <= bytes; done += 16) {
      const __m128i word =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + done));
      _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + done), word);
    }
  }
#endif
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done,
              static_cast<size_t>(bytes - done));
}

MMK_INLINE void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// The DType of an element type.
template <class T>
constexpr DType type_of = DType::kFloat32;
template <>
inline constexpr DType type_of<double> = DType::kFloat64;
template <>
inline constexpr DType type_of<Half> = DType::kFloat16;
template <>
inline constexpr DType type_of<BFloat16> = DType::kBFloat16;

// Calls body(T{}) with the element type that dtype names.
template <class Body>
MMK_INLINE void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(Half{});
    case DType::kBFloat16:
      return body(BFloat16{});
  }
}

// Calls body(A{}) with the accumulation type of dtype.
template <class Body>
MMK_INLINE auto dispatch_wide(DType dtype, Body&& body) {
  if (dtype == DType::kFloat64) return body(double{});
  return body(float{});
}

// Element `offset` of untyped memory; null stays null.
template <class A>
MMK_INLINE const A* at(const void* data, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<const A*>(data) + offset;
}

template <class A>
MMK_INLINE A* at(void* data, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<A*>(data) + offset;
}

}  // namespace mmk::cpu
