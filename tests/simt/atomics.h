// Atomics and memory intrinsics. Threads are fibers of one OS thread, so plain accesses are already atomic.
#pragma once

#include <type_traits>

#include "simt/runtime.h"

namespace mmk::simt {

template <class T, class Update>
T exchange(T* address, Update update) {
  begin_atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  end_atomic();
  return old;
}

}  // namespace mmk::simt

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return mmk::simt::exchange(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return mmk::simt::exchange(address, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of floating types");
  return mmk::simt::exchange(address, [&](T old) { return old > value ? old : value; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of floating types");
  return mmk::simt::exchange(address, [&](T old) { return old < value ? old : value; });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return mmk::simt::exchange(address, [&](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return mmk::simt::exchange(address, [&](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return mmk::simt::exchange(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA compares integers");
  return mmk::simt::exchange(address, [&](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return mmk::simt::exchange(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline void __threadfence_block() {}
inline void __threadfence() {
  mmk::simt::threadfence();
}
inline void __threadfence_system() {
  mmk::simt::threadfence();
}
