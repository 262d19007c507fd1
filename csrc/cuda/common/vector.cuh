// Vectors of elements with accesses of up to 16 bytes, and conversion to and from accumulators.
#pragma once

#include <type_traits>

#include "cuda/common/platform.cuh"
#include "cuda/common/ptx.cuh"

namespace mmk {

// Statistics and sums are float, or double for double.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
MMK_DEVICE accumulator_t<T> to_accumulator(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

// Rounds to nearest even.
template <class T>
MMK_DEVICE T from_accumulator(accumulator_t<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// Elements of one 16-byte access.
template <class T>
inline constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

template <class T, int Width>
struct alignas(Width * sizeof(T) < 16 ? Width * sizeof(T) : 16) Vec {
  static_assert((Width & (Width - 1)) == 0, "the width is a power of two");
  T data[Width];

  MMK_HOST_DEVICE T& operator[](int index) { return data[index]; }
  MMK_HOST_DEVICE const T& operator[](int index) const { return data[index]; }
};

// Whether rows at `data`, apart by any of the strides, consist of whole vectors of kWidth elements of type T.
template <class T, int kWidth = kVectorWidth<T>, class... Strides>
MMK_HOST_DEVICE bool rows_aligned(const void* data, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % (kWidth * sizeof(T)) == 0 && ((strides % kWidth == 0) && ...);
}

namespace detail {

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using Type = uint8_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// The widest access for a vector, and the number of accesses that a vector takes.
template <class T, int Width>
struct Access {
  static constexpr int kBytes = Width * static_cast<int>(sizeof(T));
  static constexpr int kWordBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kCount = kBytes / kWordBytes;
  using Word = typename detail::Word<kWordBytes>::Type;

  MMK_DEVICE static const Word* words(const T* pointer) {
#ifdef MMK_SIMT
    for (int i = 0; i < kBytes; i += kWordBytes) {
      simt::aligned_access(reinterpret_cast<const char*>(pointer) + i, kWordBytes);
    }
#endif
    return reinterpret_cast<const Word*>(pointer);
  }
  MMK_DEVICE static Word* words(T* pointer) {
    return const_cast<Word*>(words(const_cast<const T*>(pointer)));
  }
};

}  // namespace detail

// Loads Width elements from global or shared memory, from an address aligned to min(16, Width * sizeof(T)).
template <int Width, class T>
MMK_DEVICE Vec<T, Width> load(const T* pointer) {
  using Access = detail::Access<T, Width>;
  Vec<T, Width> value;
  const auto* source = Access::words(pointer);
  auto* target = reinterpret_cast<typename Access::Word*>(&value);
#pragma unroll
  for (int i = 0; i < Access::kCount; ++i) target[i] = source[i];
  return value;
}

namespace detail {

// As load, with load_16 for words of 16 bytes.
template <int Width, class T, class Load>
MMK_DEVICE Vec<T, Width> load_words(const T* pointer, Load load_16) {
  using Access = detail::Access<T, Width>;
  if constexpr (Access::kWordBytes < 16) {
    return load<Width>(pointer);
  } else {
    Vec<T, Width> value;
    const auto* source = Access::words(pointer);
    auto* target = reinterpret_cast<uint4*>(&value);
#pragma unroll
    for (int i = 0; i < Access::kCount; ++i) target[i] = load_16(source + i);
    return value;
  }
}

}  // namespace detail

template <int Width, class T>
MMK_DEVICE void store(T* pointer, const Vec<T, Width>& value) {
  using Access = detail::Access<T, Width>;
  auto* target = Access::words(pointer);
  const auto* source = reinterpret_cast<const typename Access::Word*>(&value);
#pragma unroll
  for (int i = 0; i < Access::kCount; ++i) target[i] = source[i];
}

// As load, bypassing L1, for global memory that the grid reads once and no thread writes during the kernel.
// Accesses of less than 16 bytes are ordinary loads.
template <int Width, class T>
MMK_DEVICE Vec<T, Width> load_streaming(const T* pointer) {
  return detail::load_words<Width>(pointer, [](const uint4* word) { return load_streaming_16(word); });
}

// The same for memory that the thread itself overwrites afterwards.
template <int Width, class T>
MMK_DEVICE Vec<T, Width> load_once(const T* pointer) {
  return detail::load_words<Width>(pointer, [](const uint4* word) { return load_once_16(word); });
}

// As store, for global memory that the grid does not read again.
template <int Width, class T>
MMK_DEVICE void store_streaming(T* pointer, const Vec<T, Width>& value) {
  using Access = detail::Access<T, Width>;
  if constexpr (Access::kWordBytes < 16) {
    store(pointer, value);
  } else {
    auto* target = Access::words(pointer);
    const auto* source = reinterpret_cast<const uint4*>(&value);
#pragma unroll
    for (int i = 0; i < Access::kCount; ++i) store_streaming_16(target + i, source[i]);
  }
}

template <class T, int Width>
MMK_DEVICE Vec<accumulator_t<T>, Width> to_accumulator(const Vec<T, Width>& value) {
  Vec<accumulator_t<T>, Width> result;
#pragma unroll
  for (int i = 0; i < Width; ++i) result[i] = to_accumulator(value[i]);
  return result;
}

// As to_accumulator, with one instruction for each bfloat16, the upper half of a float, instead of taking
// pairs apart.
template <class T, int Width>
MMK_DEVICE Vec<accumulator_t<T>, Width> unpack(const Vec<T, Width>& value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && Width % 2 == 0) {
    Vec<accumulator_t<T>, Width> result;
    const auto* pairs = reinterpret_cast<const uint32_t*>(&value);
#pragma unroll
    for (int i = 0; i < Width; i += 2) {
      result[i] = __uint_as_float(pairs[i / 2] << 16);
      result[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
    return result;
  } else {
    return to_accumulator(value);
  }
}

// Converts pairs, for which the hardware has an instruction.
template <class T, int Width>
MMK_DEVICE Vec<T, Width> from_accumulator(const Vec<accumulator_t<T>, Width>& value) {
  Vec<T, Width> result;
  if constexpr (std::is_same_v<T, __half> && Width % 2 == 0) {
#pragma unroll
    for (int i = 0; i < Width; i += 2) {
      const __half2 pair = __floats2half2_rn(value[i], value[i + 1]);
      result[i] = __low2half(pair);
      result[i + 1] = __high2half(pair);
    }
  } else if constexpr (std::is_same_v<T, __nv_bfloat16> && Width % 2 == 0) {
#pragma unroll
    for (int i = 0; i < Width; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(value[i], value[i + 1]);
      result[i] = __low2bfloat16(pair);
      result[i + 1] = __high2bfloat16(pair);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) result[i] = from_accumulator<T>(value[i]);
  }
  return result;
}

}  // namespace mmk
